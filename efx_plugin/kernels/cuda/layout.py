"""How the CUDA kernels store a sparse weight: one record per tile of 16 rows x 64 columns.

A record is what one warp expands into the A operands of four `mma.m16n8k16`. It consists of

- 32 words of mask, one per lane: bit 8s + 4h + 2r + e of lane 4g + t says whether the weight of row g + 8r and column
  16t + 4s + 2h + e is stored. In the fragments of the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating point
  type") that is half e of register 2h + r of the s-th mma. The columns are permuted, so that the activations which a
  lane needs for the four mma are 16 adjacent ones;
- 8 uint16, one per step of four bits, or for values of one byte 4, one per step of eight: where the non-zeros of the
  step begin, in bytes from the record's begin;
- the non-zeros by step, lane and bit, so that the lanes of a warp read adjacent ones, padded with zeros to 16 bytes; of
  one byte with the sign flipped, that is, int8 plus 128.

Bitmap tiles in the shape of tensor-core fragments are an idea of SpInfer (Fan et al., EuroSys 2025).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_with_zeros

TILE_ROWS, TILE_COLUMNS = 16, 64
TILE = TILE_ROWS * TILE_COLUMNS
LANES, BITS = 32, 32
UNIT = 16  # bytes; records begin at its multiples
MASK_BYTES = LANES * BITS // 8

# Weights that are packed or unpacked at a time; each takes about 30 bytes of temporary memory.
CHUNK = 1 << 22

_INTEGERS = {1: torch.int8, 2: torch.int16}  # by their bytes
_FLIPPED = {1: -128, 2: 0}  # bits of a stored value


def tiles_of(rows: int, columns: int) -> tuple[int, int]:
    """How many tiles a weight [rows, columns] is high and wide."""
    return -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)


def steps_of(size: int) -> int:
    """How many steps records of values of `size` bytes have."""
    return 4 * size


def head_bytes(size: int) -> int:
    """The bytes of a record in front of its values of `size` bytes."""
    return MASK_BYTES + 2 * steps_of(size)


def slot_bytes(size: int) -> int:
    """The bytes of the longest record of values of `size` bytes."""
    return int(-(-(head_bytes(size) + size * TILE) // UNIT) * UNIT)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight [rows, columns] of a dtype of one or two bytes, on its device and in bounded temporary memory.

    Zeros of either sign are not stored.

    Returns:
        starts: int32 [tiles + 1], where each record begins, in units of 16 bytes; the tiles of a block of rows follow
            each other. The last is where the last record ends.
        records: uint8 [units, 16].
    """
    rows, columns = weight.shape
    high, wide = tiles_of(rows, columns)
    starts = torch.zeros(high * wide + 1, dtype=torch.int32, device=weight.device)
    for first, last in _chunks(high, wide):
        non_zeros = _tiles(weight, first, last).count_nonzero(1)
        starts[first * wide + 1 : last * wide + 1] = _units(non_zeros, weight.element_size())
    starts.cumsum_(0)
    bounds = [bound for bound, _ in _chunks(high, wide)] + [high]
    begins = dict(zip(bounds, starts[torch.tensor(bounds, device=starts.device) * wide].tolist(), strict=True))
    records = torch.empty(begins[high], UNIT, dtype=torch.uint8, device=weight.device)
    for first, last in _chunks(high, wide):
        begin, end = begins[first], begins[last]
        at = starts[first * wide : last * wide] - begin
        _write(records[begin:end], at, _tiles(weight, first, last))
    return starts, records


