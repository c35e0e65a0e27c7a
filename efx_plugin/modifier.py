"""EfficientXpertModifier: llm-compressor's life cycle onto the pruning engine."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier, ModifierFactory
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from pydantic import PrivateAttr, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from efx_plugin.engine.arguments import PruningArguments, Quantization
from efx_plugin.engine.block_pruner import BlockPruner
from efx_plugin.engine.blocks import (
    PlannedBlock,
    allocate_over_blocks,
    decoder_blocks,
    layer_sparsities,
    plan_blocks,
)
from efx_plugin.engine.compute_dtype import warn_of_slow_dtype
from efx_plugin.engine.dense_stream import DenseStream, obstacle_to_dense_stream
from efx_plugin.engine.distributed import gather_objects, world
from efx_plugin.engine.fisher import Fisher, measure_fisher, no_layer_allocation, obstacle_to_loss
from efx_plugin.engine.quantization import describe_layers, plan_grids, refuse_other_quantization
from efx_plugin.engine.report import PrunedLayer, summary
from efx_plugin.engine.zeros import pack_mask, restore_zeros
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import LinearLayer, inner_model
from efx_plugin.model.architectures import block_map
from efx_plugin.model.channels import FreeChannels, Reordered, free_channels

# A block's sparsity may miss the target by this much before pruning counts as failed.
SPARSITY_TOLERANCE = 0.002


class EfficientXpertModifier(PruningArguments, Modifier):
    """Prunes a model, with its LoRA adapters merged in, for the domain of the calibration data (arXiv 2511.19935).

    Sample yaml:

    ```yaml
    prune_stage:
      pruning_modifiers:
        EfficientXpertModifier:
          sparsity: 0.5
          mask_structure: "0:0"
          targets: ["Linear"]
          ignore: ["lm_head"]
    ```

    The model may be plain, a PeftModel, or the model inside a PeftModel; `peft_model.base_model.model` is the one to
    pass to `oneshot`, because llm-compressor cannot split a PeftModel into blocks and then calibrates every block on
    the unpruned model. Weights are scored, masked and repaired with their adapters merged; afterwards the adapters add
    nothing, and `merge_adapters(peft_model)` or PEFT's own `merge_and_unload` returns the model with its zeros.

    With `quantization` each layer is quantized as soon as it is repaired. Rounding errors are made up for by kept
    weights alone, and later blocks are calibrated on what the quantized ones before them give.

    Instead, `QuantizationModifier` or `GPTQModifier` may follow in the recipe. GPTQ moves rounding errors onto other
    weights of a row, pruned ones among them; what it put there is taken back, and the log says how much it was.

    Lifecycle:
        - on_initialize: find targets and adapters, check the model
        - on_calibration_start: hook every decoder block
        - on_sequential_epoch_end: prune the blocks that have seen data
        - on_calibration_end: remove hooks
        - on_finalize: take back what quantization put in place of zeros, check that every targeted layer was pruned
          and that the zeros are there

    Args: those of `PruningArguments`, and

        quantization: what to quantize the pruned layers to, symmetrically: "W8A8" (8-bit weights, a scale for each row;
            8-bit activations, a scale for each token), "W8A16" (8-bit weights, a scale for each row) or "W4A16" (4-bit
            weights, a scale for each 128 of a row; for 64 or 32 where 128 do not divide it). None leaves them as they
            are.
        channel_permutation: with N:M structure, first put the channels inside each decoder block into an order in which
            important ones do not meet among the same M: those between gate, up and down of an MLP, and those of each
            head between v and o. The model computes the same in any order, and is served as fast; adapters that were
            trained on it before no longer fit it. Where the architecture is not among
            `efx_plugin.model.architectures.PROPAGATION_MAPS`, channels stay as they are, and the log says so.
        preserve_sparsity_mask: prune nothing anew, quantize a model that is sparse already, after training under a mask
            perhaps. The zeros that its layers have stay, and the arguments that choose them are without effect. With
            `dense_targets` kept weights make up for the rounding of earlier blocks as well (after GPTAQ, arXiv
            2504.02692); without, there is nothing to repair.

    Attributes:
        report: after `oneshot`, what became of each layer.
        reordered: after `oneshot`, the layers whose channels are in another order than before, by name.
    """

    requires_calibration_data: bool = True
    quantization: Quantization | None = None
    channel_permutation: bool = False
    preserve_sparsity_mask: bool = False

    _pruners: list[BlockPruner] = PrivateAttr(default_factory=list)
    _results: dict[str, list[PrunedLayer]] = PrivateAttr(default_factory=dict)
    _report: list[PrunedLayer] = PrivateAttr(default_factory=list)
    _reordered: dict[str, Reordered] = PrivateAttr(default_factory=dict)
    _layers: dict[str, LinearLayer] = PrivateAttr(default_factory=dict)
    _sparsities: dict[str, float] = PrivateAttr(default_factory=dict)
    # Of layers that are going to be quantized: which weights were kept, a bit each.
    _kept: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _dense: DenseStream | None = PrivateAttr(default=None)
    _state: State | None = PrivateAttr(default=None)

    @property
    def report(self) -> list[PrunedLayer]:
        """What became of each layer, in the model's order; empty until `on_finalize`."""
        return self._report

    @property
    def reordered(self) -> dict[str, Reordered]:
        """Empty until `on_finalize`, and without `channel_permutation`."""
        return self._reordered

    @property
    def uses_grams(self) -> bool:
        return super().uses_grams or self.quantization is not None

    @model_validator(mode="after")
    def _check_something_is_done(self) -> "EfficientXpertModifier":
        if self.preserve_sparsity_mask and self.quantization is None:
            raise EfxError(
                "preserve_sparsity_mask leaves the pruned weights as they are, and nothing is quantized: set "
                "quantization, or leave preserve_sparsity_mask out to prune"
            )
        if self.channel_permutation and (self.n_of_m is None or self.preserve_sparsity_mask):
            raise EfxError(
                "channel_permutation puts channels into an order that a new mask of N:M structure loses less in: set "
                "mask_structure, such as '2:4', and leave preserve_sparsity_mask out; or leave channel_permutation out"
            )
        if self.preserve_sparsity_mask and self.swap_rounds:
            raise EfxError(
                "preserve_sparsity_mask keeps the masks as they are and swap_rounds would change them: leave one out"
            )
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        if state.data is None or state.data.calib is None:
            raise EfxError("EfficientXpertModifier needs calibration data: pass dataset=... to oneshot")
        self._state = state
        warn_of_slow_dtype(
            state.model, "load it with dtype=torch.float32 and save it with save_sparse(model.to(torch.bfloat16), ...)"
        )
        _warn_of_equal_data(state.data.calib)
        plans = plan_blocks(state.model, self, kwargs.get("sequential_targets"))
        self._layers = {layer.name: layer for plan in plans for layer in plan.layers}
        model: Any = inner_model(state.model)
        fisher = None
        if self.preserve_sparsity_mask:
            self._sparsities = _present_sparsities(self._layers)
        else:
            fisher = self._measure_fisher(model, state.data.calib)
            self._sparsities = layer_sparsities(list(self._layers.values()), self)
            if self.allocation == "layer":
                assert fisher is not None  # else it has been refused
                self._sparsities = allocate_over_blocks(plans, self, fisher.sensitivities, fisher.energies)
        self._dense = self._dense_stream(model, plans, state.data.calib)
        arguments: PruningArguments = self
        if self.preserve_sparsity_mask and self._dense is None:
            arguments = self.model_copy(update={"repair": "none"})
        grids = None
        if self.quantization is not None:
            grids = plan_grids(plans, self.quantization)
            describe_layers(self._layers, grids, self.quantization)
        channels = self._channels(model, plans)
        self._pruners = [
            BlockPruner(
                model,
                plan,
                arguments,
                sparsities=self._sparsities,
                token_mask=self._token_mask,
                sensitivities=None if fisher is None else fisher.sensitivities,
                masks=_present_mask if self.preserve_sparsity_mask else None,
                grids=grids,
                dense=self._dense,
                channels=channels.get(plan.name, []),
            )
            for plan in plans
        ]
        return True

    def _channels(self, model: nn.Module, plans: list[PlannedBlock]) -> dict[str, list[FreeChannels]]:
        """The channels to put into another order, by name of the decoder block; none where the architecture is not
        known."""
        if not self.channel_permutation or self.n_of_m is None:
            return {}
        found: dict[str, list[FreeChannels]] = {}
        remedy = "channel_permutation leaves its channels as they are"
        try:
            for plan in plans:
                known = free_channels(block_map(model, plan.name, plan.layers + plan.others, remedy=remedy))
                names = {layer.name for layer in plan.layers}
                found[plan.name] = [
                    one for one in known if one.reader.name in names and one.width % self.n_of_m[1] == 0
                ]
        except EfxError as error:
            logger.warning(str(error))
            return {}
        return found

    def _measure_fisher(self, model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Fisher | None:
        """None where propagation "fisher" is not asked for, cannot change a mask, or has to fall back to "block".

        Raises:
            EfxError: it cannot be measured, and allocation "layer" cannot do without.
        """
        if self.propagation != "fisher" or not self.uses_propagation:
            return None
        offloaded = any(parameter.is_meta for parameter in model.parameters()) or any(
            isinstance(module._parameters, OffloadCache) or hasattr(module, "_hf_hook") for module in model.modules()
        )
        reason = "the model is offloaded" if offloaded else obstacle_to_loss(model, batches)
        if reason is None:
            try:
                return measure_fisher(model, list(self._layers.values()), batches, self.propagation_tokens)
            except torch.OutOfMemoryError:
                reason = "a backward pass through the model does not fit into memory"
        if self.allocation == "layer":
            raise no_layer_allocation(reason)
        logger.warning(f"{reason}, so propagation 'fisher' falls back to 'block'")
        return None

    def _dense_stream(
        self, model: PreTrainedModel, plans: list[PlannedBlock], batches: Iterable[dict[str, Tensor]]
    ) -> DenseStream | None:
        """None where the repair does not want the dense model's outputs, or cannot have them."""
        if not self.uses_dense_model:
            return None
        blocks = decoder_blocks(model)
        if not {plan.name for plan in plans} <= blocks.keys():
            reason: str | None = "sequential_targets are not the model's decoder blocks"
        else:
            reason = obstacle_to_dense_stream(model, blocks, next(iter(batches)))
        if reason is None:
            return DenseStream(blocks, {plan.name for plan in plans}, HooksMixin.disable_hooks)
        logger.warning(f"{reason}, so dense_targets falls back to 0")
        return None

    def _token_mask(self) -> Tensor | None:
        state: Any = self._state
        if not (masks := getattr(state, "loss_masks", None)):
            return None
        mask: Tensor = masks[state.current_batch_idx].bool()
        return mask

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.quantization is not None:
            refuse_other_quantization(self._layers.values())
        for pruner in self._pruners:
            pruner.attach(self.register_hook)
        if self._dense is not None:
            self._dense.attach(self.register_hook)

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any) -> None:
        # Whoever has seen data is pruned: `modules` is empty when llm-compressor traces a PeftModel.
        ready = [pruner for pruner in self._pruners if pruner.calibrated]
        if len(ready) > 1:
            logger.warning(
                f"{len(ready)} blocks were calibrated in one pass, each before the others were pruned; the sequential "
                "pipeline gives a better expert (with PEFT, pass peft_model.base_model.model to oneshot)"
            )
        for pruner in ready:
            index = self._pruners.index(pruner) + 1
            work = "Quantizing" if self.preserve_sparsity_mask else "Pruning"
            results = pruner.prune(progress=f"({index}/{len(self._pruners)}): {work} {pruner.plan.name}")
            self._results[pruner.plan.name] = results
            for layer in pruner.plan.layers:
                if is_module_quantized(layer.base):
                    self._kept[layer.name] = pack_mask(layer.base.weight != 0)
            logger.info(f"{pruner.plan.name}: {summary(results)}")

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        for pruner in self._pruners:
            if pruner.plan.name not in self._results:
                raise EfxError(
                    f"{pruner.plan.name} was never calibrated, so nothing in it was pruned: use oneshot's pipeline "
                    "'sequential' or 'basic' with a dataset that is not empty"
                )
        self._take_back_refills()
        for name, results in self._results.items():
            self._check_zeros(name, results)
        self._reordered = {name: one for pruner in self._pruners for name, one in pruner.reordered.items()}
        every = [result for results in self._results.values() for result in results]
        self._report = every
        done = "quantized" if self.preserve_sparsity_mask else "pruned"
        logger.info(
            f"EfficientXpertModifier {done} {len(every)} layers in {len(self._results)} blocks: {summary(every)}"
        )
        self._pruners, self._layers, self._results, self._kept = [], {}, {}, {}
        self._dense = self._state = None
        return True

    def _take_back_refills(self) -> None:
        refilled, zeros = restore_zeros({name: layer.base for name, layer in self._layers.items()}, self._kept)
        if refilled:
            logger.warning(
                f"quantization had filled {refilled:,} of {zeros:,} pruned weights ({refilled / zeros:.2%}); "
                "they are zero again"
            )

    def _check_zeros(self, block: str, results: list[PrunedLayer]) -> None:
        zeros = {result.name: int((self._layers[result.name].base.weight == 0).sum()) for result in results}
        for result in results:
            if zeros[result.name] < result.zeros:
                raise EfxError(
                    f"{result.name} had {result.zeros} zeros after pruning and has {zeros[result.name]} now: no later "
                    "modifier of the recipe may write to pruned weights"
                )
            if zeros[result.name] == 0 and not self.preserve_sparsity_mask:
                logger.warning(f"{result.name} lost no weight: every one of its scores is above the block's threshold")
        size = sum(result.size for result in results)
        achieved = sum(zeros.values()) / size
        # A row or group of M loses a whole number of weights, which in tiny layers misses the fraction by more.
        slack = SPARSITY_TOLERANCE + sum(self._layers[result.name].base.out_features for result in results) / size
        target = sum(self._sparsities[result.name] * result.size for result in results) / size
        if achieved < target - slack:
            raise EfxError(f"{block} has sparsity {achieved:.4f} after pruning, not {target:.4f}: check the log above")


