"""Everything that can be wrong with a request is found here, in seconds and before a weight is loaded."""

import math
import re
from dataclasses import dataclass
from typing import Any

import datasets
from compressed_tensors.utils import is_match
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.recipe import Recipe
from loguru import logger
from torch import nn
from transformers import PreTrainedTokenizerBase

from efx_plugin.checkpoint import quantized
from efx_plugin.checkpoint.formats.registry import find_format
from efx_plugin.checkpoint.storage.atomic import refuse_full
from efx_plugin.checkpoint.storage_plan import check_structure
from efx_plugin.compress.calibration import calibration_set
from efx_plugin.compress.experts import rehearse_experts
from efx_plugin.compress.request import PruneRequest
from efx_plugin.compress.zeros import check_order
from efx_plugin.engine.blocks import (
    layer_sparsities,
    linears_in_blocks,
    linears_outside_blocks,
    plan_blocks,
    warn_of_unprunable,
)
from efx_plugin.engine.compute_dtype import ComputeDtype, choose_compute_dtype, stored_dtype
from efx_plugin.engine.fisher import no_layer_allocation, obstacle_to_loss
from efx_plugin.engine.quantization import plan_grids
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.model.adapters import inner_model
from efx_plugin.model.loading import Sources, inspect_sources, vocabulary_size
from efx_plugin.modifier import EfficientXpertModifier


@dataclass(frozen=True)
class Prepared:
    """A request that was found fit.

    Attributes:
        sources: model and adapter, to be loaded.
        recipe: the modifiers, which leave alone what lies outside the decoder blocks.
        compute: the dtype to compute in.
        tokenizer: the adapter's or the model's.
        calibration: the calibration sequences.
    """

    sources: Sources
    recipe: Recipe
    compute: ComputeDtype
    tokenizer: PreTrainedTokenizerBase
    calibration: datasets.Dataset


def preflight(request: PruneRequest) -> Prepared:
    """Look at recipe, model, adapter, tokenizer, memory, data and disk, and say what is going to be done.

    Args:
        request: a checked one.

    Raises:
        UsageError: options contradict each other.
        EfxError: something is unfit.
    """
    recipe = request.recipe.instantiate()
    check_order(recipe)
    _check_structure(request.structure, recipe)
    sources = inspect_sources(request.model, request.adapter, trust_remote_code=request.trust_remote_code)
    for line in sources.describe():
        logger.info(line)
    stored = stored_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in sources.files.index.values())
    compute = choose_compute_dtype(*stored, request.compute_dtype)
    logger.info(compute.reason)
    leave_alone(recipe, linears_outside_blocks(sources.skeleton))
    network: Any = inner_model(sources.skeleton)
    if request.generate and not network.can_generate():
        raise UsageError(
            f"--generate asks the model for text, which a {type(network).__name__} does not write: leave it out"
        )
    refuse_full(request.output, _least_bytes(sources, recipe))
    rehearse_experts(sources.skeleton)
    warn_of_unprunable(sources.skeleton)
    for modifier in recipe.modifiers:
        _check_modifier(modifier, sources.skeleton)
    tokenizer = sources.tokenizer()
    calibration = calibration_set(
        request.dataset,
        tokenizer,
        samples=request.samples,
        length=request.length,
        vocabulary=vocabulary_size(network),
        text_field=request.text_field,
    )
    return Prepared(sources, recipe, compute, tokenizer, calibration)


def _check_structure(structure: str, recipe: Recipe) -> None:
    try:
        check_structure(structure)
    except EfxError as error:
        raise UsageError(f"--{error}") from error
    if structure == "auto":
        return
    wanted = find_format(structure, "--structure").structure
    pruned = {modifier.mask_structure for modifier in recipe.modifiers if hasattr(modifier, "mask_structure")}
    if wanted != "unstructured" and pruned == {"0:0"}:
        raise UsageError(
            f"--structure {structure} stores {wanted} sparsity and the recipe prunes unstructured: set its "
            f"mask_structure to {wanted}, or leave --structure at auto"
        )


