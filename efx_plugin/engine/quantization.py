"""Layers that are quantized as they are pruned, in the words of compressed-tensors, so that its tools know them.

A layer is described when the modifier starts and quantized when its decoder block is pruned. From then on it computes
as it will be served, activations included, and so do the inputs that later blocks are calibrated on.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    disable_quantization,
    enable_quantization,
)
from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import update_offload_parameter
from torch import Tensor

from efx_plugin.engine.arguments import Quantization
from efx_plugin.engine.blocks import PlannedBlock
from efx_plugin.errors import EfxError
from efx_plugin.method.quantize import Grid
from efx_plugin.model.adapters import LinearLayer
from efx_plugin.model.experts import expert_places

# Weights that share a scale at four bits: the first of these that divides the inputs of a layer.
GROUPS = (128, 64, 32)


def plan_grids(plans: Iterable[PlannedBlock], quantization: Quantization) -> dict[str, Grid]:
    """The grid of each layer of the blocks, by name.

    Raises:
        EfxError: a layer belongs to an expert, or has a number of inputs that no group divides.
    """
    grids = {}
    for plan in plans:
        if experts := expert_places(plan.block, plan.layers):
            raise EfxError(
                f"quantization {quantization!r} cannot be had for {next(iter(experts))}: experts are put together "
                "again after pruning, which loses their scales; add them to ignore, or leave quantization out"
            )
        for layer in plan.layers:
            weight = layer.base.weight
            dtype = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
            group = None if quantization.startswith("W8") else _group(layer, quantization)
            grids[layer.name] = Grid(8 if group is None else 4, group, dtype)
    return grids


def _group(layer: LinearLayer, quantization: Quantization) -> int:
    group = next((size for size in GROUPS if layer.base.in_features % size == 0), None)
    if group is None:
        raise EfxError(
            f"quantization {quantization!r} takes groups of {', '.join(map(str, GROUPS))} weights and none divides the "
            f"{layer.base.in_features} inputs of {layer.name}: add it to ignore, or choose W8A16"
        )
    return group


def describe_layers(layers: Mapping[str, LinearLayer], grids: Mapping[str, Grid], quantization: Quantization) -> None:
    """Give every layer its scheme, which is without effect until the layer is quantized.

    Raises:
        EfxError: an earlier modifier of the recipe has described a layer.
    """
    by_group = defaultdict[int | None, list[str]](list)
    for name, grid in grids.items():
        by_group[grid.group].append(name)
    for group, names in by_group.items():
        scheme = _scheme(group, ["Linear"] if len(by_group) == 1 else names, quantization)
        for name in names:
            base = layers[name].base
            if is_module_quantized(base):
                raise _twice(name)
            initialize_module_for_quantization(base, scheme, force_zero_point=False)
            disable_quantization(base)


def _scheme(group: int | None, targets: list[str], quantization: Quantization) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=8 if group is None else 4, strategy="channel" if group is None else "group", group_size=group
    )
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if quantization == "W8A8" else None
    return QuantizationScheme(targets=targets, weights=weights, input_activations=inputs)


def finish_layer(layer: LinearLayer, scales: Tensor) -> None:
    """Store the scales of a layer whose weight is on its grid, fp32 [out, groups], and let the scheme take effect."""
    base: Any = layer.base
    update_offload_parameter(base, "weight_scale", scales.to(base.weight_scale.dtype))
    base.quantization_status = QuantizationStatus.FROZEN
    enable_quantization(base)


def refuse_other_quantization(layers: Iterable[LinearLayer]) -> None:
    """Refuse a recipe in which a later modifier has described layers anew, which then have zero points.

    Raises:
        EfxError: it has.
    """
    for layer in layers:
        if hasattr(layer.base, "weight_zero_point"):
            raise _twice(layer.name)


def _twice(name: str) -> EfxError:
    return EfxError(
        f"{name} is to be quantized by EfficientXpertModifier and by another modifier of the recipe: leave one of the "
        "two out"
    )
