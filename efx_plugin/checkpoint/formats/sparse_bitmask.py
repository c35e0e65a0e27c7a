"""`sparse-bitmask` of compressed-tensors 0.8 to 0.14: the non-zeros of a weight, row after row, and a bit per weight.

compressed   [nnz], the weight's dtype      the non-zeros in row-major order
bitmask      uint8 [rows, ceil(columns/8)]  lowest bit first
row_offsets  int64 [rows]                   where each row begins in `compressed`
shape        int64 [2]                      rows, columns
"""

import numpy as np
import torch

from efx_plugin.checkpoint.codec import bits
from efx_plugin.checkpoint.formats import validate

NAME = "sparse-bitmask"
STRUCTURE = "unstructured"


def layout(rows: int, columns: int, nonzeros: int, dtype: torch.dtype) -> validate.Layout:
    """The tensors of a weight [rows, columns] of that dtype with so many non-zeros: name -> (dtype, shape)."""
    return {
        "compressed": (dtype, (nonzeros,)),
        "bitmask": (torch.uint8, (rows, bits.mask_width(columns))),
        "row_offsets": (torch.int64, (rows,)),
        "shape": (torch.int64, (2,)),
    }


def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compress a weight [rows, columns] on the CPU, of any dtype in `bits.BITS`; -0.0 counts as zero.

    Raises:
        EfxError: the dtype cannot be stored sparsely.
    """
    mask, counts, values = bits.pack(weight)
    return {
        "compressed": values,
        "bitmask": torch.from_numpy(mask),
        "row_offsets": torch.from_numpy(_offsets(counts)),
        "shape": torch.tensor(weight.shape, device="cpu"),
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
    mask = parts["bitmask"].numpy()
    counts = bits.row_counts(mask)
    validate.check_shapes(parts, layout(rows, columns, int(counts.sum()), parts["compressed"].dtype), where)
    validate.check_padding(mask, columns, where)
    wrong = np.flatnonzero(parts["row_offsets"].numpy() != _offsets(counts))
    if len(wrong):
        raise validate.corrupt(
            where, "row_offsets", f"does not begin row {wrong[0]} where the bitmask ends the rows before it"
        )


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts
