"""One decoder block, from calibration hooks to pruned and repaired weights: what happens in which order.

Where there are several processes, each decides on some of the layers for all of them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.blocks import PlannedBlock, layer_sparsities
from efx_plugin.engine.calibration import BlockCalibration
from efx_plugin.engine.decide import (
    Decision,
    Evidence,
    RunningScores,
    choose_mask,
    compete_for_masks,
    compete_for_shares,
    decide,
    layer_scores,
    swap,
)
from efx_plugin.engine.dense_stream import DenseStream
from efx_plugin.engine.distributed import broadcast, world
from efx_plugin.engine.memory import return_freed_memory
from efx_plugin.engine.quantization import finish_layer
from efx_plugin.engine.report import PrunedLayer, pruned_layer
from efx_plugin.method.permutation import channel_order
from efx_plugin.method.quantize import Grid
from efx_plugin.model.adapters import LinearLayer, absorb, effective_weight, stacked_adapter
from efx_plugin.model.channels import FreeChannels, Reordered, reorder
from efx_plugin.model.hooks import RegisterHook, TokenMask, every_token

# Stores a decision in the model.
Store = Callable[[LinearLayer, Decision], None]
# The mask of a layer, bool [out, in], True where a weight is kept.
MaskOf = Callable[[LinearLayer], Tensor]


def store_in_base(layer: LinearLayer, decision: Decision) -> None:
    """Store the pruned weight in the base layer, with its scales where it is quantized, and empty its adapters."""
    absorb(layer, decision.weight)
    if decision.scales is not None:
        finish_layer(layer, decision.scales)


class BlockPruner:
    """Calibrates and prunes the targeted linear layers of one decoder block.

    Args:
        model: the transformers model.
        plan: the block.
        arguments: how to prune.
        sparsities: fraction to prune by name of the layer; None takes those of the arguments.
        token_mask: which tokens to calibrate on.
        sensitivities: c, fp32 [out], by name of the layer where they were measured beforehand, as "fisher" is; None
            measures them here, and "fisher" then falls back to "block".
        running: running scores to average the new ones into, kept by the caller; None takes the new scores alone.
        masks: the masks where they are decided already; None decides on them here.
        grids: by name of the layer what its weights are quantized to; None quantizes none.
        dense: the dense model's hidden states, where the repair wants its outputs; None takes the targets of the
            repair from the inputs that reach the block.
        channels: to be put into an order that N:M pruning loses less in; none stay as they are.

    Attributes:
        plan: the block.
        arguments: how it is pruned.
        reordered: after `prune`, the layers whose channels are in another order, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PlannedBlock,
        arguments: PruningArguments,
        *,
        sparsities: Mapping[str, float] | None = None,
        token_mask: TokenMask = every_token,
        sensitivities: Mapping[str, Tensor] | None = None,
        running: RunningScores | None = None,
        masks: MaskOf | None = None,
        grids: Mapping[str, Grid] | None = None,
        dense: DenseStream | None = None,
        channels: Sequence[FreeChannels] = (),
    ):
        self.plan, self.arguments = plan, arguments
        self._grids = grids or {}
        self._sparsities = layer_sparsities(plan.layers, arguments) if sparsities is None else sparsities
        self._running, self._masks = running, masks
        self._dense = dense
        self._channels = channels
        self.reordered: dict[str, Reordered] = {}
        self._calibration = BlockCalibration(
            model, plan, arguments, token_mask=token_mask, sensitivities=sensitivities, dense=dense
        )

    @property
    def calibrated(self) -> bool:
        return self._calibration.has_data

    def attach(self, register: RegisterHook) -> None:
        """Hook the block; `register(module, hook, hook_type, **kwargs)` as llm-compressor's HooksMixin has it."""
        self._calibration.attach(register)

    @torch.no_grad()
    def prune(self, progress: str | None = None, store: Store = store_in_base) -> list[PrunedLayer]:
        """Score, mask, repair and store every layer; the statistics are freed.

        Of several processes each has to call it, at the same point.

        Args:
            progress: label of the progress bar; None shows none.
            store: where decisions go.

        Raises:
            EfxError: a layer saw no calibration data, or its statistics are not finite.
        """
        evidence = self._calibration.finish()
        for channels in self._channels:
            self._reorder(channels, evidence[channels.reader.name])
        masks, sparsities = self._compete(evidence)
        rank, processes = world()
        results = []
        layers = self.plan.layers if progress is None else tqdm(self.plan.layers, desc=progress)
        for index, layer in enumerate(layers):
            found = evidence.pop(layer.name)
            weight, adapter = effective_weight(layer), stacked_adapter(layer) if self.arguments.uses_adapter else None
            keep = masks.pop(layer.name, None)
            owner = index % processes
            if rank == owner:
                if keep is None:
                    keep = choose_mask(self.arguments, layer.name, weight, found, sparsities[layer.name], self._running)
                if self._masks is None:
                    keep = swap(self.arguments, layer.name, weight, keep, found)
                decision = decide(self.arguments, layer.name, weight, keep, found, adapter, self._grids.get(layer.name))
            else:
                decision = self._blank(layer.name, weight, adapter)
            self._broadcast(layer, decision, owner)
            del weight, found
            store(layer, decision)
            results.append(pruned_layer(layer.name, decision.keep, decision.errors))
        if self._dense is not None:
            self._dense.parted = True
        return_freed_memory()
        return results

    def _reorder(self, channels: FreeChannels, evidence: Evidence) -> None:
        """Put channels into the order in which the layer that reads them loses least."""
        assert self.arguments.n_of_m is not None
        if evidence.starved:
            return
        scores = channels.by_head(layer_scores(self.arguments, effective_weight(channels.reader), evidence))
        order = torch.stack([channel_order(of_head, *self.arguments.n_of_m) for of_head in scores])
        broadcast(order, 0)
        changed = reorder(channels, order)
        evidence.known.reorder(changed[channels.reader.name].index)
        self.reordered.update(changed)

    def _compete(self, evidence: Mapping[str, Evidence]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Masks, where matrices compete for every entry, and sparsities, where they may compete for their shares."""
        arguments, masks, sparsities = self.arguments, dict[str, Tensor](), dict(self._sparsities)
        if self._masks is not None:
            return {layer.name: self._masks(layer).to(layer.base.weight.device) for layer in self.plan.layers}, {}
        by_entry = arguments.comparison_group == "block"
        if arguments.n_of_m is not None or (arguments.allocation == "uniform" and not by_entry):
            return masks, sparsities
        for sparsity in dict.fromkeys(self._sparsities.values()):
            layers = [
                layer
                for layer in self.plan.layers
                if self._sparsities[layer.name] == sparsity and not evidence[layer.name].starved
            ]
            if not layers:
                continue
            names = [layer.name for layer in layers]
            scores = [layer_scores(arguments, effective_weight(layer), evidence[layer.name]) for layer in layers]
            if by_entry:
                found = compete_for_masks(arguments, names, scores, sparsity, self._running)
                for name, keep in zip(names, found, strict=True):
                    broadcast(keep, 0)
                    masks[name] = keep
            else:
                shares = torch.tensor(compete_for_shares(arguments, scores, sparsity), dtype=torch.float64)
                broadcast(shares, 0)
                sparsities |= dict(zip(names, shares.tolist(), strict=True))
        return masks, sparsities

    def _blank(self, name: str, weight: Tensor, adapter: Tensor | None) -> Decision:
        """Empty tensors that the decision of another process is received in."""
        update = None if adapter is None else weight.new_empty(len(weight), len(adapter))
        keep, scales = torch.empty_like(weight, dtype=torch.bool), None
        if (grid := self._grids.get(name)) is not None:
            scales = weight.new_empty(len(weight), weight.shape[1] // grid.width(weight.shape[1]))
        return Decision(keep, torch.empty_like(weight), update, torch.empty(3), scales)

    def _broadcast(self, layer: LinearLayer, decision: Decision, owner: int) -> None:
        if world()[1] == 1:
            return
        tensors = [decision.keep, decision.weight]
        tensors += [tensor for tensor in (decision.update, decision.scales) if tensor is not None]
        if self._running is not None and self.arguments.comparison_group != "block":
            tensors.append(self._running.of(layer.name, decision.weight))
        # nccl sends from the device only.
        errors = decision.errors.to(decision.weight.device)
        for tensor in (*tensors, errors):
            broadcast(tensor, owner)
        decision.errors.copy_(errors)