def leave_alone(recipe: Recipe, layers: list[str]) -> None:
    """Have every modifier ignore these layers, which lie outside the decoder blocks."""
    if layers:
        logger.info(f"{len(layers)} linear layers outside the decoder blocks stay as they are, such as {layers[0]}")
    for modifier in recipe.modifiers:
        if hasattr(modifier, "ignore"):
            ignored = modifier.ignore or []
            # SparseGPT and Wanda put a full stop behind the names of layers that are targeted as "Linear".
            names = [rf"re:{re.escape(layer)}\.?$" for layer in layers]
            modifier.ignore = [*([ignored] if isinstance(ignored, str) else ignored), *names]


def _check_modifier(modifier: Modifier, skeleton: nn.Module) -> None:
    if isinstance(modifier, EfficientXpertModifier):
        plans = plan_blocks(skeleton, modifier)
        layer_sparsities([layer for plan in plans for layer in plan.layers], modifier)
        if modifier.quantization is not None:
            plan_grids(plans, modifier.quantization)
        model: Any = inner_model(skeleton)
        if modifier.allocation == "layer" and (reason := obstacle_to_loss(model, [{}])):
            raise no_layer_allocation(reason)  # text has no labels
        return
    if isinstance(modifier, QuantizationMixin):
        _check_quantization(modifier, skeleton)
    name, targets = type(modifier).__name__, getattr(modifier, "targets", None)
    if not 0 <= _sparsity(modifier) < 1:
        raise EfxError(f"{name} in the recipe has sparsity {modifier.sparsity}: set a fraction between 0 and 1")
    if targets and not any(is_match(path, module, targets) for path, module in inner_model(skeleton).named_modules()):
        raise EfxError(f"targets {targets} of {name} in the recipe match nothing in the model: correct them")


def _check_quantization(modifier: QuantizationMixin, skeleton: nn.Module) -> None:
    config = quantized.with_formats(modifier.resolved_config)
    made = "the model that this recipe makes"
    if quantized.is_narrow(config):
        quantized.refuse_unpacked(config, made)
    else:
        quantized.stored_config(config, made)
    for scheme in config.config_groups.values():
        size = scheme.weights.group_size if scheme.weights is not None else None
        if size is None or size < 1:
            continue
        for layer in linears_in_blocks(skeleton):
            matches = is_match(layer.name, layer.base, scheme.targets, ignore=modifier.ignore)
            if matches and layer.base.in_features % size:
                raise EfxError(
                    f"{type(modifier).__name__} in the recipe quantizes groups of {size} weights, which do not divide "
                    f"the {layer.base.in_features} inputs of {layer.name}: choose another group_size or a scheme by "
                    "channel, or add the layer to ignore"
                )


def _least_bytes(sources: Sources, recipe: Recipe) -> int:
    """Bytes that the expert takes at least: a bit for every weight that may be pruned, and the values that are kept."""
    whole = sum(tensor.nbytes for tensor in sources.files.index.values())
    prunable = [layer.base.weight for layer in linears_in_blocks(sources.skeleton)]
    kept = 1 - max((_sparsity(modifier) for modifier in recipe.modifiers), default=0.0)
    to_bytes = any(
        isinstance(modifier, QuantizationMixin) or getattr(modifier, "quantization", None) is not None
        for modifier in recipe.modifiers
    )
    least = sum(
        weight.numel() / 8 + kept * weight.numel() * (0.5 if to_bytes else weight.element_size()) for weight in prunable
    )
    return max(0, whole - sum(weight.nbytes for weight in prunable)) + int(least)


def _sparsity(modifier: Modifier) -> float:
    """The largest fraction of any layer that a modifier prunes."""
    sparsity: Any = getattr(modifier, "sparsity", None) or 0.0
    if isinstance(sparsity, dict | list):
        return float(max(sparsity.values() if isinstance(sparsity, dict) else sparsity))
    return float(sparsity)
