"""Whether a checkpoint holds what its model needs and nothing else, by names and shapes alone.

transformers makes up what is missing and drops what has no place, with a warning at most. So every
reader and every export asks here first.
"""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from efx_plugin.checkpoint import model_weights, quantized
from efx_plugin.checkpoint.formats.protocol import Layout
from efx_plugin.errors import SparseCheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_fit(model: "PreTrainedModel", layout: Layout, where: str | os.PathLike[str]) -> None:
    """Compare a checkpoint with the model that config.json names under `architectures`.

    Persistent buffers and second names of tied weights may be there or not, and so may what transformers ignores for
    this architecture.

    Args:
        model: that model, with or without weights.
        layout: dtype and shape of every tensor by its dense name, perhaps quantized.
        where: the directory, for messages.

    Raises:
        SparseCheckpointError: naming a tensor that is missing, of another shape, or without a place in the model, and
            what to do.
    """
    kind = type(model).__name__
    stored = {_short(model, name): name for name in layout if not quantized.is_parameter(name)}
    if adapted := [name for name in stored.values() if ".base_layer." in name or ".lora_" in name]:
        raise SparseCheckpointError(
            f"{where} was stored with its adapter unmerged ({min(adapted)}): store what "
            "efx_plugin.merge_adapters(model) returns, with efx_plugin.save_sparse"
        )
    expected = {_short(model, name): tensor for name, tensor in model_weights.names_on_disk(model).items()}
    needed = model_weights.on_disk(model, dict(model.named_parameters()))
    found: Any = SimpleNamespace(  # the two attributes of transformers' LoadStateDictInfo that are read
        missing_keys={name for name in needed if _short(model, name) not in stored},
        unexpected_keys={name for short, name in stored.items() if short not in expected},
    )
    model._adjust_missing_and_unexpected_keys(found)
    # In from_pretrained, nothing is tied yet.
    pairs = [set(pair) for pair in model_weights.tied_weights(model).items()]
    reached = {name for pair in pairs for name in pair if any(_short(model, other) in stored for other in pair)}
    missing = found.missing_keys - reached
    if missing:
        raise SparseCheckpointError(f"{where} has no {min(missing)}, which a {kind} needs: {_remedy(model, missing)}")
    if found.unexpected_keys:
        raise SparseCheckpointError(
            f"{where} holds {min(found.unexpected_keys)}, which has no place in a {kind}: correct `architectures` in "
            "config.json, or store the model again with save_pretrained or efx_plugin.save_sparse"
        )
    _check_shapes(
        {name: tuple(expected[short].shape) for short, name in stored.items() if short in expected}, layout, where
    )


def check_body(model: "PreTrainedModel", layout: Layout, where: str | os.PathLike[str]) -> None:
    """Compare a checkpoint with a model of another class than its own, such as one with a new head on the same body.

    Args:
        model, layout, where: see `check_fit`.

    Raises:
        SparseCheckpointError: a weight of the body is missing, or any weight has another shape.
    """
    prefix = f"{model.base_model_prefix}."
    is_body = model.base_model is model
    stored = {_short(model, name): name for name in layout}
    shapes = {}
    for name, parameter in model_weights.on_disk(model, dict(model.named_parameters())).items():
        theirs = stored.get(_short(model, name))
        if theirs is not None:
            shapes[theirs] = tuple(parameter.shape)
        elif is_body or name.startswith(prefix):
            raise SparseCheckpointError(f"{where} has no {name}, which a {type(model).__name__} needs")
    _check_shapes(shapes, layout, where)


def _short(model: "PreTrainedModel", name: str) -> str:
    """A name without the prefix of the body: bodies are loaded from whole models, and the other way round."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _check_shapes(expected: dict[str, tuple[int, ...]], layout: Layout, where: str | os.PathLike[str]) -> None:
    for name, shape in expected.items():
        if layout[name][1] != shape:
            raise SparseCheckpointError(
                f"{where} holds {name} as {list(layout[name][1])}, but its config.json makes it {list(shape)}: they do "
                "not belong together, download or export it again"
            )


def _remedy(model: "PreTrainedModel", missing: set[str]) -> str:
    head = model.get_output_embeddings()
    if head is not None and any(
        f"{name}.weight" in missing for name, module in model.named_modules() if module is head
    ):
        return "if the output layer is the embedding, set tie_word_embeddings to true in config.json"
    return "download or export it again"
