"""The registry of sparse formats: one module each, with the same names in each, found by the name in config.json.

A format module has `NAME`, `STRUCTURE` (what config.json calls the pattern of the zeros), `layout`, `compress`,
`decompress` and `check`. A new format is a new module and a line here.
"""

from types import ModuleType

import torch

from efx_plugin.checkpoint.formats import sparse_24_bitmask, sparse_bitmask, validate
from efx_plugin.errors import SparseCheckpointError

FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (sparse_bitmask, sparse_24_bitmask)}

PART_NAMES = frozenset(name for module in FORMATS.values() for name in module.layout(0, 0, 0, torch.float32))


def find_format(name: object, where: str) -> ModuleType:
    """The module of a format.

    Raises:
        SparseCheckpointError: there is no such format; `where` says who asked for it.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise SparseCheckpointError(f"{where} asks for the format {name!r}; the formats are {', '.join(FORMATS)}.")
    return FORMATS[name]


def decompress(format_name: str, parts: dict[str, torch.Tensor], *, where: str) -> torch.Tensor:
    """Validate and expand one weight.

    Args:
        format_name: "sparse-bitmask" or "sparse-24-bitmask".
        parts: the weight's tensors by their last name (`compressed`, `bitmask`, ...), as read from the file.
        where: what to call the weight in an error, `FILE: PREFIX` or the prefix alone where no file is known.

    Returns:
        The weight [rows, columns] on the CPU, in the dtype of `compressed`; a vector [columns] if one was compressed.

    Raises:
        SparseCheckpointError: the parts are incomplete, of the wrong type or size, or disagree with each other.
    """
    module = find_format(format_name, where)
    module = find_format(format_name, where)
    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}
    rows = _as_rows(parts)
    module.check(rows, where)
    return module.decompress(rows).reshape(parts["shape"].flatten().tolist())


def dense_shape(format_name: str, parts: dict[str, torch.Tensor], *, where: str) -> tuple[int, ...]:
    """The shape that `decompress` would return. Only `shape` is read; the other parts may be on the meta device.

    Raises:
        SparseCheckpointError: a part is missing or of the wrong type, or the shape disagrees with the bitmask.
    """
    validate.dense_shape(_as_rows(parts), find_format(format_name, where).layout, where)
    return tuple(parts["shape"].flatten().tolist())


def _as_rows(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Releases that were given no targets compressed vectors too, such as the weights of norms: one row without its
    dimension.
    """
    is_vector = {name: tuple(parts[name].shape) for name in ("shape", "row_offsets") if name in parts} == {
        "shape": (1,),
        "row_offsets": (),
    }
    if not is_vector:
        return parts
    rows = {name: parts[name][None] for name in ("bitmask", "row_offsets") if name in parts}
    return parts | rows | {"shape": torch.cat([torch.ones_like(parts["shape"]), parts["shape"]])}
