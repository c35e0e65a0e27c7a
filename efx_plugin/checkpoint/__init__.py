"""The sparse formats of compressed-tensors on disk: write, read, validate.

Needs torch; transformers is imported only by the functions that take or return a model.
"""

from efx_plugin.checkpoint.formats.registry import FORMATS, decompress
from efx_plugin.checkpoint.reader import expand, linear_bytes, load_sparse, read_sparsity_config
from efx_plugin.checkpoint.storage.safetensors_file import StoredTensor, read_index
from efx_plugin.checkpoint.writer import export_checkpoint, save_sparse

__all__ = [
    "FORMATS",
    "StoredTensor",
    "decompress",
    "expand",
    "export_checkpoint",
    "linear_bytes",
    "load_sparse",
    "read_index",
    "read_sparsity_config",
    "save_sparse",
]
