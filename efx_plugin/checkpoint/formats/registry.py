"""The sparse formats, found by the name in config.json. A new format is a class in a new file and a line here."""

import torch

from efx_plugin.checkpoint.formats.protocol import SHAPE, Format, Parts
from efx_plugin.checkpoint.formats.sparse_24_bitmask import Sparse24Bitmask
from efx_plugin.checkpoint.formats.sparse_bitmask import SparseBitmask
from efx_plugin.errors import SparseCheckpointError

# "auto" takes the first that makes every sparse weight smaller.
FORMATS: tuple[Format, ...] = (Sparse24Bitmask(), SparseBitmask())


def format_names() -> tuple[str, ...]:
    """The names of the formats."""
    return tuple(known.name for known in FORMATS)


def find_format(name: object, where: str = "the caller") -> Format:
    """The format of that name.

    Raises:
        SparseCheckpointError: there is no such format; `where` says who asked for it.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    raise SparseCheckpointError(f"{where} asks for the format {name!r}: the formats are {', '.join(format_names())}")


def part_names() -> frozenset[str]:
    """What the parts of a weight are called in one format or another."""
    return frozenset(name for known in FORMATS for name in part_dtypes(known, torch.float32))


def part_dtypes(known: Format, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The parts of a weight of that dtype: name -> dtype."""
    return {name: part_dtype for name, (part_dtype, _) in known.layout(0, 0, 0, dtype).items()}


def decompress(format_name: str, parts: Parts, *, where: str) -> torch.Tensor:
    """Validate and expand one weight.

    Args:
        format_name: "sparse-bitmask" or "sparse-24-bitmask".
        parts: the weight's tensors by the last part of their name, as read from the file.
        where: what to call the weight in an error, `FILE: PREFIX` or the prefix alone where no file is known.

    Returns:
        The weight [rows, columns] on the CPU, in the dtype it was stored with; a vector [columns] if it was one.

    Raises:
        SparseCheckpointError: the parts are incomplete, of the wrong type or size, or disagree with each other.
    """
    found = find_format(format_name, where)
    rows = _as_rows({name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()})
    found.check(rows, where)
    return found.decompress(rows).reshape(parts[SHAPE].flatten().tolist())


def dense_layout(format_name: str, parts: Parts, *, where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of what `decompress` would return. Only `shape` is read; the other parts may be on meta.

    Raises:
        SparseCheckpointError: a part is missing or of the wrong type, or the shape disagrees with another part.
    """
    dtype, _ = find_format(format_name, where).dense_layout(_as_rows(parts), where)
    return dtype, tuple(parts[SHAPE].flatten().tolist())


def _as_rows(parts: Parts) -> Parts:
    """The parts of a vector as those of a matrix with one row.

    Releases of compressed-tensors that were given no targets compressed vectors too, such as the weights of norms:
    `shape` [1], `bitmask` [ceil(columns/8)], and a scalar `row_offsets`.
    """
    if SHAPE not in parts or tuple(parts[SHAPE].shape) != (1,):
        return parts
    if "row_offsets" not in parts or parts["row_offsets"].dim() != 0:
        return parts
    rows = {name: parts[name][None] for name in ("bitmask", "row_offsets") if name in parts}
    return {**parts, **rows, SHAPE: torch.cat([torch.ones_like(parts[SHAPE]), parts[SHAPE]])}
