"""What writing and loading must know of a transformers model: its class, and which of its weights may be compressed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from efx_plugin.checkpoint.config import GUARD_KEY
from efx_plugin.errors import EfxError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Linears(NamedTuple):
    """The nn.Linear layers of a model.

    Attributes:
        weights: names on disk of the weights that may be compressed.
        others: modules whose weight stays dense: the output embeddings.
    """

    weights: frozenset[str]
    others: tuple[str, ...]


def read_model_config(directory: str | os.PathLike[str]) -> "PretrainedConfig":
    """The model's config without what only concerns how its weights are stored.

    Raises:
        EfxError: transformers cannot make a config of the directory's config.json.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory)
    except Exception as error:  # each family checks its config in its own way
        raise EfxError(f"transformers cannot use {Path(directory) / 'config.json'}: {_first_line(error)}") from error
    for key in ("quantization_config", GUARD_KEY):
        if hasattr(config, key):
            delattr(config, key)
    return config


def model_class(config: "PretrainedConfig") -> type["PreTrainedModel"]:
    """The class that config.json names first under `architectures`.

    Raises:
        EfxError: it names none, or one that transformers does not have.
    """
    import transformers

    name = config.architectures[0] if config.architectures else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise EfxError(
            f"config.json names the architecture {name!r}, which transformers {transformers.__version__} lacks"
        )
    return cls


def skeleton(config: "PretrainedConfig", cls: "type[PreTrainedModel] | None" = None) -> "PreTrainedModel":
    """The model without weights, on the meta device; of the class that config.json names unless another is given.

    Raises:
        EfxError: the config does not make a model.
    """
    cls = cls or model_class(config)
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # sizes that contradict each other, each found by another layer
        raise EfxError(f"transformers cannot make a {cls.__name__} of the config.json: {_first_line(error)}") from error


def refuse_unmerged(model: object) -> None:
    """Refuse what is no plain transformers model.

    Raises:
        EfxError: the model carries an adapter, was quantized by another tool than llm-compressor, or comes from
            somewhere else.
    """
    from transformers import PreTrainedModel

    # PEFT is recognized by what it leaves in a model, so that it need not be installed.
    if hasattr(model, "peft_type") or (
        isinstance(model, torch.nn.Module) and any(hasattr(module, "base_layer") for module in model.modules())
    ):
        raise EfxError("the model still carries an adapter: save what efx_plugin.merge_adapters(model) returns")
    if not isinstance(model, PreTrainedModel):
        raise EfxError(f"save_sparse takes a transformers PreTrainedModel, not {type(model).__name__}")
    # So is llm-compressor, which calibrates experts one by one; transformers cannot load them back like that.
    if any(base.__name__ == "LinearExperts2D" for module in model.modules() for base in type(module).__mro__):
        raise EfxError(
            "the model's experts are still taken apart as llm-compressor calibrates them: call "
            "llmcompressor.modeling.moe.linearize.repack_moe(model) first"
        )
    by_compressed_tensors = any(hasattr(module, "quantization_scheme") for module in model.modules())
    if getattr(model.config, "quantization_config", None) is not None and not by_compressed_tensors:
        raise EfxError(
            "the model is quantized, but not by llm-compressor: prune the original, with a recipe that quantizes too"
        )


def on_disk(model: "PreTrainedModel", weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model by the names that they have on disk, tied ones once.

    Some architectures are loaded under other names than they are stored by; transformers knows how to go back.
    """
    from transformers.core_model_loading import revert_weight_conversion

    aliases = {
        alias
        for alias, weight in tied_weights(model).items()
        if weight in weights and model.get_parameter(alias) is model.get_parameter(weight)
    }
    own = {name: weights[name] for name in weights if name not in aliases}
    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, own)
    return stored


def names_on_disk(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by every name that they may have on disk; tied ones have several."""
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    return stored


def find_linears(model: "PreTrainedModel") -> Linears:
    """Which weights may be compressed: those of nn.Linear layers, except for the output embeddings."""
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    others = tuple(name for name, module in layers.items() if module is head)
    weights = {id(_weight(module)) for name, module in layers.items() if name not in others}
    stored = on_disk(model, dict(model.named_parameters()))
    names = (name.removesuffix("_packed") for name, weight in stored.items() if id(weight) in weights)
    return Linears(frozenset(names), others)


def _weight(module: torch.nn.Linear) -> torch.Tensor:
    """llm-compressor's `save_pretrained` leaves weights of a model packed that it stores so."""
    weight: torch.Tensor = getattr(module, "weight_packed" if hasattr(module, "weight_packed") else "weight")
    return weight


def tied_weights(model: "PreTrainedModel") -> Mapping[str, str]:
    """Weights that are another name for a weight: alias -> weight."""
    return model.all_tied_weights_keys


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
