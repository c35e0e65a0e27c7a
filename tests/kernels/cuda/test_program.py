"""CUDA C++ becomes machine code without a GPU, and is compiled once for all processes of a user."""

import logging
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from efx_plugin.kernels.cuda import program
from efx_plugin.kernels.cuda.program import architecture, cache_folder, cached_cubin, compile_cubin, missing

SOURCE = 'extern "C" __global__ void fill(int* to) { to[threadIdx.x] = VALUE; }'
RECIPE = {"source": SOURCE, "name": "fill.cu", "defines": {"VALUE": 1}, "arch": "sm_80"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def compilations(monkeypatch) -> list[dict]:
    """What has been compiled."""
    made = []

    def compile_and_count(*recipe):
        made.append(recipe)
        return compile_cubin(*recipe)

    monkeypatch.setattr(program, "compile_cubin", compile_and_count)
    return made


def entries() -> list:
    return list(cache_folder().iterdir())


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_architecture_is_compiled_for_without_a_gpu(arch):
    cubin = compile_cubin(**RECIPE | {"arch": arch})
    assert cubin.startswith(b"\x7fELF") and b"fill" in cubin


def test_what_does_not_compile_says_where_and_how():
    with pytest.raises(
        RuntimeError, match=r"fill.cu does not compile with .*sm_80.*-DVALUE=1.*\n.*fill.cu\(1\): error"
    ):
        compile_cubin(**RECIPE | {"source": SOURCE.replace("int*", "nothing*")})


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((12, 0), "sm_120"), ((7, 0), None), ((99, 0), None)],
)
def test_the_architecture_is_one_that_the_device_runs(capability, expected):
    assert architecture(capability) == expected


def test_a_minor_version_that_nvrtc_does_not_know_yet_runs_code_for_an_earlier_one():
    assert architecture((8, 99)) == "sm_89"


def test_it_is_compiled_once(compilations):
    first = cached_cubin(**RECIPE)
    assert cached_cubin(**RECIPE) == first == compile_cubin(**RECIPE)
    assert len(compilations) == len(entries()) == 1


@pytest.mark.parametrize(
    "change", [{"source": SOURCE + " "}, {"defines": {"VALUE": 2}}, {"arch": "sm_90"}, {"name": "other.cu"}]
)
def test_another_program_is_another_entry(compilations, change):
    cached_cubin(**RECIPE)
    assert cached_cubin(**RECIPE | change) == compile_cubin(**RECIPE | change)
    assert len(compilations) == len(entries()) == 2


def test_another_nvrtc_compiles_anew(compilations, monkeypatch):
    cached_cubin(**RECIPE)
    monkeypatch.setattr(program, "nvrtc_version", lambda: (99, 0))
    cached_cubin(**RECIPE)
    assert len(compilations) == len(entries()) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda code: b"",
        lambda code: code[:10],
        lambda code: code[:-1],
        lambda code: code + b"x",
        lambda code: code[::-1],
    ],
)
def test_a_damaged_entry_is_compiled_anew_and_mended(compilations, damage):
    first = cached_cubin(**RECIPE)
    (entry,) = entries()
    stored = entry.read_bytes()
    entry.write_bytes(damage(stored))
    assert cached_cubin(**RECIPE) == first
    assert entry.read_bytes() == stored
    assert len(compilations) == 2


def test_several_processes_fill_the_cache_at_once():
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        made = [pool.submit(cached_cubin, **RECIPE | {"defines": {"VALUE": value % 2}}) for value in range(16)]
        codes = {future.result() for future in made}
    assert len(codes) == len(entries()) == 2


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch, caplog):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with caplog.at_level(logging.WARNING):
        assert cached_cubin(**RECIPE) == compile_cubin(**RECIPE)
    assert "compiles the GPU kernels anew in each process" in caplog.text


@pytest.mark.parametrize("chosen", ["", "relative/folder"])
def test_a_cache_home_that_is_no_absolute_path_is_ignored(monkeypatch, tmp_path, chosen):
    monkeypatch.setenv("XDG_CACHE_HOME", chosen)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "efx-plugin" / "kernels"


def test_nothing_is_missing_here():
    assert missing() is None


@pytest.mark.parametrize(
    ("cuda", "packages"),
    [
        ("13.0", "pip install 'cuda-bindings==13.*' 'nvidia-cuda-nvrtc==13.*'"),
        ("12.8", "pip install 'cuda-bindings==12.*' 'nvidia-cuda-nvrtc-cu12'"),
    ],
)
@pytest.mark.parametrize("error", [ImportError("no cuda.bindings"), RuntimeError("no libnvrtc")])
def test_what_is_missing_is_named_for_the_cuda_of_torch(monkeypatch, cuda, packages, error):
    def fails():
        raise error

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(program, "nvrtc_version", fails)
    assert packages in missing.__wrapped__()


def test_without_cuda_bindings_the_import_works_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "NVRTC, which compiles the GPU kernels, cannot be loaded" in missing.__wrapped__()
