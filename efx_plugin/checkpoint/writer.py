"""From dense weights, in memory or on disk, to a complete checkpoint directory."""

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from efx_plugin.checkpoint import dense, model_weights, packed, provenance, quantized, storage_plan
from efx_plugin.checkpoint.config import quantizes, sparse_config, sparsity_of
from efx_plugin.checkpoint.fit import check_fit
from efx_plugin.checkpoint.model_card import model_card
from efx_plugin.checkpoint.provenance import check_metadata
from efx_plugin.checkpoint.reader import read_config
from efx_plugin.checkpoint.storage import atomic, safetensors_file, shards
from efx_plugin.checkpoint.storage.prefetch import map_ahead
from efx_plugin.errors import EfxError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)


def save_sparse(
    model: "PreTrainedModel",
    directory: str | os.PathLike[str],
    structure: str = "auto",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    companions: Mapping[str, Path] | None = None,
    recipe: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Write a pruned model as a sparse checkpoint.

    A model that is quantized to eight bits (W8A8, W8A16, FP8), by llm-compressor or by `EfficientXpertModifier`, stays
    quantized: the bytes of its weights are compressed, and scales and the like lie beside them. One of four bits
    (W4A16) is stored as llm-compressor does it, with its zeros written out, for no sparse format stores such weights.

    Weights of nn.Linear layers that the format makes smaller are compressed; the others, embeddings, norms and biases
    are stored as they are, tied weights once. The directory appears only when it is complete.

    Args:
        model: a plain transformers model with zeros in its Linear weights (bfloat16, float16 or float32), on any
            device. -0.0 is stored as 0.0.
        directory: the destination, which must not exist.
        structure: "sparse-bitmask" (any zeros), "sparse-24-bitmask" (at most two non-zeros in each aligned four of a
            row), or "auto": the latter if every sparse weight is 2:4 sparse, else the former.
        tokenizer: saved along; one that cannot be saved is left out with a warning.
        companions: files to copy as they are, by name, in place of the tokenizer and the model's generation config.
        recipe: the recipe that pruned the model, a path or its YAML text; saved along as recipe.yaml.
        max_shard_size: bytes, or a size such as "5GB".
        metadata: for the model card: `base_model`, `adapter`, `calibration` and `healing` (text), `figures` (name ->
            value), `license` and `language` as the hub writes them; what is not given is taken from the directory that
            the model was loaded from.
        progress: show a progress bar if it takes longer than two seconds.

    Raises:
        EfxError: the destination exists or its disk is full; the model carries an adapter, is quantized in a way that
            cannot be stored sparsely, has no sparse Linear weight, or holds NaN or infinity.
    """
    atomic.refuse_existing(directory)
    storage_plan.check_structure(structure)
    model_weights.refuse_unmerged(model)
    metadata = check_metadata(metadata)
    recipe_text = _read_recipe(recipe)
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise EfxError(f"{name} is on the meta device: load or dispatch the whole model before saving it")
    quantization = quantized.of_model(model)

    def extras(destination: Path) -> None:
        if companions is not None:
            shards.copy_companions(companions, destination)
        elif model.can_generate():
            _save_generation_config(model.generation_config, destination)
        if tokenizer is not None and companions is None:
            _save_tokenizer(tokenizer, destination)
        if recipe_text is not None:
            (destination / "recipe.yaml").write_text(recipe_text)

    loaded_from = getattr(model.config, "_name_or_path", "")
    known = provenance.of_directory(loaded_from) if os.path.isdir(loaded_from) else {"base_model": loaded_from}
    if quantization is not None and quantized.is_narrow(quantization):
        _refuse_structure(structure)
        quantized.refuse_unpacked(quantization, "The model")
        packed.write_packed(
            directory,
            model_weights.on_disk(model, quantized.packed_state(model)),
            _config_of(model),
            quantized.packed_config(quantization),
            max_shard_size=storage_plan.parse_size(max_shard_size),
            metadata=known | metadata,
            recipe=recipe_text,
            extras=extras,
            progress=progress,
        )
        return
    described = None if quantization is None else quantized.stored_config(quantization, "The model")
    state = model_weights.on_disk(model, model.state_dict() if quantization is None else quantized.state_of(model))
    _write(
        directory,
        storage_plan.Source(
            {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()},
            lambda name: state[name].detach().cpu().contiguous(),
        ),
        model_weights.find_linears(model),
        _config_of(model),
        structure,
        quantization=described,
        max_shard_size=storage_plan.parse_size(max_shard_size),
        metadata=known | metadata,
        recipe=recipe_text,
        extras=extras,
        progress=progress,
    )


def export_checkpoint(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    structure: str = "auto",
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Write a dense Hugging Face directory of a pruned model as a sparse checkpoint, without loading the model.

    The directory may be quantized to eight bits, as llm-compressor's `save_pretrained` writes it; see `save_sparse`.
    With structure="dense" it goes the other way: the source is sparse, and is written as the plain, perhaps quantized
    checkpoint that vLLM and transformers open by themselves.

    A few weights are in memory at a time. Every weight is read twice: once to count zeros, which fixes all sizes, once
    to write it. Tokenizer, chat template, generation config, recipe.yaml and the like come along.

    Args:
        source: a local directory with config.json and safetensors files.
        structure: as for `save_sparse`, or "dense".
        directory, max_shard_size, metadata, progress: see `save_sparse`; what the source says of its base model,
            adapter, calibration and figures is passed on.

    Raises:
        EfxError: as `save_sparse`; or the source is an adapter, not in safetensors, or has that structure already.
        SparseCheckpointError: a file of the source is missing or corrupt.
    """
    atomic.refuse_existing(directory)
    source = Path(source)
    if structure == dense.NAME:
        dense.export_dense(
            source,
            directory,
            max_shard_size=storage_plan.parse_size(max_shard_size),
            metadata=check_metadata(metadata),
            progress=progress,
        )
        return
    storage_plan.check_structure(structure)
    metadata = check_metadata(metadata)
    config = _read_source_config(source)
    quantization = quantized.of_config(config, source)
    described = None if quantization is None else quantized.stored_config(quantization, source)
    model_config = model_weights.read_model_config(source)
    skeleton = model_weights.skeleton(model_config)
    index = safetensors_file.read_index(source)
    aliases = _stored_twice(source, index, model_weights.tied_weights(skeleton))
    recipe = source / "recipe.yaml"
    weights = storage_plan.Source(
        {name: (stored.dtype, stored.shape) for name, stored in index.items() if name not in aliases},
        lambda name: safetensors_file.read_tensor(source, index[name]),
    )
    if quantization is not None:
        weights = quantized.unpack(weights)
    check_fit(skeleton, weights.layout, source)
    _write(
        directory,
        weights,
        model_weights.find_linears(skeleton),
        config,
        structure,
        quantization=described,
        max_shard_size=storage_plan.parse_size(max_shard_size),
        metadata=provenance.of_directory(source) | metadata,
        recipe=recipe.read_text() if recipe.is_file() else None,
        extras=lambda destination: shards.copy_companions(shards.companions(source), destination),
        progress=progress,
    )


def _write(
    directory: str | os.PathLike[str],
    source: storage_plan.Source,
    linears: model_weights.Linears,
    config: Mapping[str, Any],
    structure: str,
    *,
    quantization: Mapping[str, Any] | None,
    max_shard_size: int,
    metadata: Mapping[str, Any],
    recipe: str | None,
    extras: Callable[[Path], None],
    progress: bool,
) -> None:
    names = list(source.layout)
    size = {name: safetensors_file.nbytes(*described) for name, described in source.layout.items()}
    surveys: dict[str, storage_plan.Survey] = {}
    with shards.progress_bar("checking", sum(size.values()), progress) as bar:
        for name, found in zip(
            names,
            map_ahead(lambda name: storage_plan.survey(source, name, name in linears.weights), names),
            strict=True,
        ):
            bar.update(size[name])
            if found is not None:
                surveys[name] = found
    form, sparse = storage_plan.choose(structure, surveys)
    items = storage_plan.make_items(source.layout, surveys, form, sparse)
    needed = sum(item.nbytes for item in items)
    zeros = 1 - sum(surveys[name].nonzeros for name in sparse) / sum(
        surveys[name].rows * surveys[name].columns for name in sparse
    )
    ignore = {*linears.others, *(name.removesuffix(".weight") for name in set(surveys) - sparse)}

    with atomic.new_directory(directory, needed) as destination:
        with shards.progress_bar("writing", needed, progress) as bar:
            shards.write_shards(destination, source, storage_plan.make_shards(items, max_shard_size), bar.update)
        described = sparse_config(config, form, ignore, zeros, quantization)
        shards.write_json(destination / "config.json", described)
        extras(destination)
        shards.write_json(destination / shards.PROVENANCE_FILE, metadata)
        card = model_card(Path(directory).name, described, metadata, form, surveys, sparse, recipe)
        (destination / "README.md").write_text(card)


def _refuse_structure(structure: str) -> None:
    if structure != "auto":
        raise EfxError(
            f"{structure} stores weights of eight bits or more and the model has fewer: leave structure at auto"
        )


def _save_generation_config(config: "GenerationConfig", destination: Path) -> None:
    """transformers stores only what it finds consistent; a flag that contradicts another must not cost the weights."""
    try:
        config.save_pretrained(destination)
    except ValueError as error:
        config.to_json_file(destination / "generation_config.json")
        _LOGGER.warning(
            "The model's generation config is stored as it is, although transformers finds it invalid: correct "
            "generation_config.json (%s)",
            " ".join(str(error).split()),
        )


def _save_tokenizer(tokenizer: "PreTrainedTokenizerBase", destination: Path) -> None:
    """A tokenizer that cannot be stored must not cost the weights; what it wrote so far is taken away."""
    before = set(destination.iterdir())
    try:
        tokenizer.save_pretrained(destination)
    except OSError:  # the disk is full
        raise
    except Exception as error:  # whatever a tokenizer of some kind stumbles over
        for path in set(destination.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _LOGGER.warning(
            "The tokenizer is not among the files, because it cannot be stored (%s: %s): copy the base model's there",
            type(error).__name__,
            " ".join(str(error).split()),
        )


def _config_of(model: "PreTrainedModel") -> dict[str, Any]:
    """config.json as `save_pretrained` would write it."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    described: dict[str, Any] = json.loads(config.to_json_string())
    return described


def _read_source_config(source: Path) -> dict[str, Any]:
    if (source / shards.ADAPTER_CONFIG).is_file() and not shards.has_weights(source):
        raise EfxError(
            f"{source} is an adapter: merge it with efx_plugin.merge_adapters(model) and save the merged model"
        )
    if shards.has_adapter(source):
        raise EfxError(
            f"{source} holds a model and an adapter beside it: if the adapter is merged already, remove its files, "
            "else merge it with efx_plugin.merge_adapters(model) and save the merged model"
        )
    config = read_config(source)
    if sparsity_of(config) is not None:
        raise EfxError(f'{source} is stored sparsely already: structure="dense" takes the sparse compression off')
    quantization = config.get("quantization_config")
    by_llm_compressor = (
        isinstance(quantization, Mapping)
        and quantization.get("quant_method") == "compressed-tensors"
        and quantization.get("config_groups")
    )
    if quantizes(quantization) and not by_llm_compressor:
        raise EfxError(
            f"{source} is quantized, but not by llm-compressor: prune the original, with a recipe that quantizes too"
        )
    return config


def _stored_twice(
    source: Path, index: Mapping[str, safetensors_file.StoredTensor], tied: Mapping[str, str]
) -> frozenset[str]:
    """Tied weights that a directory holds under both names."""

    def raw(name: str) -> torch.Tensor:
        return safetensors_file.read_tensor(source, index[name]).reshape(-1).view(torch.uint8)

    return frozenset(
        alias
        for alias, weight in tied.items()
        if alias in index
        and weight in index
        and (index[alias].dtype, index[alias].shape) == (index[weight].dtype, index[weight].shape)
        and torch.equal(raw(alias), raw(weight))
    )


def _read_recipe(recipe: str | os.PathLike[str] | None) -> str | None:
    """The text of a recipe, given as text (which has line breaks) or as a path."""
    if recipe is None or (isinstance(recipe, str) and "\n" in recipe):
        return recipe
    try:
        return Path(recipe).read_text()
    except OSError as error:
        raise EfxError(f"the recipe {recipe} cannot be read: {error.strerror}") from error
