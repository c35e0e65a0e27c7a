"""Checks on the tensors of one compressed weight. A checkpoint is untrusted input: nothing in it is used before these.

`where` says in every message which weight it is about: `FILE: PREFIX`, to which the name of the tensor is added.
"""

from collections.abc import Callable

import numpy as np
import torch

from efx_plugin.checkpoint.codec import bits
from efx_plugin.checkpoint.formats.protocol import Layout, Parts
from efx_plugin.errors import SparseCheckpointError


def corrupt(where: str, tensor: str, problem: str) -> SparseCheckpointError:
    """The error for a tensor that contradicts itself or its siblings."""
    return SparseCheckpointError(f"{where}.{tensor} {problem}: the checkpoint is corrupt, download or export it again")


def dense_layout(
    parts: Parts, layout: Callable[[int, int, int, torch.dtype], Layout], where: str
) -> tuple[torch.dtype, tuple[int, int]]:
    """Dtype, rows and columns of a weight that is stored with a bitmask; names and dtypes of its parts are checked.

    The declared shape is believed only if the bitmask, whose bytes are really there, is as large as it says.

    Args:
        parts: the tensors; only `shape` is read.
        layout: of the format, see `protocol.Format`.
        where: what an error calls the weight.

    Raises:
        SparseCheckpointError: naming the part that is missing or wrong.
    """
    expected = layout(0, 0, 0, torch.float32)
    for name in expected:
        if name not in parts:
            raise corrupt(where, name, "is missing")
    for name in parts:
        if name not in expected:
            raise corrupt(where, name, f"does not belong to a weight stored as {', '.join(expected)}")
    if parts["compressed"].dtype not in bits.BITS:
        raise corrupt(where, "compressed", f"is of {parts['compressed'].dtype}, which no weight stored sparsely has")
    for name, (dtype, _) in expected.items():
        if name != "compressed" and parts[name].dtype != dtype:
            raise corrupt(where, name, f"is of {parts[name].dtype} instead of {dtype}")
    if tuple(parts["shape"].shape) != expected["shape"][1]:
        raise corrupt(where, "shape", f"has the shape {list(parts['shape'].shape)}, not {list(expected['shape'][1])}")
    rows, columns = parts["shape"].flatten().tolist()
    if rows < 1 or columns < 1:
        raise corrupt(where, "shape", f"declares a weight [{rows}, {columns}]")
    if tuple(parts["bitmask"].shape) != (rows, bits.mask_width(columns)):
        raise corrupt(
            where, "shape", f"declares a weight [{rows}, {columns}], but the bitmask is {list(parts['bitmask'].shape)}"
        )
    return parts["compressed"].dtype, (rows, columns)


def check_shapes(parts: Parts, layout: Layout, where: str) -> None:
    """Every part has the shape that the layout gives it."""
    for name, (_, size) in layout.items():
        if tuple(parts[name].shape) != size:
            raise corrupt(where, name, f"has the shape {list(parts[name].shape)} where {list(size)} belongs")


def check_padding(mask: np.ndarray, columns: int, where: str) -> None:
    """The bits of a row's last byte beyond the last column are clear."""
    if not (used := columns % 8):
        return
    wrong = np.flatnonzero(mask[:, -1] >> used)
    if len(wrong):
        raise corrupt(where, "bitmask", f"has bits set beyond column {columns - 1} in row {wrong[0]}")
