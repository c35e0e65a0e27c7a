"""The table of variants covers every number of tokens, and what it says fits the devices."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from efx_plugin.kernels.cuda import variants
from efx_plugin.kernels.cuda.variants import DTYPES, MOST_TOKENS_DECODED

every_kind = pytest.mark.parametrize(("dtype", "is_int8"), [*itertools.product(DTYPES, (False, True))])


@every_kind
@pytest.mark.parametrize("most", [16, 64])
def test_the_smallest_variant_that_takes_the_tokens_is_chosen(dtype, is_int8, most):
    all_variants = variants.decode_variants(dtype, is_int8, most=most)
    assert all_variants[-1].tokens == most
    for tokens in range(1, most + 1):
        variant = variants.decode_variant(all_variants, tokens, 4096, 132)
        smaller = [other.tokens for other in all_variants if other.tokens < variant.tokens]
        assert max(smaller, default=0) < tokens <= variant.tokens


@dataclass
class Device:
    multi_processor_count: int
    shared_memory_per_multiprocessor: int


DEVICES = {
    "A100": Device(108, 164 << 10),
    "RTX 4090": Device(128, 100 << 10),
    "L4": Device(58, 100 << 10),
    "H100": Device(132, 228 << 10),
}


@every_kind
@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
@pytest.mark.parametrize("most", [16, 64])
@pytest.mark.parametrize("rows", [1, 1000, 2048, 4096, 6144, 14336, 100_000])
def test_a_block_fits_the_device(dtype, is_int8, device, most, rows):
    warps = variants.decode_warps(rows, 1 if is_int8 else 2, most, device)
    for variant in (
        *variants.decode_variants(dtype, is_int8, warps, most),
        variants.expand_variant(dtype, is_int8),
    ):
        launch = variants.launch(variant, rows, 14336)
        assert launch.shared_bytes + 1024 <= device.shared_memory_per_multiprocessor and launch.block <= 1024


# Measured on an H100 with 1 to 16 tokens, half of the weights zero: the fastest, or one within 5 % of it.
FASTEST = {2048: (16, 1), 4096: (16, 2), 6144: (8, 1), 8192: (8, 2), 16384: (4, 2), 28672: (4, 2)}


@pytest.mark.parametrize("rows", FASTEST)
def test_warps_and_rows_of_a_block_are_those_that_were_fastest(rows):
    warps = variants.decode_warps(rows, 2, 16, DEVICES["H100"])
    fit = variants.decode_variants(torch.bfloat16, False, warps, 16)
    for tokens in (1, 16):
        assert (warps, variants.decode_variant(fit, tokens, rows, 132).row_blocks) == FASTEST[rows]


def test_the_grid_covers_ragged_sizes():
    decode, expand = variants.decode_variants(torch.bfloat16)[-1], variants.expand_variant(torch.bfloat16)
    assert variants.launch(decode, 33, 64).grid * decode.row_blocks * 16 >= 33
    assert variants.launch(expand, 33, 72).grid * variants.launch(expand, 33, 72).block // 32 >= 3 * 2


@pytest.mark.parametrize("columns", [8, 4096, 14336, 1 << 24])
def test_a_panel_is_whole_blocks_of_rows_of_bounded_size(columns):
    rows = variants.panel_rows(columns)
    assert rows % 16 == 0 and (rows == 16 or rows * columns * 2 <= variants.PANEL_BYTES)


def test_crossovers_rise_and_the_first_is_within_what_decode_takes():
    for one in (*variants.MEASURED.values(), *variants.RECKONED.values()):
        assert 1 <= one.decode <= MOST_TOKENS_DECODED and one.decode <= one.gemm


def test_a_device_has_its_own_crossovers_or_those_of_the_one_before(monkeypatch):
    measured = variants.Crossovers(8, 100)
    monkeypatch.setitem(variants.MEASURED, (8, 9), measured)
    assert variants.crossovers((8, 9)) == measured
    assert variants.crossovers((8, 7)) == variants.RECKONED[8, 6]
    assert all(variants.crossovers(one) == variants.RECKONED[one] for one in variants.RECKONED)
    assert variants.crossovers((99, 0)) == variants.RECKONED[max(variants.RECKONED)]
