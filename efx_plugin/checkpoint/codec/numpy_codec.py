"""The codec in numpy, for installations without a C++ compiler; its results are those of `native`.

Weights are arrays of signed integers [rows, columns]. `magnitude` is an integer with the bits that are clear in a zero.
Masks are uint8 [rows, ceil(columns / 8)], see `bits`.
"""

from collections.abc import Iterator

import numpy as np

# Weights per pass: the mask, the indices and the values of one block stay in the cache of a core.
_BLOCK = 1 << 18

# A byte of a mask holds two fours: the low half and the high half of its bits. These tables have an entry per byte.
_LOW, _HIGH = np.arange(256) & 15, np.arange(256) >> 4
_COUNTS = np.bitwise_count(np.arange(16))
_FULLER_HALF = np.maximum(_COUNTS[_LOW], _COUNTS[_HIGH])  # bits set in the half that has more
_TWO_IN_BOTH = (_COUNTS[_LOW] == 2) & (_COUNTS[_HIGH] == 2)


def _fill_up() -> np.ndarray:
    """Each byte with its lowest clear bits set until both halves have two."""
    filled = np.arange(16)
    for bit in (1, 2, 4, 8):
        filled = np.where(np.bitwise_count(filled) < 2, filled | bit, filled)
    table: np.ndarray = (filled[_LOW] | filled[_HIGH] << 4).astype(np.uint8)
    return table


_FILLED = _fill_up()


def nonzero_mask(values: np.ndarray, magnitude: int) -> np.ndarray:
    """The mask of the weights that have one of the bits of `magnitude`."""
    rows, columns = values.shape
    bits = values.dtype.type(magnitude)
    mask = np.empty((rows, (columns + 7) // 8), np.uint8)
    for block in _row_blocks(rows, columns):
        mask[block] = np.packbits((values[block] & bits) != 0, axis=-1, bitorder="little")
    return mask


def pack(values: np.ndarray, magnitude: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mask, the number of bits in each row (int64), and the values under it, row after row [number of bits]."""
    mask = nonzero_mask(values, magnitude)
    counts = row_counts(mask)
    return mask, counts, _select(values, mask, int(counts.sum()))


def pack_24(values: np.ndarray, magnitude: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A mask with two bits in every aligned four, and the values under it, [rows * columns / 2]; None if the weight is
    not 2:4 sparse.

    Where a four has fewer than two non-zeros, its first zeros are kept too, as 0.
    """
    rows, columns = values.shape
    if columns % 4:
        return None
    mask = nonzero_mask(values, magnitude)
    if fours(mask, columns) == 0:
        return None
    mask = _FILLED[mask]
    if columns % 8:
        mask[:, -1] &= 0x0F
    packed = _select(values, mask, rows * columns // 2)
    packed[(packed & packed.dtype.type(magnitude)) == 0] = 0  # a -0.0 that was kept
    return mask, packed


def unpack(packed: np.ndarray, mask: np.ndarray, columns: int) -> np.ndarray:
    """The weight [rows, columns] with the values at the set bits and 0 elsewhere.

    The caller has checked that there are as many values as set bits and that no bit lies beyond the last column.
    """
    values = np.zeros((len(mask), columns), packed.dtype)
    done = 0
    for block in _row_blocks(len(mask), columns):
        where = _positions(mask[block], columns)
        values[block].reshape(-1)[where] = packed[done : done + len(where)]
        done += len(where)
    return values


def row_counts(mask: np.ndarray) -> np.ndarray:
    """Set bits per row: int64 [rows]."""
    counts: np.ndarray = np.bitwise_count(mask).sum(axis=-1, dtype=np.int64)
    return counts


def fours(mask: np.ndarray, columns: int) -> int:
    """2 if every aligned four of a row has exactly two bits set, 1 if none has more, else 0; columns % 4 is 0."""
    if (_FULLER_HALF[mask] > 2).any():
        return 0
    return 2 if has_two_of_four(mask, columns).all() else 1


def has_two_of_four(mask: np.ndarray, columns: int) -> np.ndarray:
    """Whether the fours in each byte of a mask have exactly two bits set: bool, as large as the mask; columns % 4 is 0.

    The last byte of a row may hold one four only; then its other half does not count.
    """
    if columns % 8:
        mask = mask.copy()
        mask[:, -1] |= 0x30
    fits: np.ndarray = _TWO_IN_BOTH[mask]
    return fits


def _select(values: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    selected = np.empty(count, values.dtype)
    done = 0
    for block in _row_blocks(*values.shape):
        where = _positions(mask[block], values.shape[1])
        # "clip" only because numpy then writes straight into `out`; no position is out of range.
        values[block].reshape(-1).take(where, out=selected[done : done + len(where)], mode="clip")
        done += len(where)
    return selected


def _positions(mask: np.ndarray, columns: int) -> np.ndarray:
    """Where the bits of some rows are set, counted through the rows: int64 [number of set bits]."""
    return np.flatnonzero(np.unpackbits(mask, axis=-1, count=columns, bitorder="little").view(bool))


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, start + step)
