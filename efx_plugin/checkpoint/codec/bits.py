"""Bit masks over the rows of a weight, and moving values in and out under them.

A mask is uint8 [rows, ceil(columns / 8)], one bit per weight, lowest bit first: column c of a row is bit c % 8 of byte
c // 8, as `numpy.packbits(..., bitorder="little")` packs it. Weights are handled as integers of their own width, so
that every bit of a value survives and dtypes that torch has no arithmetic for work like the others.

The work is done by `native`, or by `numpy_codec` where that was not compiled.
"""

import logging
import threading
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from efx_plugin.checkpoint.codec import native, numpy_codec
from efx_plugin.checkpoint.codec.protocol import Codec
from efx_plugin.errors import EfxError

logger = logging.getLogger(__name__)


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


_choosing = threading.Lock()


def codec() -> Codec:
    """`native` if it was compiled, else `numpy_codec` with the same results; a warning says once that it is slow."""
    with _choosing:  # else several threads that come first would each warn
        return _choose()


@cache
def _choose() -> Codec:
    if native.library() is not None:
        return native
    logger.warning(
        "efx-plugin was installed without a C++ compiler, so sparse weights are packed and unpacked several times "
        "slower; install g++ and run `pip install --force-reinstall --no-deps efx-plugin`."
    )
    return numpy_codec


def as_integers(weight: torch.Tensor) -> np.ndarray:
    """View a CPU tensor of one of the dtypes in `BITS` as integers, without copying if it is contiguous.

    Raises:
        EfxError: the dtype cannot be stored sparsely.
    """
    if weight.dtype not in BITS:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in BITS)
        raise EfxError(f"weights of {weight.dtype} cannot be stored sparsely: convert the model to one of {dtypes}")
    return weight.detach().contiguous().view(BITS[weight.dtype].integer).numpy()


def nonzero_mask(weight: torch.Tensor) -> np.ndarray:
    """The mask of a weight [rows, columns]: a set bit for everything but 0.0 and -0.0 (NaN included)."""
    return codec().nonzero_mask(as_integers(weight), BITS[weight.dtype].magnitude)


def pack(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """The mask of a weight [rows, columns], the set bits per row (int64 [rows]), and the values under the mask, row
    after row ([number of set bits], the weight's dtype).
    """
    mask, counts, packed = codec().pack(as_integers(weight), BITS[weight.dtype].magnitude)
    return mask, counts, torch.from_numpy(packed).view(weight.dtype)


def pack_24(weight: torch.Tensor) -> tuple[np.ndarray, torch.Tensor] | None:
    """A mask with two bits in each aligned four of a row, and the values under it, [rows, columns / 2]; None if the
    weight [rows, columns] is not 2:4 sparse.

    Where a four has fewer than two non-zeros, its first zeros are kept too, as 0.0.
    """
    result = codec().pack_24(as_integers(weight), BITS[weight.dtype].magnitude)
    if result is None:
        return None
    mask, packed = result
    return mask, torch.from_numpy(packed).view(weight.dtype).reshape(len(mask), weight.shape[1] // 2)


def unpack(values: torch.Tensor, mask: np.ndarray, columns: int) -> torch.Tensor:
    """The inverse of `pack` and `pack_24`: a weight [rows, columns], the values at the set bits and 0.0 elsewhere.

    The caller has checked that there are as many values as set bits and that no bit lies beyond the last column.
    """
    return torch.from_numpy(codec().unpack(as_integers(values).reshape(-1), mask, columns)).view(values.dtype)


def mask_width(columns: int) -> int:
    """Bytes of mask per row."""
    return (columns + 7) // 8


def row_counts(mask: np.ndarray) -> np.ndarray:
    """Set bits per row: int64 [rows]."""
    return codec().row_counts(mask)


def is_24(mask: np.ndarray, columns: int) -> bool:
    """Whether a mask has at most two bits in each aligned four of a row, and rows of whole fours."""
    return columns % 4 == 0 and codec().fours(mask, columns) > 0


def first_not_two_of_four(mask: np.ndarray, columns: int) -> tuple[int, int] | None:
    """Row and byte of the first aligned four that has not exactly two bits, None if there is none; columns % 4 is 0."""
    if codec().fours(mask, columns) == 2:
        return None
    row, byte = np.argwhere(~numpy_codec.has_two_of_four(mask, columns))[0]
    return int(row), int(byte)
