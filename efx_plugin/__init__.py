"""EfficientXpert (arXiv 2511.19935) for llm-compressor, compressed-tensors and vLLM.

Importing this package is cheap: torch, transformers, llm-compressor and vLLM are imported when one of the names
below is first used. If llm-compressor is, or later gets, imported, `EfficientXpertModifier` is registered with its
`ModifierFactory`, so that YAML recipes can name it; and transformers' `from_pretrained` then reads sparse checkpoints.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from efx_plugin.version import __version__ as __version__

if TYPE_CHECKING:
    from efx_plugin.checkpoint import load_sparse, save_sparse
    from efx_plugin.kernels import sparse_linear
    from efx_plugin.model.adapters import merge_adapters
    from efx_plugin.modifier import EfficientXpertModifier
    from efx_plugin.training import EfficientXpertCallback

__all__ = [
    "EfficientXpertCallback",
    "EfficientXpertModifier",
    "load_sparse",
    "merge_adapters",
    "save_sparse",
    "sparse_linear",
]

_HOMES = {
    "EfficientXpertCallback": "efx_plugin.training",
    "EfficientXpertModifier": "efx_plugin.modifier",
    "load_sparse": "efx_plugin.checkpoint",
    "merge_adapters": "efx_plugin.model.adapters",
    "save_sparse": "efx_plugin.checkpoint",
    "sparse_linear": "efx_plugin.kernels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


@wrapt.when_imported("llmcompressor")
def _register_modifier(_llmcompressor: ModuleType) -> None:
    import_module("efx_plugin.modifier")


@wrapt.when_imported("transformers.quantizers.auto")
def _register_quantizer(_auto: ModuleType) -> None:
    import_module("efx_plugin.checkpoint.transformers_hook").register()
