"""The compiled kernels under sanitizers and beside pages that cannot be touched; native_replay.cpp makes the calls.

The kernel of AMX has its tiles emulated there, so that every processor with AVX512-BF16 tests it.
"""

import platform
import shutil
import subprocess

import numpy as np
import pytest
import torch

from efx_plugin.kernels import native
from tests.support.native_calls import (
    ALL,
    ARM64,
    HEADER,
    ISAS,
    KINDS,
    PORTABLE,
    ROOT,
    X86,
    assert_right,
    bytes_of,
    compile_replay,
    digest,
    make_call,
    make_weight,
    random_call,
    replay,
    write_calls,
)
from tests.support.products import is_sum

AMX = 0  # its number

pytestmark = pytest.mark.skipif(not ISAS, reason="the kernels are not compiled")
with_bf16 = pytest.mark.skipif("avx512_bf16" not in ISAS, reason="a processor without AVX512-BF16")


@pytest.fixture(scope="module")
def sanitized_program(tmp_path_factory):
    """The program of native_replay.cpp under sanitizers, its tiles emulated: they see no loads and stores of real ones.

    Arrays on the stack are left to the bounds check of UBSan, and of the loops that are unrolled for vectors a few
    checks that plain C++ gets suffice: with all of them, g++ takes minutes for those files.
    """
    compiler = shutil.which("g++")
    if compiler is None or platform.system() != "Linux":
        pytest.skip("needs the sanitizers of g++ on Linux")
    architecture = X86 if "avx2" in ALL else ARM64 if "neon" in ALL else PORTABLE
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param", "asan-stack=0"]
    fewer = ["-fno-sanitize=null,object-size,alignment", "--param", "asan-instrumentation-with-call-threshold=0"]
    tiles = f'-DEFX_EMULATE_TILES="{ROOT / "tests" / "kernels" / "emulated_tiles.hpp"}"'
    return compile_replay(tmp_path_factory.mktemp("replay"), compiler, architecture, [*sanitizers, tiles], fewer)


def call_in_process(call: dict[str, int], arrays: list[torch.Tensor | None]) -> str:
    """What the replaying program prints for the call."""
    library = native.library()
    isa, kind, rows, columns, m = (call[name] for name in ("isa", "kind", "rows", "columns", "m"))
    weight, scales, x, bias = (None if array is None else array.data_ptr() for array in arrays)
    shape = (isa, kind, weight, rows, columns, call["span"])
    size = library.efx_packed_size(*shape, 1)
    buffer = torch.full((size,), 0xA5, dtype=torch.uint8)
    y = torch.full((m * rows * arrays[2].element_size(),), 0xA5, dtype=torch.uint8)
    packed = library.efx_pack(*shape, call["scale_type"], scales, buffer.data_ptr(), size, 1)
    if call["field"] >= 0:
        buffer[: 8 * len(HEADER)].view(torch.int64)[call["field"]] = call["value"]
    product = library.efx_linear(isa, buffer.data_ptr(), size, x, call["type"], m, columns, bias, y.data_ptr(), rows, 1)
    return f"{size} {packed} {product} {digest(bytes_of(buffer) + bytes_of(y))}"


def corrupt(rng: np.random.Generator, call: dict[str, int]) -> dict[str, int]:
    """The call, of which one in four finds its packed weight corrupt."""
    if rng.random() >= 0.25:
        return call
    value = int(rng.choice([-(2**63), -1, 0, 1, 2**31, 2**32 + 6, 2**61, 2**62, 2**63 - 1]))
    return call | {"field": int(rng.integers(len(HEADER))), "value": value}


def test_no_call_makes_the_sanitizers_report(sanitized_program, tmp_path):
    """Nor do tiles that are emulated, see below: but they add in another order."""
    rng = np.random.default_rng(0)
    calls = [random_call(rng, ALL.index(isa)) for isa in ISAS if isa != "amx" for _ in range(100)]
    calls = [(corrupt(rng, call), arrays) for call, arrays in calls]
    write_calls(tmp_path / "calls", calls)
    replayed = subprocess.run([sanitized_program, tmp_path / "calls"], capture_output=True, text=True)
    assert (replayed.returncode, replayed.stderr) == (0, "")
    found = replayed.stdout.splitlines()
    assert found == [call_in_process(*call) for call in calls]
    refusals = [line.split()[2] for line in found].count("-1")
    assert len(calls) / 10 < refusals < len(calls) / 2


@with_bf16
def test_tiles_give_the_rounding_of_a_sum_in_float32(sanitized_program):
    rng = np.random.default_rng(0)
    calls = [random_call(rng, AMX) for _ in range(200)]
    assert_right(calls, *replay([sanitized_program], sanitized_program.parent, calls))


@with_bf16
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [4099, 8340])  # more than are expanded at a time; as seeds: groups of 128 and of 32
def test_tiles_give_a_row_the_same_bits_in_any_batch(sanitized_program, kind, columns):
    weight, scales = make_weight(kind, 35, columns, seed=columns)
    x = torch.randn(130, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes = [130, 65, 33, 17, 16, 4, 3, 1]
    calls = [make_call(AMX, kind, weight, scales, x[-m:], None) for m in sizes]
    _, products = replay([sanitized_program], sanitized_program.parent, calls)
    assert is_sum(products[0], kind, weight, scales, x, None)
    for m, y in zip(sizes, products, strict=True):
        assert torch.equal(y, products[0][-m:]), m
