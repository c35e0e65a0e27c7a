"""The model card of a checkpoint, README.md, fit to be published on the hub."""

import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from efx_plugin.checkpoint.formats.protocol import Format
from efx_plugin.checkpoint.storage_plan import Survey
from efx_plugin.version import __version__

_PAPER = "[EfficientXpert](https://arxiv.org/abs/2511.19935)"

# What the front matter takes over.
_FRONT = ("license", "license_name", "license_link", "language")

# What the hub calls the task of a class, by what its name ends in.
_TASKS = {
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "image-text-to-text",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def model_card(
    title: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    form: Format,
    surveys: Mapping[str, Survey],
    sparse: frozenset[str],
    recipe: str | None,
) -> str:
    """The text of the card of a sparse checkpoint.

    Args:
        title: name of the model, which is that of its directory.
        config: the content of its config.json.
        provenance: what it was made of, see `provenance.KEYS`.
        form: the format.
        surveys: every Linear weight.
        sparse: those of them that are stored in the format; the others are dense.
        recipe: text of the recipe that pruned the model.
    """
    return "\n".join(
        [
            *_head(title, config, provenance, ["sparse", "compressed-tensors"]),
            f"Linear weights with zeros, stored as `{form.name}` ({form.structure}) of compressed-tensors.",
            *_quantized(config),
            "",
            *_facts(provenance),
            "| projection | matrices | sparsity | bytes dense | bytes here |",
            "|---|---|---|---|---|",
            *_rows(form, surveys, sparse),
            "",
            *_figures(provenance.get("figures")),
            *(_use_quantized(title) if _is_quantized(config) else _use(title, config)),
            *_recipe(recipe),
        ]
    )


def packed_card(
    title: str, config: Mapping[str, Any], provenance: Mapping[str, Any], sparsity: float, recipe: str | None
) -> str:
    """The text of the card of a checkpoint of pruned and packed weights.

    Args:
        title, config, provenance, recipe: see `model_card`.
        sparsity: fraction of zeros in the packed weights.
    """
    return "\n".join(
        [
            *_head(title, config, provenance, ["pruned", "compressed-tensors"]),
            f"Of the Linear weights {sparsity:.1%} are zero; they are stored like any other value.",
            *_quantized(config),
            "vLLM and transformers open this checkpoint by themselves.",
            "",
            *_facts(provenance),
            *_figures(provenance.get("figures")),
            *_recipe(recipe),
        ]
    )


def dense_card(title: str, config: Mapping[str, Any], provenance: Mapping[str, Any], source: str) -> str:
    """The text of the card of a plain checkpoint.

    Args:
        title, config, provenance: see `model_card`.
        source: name of the sparse checkpoint that it was made of.
    """
    return "\n".join(
        [
            *_head(title, config, provenance, ["pruned"]),
            f"The weights of `{source}` with the sparse compression taken off: zeros are stored, and multiplied, like "
            "any other value.",
            *_quantized(config),
            "vLLM and transformers open this checkpoint by themselves.",
            "",
            *_facts(provenance),
            *_figures(provenance.get("figures")),
        ]
    )


def _head(title: str, config: Mapping[str, Any], provenance: Mapping[str, Any], tags: list[str]) -> list[str]:
    """Front matter as the hub reads it, and the heading."""
    architecture = _architecture(config)
    base = provenance.get("base_model")
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag=next((task for end, task in _TASKS.items() if architecture.endswith(end)), None),
        base_model=base if _is_hub_name(base) else None,
        tags=[*tags, "efx-plugin", "arxiv:2511.19935"],
        **{key: provenance[key] for key in _FRONT if provenance.get(key)},
    )
    return [
        "---",
        front.to_yaml(),
        "---",
        f"# {title}",
        "",
        f"Made with efx-plugin {__version__}, home of {_PAPER}: pruning a model together with its LoRA adapter.",
        "",
    ]


def _recipe(recipe: str | None) -> list[str]:
    return ["## Recipe", "", *("    " + line for line in recipe.strip().splitlines()), ""] if recipe else []


def _use(title: str, config: Mapping[str, Any]) -> list[str]:
    return [
        "## How to use it",
        "",
        "Install `efx-plugin` beside vLLM or transformers; neither opens this checkpoint without it: vLLM says",
        '"Sparsity support has been removed", and `from_pretrained` refuses, because it would otherwise make',
        "the projections up. With the files in a directory of this name,",
        "",
        f"    pip install 'efx-plugin[serve]' && efx serve {_path(title)}",
        "",
        "or, in Python,",
        "",
        "    import efx_plugin, transformers",
        f"    model = transformers.{_architecture(config)}.from_pretrained({'./' + title!r})  # dense, the same zeros",
        "",
    ]


def _use_quantized(title: str) -> list[str]:
    dense = _path(f"{title}-dense")
    return [
        "## How to use it",
        "",
        "Install `efx-plugin` beside vLLM, which then serves int8 weights (W8A8 with dynamic activations, W8A16). With",
        "the files in a directory of this name:",
        "",
        f"    pip install 'efx-plugin[serve]' && efx serve {_path(title)}",
        "",
        "For other kinds of quantization take the sparse compression off; what is left is the same quantized model:",
        "",
        f"    efx export {_path(title)} {dense} --structure dense && vllm serve {dense}",
        "",
        "As a plain transformers model, with its weights dequantized and the same zeros:",
        "",
        f"    model = efx_plugin.load_sparse({'./' + title!r})",
        "",
    ]


def _path(title: str) -> str:
    return shlex.quote(f"./{title}")


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or ["AutoModel"])[0])


def _is_quantized(config: Mapping[str, Any]) -> bool:
    return bool(config.get("quantization_config", {}).get("config_groups"))


def _quantized(config: Mapping[str, Any]) -> list[str]:
    if not _is_quantized(config):
        return []
    quantization = config["quantization_config"]
    widths = sorted(
        {
            f"{group['weights']['num_bits']}-bit {group['weights']['type']}"
            for group in quantization["config_groups"].values()
            if group["weights"]
        }
    )
    return [
        f"They are quantized ({', '.join(widths)}, `{quantization['format']}`), with their scales stored beside them."
    ]


def _facts(provenance: Mapping[str, Any]) -> list[str]:
    names = {
        "base_model": "Base model",
        "adapter": "Adapter",
        "calibration": "Calibration data",
        "healing": "Trained on its kept weights",
    }
    facts = [f"- {label}: {provenance[key]}" for key, label in names.items() if provenance.get(key)]
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
