"""The kernel of AMX with its tiles emulated, so that every processor with AVX512-BF16 tests it, under sanitizers."""

import numpy as np
import pytest
import torch

from efx_plugin.kernels import native
from tests.support.native_calls import (
    KINDS,
    assert_right,
    is_sum,
    make_call,
    make_weight,
    random_call,
    replay,
)

AMX = 0  # its number

pytestmark = pytest.mark.skipif(
    not any(kernel.name == "avx512_bf16" and kernel.is_supported for kernel in native.KERNELS),
    reason="a processor without AVX512-BF16",
)


def test_is_the_rounding_of_a_sum_in_float32(sanitized_program):
    rng = np.random.default_rng(0)
    calls = [random_call(rng, AMX) for _ in range(200)]
    assert_right(calls, *replay([sanitized_program], sanitized_program.parent, calls))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [4099, 8340])  # more than are expanded at a time; as seeds: groups of 128 and of 32
def test_a_row_is_the_same_bits_in_any_batch(sanitized_program, kind, columns):
    weight, scales = make_weight(kind, 35, columns, seed=columns)
    x = torch.randn(130, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes = [130, 65, 33, 17, 16, 4, 3, 1]
    calls = [make_call(AMX, kind, weight, scales, x[-m:], None) for m in sizes]
    _, products = replay([sanitized_program], sanitized_program.parent, calls)
    assert is_sum(products[0], kind, weight, scales, x, None)
    for m, y in zip(sizes, products, strict=True):
        assert torch.equal(y, products[0][-m:]), m
