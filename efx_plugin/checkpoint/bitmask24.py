"""`sparse-24-bitmask` of compressed-tensors 0.9 to 0.14: two values of each aligned four in a row, a bit per weight.

    compressed  [rows, columns/2], the weight's dtype  the kept values in row-major order
    bitmask     uint8 [rows, ceil(columns/8)]          lowest bit first, exactly two bits in every four
    shape       int64 [2, 1]                           rows, columns

Where a four has fewer than two non-zeros, zeros fill up: which of them is free, here the first.
"""

import numpy as np
import torch

from efx_plugin.checkpoint import bits, validate
from efx_plugin.errors import EfxError

NAME = "sparse-24-bitmask"
STRUCTURE = "2:4"


# For every byte of a mask, which is two fours: the larger number of bits set in one, whether it is two in both, and the
# byte with bits added from the lowest on until it is.
_LOW, _HIGH = np.arange(256) & 15, np.arange(256) >> 4
_COUNTS = np.bitwise_count(np.arange(16))
_FULLEST = np.maximum(_COUNTS[_LOW], _COUNTS[_HIGH])
_IS_TWO_TWICE = (_COUNTS[_LOW] == 2) & (_COUNTS[_HIGH] == 2)


def _fill_up() -> np.ndarray:
    filled = np.arange(16)
    for bit in (1, 2, 4, 8):
        filled = np.where(np.bitwise_count(filled) < 2, filled | bit, filled)
    return (filled[_LOW] | filled[_HIGH] << 4).astype(np.uint8)


_FILLED = _fill_up()


def layout(rows: int, columns: int, nonzeros: int, dtype: torch.dtype) -> validate.Layout:
    """The tensors of a weight [rows, columns] of that dtype: name -> (dtype, shape); `nonzeros` does not matter."""
    return {
        "compressed": (dtype, (rows, columns // 2)),
        "bitmask": (torch.uint8, (rows, bits.mask_width(columns))),
        "shape": (torch.int64, (2, 1)),
    }


def fits(mask: np.ndarray, columns: int) -> bool:
    """Whether a mask (see `bits`) has at most two bits in each aligned four of a row."""
    return columns % 4 == 0 and not (_FULLEST[mask] > 2).any()


def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compress a 2:4 sparse weight [rows, columns] on the CPU, of any dtype in `bits.BITS`; -0.0 counts as zero.

    Raises:
        EfxError: the weight is not 2:4 sparse, so that this format would lose weights, or its dtype is not supported.
    """
    mask = bits.nonzero_mask(weight)
    rows, columns = weight.shape
    if not fits(mask, columns):
        raise EfxError(f"A weight [{rows}, {columns}] is not 2:4 sparse; store it as sparse-bitmask.")
    mask = _FILLED[mask]
    if columns % 8:
        mask[:, -1] &= 0x0F
    values = bits.select(weight, mask)
    integers = bits.as_integers(values)
    integers[(integers & integers.dtype.type(bits.BITS[weight.dtype].magnitude)) == 0] = 0  # a -0.0 that fills up
    return {
        "compressed": values.reshape(rows, columns // 2),
        "bitmask": torch.from_numpy(mask),
        "shape": torch.tensor(weight.shape, device="cpu").reshape(2, 1),
    }


def decompress(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [rows, columns] of parts that `check` has accepted."""
    return bits.scatter(parts["compressed"].flatten(), parts["bitmask"].numpy(), int(parts["shape"][1]))


def check(parts: dict[str, torch.Tensor], where: str) -> None:
    """Check CPU tensors before any of their numbers is used as a size or an offset.

    Raises:
        SparseCheckpointError: naming the tensor (`where` and its name) and what is wrong with it.
    """
    rows, columns = validate.dense_shape(parts, layout, where)
    if columns % 4:
        raise validate.corrupt(
            where, "shape", f"declares {columns} columns, which 2:4 sparsity cannot divide into fours"
        )
    validate.check_shapes(parts, layout(rows, columns, 0, parts["compressed"].dtype), where)
    mask = parts["bitmask"].numpy()
    validate.check_padding(mask, columns, where)
    if columns % 8:
        mask = mask.copy()
        mask[:, -1] |= 0x30  # the four that is not there
    wrong = np.argwhere(~_IS_TWO_TWICE[mask])
    if len(wrong):
        row, byte = wrong[0]
        columns_of_byte = f"columns {8 * byte} to {min(8 * byte + 7, columns - 1)}"
        raise validate.corrupt(
            where, "bitmask", f"does not keep two weights of every four in row {row}, {columns_of_byte}"
        )
