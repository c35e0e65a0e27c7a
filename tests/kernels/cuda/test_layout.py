"""Records hold what the layout says, and a weight comes back from them as it was."""

import pytest
import torch

from efx_plugin.kernels.cuda import layout

DTYPES = (torch.bfloat16, torch.float16, torch.int8)
SHAPES = ((1, 1), (16, 64), (17, 65), (40, 72), (100, 1000), (256, 192))


def sparse_weight(rows: int, columns: int, dtype: torch.dtype, density: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator).mul(40)
    return weight.mul(torch.rand(rows, columns, generator=generator) < density).to(dtype)


def read_record(record: bytes, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """The tile [16, 64] in a record, value by value, and how many bytes were used."""
    numbers = torch.frombuffer(bytearray(record), dtype=torch.uint8)
    masks = numbers[:128].view(torch.int32).tolist()
    count, at = (4, 136) if dtype == torch.int8 else (8, 144)
    steps = numbers[128:at].view(torch.int16).tolist()
    tile = torch.zeros(16, 64, dtype=dtype)
    bits = 32 // count
    for step in range(count):
        assert steps[step] == at
        for lane in range(32):
            for bit in range(bits * step, bits * step + bits):
                if masks[lane] >> bit & 1:
                    g, t, s, h, r, e = lane // 4, lane % 4, bit // 8, bit // 4 % 2, bit // 2 % 2, bit % 2
                    value = numbers[at : at + dtype.itemsize]
                    value = value.short().sub(128) if dtype == torch.int8 else value.view(dtype)
                    tile[g + 8 * r, 16 * t + 4 * s + 2 * h + e] = value[0]
                    at += dtype.itemsize
    return tile, at


@pytest.mark.parametrize("dtype", DTYPES)
def test_records_are_as_described(dtype):
    weight = sparse_weight(40, 72, dtype)
    starts, records = layout.pack(weight)
    assert starts.dtype == torch.int32 and records.dtype == torch.uint8 and records.shape == (starts[-1], 16)
    for tile in range(6):
        begin, end = starts[tile : tile + 2].tolist()
        values, used = read_record(bytes(records[begin:end].flatten().tolist()), dtype)
        assert -(-used // 16) == end - begin
        assert not records[begin:end].flatten()[used:].any()
        top, left = tile // 2 * 16, tile % 2 * 64
        expected = torch.zeros(16, 64, dtype=dtype)
        part = weight[top : top + 16, left : left + 64]
        expected[: part.shape[0], : part.shape[1]] = part
        assert torch.equal(values, expected)


@pytest.mark.parametrize("chunk", [1, 1 << 16, layout.CHUNK])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_comes_back_whatever_the_chunks(monkeypatch, shape, dtype, chunk):
    monkeypatch.setattr(layout, "CHUNK", chunk)
    for density in (0.0, 0.5, 1.0):
        weight = sparse_weight(*shape, dtype, density)
        starts, records = layout.pack(weight)
        assert torch.equal(layout.unpack(starts, records, *shape, dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_bit_pattern_comes_back_and_zeros_lose_their_sign(dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(256, 256)
    back = layout.unpack(*layout.pack(patterns.view(dtype)), 256, 256, dtype)
    assert torch.equal(back.view(torch.int16), patterns.where(patterns != -(1 << 15), 0))


def test_every_integer_comes_back():
    integers = torch.arange(-128, 128).to(torch.int8).repeat(16).view(64, 64)
    assert torch.equal(layout.unpack(*layout.pack(integers), 64, 64, torch.int8), integers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_longest_record_is_a_full_one(dtype):
    starts, _ = layout.pack(torch.ones(16, 64, dtype=dtype))
    assert starts[1] * layout.UNIT == layout.slot_bytes(dtype.itemsize)


def test_a_view_is_packed_as_its_copy():
    weight = sparse_weight(64, 96, torch.bfloat16)
    for view in (weight.T, weight[3:40, 5:], weight[::2]):
        copies = layout.pack(view.clone(memory_format=torch.contiguous_format))
        assert all(map(torch.equal, layout.pack(view), copies))


def test_memory_beyond_the_result_is_bounded_by_the_chunk(monkeypatch):
    """Measured by what the operators of a packing allocate."""
    monkeypatch.setattr(layout, "CHUNK", 1 << 16)
    weight = sparse_weight(1024, 1024, torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        starts, records = layout.pack(weight)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert peak - starts.nbytes - records.nbytes < 40 * layout.CHUNK