def unpack(starts: Tensor, records: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] that was packed, of its `dtype`; its zeros are all +0.0."""
    high, wide = tiles_of(rows, columns)
    weight = torch.empty(rows, columns, dtype=dtype, device=records.device)
    for first, last in _chunks(high, wide):
        tiles = _read(records, starts[first * wide : last * wide], dtype.itemsize)
        block = _from_tiles(tiles, last - first, wide).view(dtype)
        top = first * TILE_ROWS
        weight[top : last * TILE_ROWS] = block[: rows - top, :columns]
    return weight


def _chunks(high: int, wide: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of the rows of tiles to treat at a time."""
    step = max(1, CHUNK // (max(1, wide) * TILE))
    return ((first, min(first + step, high)) for first in range(0, high, step))


def _tiles(weight: Tensor, first: int, last: int) -> Tensor:
    """Rows `first` to `last` of tiles as integers [tiles, 1024], by lane and bit, all zeros as 0."""
    chunk = weight[first * TILE_ROWS : last * TILE_ROWS]
    high, wide = tiles_of(*chunk.shape)
    chunk = torch.where(chunk == 0, 0, chunk.contiguous().view(_INTEGERS[weight.element_size()]))
    chunk = pad_with_zeros(chunk, (0, wide * TILE_COLUMNS - chunk.shape[1], 0, high * TILE_ROWS - chunk.shape[0]))
    r, g, t, s, h, e = 1, 2, 4, 5, 6, 7
    return chunk.view(high, 2, 8, wide, 4, 4, 2, 2).permute(0, 3, g, t, s, h, r, e).reshape(-1, TILE)


def _from_tiles(tiles: Tensor, high: int, wide: int) -> Tensor:
    """The inverse of `_tiles`: [16 high, 64 wide]."""
    g, t, s, h, r, e = 2, 3, 4, 5, 6, 7
    blocks = tiles.view(high, wide, 8, 4, 4, 2, 2, 2).permute(0, r, g, 1, t, s, h, e)
    return blocks.reshape(high * TILE_ROWS, wide * TILE_COLUMNS)


def _units(non_zeros: Tensor, size: int) -> Tensor:
    """Units in records of so many non-zeros of `size` bytes."""
    return (head_bytes(size) + UNIT - 1 + size * non_zeros) // UNIT


def _ranks(kept: Tensor, steps: int) -> Tensor:
    """How many of `kept` [tiles, 32 lanes, 32 bits] are stored before each: int32 [tiles, steps, 32 lanes, bits]."""
    by_step = kept.view(-1, LANES, steps, BITS // steps).transpose(1, 2)
    flat = by_step.reshape(-1, TILE)
    return (flat.cumsum(1, dtype=torch.int32) - flat.int()).view(by_step.shape)


def _write(records: Tensor, starts: Tensor, tiles: Tensor) -> None:
    """Fill the records [units, 16] of `tiles` [tiles, 1024], which begin at `starts` [tiles] in units."""
    size = tiles.element_size()
    begins = starts.long()[:, None]
    kept = (tiles != 0).view(-1, LANES, BITS)
    ranks = _ranks(kept, steps_of(size))
    words = (kept.int() << torch.arange(BITS, dtype=torch.int32, device=tiles.device)).sum(-1, dtype=torch.int32)
    steps = head_bytes(size) + size * ranks[:, :, 0, 0]
    records.zero_()
    _place(records.view(torch.int32), begins * (UNIT // 4), words)
    _place(records.view(torch.int16), begins * (UNIT // 2) + MASK_BYTES // 2, steps)
    values = records.view(_INTEGERS[size]).view(-1)
    at = (begins * UNIT + head_bytes(size)) // size + ranks.transpose(1, 2).reshape(-1, TILE)
    values[at[kept.view(-1, TILE)]] = tiles[tiles != 0] ^ _FLIPPED[size]


def _place(integers: Tensor, begins: Tensor, values: Tensor) -> None:
    """Write `values` [tiles, n] one after the other from `begins` [tiles, 1] on."""
    integers.view(-1)[begins + torch.arange(values.shape[1], device=values.device)] = values.to(integers.dtype)


def _read(records: Tensor, starts: Tensor, size: int) -> Tensor:
    """The tiles [tiles, 1024] of the records that begin at `starts`, as integers of `size` bytes."""
    begins = starts.long()[:, None]
    words = records.view(torch.int32).view(-1)[begins * (UNIT // 4) + torch.arange(LANES, device=records.device)]
    kept = (words[:, :, None] >> torch.arange(BITS, dtype=torch.int32, device=records.device)) & 1 == 1
    values = records.view(_INTEGERS[size]).view(-1)
    ranks = _ranks(kept, steps_of(size)).transpose(1, 2).reshape(-1, TILE)
    at = (begins * UNIT + head_bytes(size)) // size + ranks
    kept = kept.view(-1, TILE)
    return torch.where(kept, values[torch.where(kept, at, 0)] ^ _FLIPPED[size], 0)
