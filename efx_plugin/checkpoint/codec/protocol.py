"""What a codec does. `native` and `numpy_codec` are modules with these functions and the same results."""

from typing import Protocol

import numpy as np


class Codec(Protocol):
    """Packing and unpacking of weights, seen as arrays of signed integers [rows, columns] of 1, 2 or 4 bytes.

    A mask is uint8 [rows, ceil(columns / 8)], lowest bit first. `magnitude` is an integer whose set bits are those that
    are clear in a zero.
    """

    def nonzero_mask(self, values: np.ndarray, magnitude: int) -> np.ndarray:
        """The mask of the weights that have one of the bits of `magnitude`."""

    def pack(self, values: np.ndarray, magnitude: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mask, the bits set in each row (int64 [rows]), and the values under them, row after row [bits set]."""

    def pack_24(self, values: np.ndarray, magnitude: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A mask with two bits in every aligned four of a row, and the values under it [rows * columns / 2].

        Where a four has fewer than two non-zeros, its first zeros are kept too, as 0. None if the
        weight is not 2:4 sparse.
        """

    def unpack(self, packed: np.ndarray, mask: np.ndarray, columns: int) -> np.ndarray:
        """The weight [rows, columns] with the values [bits set] at the set bits and 0 elsewhere.

        The caller has checked that there are as many values as set bits and that no bit lies beyond the last column.
        """

    def row_counts(self, mask: np.ndarray) -> np.ndarray:
        """Set bits per row: int64 [rows]."""

    def fours(self, mask: np.ndarray, columns: int) -> int:
        """2 if every aligned four of a row has exactly two bits set, 1 if none has more, else 0; columns % 4 is 0."""
