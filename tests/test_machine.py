import pytest
import torch

from efx_plugin import machine
from efx_plugin.machine import (
    cpu_multiplies_in,
    cpu_name,
    free_memory,
    time_over_float32,
    why_emulated,
)


@pytest.fixture
def with_bfloat16(monkeypatch):
    """A processor of x86 with AVX512-BF16, whatever this one is."""
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    "allowed, found",
    [
        ("AVX512_CORE_VNNI", False),
        ("avx512_core", False),
        ("AVX2", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("DEFAULT", True),
    ],
)
def test_instructions_that_onednn_may_not_use_are_not_there(with_bfloat16, monkeypatch, variable, allowed, found):
    assert cpu_multiplies_in(torch.bfloat16)
    monkeypatch.setenv(variable, allowed)
    assert cpu_multiplies_in(torch.bfloat16) is found
    assert cpu_multiplies_in(torch.float32)


def test_a_processor_without_them(with_bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not cpu_multiplies_in(torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu_multiplies_in(torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_missing_is_laid_at_the_door_of_the_processor_or_of_the_variable(with_bfloat16, monkeypatch, dtype):
    lacks = f"{cpu_name()} has no instructions for {dtype}"
    assert why_emulated(getattr(torch, dtype)) == lacks
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "all")
    assert why_emulated(getattr(torch, dtype)) == lacks
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert why_emulated(getattr(torch, dtype)).endswith(f"for {dtype} with ONEDNN_MAX_CPU_ISA=AVX2")


def test_free_memory_and_times_are_those_of_a_machine():
    assert 2**20 < free_memory() < 2**50
    assert 0 < time_over_float32(torch.bfloat16) < 1e4
