"""Bit masks over the rows of a weight, and moving values in and out under them.

A mask is uint8 [rows, ceil(columns / 8)], one bit per weight, lowest bit first: column c of a row is bit c % 8 of byte
c // 8, as `numpy.packbits(..., bitorder="little")` packs it. Weights are handled as integers of their own width, so
that every bit of a value survives and dtypes that torch has no arithmetic for work like the others.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from efx_plugin.errors import EfxError


class Bits(NamedTuple):
    """How a dtype is seen as integers: `integer` of the same width, and the bits that are clear in a zero."""

    integer: torch.dtype
    magnitude: int  # for floats all but the sign: -0.0 is a zero


BITS = {
    torch.bfloat16: Bits(torch.int16, 0x7FFF),
    torch.float16: Bits(torch.int16, 0x7FFF),
    torch.float32: Bits(torch.int32, 0x7FFFFFFF),
    torch.float8_e4m3fn: Bits(torch.int8, 0x7F),
    torch.int8: Bits(torch.int8, -1),
}

# Weights per pass: the mask, the indices and the values of one block stay in the cache of a core.
_BLOCK = 1 << 18


def as_integers(weight: torch.Tensor) -> np.ndarray:
    """View a CPU tensor of one of the dtypes in `BITS` as integers, without copying if it is contiguous.

    Raises:
        EfxError: the dtype cannot be stored sparsely.
    """
    if weight.dtype not in BITS:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in BITS)
        raise EfxError(f"Weights of {weight.dtype} cannot be stored sparsely; convert the model to one of {dtypes}.")
    return weight.detach().contiguous().view(BITS[weight.dtype].integer).numpy()


def nonzero_mask(weight: torch.Tensor) -> np.ndarray:
    """The mask of a weight [rows, columns]: a set bit for everything but 0.0 and -0.0 (NaN included)."""
    values = as_integers(weight)
    magnitude = values.dtype.type(BITS[weight.dtype].magnitude)
    rows, columns = values.shape
    mask = np.empty((rows, mask_width(columns)), np.uint8)
    for block in _row_blocks(rows, columns):
        mask[block] = np.packbits((values[block] & magnitude) != 0, axis=-1, bitorder="little")
    return mask


def select(weight: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """The values under the mask, row after row: [number of set bits], the weight's dtype."""
    values = as_integers(weight)
    selected = np.empty(row_counts(mask).sum(), values.dtype)
    done = 0
    for block in _row_blocks(*values.shape):
        where = _positions(mask[block], values.shape[1])
        # "clip" only because numpy then writes straight into `out`; no position is out of range.
        values[block].reshape(-1).take(where, out=selected[done : done + len(where)], mode="clip")
        done += len(where)
    return torch.from_numpy(selected).view(weight.dtype)


def scatter(values: torch.Tensor, mask: np.ndarray, columns: int) -> torch.Tensor:
    """The mirror image of `select`: a weight [rows, columns] with the values at the set bits and 0.0 elsewhere.

    The caller has checked that there are as many values as set bits and that no bit lies beyond the last column.
    """
    source = as_integers(values)
    weight = np.zeros((len(mask), columns), source.dtype)
    done = 0
    for block in _row_blocks(len(mask), columns):
        where = _positions(mask[block], columns)
        weight[block].reshape(-1)[where] = source[done : done + len(where)]
        done += len(where)
    return torch.from_numpy(weight).view(values.dtype)


def mask_width(columns: int) -> int:
    """Bytes of mask per row."""
    return (columns + 7) // 8


def row_counts(mask: np.ndarray) -> np.ndarray:
    """Set bits per row: int64 [rows]."""
    return np.bitwise_count(mask).sum(axis=-1, dtype=np.int64)


def _positions(mask: np.ndarray, columns: int) -> np.ndarray:
    """Where the bits of some rows are set, counted through the rows: int64 [number of set bits]."""
    return np.flatnonzero(np.unpackbits(mask, axis=-1, count=columns, bitorder="little").view(bool))


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, start + step)
