"""The table of variants covers every number of tokens, and what it says fits the devices."""

import itertools

import pytest
import torch

from efx_plugin.kernels.cuda import variants
from efx_plugin.kernels.cuda.variants import DTYPES, MOST_TOKENS_DECODED

SHARED_BYTES_OF_SM_86 = 99 << 10  # per block; of the architectures from 8.0 on, 8.6, 8.9 and 12.0 have the least


every_kind = pytest.mark.parametrize(("dtype", "is_int8"), [*itertools.product(DTYPES, (False, True))])


@every_kind
def test_the_smallest_variant_that_takes_the_tokens_is_chosen(dtype, is_int8):
    all_variants = variants.decode_variants(dtype, is_int8)
    for tokens in range(1, MOST_TOKENS_DECODED + 1):
        variant = variants.decode_variant(dtype, tokens, is_int8)
        smaller = [other.tokens for other in all_variants if other.tokens < variant.tokens]
        assert max(smaller, default=0) < tokens <= variant.tokens


@every_kind
def test_a_block_fits_every_device(dtype, is_int8):
    for variant in (*variants.decode_variants(dtype, is_int8), variants.expand_variant(dtype, is_int8)):
        launch = variants.launch(variant, 4096, 14336)
        assert launch.shared_bytes <= SHARED_BYTES_OF_SM_86 and launch.block <= 1024


def test_the_grid_covers_ragged_sizes():
    decode, expand = variants.decode_variant(torch.bfloat16, 64), variants.expand_variant(torch.bfloat16)
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
