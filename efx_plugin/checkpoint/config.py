"""What config.json says of a sparse checkpoint."""

import copy
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

# The release of compressed-tensors whose readers and file layout these checkpoints follow.
VERSION = "0.13.0"

# transformers reads this key before it makes a model and quotes a value that is no file name. Without it, it dies of an
# unrelated AttributeError, and if the quantization_config is taken out, it loads RANDOM projections with a warning.
GUARD_KEY = "transformers_weights"
GUARD = (
    "none, because this checkpoint is sparse. Install efx-plugin and `import efx_plugin` before from_pretrained, "
    "or use efx_plugin.load_sparse"
)


def sparse_config(
    config: Mapping[str, Any],
    module: ModuleType,
    ignore: Iterable[str],
    global_sparsity: float,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The model's config.json with the description of how its weights are stored.

    Args:
        config: the model's own config.
        module: the format.
        ignore: nn.Linear modules whose weight is stored dense.
        global_sparsity: fraction of zeros in the compressed weights.
        quantization: how the weights are quantized, see `quantized.stored_config`; None if they are not.
    """
    described = copy.deepcopy(dict(config))
    described[GUARD_KEY] = GUARD
    described["quantization_config"] = {
        # Without groups 0.13.0 takes a `format` for an incomplete quantization_config.
        **(quantization or {"config_groups": {}, "format": "dense"}),
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "sparsity_config": {
            "format": module.NAME,
            "targets": ["Linear"],
            "ignore": sorted(ignore),
            "global_sparsity": round(global_sparsity, 6),
            "sparsity_structure": module.STRUCTURE,
        },
    }
    return described
