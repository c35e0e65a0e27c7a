"""`sparse-24-bitmask` of compressed-tensors 0.9 to 0.14: two values of each aligned four in a row, a bit per weight.

    compressed  [rows, columns/2], the weight's dtype  the kept values in row-major order
    bitmask     uint8 [rows, ceil(columns/8)]          lowest bit first, exactly two bits in every four
    shape       int64 [2, 1]                           rows, columns

Where a four has fewer than two non-zeros, zeros fill up: which of them is free, here the first.
"""

import numpy as np
import torch

from efx_plugin.checkpoint.codec import bits, numpy_codec
from efx_plugin.checkpoint.formats import validate
from efx_plugin.errors import EfxError

NAME = "sparse-24-bitmask"
STRUCTURE = "2:4"


def layout(rows: int, columns: int, nonzeros: int, dtype: torch.dtype) -> validate.Layout:
    """The tensors of a weight [rows, columns] of that dtype: name -> (dtype, shape); `nonzeros` does not matter."""
    return {
        "compressed": (dtype, (rows, columns // 2)),
        "bitmask": (torch.uint8, (rows, bits.mask_width(columns))),
        "shape": (torch.int64, (2, 1)),
    }


def fits(mask: np.ndarray, columns: int) -> bool:
    """Whether a mask (see `bits`) has at most two bits in each aligned four of a row."""
    return columns % 4 == 0 and bits.fours(mask, columns) > 0


def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compress a 2:4 sparse weight [rows, columns] on the CPU, of any dtype in `bits.BITS`; -0.0 counts as zero.

    Raises:
        EfxError: the weight is not 2:4 sparse, so that this format would lose weights, or its dtype is not supported.
    """
    packed = bits.pack_24(weight)
    if packed is None:
        raise EfxError(f"A weight {list(weight.shape)} is not 2:4 sparse; store it as sparse-bitmask.")
    mask, values = packed
    return {
        "compressed": values,
        "bitmask": torch.from_numpy(mask),
        "shape": torch.tensor(weight.shape, device="cpu").reshape(2, 1),
    }


def decompress(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [rows, columns] of parts that `check` has accepted."""
    return bits.unpack(parts["compressed"], parts["bitmask"].numpy(), int(parts["shape"][1]))


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
    if bits.fours(mask, columns) != 2:
        row, byte = np.argwhere(~numpy_codec.IS_TWO_TWICE[numpy_codec.whole_bytes(mask, columns)])[0]
        columns_of_byte = f"columns {8 * byte} to {min(8 * byte + 7, columns - 1)}"
        raise validate.corrupt(
            where, "bitmask", f"does not keep two weights of every four in row {row}, {columns_of_byte}"
        )
