"""`sparse-24-bitmask` of compressed-tensors 0.9 to 0.14: two values of each aligned four in a row, a bit per weight.

    compressed  [rows, columns/2], the weight's dtype  the kept values in row-major order
    bitmask     uint8 [rows, ceil(columns/8)]          lowest bit first, exactly two bits in every four
    shape       int64 [2, 1]                           rows, columns

Where a four has fewer than two non-zeros, zeros fill up: which of them is free, here the first.
"""

import numpy as np
import torch

from efx_plugin.checkpoint.codec import bits
from efx_plugin.checkpoint.formats import validate
from efx_plugin.checkpoint.formats.protocol import Layout, Parts
from efx_plugin.errors import EfxError


class Sparse24Bitmask:
    """At most two non-zeros in each aligned four of a row; see `protocol.Format` for the methods."""

    name = "sparse-24-bitmask"
    structure = "2:4"

    def fits(self, mask: np.ndarray, columns: int) -> bool:
        return bits.is_24(mask, columns)

    def layout(self, rows: int, columns: int, nonzeros: int, dtype: torch.dtype) -> Layout:
        return {
            "compressed": (dtype, (rows, columns // 2)),
            "bitmask": (torch.uint8, (rows, bits.mask_width(columns))),
            "shape": (torch.int64, (2, 1)),
        }

    def compress(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed = bits.pack_24(weight)
        if packed is None:
            raise EfxError(f"a weight {list(weight.shape)} is not 2:4 sparse: store it as sparse-bitmask")
        mask, values = packed
        return {
            "compressed": values,
            "bitmask": torch.from_numpy(mask),
            "shape": torch.tensor(weight.shape, device="cpu").reshape(2, 1),
        }

    def dense_layout(self, parts: Parts, where: str) -> tuple[torch.dtype, tuple[int, int]]:
        return validate.dense_layout(parts, self.layout, where)

    def check(self, parts: Parts, where: str) -> None:
        dtype, (rows, columns) = self.dense_layout(parts, where)
        if columns % 4:
            raise validate.corrupt(
                where, "shape", f"declares {columns} columns, which 2:4 sparsity cannot divide into fours"
            )
        validate.check_shapes(parts, self.layout(rows, columns, 0, dtype), where)
        mask = parts["bitmask"].numpy()
        validate.check_padding(mask, columns, where)
        wrong = bits.first_not_two_of_four(mask, columns)
        if wrong is not None:
            row, byte = wrong
            columns_of_byte = f"columns {8 * byte} to {min(8 * byte + 7, columns - 1)}"
            raise validate.corrupt(
                where, "bitmask", f"does not keep two weights of every four in row {row}, {columns_of_byte}"
            )

    def decompress(self, parts: Parts) -> torch.Tensor:
        return bits.unpack(parts["compressed"], parts["bitmask"].numpy(), int(parts["shape"][1]))
