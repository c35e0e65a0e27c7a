"""EfficientXpertModifier: llm-compressor's life cycle onto the pruning engine."""

import difflib
from typing import Any, Literal

import numpy as np
import torch
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import is_match, update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier, ModifierFactory
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import LinearLayer, inner_model, linear_layers
from efx_plugin.model.pruner import BlockPruner, PrunedLayer, PruningSettings

# A block's sparsity may miss the target by this much before pruning counts as failed.
SPARSITY_TOLERANCE = 0.002


class EfficientXpertModifier(Modifier):
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

    `QuantizationModifier` or `GPTQModifier` may follow in the recipe. GPTQ moves rounding errors onto other weights of
    a row, pruned ones among them; what it put there is taken back, and the log says how much it was.

    Lifecycle:
        - on_initialize: find targets and adapters, check the model
        - on_calibration_start: hook every decoder block
        - on_sequential_epoch_end: prune the blocks that have seen data
        - on_calibration_end: remove hooks
        - on_finalize: take back what quantization put in place of zeros, check that every targeted layer was pruned
          and that the zeros are there

    Args:
        sparsity: fraction of the weights to prune, between 0 and 1.
        mask_structure: "N:M" prunes N of every M consecutive inputs (then sparsity must be N/M); "0:0" is
            unstructured.
        targets: names, `re:` patterns or class names of the layers to prune.
        ignore: the same for layers to leave alone.
        saliency: what a weight is worth to its layer: "wanda" (its energy on the data) or "magnitude".
        propagation: what the layer's output is worth to what follows: "block" (measured by gradients within the
            decoder block), "activation" (from forward statistics; needs a known architecture) or "none".
        comparison_group: among which weights the lowest scores are pruned: "row", "matrix" or decoder "block".
            With N:M structure the group is always the M inputs.
        floor: in "matrix" and "block" groups no row may lose more than floor * sparsity of its weights.
        repair: "weights" refits the kept weights of each layer to its calibration outputs; "none" leaves them.
        repair_steps: conjugate gradient steps of the repair.
        dampening_frac: fraction of the mean diagonal added to the Gram's diagonal in the repair.
        propagation_tokens: calibration tokens spent on "block" propagation.
        seed: of the random directions in "block" propagation.
    """

    requires_calibration_data: bool = True

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    mask_structure: str = Field(default="0:0", pattern=r"^\d+:\d+$")
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: str | list[str] = Field(default_factory=lambda: ["lm_head"])
    saliency: Literal["magnitude", "wanda"] = "wanda"
    propagation: Literal["none", "activation", "block"] = "block"
    comparison_group: Literal["row", "matrix", "block"] = "block"
    floor: float = Field(default=1.4, ge=1)
    repair: Literal["none", "weights"] = "weights"
    repair_steps: int = Field(default=10, ge=1)
    dampening_frac: float = Field(default=0.01, gt=0)
    propagation_tokens: int = Field(default=4096, ge=1)
    seed: int = 0

    _pruners: list[BlockPruner] = PrivateAttr(default_factory=list)
    _results: dict[str, list[PrunedLayer]] = PrivateAttr(default_factory=dict)
    _layers: dict[str, LinearLayer] = PrivateAttr(default_factory=dict)
    # Of layers that are going to be quantized: which weights were kept, a bit each.
    _kept: dict[str, np.ndarray] = PrivateAttr(default_factory=dict)
    _state: State | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_arguments(cls, arguments: Any) -> Any:
        # EfxError is no ValueError, so pydantic lets it through as it is instead of wrapping it in a report.
        for name in set(arguments) - set(cls.model_fields):
            close = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(sorted(cls.model_fields))}"
            raise EfxError(f"EfficientXpertModifier has no argument {name!r}: {hint}")
        return arguments

    @model_validator(mode="after")
    def _check_structure(self) -> "EfficientXpertModifier":
        if (n_of_m := self._n_of_m) is not None:
            n, m = n_of_m
            if not 0 < n < m or abs(self.sparsity - n / m) > 1e-6:
                raise EfxError(
                    f"mask_structure {self.mask_structure!r} prunes {n} of {m} weights, sparsity {self.sparsity} does "
                    f"not: set sparsity to N/M with 0 < N < M, or mask_structure to '0:0'"
                )
        return self

    @property
    def _n_of_m(self) -> tuple[int, int] | None:
        n, m = (int(part) for part in self.mask_structure.split(":"))
        return None if (n, m) == (0, 0) else (n, m)

    def on_initialize(self, state: State, **kwargs) -> bool:
        if state.data is None or state.data.calib is None:
            raise EfxError("EfficientXpertModifier needs calibration data: pass dataset=... to oneshot")
        self._state = state
        model = inner_model(state.model)
        layers = linear_layers(state.model)
        targeted = [layer for layer in layers if is_match(layer.name, layer.base, self.targets, ignore=self.ignore)]
        if not targeted:
            raise EfxError(
                f"targets {self.targets} with ignore {self.ignore} match no linear layer of {type(model).__name__}, "
                f"which has {_examples(layers)}: correct targets or ignore"
            )
        self._layers = {layer.name: layer for layer in targeted}
        for layer in targeted:
            if not torch.isfinite(layer.base.weight).all():
                raise EfxError(
                    f"the weight of {layer.name} contains NaN or infinity: the model is damaged, load it anew"
                )
            if self._n_of_m is not None and layer.base.in_features % self._n_of_m[1]:
                raise EfxError(
                    f"mask_structure {self.mask_structure!r} does not divide the {layer.base.in_features} inputs of "
                    f"{layer.name}: add it to ignore"
                )
        if self.comparison_group == "block" and self.propagation == "activation" and self._n_of_m is None:
            logger.warning(
                "propagation 'activation' gives q and k another unit than the other matrices; comparison_group "
                "'matrix' suits it better than 'block'"
            )
        self._pruners = self._make_pruners(model, layers, targeted, kwargs.get("sequential_targets"))
        return True

    def _make_pruners(
        self,
        model: nn.Module,
        layers: list[LinearLayer],
        targeted: list[LinearLayer],
        sequential_targets: str | list[str] | None,
    ) -> list[BlockPruner]:
        fields = set(PruningSettings.__dataclass_fields__) - {"n_of_m"}
        settings = PruningSettings(n_of_m=self._n_of_m, **self.model_dump(include=fields))
        blocks = _decoder_blocks(model, sequential_targets)
        pruners, remaining = [], {layer.name for layer in targeted}
        for name, block in blocks.items():
            inside = [layer for layer in layers if layer.name.startswith(name + ".")]
            chosen = [layer for layer in inside if layer.name in remaining]
            others = [layer for layer in inside if layer.name not in remaining]
            if chosen:
                pruners.append(BlockPruner(model, name, block, chosen, others, settings, self._token_mask))
                remaining -= {layer.name for layer in chosen}
        if remaining:
            raise EfxError(
                f"{min(remaining)} is targeted but lies outside the decoder blocks of {type(model).__name__}: "
                "add it to ignore"
            )
        return pruners

    def _token_mask(self) -> torch.Tensor | None:
        masks = getattr(self._state, "loss_masks", None)
        return masks[self._state.current_batch_idx].bool() if masks else None

    def on_calibration_start(self, state: State, event: Event, **kwargs):
        for pruner in self._pruners:
            pruner.attach(self.register_hook)

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[nn.Module], **kwargs):
        # Whoever has seen data is pruned: `modules` is empty when llm-compressor traces a PeftModel.
        ready = [pruner for pruner in self._pruners if pruner.calibrated]
        if len(ready) > 1:
            logger.warning(
                f"{len(ready)} blocks were calibrated in one pass, each before the others were pruned; the sequential "
                "pipeline gives a better expert (with PEFT, pass peft_model.base_model.model to oneshot)"
            )
        for pruner in ready:
            index = self._pruners.index(pruner) + 1
            results = pruner.prune(progress=f"({index}/{len(self._pruners)}): Pruning {pruner.name}")
            self._results[pruner.name] = results
            for layer in pruner.layers:
                if is_module_quantized(layer.base):
                    self._kept[layer.name] = np.packbits((layer.base.weight != 0).cpu().numpy())
            logger.info(f"{pruner.name}: {_summary(results)}")

    def on_calibration_end(self, state: State, event: Event, **kwargs):
        self.remove_hooks()

    def on_finalize(self, state: State, **kwargs) -> bool:
        for pruner in self._pruners:
            if pruner.name not in self._results:
                raise EfxError(
                    f"{pruner.name} was never calibrated, so nothing in it was pruned: use oneshot's pipeline "
                    "'sequential' or 'basic' with a dataset that is not empty"
                )
        self._take_back_refills()
        for name, results in self._results.items():
            self._check_zeros(name, results)
        every = [result for results in self._results.values() for result in results]
        logger.info(
            f"EfficientXpertModifier pruned {len(every)} layers in {len(self._results)} blocks: {_summary(every)}"
        )
        self._pruners, self._layers, self._results, self._kept, self._state = [], {}, {}, {}, None
        return True

    @torch.no_grad()
    def _take_back_refills(self) -> None:
        """Zeros of quantized layers again, which lie on every grid of quantization."""
        refilled = zeros = 0
        for name, bits in self._kept.items():
            base = self._layers[name].base
            weight = base.weight
            kept = torch.from_numpy(np.unpackbits(bits, count=weight.numel())).bool()
            kept = kept.reshape(weight.shape).to(weight.device)
            zeros += int((~kept).sum())
            if count := int((weight != 0).logical_and(~kept).sum()):
                refilled += count
                update_offload_parameter(base, "weight", torch.where(kept, weight, 0))
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
            if zeros[result.name] == 0:
                logger.warning(f"{result.name} lost no weight: every one of its scores is above the block's threshold")
        size = sum(result.size for result in results)
        achieved = sum(zeros.values()) / size
        # A row or group of M loses a whole number of weights, which in tiny layers misses the fraction by more.
        slack = SPARSITY_TOLERANCE + sum(self._layers[result.name].base.out_features for result in results) / size
        if achieved < self.sparsity - slack:
            raise EfxError(
                f"{block} has sparsity {achieved:.4f} after pruning, not {self.sparsity}: check the log above"
            )


def _decoder_blocks(model: nn.Module, sequential_targets: str | list[str] | None) -> dict[str, nn.Module]:
    try:
        targets = infer_sequential_targets(model, sequential_targets)
    except (AttributeError, TypeError):
        targets = []
    blocks = {name: module for name, module in model.named_modules() if name and is_match(name, module, targets)}
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


def _examples(layers: list[LinearLayer]) -> str:
    if not layers:
        return "no torch.nn.Linear at all"
    return f"{len(layers)} of them, such as {layers[0].name}"


def _summary(results: list[PrunedLayer]) -> str:
    size, zeros = sum(result.size for result in results), sum(result.zeros for result in results)
    text = f"sparsity {zeros / size:.4f} ({zeros:,} of {size:,} weights)"
    errors = [result.relative_error for result in results if result.relative_error is not None]
    return f"{text}, output error {sum(errors) / len(errors):.1%}" if errors else text


ModifierFactory.register("EfficientXpertModifier", EfficientXpertModifier)
