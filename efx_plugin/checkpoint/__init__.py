"""The sparse formats of compressed-tensors on disk: write, read, validate.

Importing this package is cheap: torch is imported when one of the names below is first used, transformers only by the
functions that take or return a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efx_plugin.checkpoint.formats.registry import decompress, find_format, format_names
    from efx_plugin.checkpoint.reader import expand, linear_bytes, load_sparse, read_sparsity_config
    from efx_plugin.checkpoint.storage.safetensors_file import StoredTensor, read_index
    from efx_plugin.checkpoint.writer import export_checkpoint, save_sparse

__all__ = [
    "StoredTensor",
    "decompress",
    "expand",
    "export_checkpoint",
    "find_format",
    "format_names",
    "linear_bytes",
    "load_sparse",
    "read_index",
    "read_sparsity_config",
    "save_sparse",
]

_HOMES = {
    "formats.registry": ("decompress", "find_format", "format_names"),
    "reader": ("expand", "linear_bytes", "load_sparse", "read_sparsity_config"),
    "storage.safetensors_file": ("StoredTensor", "read_index"),
    "writer": ("export_checkpoint", "save_sparse"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