def _present_mask(layer: LinearLayer) -> Tensor:
    return layer.base.weight != 0


def _present_sparsities(layers: Mapping[str, LinearLayer]) -> dict[str, float]:
    """The fraction of zeros in each layer.

    Raises:
        EfxError: no layer has any.
    """
    kept = {name: int(_present_mask(layer).sum()) for name, layer in layers.items()}
    sizes = {name: layer.base.weight.numel() for name, layer in layers.items()}
    if kept == sizes:
        raise EfxError(
            "preserve_sparsity_mask keeps the zeros of a sparse model and this one has none in its targets: prune it "
            "first, or leave preserve_sparsity_mask out"
        )
    return {name: 1 - kept[name] / size for name, size in sizes.items()}


def _warn_of_equal_data(batches: Iterable[dict[str, Tensor]]) -> None:
    if world()[1] == 1:
        return
    first = next(iter(batches), {}).get("input_ids")
    shown = gather_objects(None if first is None else first.tolist())
    if first is not None and all(one == shown[0] for one in shown):
        logger.warning(
            f"all {len(shown)} processes start with the same calibration data: llm-compressor 0.14 gives each process "
            "the first share of a dataset that all of them pass, so pass each its own, such as dataset[rank::processes]"
        )


ModifierFactory.register("EfficientXpertModifier", EfficientXpertModifier)
