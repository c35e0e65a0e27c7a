"""What config.json says of a sparse checkpoint; imports neither torch nor numpy, so that the answer comes at once."""

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efx_plugin.checkpoint.formats.protocol import Format

# The release of compressed-tensors whose readers and file layout these checkpoints follow.
VERSION = "0.13.0"

# transformers reads this key before it makes a model. It quotes a value that names no safetensors file, for local
# directories and on the hub alike; the name of a missing file it would quote for local directories only. Without the
# key, transformers fails with an unrelated AttributeError. Without the quantization_config as well, it loads RANDOM
# projections with a warning.
GUARD_KEY = "transformers_weights"
GUARD = (
    "\nThis checkpoint is not damaged: it is sparse, and transformers reads it with the help of efx-plugin.\n"
    "Run `pip install efx-plugin`, then `import efx_plugin` before from_pretrained, or use efx_plugin.load_sparse."
)


def sparsity_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `sparsity_config` inside a config.json, None where it describes no sparse weights."""
    quantization = config.get("quantization_config")
    return sparsity_in(quantization) if isinstance(quantization, Mapping) else None


def sparsity_in(quantization: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `sparsity_config` inside a quantization_config, None where it describes no sparse weights.

    compressed-tensors left an empty one, or one of the format "dense", in checkpoints that are not sparse.
    """
    sparsity = quantization.get("sparsity_config")
    if not isinstance(sparsity, Mapping) or sparsity.get("format") in (None, "", "dense"):
        return None
    return dict(sparsity)


def quantizes(quantization: object) -> bool:
    """Whether a quantization_config quantizes anything: one of compressed-tensors may do nothing at all."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "compressed-tensors":
        return bool(quantization)
    return any(quantization.get(key) for key in ("config_groups", "kv_cache_scheme", "transform_config"))


def sparse_config(
    config: Mapping[str, Any],
    form: "Format",
    ignore: Iterable[str],
    global_sparsity: float,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The model's config.json with the description of how its weights are stored.

    Args:
        config: the model's own config.
        form: the format.
        ignore: nn.Linear modules whose weight is stored dense.
        global_sparsity: fraction of zeros in the compressed weights.
        quantization: how the weights are quantized, see `quantized.stored_config`; None if they are not.
    """
    described = copy.deepcopy(dict(config))
    described[GUARD_KEY] = GUARD
    described["quantization_config"] = {
        # Without `config_groups`, 0.13.0 finds a quantization_config with a `format` incomplete.
        **(quantization or {"config_groups": {}, "format": "dense"}),
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "sparsity_config": {
            "format": form.name,
            "targets": ["Linear"],
            "ignore": sorted(ignore),
            "global_sparsity": round(global_sparsity, 6),
            "sparsity_structure": form.structure,
        },
    }
    return described
