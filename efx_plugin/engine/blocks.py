"""Which linear layers of which decoder blocks are to be pruned, and how much of each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.utils import is_match
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.errors import EfxError
from efx_plugin.method.allocation import ScoreCounts
from efx_plugin.method.scores import foresight_scores, wanda_saliency
from efx_plugin.model.adapters import LinearLayer, active_adapters, effective_weight, inner_model, linear_layers

# Nobody needs to hear of a smaller part of the decoder blocks that cannot be pruned.
_SAID = 0.02


@dataclass(frozen=True)
class PlannedBlock:
    """A decoder block to prune.

    Attributes:
        name: name of the block in the model without adapters.
        block: the decoder block.
        layers: its linear layers to prune.
        others: its other linear layers.
    """

    name: str
    block: nn.Module
    layers: list[LinearLayer]
    others: list[LinearLayer]


def plan_blocks(
    model: nn.Module, arguments: PruningArguments, block_classes: str | list[str] | None = None
) -> list[PlannedBlock]:
    """The decoder blocks of a model, in order, that hold targeted layers.

    A target that is a class or an expression, such as "Linear", means layers in the decoder blocks: classification
    heads, and vision towers and projectors of vision-language models, stay as they are, and the log says so.

    Args:
        model: a transformers model or a PeftModel around one, perhaps without weights, on the meta device.
        arguments: their targets and ignore choose the layers.
        block_classes: class of the decoder blocks; None takes the model's own declaration.

    Raises:
        EfxError: no layer is targeted, one outside the decoder blocks is targeted by name, no blocks are found, a
            weight is not finite, its width does not suit the mask structure, or it has no adapter and the repair moves
            one.
    """
    inner = inner_model(model)
    layers = linear_layers(model)
    targeted = [
        layer for layer in layers if is_match(layer.name, layer.base, arguments.targets, ignore=arguments.ignore)
    ]
    if not targeted:
        raise EfxError(
            f"targets {arguments.targets} with ignore {arguments.ignore} match no linear layer of "
            f"{type(inner).__name__}, which has {_examples(layers)}: correct targets or ignore"
        )
    if arguments.comparison_group == "block" and arguments.propagation == "activation" and arguments.n_of_m is None:
        logger.warning(
            "propagation 'activation' gives q and k another unit than the other matrices; comparison_group 'matrix' "
            "suits it better than 'block'"
        )
    blocks = decoder_blocks(inner, block_classes)
    targeted = _inside(targeted, blocks, arguments, inner)
    for layer in targeted:
        if not layer.base.weight.is_meta and not torch.isfinite(layer.base.weight).all():
            raise EfxError(f"the weight of {layer.name} contains NaN or infinity: the model is damaged, load it anew")
        if arguments.n_of_m is not None and layer.base.in_features % arguments.n_of_m[1]:
            raise EfxError(
                f"mask_structure {arguments.mask_structure!r} does not divide the {layer.base.in_features} inputs of "
                f"{layer.name}: add it to ignore"
            )
        if arguments.uses_adapter and not active_adapters(layer):
            raise EfxError(
                f"repair {arguments.repair!r} moves a LoRA adapter and {layer.name} has none that is active and not "
                "merged: pass the adapter, add the layer to ignore, or set repair to 'weights'"
            )
    plans, names = [], {layer.name for layer in targeted}
    for name, block in blocks.items():
        inside = [layer for layer in layers if layer.name.startswith(name + ".")]
        chosen = [layer for layer in inside if layer.name in names]
        if chosen:
            plans.append(PlannedBlock(name, block, chosen, [layer for layer in inside if layer.name not in names]))
    return plans


def _inside(
    targeted: list[LinearLayer], blocks: Mapping[str, nn.Module], arguments: PruningArguments, model: nn.Module
) -> list[LinearLayer]:
    prefixes = tuple(name + "." for name in blocks)
    inside = [layer for layer in targeted if layer.name.startswith(prefixes)]
    outside = [layer for layer in targeted if not layer.name.startswith(prefixes)]
    # The output layer of a vision-language model may lie deeper than a recipe's `ignore: [lm_head]` reaches.
    ignored = {arguments.ignore} if isinstance(arguments.ignore, str) else set(arguments.ignore)
    outside = [layer for layer in outside if layer.name.rpartition(".")[2] not in ignored]
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for layer in outside:
        if layer.module is head or layer.name in arguments.targets:
            raise EfxError(
                f"{layer.name} is targeted but lies outside the decoder blocks of {type(model).__name__}: "
                "add it to ignore"
            )
    if not inside:
        raise EfxError(
            f"targets {arguments.targets} with ignore {arguments.ignore} match no linear layer in the decoder blocks "
            f"of {type(model).__name__}: correct targets or ignore"
        )
    if outside:
        logger.warning(
            f"{len(outside)} linear layers outside the decoder blocks stay as they are, such as {outside[0].name}"
        )
    return inside


def linears_outside_blocks(model: nn.Module) -> list[str]:
    """Linear layers that are no language model's: classification heads, vision towers, projectors.

    Raises:
        EfxError: no decoder blocks are found, or no linear layer in them.
    """
    inner = inner_model(model)
    prefixes = tuple(name + "." for name in decoder_blocks(inner))
    head = inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None
    layers = linear_layers(inner)
    outside = [layer for layer in layers if not layer.name.startswith(prefixes)]
    if len(outside) == len(layers):
        raise EfxError(
            f"{type(inner).__name__} has no torch.nn.Linear in its decoder blocks, so targets match no linear layer "
            "(GPT-2 has Conv1D instead): such a model cannot be pruned here"
        )
    return [layer.name for layer in outside if layer.module is not head]


def linears_in_blocks(model: nn.Module) -> list[LinearLayer]:
    """Linear layers inside the decoder blocks, in order: what "Linear" targets.

    Raises:
        EfxError: no decoder blocks are found.
    """
    prefixes = tuple(f"{name}." for name in decoder_blocks(inner_model(model)))
    return [layer for layer in linear_layers(model) if layer.name.startswith(prefixes)]


def warn_of_unprunable(model: nn.Module) -> None:
    """Say where much of the decoder blocks is in no linear layer, such as experts that are one tensor."""
    inner = inner_model(model)
    linear = {id(layer.base.weight) for layer in linears_in_blocks(model)}
    prefixes = tuple(f"{name}." for name in decoder_blocks(inner))
    sizes = {
        name: weight.numel()
        for name, weight in inner.named_parameters()
        if name.startswith(prefixes) and weight.ndim > 1 and ".lora_" not in name
    }
    others = [name for name, weight in inner.named_parameters() if name in sizes and id(weight) not in linear]
    share = sum(sizes[name] for name in others) / sum(sizes.values())
    if share > _SAID:
        logger.warning(
            f"{share:.0%} of the weights in the decoder blocks are in no torch.nn.Linear and stay as they are, such as "
            f"{max(others, key=lambda name: sizes[name])}"
        )


def decoder_blocks(model: nn.Module, block_classes: str | list[str] | None = None) -> dict[str, nn.Module]:
    """The decoder blocks of a transformers model by name, in order; of a vision-language model those of its language
    model.

    Raises:
        EfxError: none are found.
    """
    # Importing llm-compressor registers the modifier, which imports this module.
    from llmcompressor.utils.pytorch.module import infer_sequential_targets

    try:
        targets = infer_sequential_targets(model, block_classes)
    except (AttributeError, TypeError):
        targets = []
    decoder = set(model.get_decoder().modules()) if isinstance(model, PreTrainedModel) else set(model.modules())
    blocks = {
        name: module
        for name, module in model.named_modules()
        if name and module in decoder and is_match(name, module, targets)
    }
    # A LoRA wrapper or a nested match is no block of its own.
    blocks = {
        name: block for name, block in blocks.items() if not any(name.startswith(other + ".") for other in blocks)
    }
    if not blocks:
        raise EfxError(
            f"{type(model).__name__} is an unknown architecture: no decoder blocks found in it; name their class in "
            "oneshot's sequential_targets"
        )
    return blocks


def layer_sparsities(layers: list[LinearLayer], arguments: PruningArguments) -> dict[str, float]:
    """The sparsity that the arguments give to each layer by name.

    Raises:
        EfxError: a layer matches no key of a mapping.
    """
    if not isinstance(arguments.sparsity, dict):
        return {layer.name: arguments.sparsity for layer in layers}
    found = {}
    for layer in layers:
        matches = (value for key, value in arguments.sparsity.items() if is_match(layer.name, layer.base, key))
        if (value := next(matches, None)) is None:
            raise EfxError(
                f"no key of sparsity {arguments.sparsity} matches {layer.name}: add one, or ignore the layer"
            )
        found[layer.name] = value
    return found


def allocate_over_blocks(
    plans: list[PlannedBlock],
    arguments: PruningArguments,
    sensitivities: Mapping[str, Tensor],
    energies: Mapping[str, Tensor],
) -> dict[str, float]:
    """Allocation "layer": for each layer by name, the fraction that its decoder block loses when all blocks compete.

    Args:
        plans: the blocks.
        arguments: their sparsity is that of the whole.
        sensitivities: Fisher c of every layer, fp32 [out].
        energies: E[x²] of every layer's inputs, fp32 [in].
    """
    assert isinstance(arguments.sparsity, float)  # PruningArguments refuses a mapping
    counts = ScoreCounts(arguments.sparsity, arguments.floor)
    for plan in plans:
        for layer in plan.layers:
            saliency = wanda_saliency(effective_weight(layer), energies[layer.name])
            counts.add(plan.name, foresight_scores(saliency, sensitivities[layer.name]))
    of_block = counts.sparsities()
    return {layer.name: of_block[plan.name] for plan in plans for layer in plan.layers}


def _examples(layers: list[LinearLayer]) -> str:
    if not layers:
        return "no torch.nn.Linear at all"
    return f"{len(layers)} of them, such as {layers[0].name}"
