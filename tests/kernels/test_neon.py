"""The kernels for aarch64, compiled here and run by an emulator: the sums that they owe, on processors old and new."""

import shutil

import numpy as np
import pytest
import torch

from efx_plugin.kernels import native
from tests.support.native_calls import (
    ARM64,
    DTYPES,
    KINDS,
    assert_right,
    compile_replay,
    make_call,
    make_weight,
    random_call,
    replay,
)
from tests.support.products import is_sum

CXX = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
ISAS = ["neon_bf16", "neon"]  # by their numbers
PROCESSORS = [("max", "neon_bf16"), ("max", "neon"), ("cortex-a53", "neon")]
UNSUPPORTED = -3

pytestmark = pytest.mark.skipif(
    CXX is None or EMULATOR is None,
    reason="no compiler or no emulator for aarch64: apt-get install g++-aarch64-linux-gnu qemu-user",
)
every_processor = pytest.mark.parametrize(("processor", "isa"), PROCESSORS)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_replay(tmp_path_factory.mktemp("neon"), CXX, ARM64, ["-static"])


def replayed(program, processor, calls):
    return replay([EMULATOR, "-cpu", processor, program], program.parent, calls)


@every_processor
def test_is_the_rounding_of_a_sum_in_float32(program, processor, isa):
    """And weights are packed as on this processor."""
    rng = np.random.default_rng(0)
    calls = [random_call(rng, ISAS.index(isa)) for _ in range(300)]
    assert_right(calls, *replayed(program, processor, calls))


@every_processor
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_in_any_batch(program, processor, isa, kind):
    """In rows that are expanded in parts, too."""
    weight, scales = make_weight(kind, 35, 1301, seed=1301)
    xs = [torch.randn(40, 1301, generator=torch.Generator().manual_seed(0)).to(dtype) for dtype in DTYPES]
    sizes = [40, *range(1, 12)]
    calls = [make_call(ISAS.index(isa), kind, weight, scales, x[-m:], None) for x in xs for m in sizes]
    _, products = replayed(program, processor, calls)
    for x, of_dtype in zip(xs, (products[: len(sizes)], products[len(sizes) :]), strict=True):
        assert is_sum(of_dtype[0], kind, weight, scales, x, None)
        assert all(torch.equal(y, of_dtype[0][-len(y) :]) for y in of_dtype)


@every_processor
def test_denormal_weights_are_kept_or_count_as_zeros(program, processor, isa):
    """Instructions for bfloat16 take zeros for them."""
    weight, x = torch.full((16, 4), 2.0**-130).bfloat16(), torch.full((1, 4), 2.0**20).bfloat16()
    _, (y,) = replayed(program, processor, [make_call(ISAS.index(isa), "bf16", weight, None, x, None)])
    assert (y == (0 if isa == "neon_bf16" else 2.0**-108)).all()


def test_a_processor_without_dot_products_refuses_the_kernel_that_needs_them(program):
    weight, _ = make_weight("bf16", 20, 12)
    call = make_call(ISAS.index("neon_bf16"), "bf16", weight, None, torch.ones(1, 12), None)
    (line,), _ = replayed(program, "cortex-a53", [call])
    assert line.startswith(f"{UNSUPPORTED} ")


def test_every_kernel_has_a_summary():
    assert set(ISAS) < set(native.SUMMARIES)
