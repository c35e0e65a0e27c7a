"""What a sparse format is. A new format is a class with these members in a new file, and a line in `registry`."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

# The tensors that a weight is stored as, by the last part of their name.
Parts = Mapping[str, torch.Tensor]

# Dtype and shape of tensors, by name.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

# The part that every format has: int64, whose two numbers are the rows and columns of the weight.
SHAPE = "shape"


class Format(Protocol):
    """How a weight [rows, columns] is stored without its zeros, as a few tensors called parts.

    Parts from a file are untrusted. `dense_layout` and `check` take any tensors, `decompress` takes only what `check`
    has accepted. `where` is what an error calls the weight; the error adds the name of the part.
    """

    @property
    def name(self) -> str:
        """What config.json calls the format: `sparsity_config.format`."""

    @property
    def structure(self) -> str:
        """What config.json calls the pattern of the zeros: `sparsity_config.sparsity_structure`."""

    def fits(self, mask: np.ndarray, columns: int) -> bool:
        """Whether every non-zero of a weight can be stored.

        Args:
            mask: uint8 [rows, ceil(columns / 8)], a bit for every non-zero, see `codec.bits`.
            columns: of the weight.
        """

    def layout(self, rows: int, columns: int, nonzeros: int, dtype: torch.dtype) -> Layout:
        """The parts of a weight [rows, columns] of that dtype with so many non-zeros, in the order of `compress`.

        Names and dtypes of the parts depend on `dtype` alone.
        """

    def compress(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a weight [rows, columns] on the CPU, of a dtype in `codec.bits.BITS`; -0.0 counts as zero.

        Raises:
            EfxError: the weight does not fit the format, or its dtype cannot be stored sparsely.
        """

    def dense_layout(self, parts: Parts, where: str) -> tuple[torch.dtype, tuple[int, int]]:
        """Dtype and [rows, columns] of the weight; of the parts only `shape` is read, the others may be on meta.

        Raises:
            SparseCheckpointError: a part is missing or of the wrong dtype, or the shape disagrees with another part.
        """

    def check(self, parts: Parts, where: str) -> None:
        """Check contiguous CPU tensors, before any number in them is used as a size or an offset.

        Raises:
            SparseCheckpointError: naming the part and what is wrong with it.
        """

    def decompress(self, parts: Parts) -> torch.Tensor:
        """The weight [rows, columns] on the CPU, of parts that `check` has accepted; 0.0 where nothing is stored."""
