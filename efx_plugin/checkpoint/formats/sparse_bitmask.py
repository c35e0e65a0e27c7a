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
from efx_plugin.checkpoint.formats.protocol import Layout, Parts


class SparseBitmask:
    """Zeros anywhere; see `protocol.Format` for the methods."""

    name = "sparse-bitmask"
    structure = "unstructured"

    def fits(self, mask: np.ndarray, columns: int) -> bool:
        return True

    def layout(self, rows: int, columns: int, nonzeros: int, dtype: torch.dtype) -> Layout:
        return {
            "compressed": (dtype, (nonzeros,)),
            "bitmask": (torch.uint8, (rows, bits.mask_width(columns))),
            "row_offsets": (torch.int64, (rows,)),
            "shape": (torch.int64, (2,)),
        }

    def compress(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        mask, counts, values = bits.pack(weight)
        return {
            "compressed": values,
            "bitmask": torch.from_numpy(mask),
            "row_offsets": torch.from_numpy(_offsets(counts)),
            "shape": torch.tensor(weight.shape, device="cpu"),
        }

    def dense_layout(self, parts: Parts, where: str) -> tuple[torch.dtype, tuple[int, int]]:
        return validate.dense_layout(parts, self.layout, where)

    def check(self, parts: Parts, where: str) -> None:
        dtype, (rows, columns) = self.dense_layout(parts, where)
        mask = parts["bitmask"].numpy()
        counts = bits.row_counts(mask)
        validate.check_shapes(parts, self.layout(rows, columns, int(counts.sum()), dtype), where)
        validate.check_padding(mask, columns, where)
        wrong = np.flatnonzero(parts["row_offsets"].numpy() != _offsets(counts))
        if len(wrong):
            raise validate.corrupt(
                where, "row_offsets", f"does not begin row {wrong[0]} where the bitmask ends the rows before it"
            )

    def decompress(self, parts: Parts) -> torch.Tensor:
        return bits.unpack(parts["compressed"], parts["bitmask"].numpy(), int(parts["shape"][1]))


def _offsets(counts: np.ndarray) -> np.ndarray:
    offsets: np.ndarray = np.cumsum(counts) - counts
    return offsets
