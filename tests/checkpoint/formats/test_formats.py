"""What is written is what is read, bit for bit, and it lies in the file as the format says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.checkpoint import decompress, find_format, format_names
from efx_plugin.checkpoint.codec.bits import BITS
from efx_plugin.checkpoint.formats import registry
from efx_plugin.errors import EfxError, SparseCheckpointError

BITMASK, BITMASK24 = "sparse-bitmask", "sparse-24-bitmask"


@st.composite
def weights(draw, two_of_four=False):
    """Weights of any bit pattern (NaN payloads, infinities, subnormals, -0.0), with empty and full rows among them."""
    dtype = draw(st.sampled_from(list(BITS)))
    rows = draw(st.integers(1, 9))
    columns = draw(st.integers(1, 12)) * 4 if two_of_four else draw(st.integers(1, 45))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    raw = rng.integers(0, 256, (rows, columns * dtype.itemsize), dtype=np.uint8)
    weight = torch.from_numpy(raw).view(dtype)
    density = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=rows, max_size=rows))
    keep = torch.from_numpy(rng.random((rows, columns)) < np.array(density)[:, None])
    if two_of_four:
        first_two = torch.from_numpy(rng.random((rows, columns // 4, 4)).argsort(-1).argsort(-1) < 2)
        keep &= first_two.reshape(rows, columns)
    weight.view(BITS[dtype].integer)[~keep] = 0
    if dtype != torch.int8 and draw(st.booleans()):
        weight.view(BITS[dtype].integer)[~keep] = torch.iinfo(BITS[dtype].integer).min  # -0.0
    return weight


def bits_of(weight: torch.Tensor) -> list[list[int]]:
    return weight.view(BITS[weight.dtype].integer).tolist()


def without_negative_zeros(weight: torch.Tensor) -> list[list[int]]:
    negative_zero = None if weight.dtype == torch.int8 else torch.iinfo(BITS[weight.dtype].integer).min
    return [[0 if value == negative_zero else value for value in row] for row in bits_of(weight)]


@given(weights())
def test_bitmask_round_trip_is_bit_exact_but_for_negative_zeros(weight):
    restored = decompress(BITMASK, find_format(BITMASK).compress(weight), where="w")
    assert restored.dtype == weight.dtype
    assert bits_of(restored) == without_negative_zeros(weight)


@given(weights(two_of_four=True))
def test_24_round_trip_is_bit_exact_but_for_negative_zeros(weight):
    restored = decompress(BITMASK24, find_format(BITMASK24).compress(weight), where="w")
    assert restored.dtype == weight.dtype
    assert bits_of(restored) == without_negative_zeros(weight)


@given(weights())
def test_bitmask_layout_against_a_double_loop(weight):
    parts = find_format(BITMASK).compress(weight)
    rows, columns = weight.shape
    values, offsets = [], []
    mask = [[0] * ((columns + 7) // 8) for _ in range(rows)]
    for row, line in enumerate(without_negative_zeros(weight)):
        offsets.append(len(values))
        for column, value in enumerate(line):
            if value != 0:
                values.append(value)
                mask[row][column // 8] |= 1 << column % 8
    assert parts["compressed"].dtype == weight.dtype
    assert bits_of(parts["compressed"]) == values
    assert parts["bitmask"].dtype == torch.uint8
    assert parts["bitmask"].tolist() == mask
    assert parts["row_offsets"].dtype == parts["shape"].dtype == torch.int64
    assert parts["row_offsets"].tolist() == offsets
    assert parts["shape"].tolist() == [rows, columns]


@given(weights(two_of_four=True))
def test_24_layout_against_a_double_loop(weight):
    parts = find_format(BITMASK24).compress(weight)
    rows, columns = weight.shape
    assert parts["shape"].dtype == torch.int64
    assert parts["shape"].tolist() == [[rows], [columns]]
    assert parts["bitmask"].dtype == torch.uint8
    assert list(parts["bitmask"].shape) == [rows, (columns + 7) // 8]
    assert list(parts["compressed"].shape) == [rows, columns // 2]
    expected = without_negative_zeros(weight)
    stored = bits_of(parts["compressed"])
    for row in range(rows):
        kept = [column for column in range(columns) if parts["bitmask"][row, column // 8] >> column % 8 & 1]
        for four in range(columns // 4):
            assert sum(column // 4 == four for column in kept) == 2
        assert all(column in kept for column in range(columns) if expected[row][column] != 0)
        assert stored[row] == [expected[row][column] for column in kept]


@given(weights())
def test_the_layout_is_known_from_the_number_of_zeros_alone(weight):
    """Which is what lets a shard's header be written before its tensors."""
    parts = find_format(BITMASK).compress(weight)
    layout = find_format(BITMASK).layout(*weight.shape, len(parts["compressed"]), weight.dtype)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout


def test_a_weight_larger_than_a_block_and_a_row_longer_than_one():
    for rows, columns in ((3000, 130), (2, 300_001)):
        weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)
        assert torch.equal(decompress(BITMASK, find_format(BITMASK).compress(weight), where="w"), weight)


def test_weights_that_are_views_are_stored_as_they_read():
    weight = (torch.randn(20, 30) * (torch.rand(20, 30) < 0.5))[::2, 3:19].T
    assert torch.equal(decompress(BITMASK, find_format(BITMASK).compress(weight), where="w"), weight)


def test_half_of_bfloat16_takes_nine_sixteenths():
    weight = torch.ones(64, 4096, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    sizes = {
        form.name: sum(part.nbytes for part in form.compress(weight).values()) / weight.nbytes
        for form in registry.FORMATS
    }
    assert sizes[BITMASK] == pytest.approx(0.5625, abs=0.002)
    assert sizes[BITMASK24] == pytest.approx(0.5625, abs=0.0002)


def test_24_refuses_to_lose_weights():
    weight = torch.zeros(2, 8)
    weight[1, 4:7] = 1
    with pytest.raises(EfxError, match="not 2:4 sparse"):
        find_format(BITMASK24).compress(weight)
    with pytest.raises(EfxError, match="not 2:4 sparse"):
        find_format(BITMASK24).compress(torch.zeros(2, 6))


@pytest.mark.parametrize("form", registry.FORMATS, ids=format_names())
def test_a_dtype_without_a_layout_is_refused(form):
    with pytest.raises(EfxError, match=r"torch\.float64 cannot be stored sparsely"):
        form.compress(torch.zeros(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", format_names())
def test_the_default_device_does_not_matter(name):
    """transformers and vLLM load under one: meta, or a GPU."""
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 3, 0, 0]])
    with torch.device("meta"):
        restored = decompress(name, find_format(name).compress(weight), where="w")
    assert torch.equal(restored, weight)


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_vectors_of_old_releases_are_read(size, seed):
    """Without targets they compressed vectors too: a shape [1], a flat mask and a scalar offset."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) < 0.5)
    parts = find_format(BITMASK).compress(vector[None])
    old = {
        "compressed": parts["compressed"],
        "bitmask": parts["bitmask"][0],
        "row_offsets": torch.tensor(0),
        "shape": torch.tensor([size]),
    }
    assert torch.equal(decompress(BITMASK, old, where="norm"), vector)
    with pytest.raises(SparseCheckpointError, match=r"norm\.row_offsets"):
        decompress(BITMASK, old | {"row_offsets": torch.tensor(1)}, where="norm")


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(
        SparseCheckpointError, match="layer asks for the format 'marlin-24': the formats are sparse-24-bit"
    ):
        decompress("marlin-24", {}, where="layer")
