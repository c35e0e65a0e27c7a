"""The model card of a sparse checkpoint: README.md."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from efx_plugin.checkpoint.formats.protocol import Format
from efx_plugin.checkpoint.storage_plan import Survey
from efx_plugin.errors import EfxError

_KEYS = ("base_model", "adapter", "calibration", "figures")


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The metadata of a card, if it has no key but base_model, adapter, calibration and figures.

    Raises:
        EfxError: naming the key that is not one of them.
    """
    metadata = dict(metadata or {})
    for key in metadata:
        if key not in _KEYS:
            raise EfxError(f"metadata has the key {key!r}: the model card has room for {', '.join(_KEYS)}")
    return metadata


def model_card(
    title: str,
    metadata: Mapping[str, Any],
    form: Format,
    surveys: Mapping[str, Survey],
    sparse: frozenset[str],
    recipe: str | None,
    quantization: Mapping[str, Any] | None = None,
) -> str:
    """The text of the card.

    Args:
        title: name of the model.
        metadata: see `save_sparse`.
        form: the format.
        surveys: every Linear weight.
        sparse: those of them that are stored in the format; the others are dense.
        recipe: text of the recipe that pruned the model.
        quantization: how the weights are quantized, see `quantized.stored_config`; None if they are not.
    """
    base = metadata.get("base_model")
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            *([f"base_model: {base}"] if _is_hub_name(base) else []),
            "tags: [sparse, compressed-tensors, efx-plugin]",
            "---",
            f"# {title}",
            "",
            f"Linear weights with zeros, stored as `{form.name}` ({form.structure}) of compressed-tensors.",
            *([] if quantization is None else [_quantized(quantization)]),
            "",
            *_facts(metadata),
            "| projection | matrices | sparsity | bytes dense | bytes here |",
            "|---|---|---|---|---|",
            *_rows(form, surveys, sparse),
            "",
            *_figures(metadata.get("figures")),
            *(_USE if quantization is None else _USE_QUANTIZED),
            *(["## Recipe", "", *("    " + line for line in recipe.strip().splitlines()), ""] if recipe else []),
        ]
    )


def dense_card(title: str, source: str, quantization: Mapping[str, Any] | None) -> str:
    """The text of the card of a plain checkpoint.

    Args:
        title: name of the model.
        source: name of the sparse checkpoint that it was made of.
        quantization: how the weights are quantized, None if they are not.
    """
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "---",
            f"# {title}",
            "",
            f"The weights of `{source}` with the sparse compression taken off: zeros are stored, and multiplied, like "
            "any other value.",
            *([] if quantization is None else [_quantized(quantization)]),
            "vLLM and transformers open this checkpoint by themselves.",
            "",
        ]
    )


_USE = [
    "## How to use it",
    "",
    "Install `efx-plugin` beside vLLM or transformers; neither opens this checkpoint without it: vLLM says",
    '"Sparsity support has been removed", and `from_pretrained` refuses, because it would otherwise make',
    "the projections up.",
    "",
    "    pip install 'efx-plugin[serve]' && efx serve DIRECTORY",
    "",
    "or, in Python,",
    "",
    "    import efx_plugin  # before from_pretrained",
    "    model = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY)  # dense weights, the same zeros",
    "",
]

_USE_QUANTIZED = [
    "## How to use it",
    "",
    "Install `efx-plugin` beside vLLM, which then serves int8 weights (W8A8 with dynamic activations, W8A16):",
    "",
    "    pip install 'efx-plugin[serve]' && efx serve DIRECTORY",
    "",
    "For other kinds of quantization take the sparse compression off; what is left is the same quantized model:",
    "",
    "    efx export DIRECTORY DENSE --structure dense && vllm serve DENSE",
    "",
    "As a plain transformers model, with its weights dequantized and the same zeros:",
    "",
    "    model = efx_plugin.load_sparse(DIRECTORY)",
    "",
]


def _quantized(quantization: Mapping[str, Any]) -> str:
    widths = sorted(
        {
            f"{group['weights']['num_bits']}-bit {group['weights']['type']}"
            for group in quantization["config_groups"].values()
            if group["weights"]
        }
    )
    return (
        f"They are quantized ({', '.join(widths)}, `{quantization['format']}`), with their scales stored beside them."
    )


def _facts(metadata: Mapping[str, Any]) -> list[str]:
    names = {"base_model": "Base model", "adapter": "Adapter", "calibration": "Calibration data"}
    facts = [f"- {label}: {metadata[key]}" for key, label in names.items() if metadata.get(key)]
    return [*facts, ""] if facts else []


def _rows(form: Format, surveys: Mapping[str, Survey], sparse: frozenset[str]) -> Iterable[str]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in surveys:
        kinds[name.removesuffix(".weight").rpartition(".")[2]].append(name)
    for kind, names in [*kinds.items(), ("all", list(surveys))]:
        found = [surveys[name] for name in names]
        zeros = 1 - sum(one.nonzeros for one in found) / sum(one.rows * one.columns for one in found)
        dense = sum(one.nbytes(None) for one in found)
        here = sum(surveys[name].nbytes(form if name in sparse else None) for name in names)
        yield f"| {kind} | {len(names)} | {zeros:.1%} | {dense:,} | {here:,} |"


def _figures(figures: Mapping[str, Any] | None) -> list[str]:
    if not figures:
        return []
    return ["## Measured", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items()), ""]


def _is_hub_name(base: object) -> bool:
    """Only the name of a model on the hub makes valid front matter."""
    return (
        isinstance(base, str)
        and base.count("/") == 1
        and not base.startswith((".", "/", "~"))
        and not os.path.exists(base)
    )
