"""Whatever the tensors of a weight claim, the answer is the weight or one sentence."""

import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.checkpoint import decompress, find_format, format_names
from efx_plugin.checkpoint.formats import registry
from efx_plugin.errors import SparseCheckpointError

BITMASK, BITMASK24 = "sparse-bitmask", "sparse-24-bitmask"
WHERE = "model.safetensors: model.layers.0.mlp.up_proj"
NAMES = [(form.name, part) for form in registry.FORMATS for part in registry.part_dtypes(form, torch.float32)]


def make_parts(name: str, rows: int = 6, columns: int = 20) -> dict[str, torch.Tensor]:
    weight = torch.arange(1, rows * columns + 1, dtype=torch.float32).reshape(rows, columns)
    weight.view(rows, -1, 4)[:, :, ::2] = 0
    return find_format(name).compress(weight)


def refuse(name: str, parts: dict[str, torch.Tensor], tensor: str) -> None:
    """Decompression ends in one sentence that names the file and the tensor."""
    with pytest.raises(SparseCheckpointError) as caught:
        decompress(name, parts, where=WHERE)
    assert str(caught.value).startswith(f"{WHERE}.{tensor} ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", format_names())
def test_parts_as_written_are_accepted(name):
    assert decompress(name, make_parts(name), where=WHERE).shape == (6, 20)


@pytest.mark.parametrize(("name", "part"), NAMES)
def test_a_part_is_missing(name, part):
    parts = make_parts(name)
    del parts[part]
    refuse(name, parts, part)


def test_parts_of_the_other_format():
    refuse(BITMASK24, make_parts(BITMASK), "row_offsets")
    refuse(BITMASK, make_parts(BITMASK24), "row_offsets")
    refuse(BITMASK, make_parts(BITMASK24) | {"row_offsets": make_parts(BITMASK)["row_offsets"]}, "shape")


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, part in NAMES if part != "compressed"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bfloat16, torch.bool, torch.uint64])
def test_a_part_of_the_wrong_dtype(name, part, dtype):
    refuse(name, make_parts(name) | {part: make_parts(name)[part].to(dtype)}, part)


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.uint8])
def test_values_of_a_dtype_that_no_weight_has(name, dtype):
    refuse(name, make_parts(name) | {"compressed": make_parts(name)["compressed"].to(dtype)}, "compressed")


@given(st.data(), st.sampled_from(format_names()))
def test_any_flipped_bit_of_a_mask(data, name):
    """One bit more or less cannot be right, padding included: 20 columns leave four bits of the third byte unused."""
    parts = make_parts(name)
    row, byte, bit = (data.draw(st.integers(0, end)) for end in (5, 2, 7))
    parts["bitmask"][row, byte] ^= 1 << bit
    with pytest.raises(SparseCheckpointError, match=WHERE):
        decompress(name, parts, where=WHERE)


@given(st.data())
def test_a_bit_that_moved_to_another_row(data):
    """The number of bits still fits the number of values; only the row offsets tell."""
    parts = make_parts(BITMASK)
    source, target = data.draw(st.permutations(range(6)))[:2]
    parts["bitmask"][source, 0] ^= 0b10  # column 1 holds a value, column 0 does not
    parts["bitmask"][target, 0] ^= 0b01
    refuse(BITMASK, parts, "row_offsets")


@given(st.integers(0, 5), st.integers(-(2**63), 2**63 - 1))
def test_an_offset_that_lies(row, offset):
    parts = make_parts(BITMASK)
    if parts["row_offsets"][row] != offset:
        parts["row_offsets"][row] = offset
        refuse(BITMASK, parts, "row_offsets")


@given(st.integers(1, 30), st.booleans())
def test_values_cut_off_or_left_over(count, is_cut):
    parts = make_parts(BITMASK)
    values = parts["compressed"]
    parts["compressed"] = values[:-count] if is_cut else torch.cat([values, values[:count]])
    refuse(BITMASK, parts, "compressed")


@pytest.mark.parametrize(("name", "part"), NAMES)
def test_a_part_with_another_number_of_dimensions(name, part):
    for reshaped in (make_parts(name)[part][None], make_parts(name)[part].flatten()[0]):
        with pytest.raises(SparseCheckpointError, match=WHERE):
            decompress(name, make_parts(name) | {part: reshaped}, where=WHERE)


EXTENTS = st.one_of(
    st.integers(-3, 40), st.sampled_from([-(2**63), -(2**32), 2**31, 2**32 + 6, 2**40, 2**62, 2**63 - 1])
)


@given(EXTENTS, EXTENTS, st.sampled_from(format_names()))
def test_a_shape_that_lies_costs_no_memory(rows, columns, name):
    parts = make_parts(name)
    if rows == 6 and 20 <= columns <= 24 and name == BITMASK:
        return  # nothing in the weight itself contradicts a few more columns of zeros: only the model does
    if [rows, columns] == [6, 20]:
        return
    parts["shape"] = torch.tensor([rows, columns]).reshape(parts["shape"].shape)
    tracemalloc.start()
    try:
        with pytest.raises(SparseCheckpointError, match=WHERE):
            decompress(name, parts, where=WHERE)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_columns_that_are_no_fours():
    parts = make_parts(BITMASK24)
    parts["shape"][1, 0] = 18
    refuse(BITMASK24, parts, "shape")


def test_a_four_that_keeps_three_and_one_that_keeps_one():
    """As many bits as values, but not two in every four."""
    parts = make_parts(BITMASK24)
    parts["bitmask"][3, 1] = 0b0001_1011
    with pytest.raises(
        SparseCheckpointError, match=r"bitmask does not keep two weights of every four in row 3, columns 8 to 15"
    ):
        decompress(BITMASK24, parts, where=WHERE)


def test_a_last_four_that_keeps_one():
    """20 columns: the last byte holds one four, and the bits of another that must stay clear."""
    parts = make_parts(BITMASK24)
    parts["bitmask"][0, 2] = 0b0000_0100
    with pytest.raises(SparseCheckpointError, match=r"in row 0, columns 16 to 19"):
        decompress(BITMASK24, parts, where=WHERE)
