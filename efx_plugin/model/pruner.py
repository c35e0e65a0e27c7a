"""The engine: one decoder block from calibration hooks to pruned and repaired weights.

The modifier and the training callback drive it; they differ in who runs the model, not in what happens to a block.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from efx_plugin.errors import EfxError
from efx_plugin.method.importance import foresight_scores, magnitude_saliency, wanda_saliency
from efx_plugin.method.masks import n_of_m_mask, pooled_masks, row_mask
from efx_plugin.method.statistics import InputStatistics
from efx_plugin.method.surgeon import output_error, repair_weights
from efx_plugin.model.adapters import LinearLayer, absorb, effective_weight
from efx_plugin.model.propagation import (
    ActivationPropagation,
    BlockPropagation,
    NoPropagation,
    RegisterHook,
    TokenMask,
    every_token,
)


@dataclass(frozen=True)
class PruningSettings:
    """How to prune; the fields are the arguments of `EfficientXpertModifier` of the same names.

    `n_of_m` is the parsed mask structure: None, or (n, m) to prune n of every m consecutive inputs.
    """

    sparsity: float
    n_of_m: tuple[int, int] | None
    saliency: Literal["magnitude", "wanda"]
    propagation: Literal["none", "activation", "block"]
    comparison_group: Literal["row", "matrix", "block"]
    floor: float
    repair: Literal["none", "weights"]
    repair_steps: int
    dampening_frac: float
    propagation_tokens: int
    seed: int


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one linear layer.

    Attributes:
        name: its name.
        size: number of weights.
        zeros: number of weights that are zero now.
        relative_error: calibration error of its output relative to the energy of the output, None where only input
            energies were kept.
    """

    name: str
    size: int
    zeros: int
    relative_error: float | None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size


class BlockPruner:
    """Calibrates and prunes the targeted linear layers of one decoder block.

    Args:
        model: the transformers model.
        name: name of the block.
        block: the decoder block.
        layers: the targeted linear layers inside it.
        others: its other linear layers, which may consume the targeted ones' outputs.
        settings: how to prune.
        token_mask: which tokens to calibrate on.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        block: nn.Module,
        layers: list[LinearLayer],
        others: list[LinearLayer],
        settings: PruningSettings,
        token_mask: TokenMask = every_token,
    ):
        self.name, self.layers, self.settings = name, layers, settings
        self._token_mask = token_mask
        self._statistics: dict[str, InputStatistics] = {}
        self._last: tuple[Tensor, InputStatistics] | None = None
        if settings.propagation == "activation":
            self._propagation = ActivationPropagation(model, name, layers + others, token_mask)
        elif settings.propagation == "block":
            self._propagation = BlockPropagation(block, layers, tokens=settings.propagation_tokens, seed=settings.seed)
        else:
            self._propagation = NoPropagation()

    @property
    def calibrated(self) -> bool:
        return bool(self._statistics)

    def attach(self, register: RegisterHook) -> None:
        """Hook the block; `register(module, hook, hook_type, **kwargs)` as llm-compressor's HooksMixin has it."""
        for layer in self.layers:
            register(
                layer.module,
                lambda _module, args, _output, name=layer.name: self._see_input(name, args[0]),
                "forward",
            )
        self._propagation.attach(register)

    @torch.no_grad()
    def _see_input(self, name: str, inputs: Tensor) -> None:
        if self._propagation.measuring:
            return
        # q, k and v read the same tensor, and so do gate and up: one Gram serves them all.
        if self._last is not None and self._last[0] is inputs:
            shared = self._last[1]
            if self._statistics.setdefault(name, shared) is shared:
                return
        own = self._statistics.get(name)
        if own is None:
            full = self.settings.repair != "none"
            own = InputStatistics(inputs.shape[-1], full=full, device=inputs.device)
            self._statistics[name] = own
        mask = self._token_mask()
        own.update(inputs if mask is None else inputs[mask.to(inputs.device)])
        self._last = (inputs, own)

    @torch.no_grad()
    def prune(self, progress: str | None = None) -> list[PrunedLayer]:
        """Score, mask, repair and store every layer; the statistics are freed.

        Args:
            progress: label of the progress bar; None shows none.

        Raises:
            EfxError: a layer saw no calibration data, or its statistics are not finite.
        """
        self._last = None
        self._require_finite_statistics()
        masks = self._masks()
        results = []
        for layer in self.layers if progress is None else tqdm(self.layers, desc=progress):
            statistics = self._statistics.pop(layer.name)
            results.append(self._prune_layer(layer, masks.pop(layer.name), statistics))
        return results

    def _prune_layer(self, layer: LinearLayer, keep: Tensor, statistics: InputStatistics) -> PrunedLayer:
        weight = effective_weight(layer)
        if self.settings.repair == "weights":
            gram = statistics.gram
            pruned = repair_weights(
                weight,
                keep,
                gram,
                steps=self.settings.repair_steps,
                dampening_frac=self.settings.dampening_frac,
            )
            energy = output_error(weight, torch.zeros_like(weight), gram).sum()
            error = float(output_error(weight, pruned, gram).sum() / energy) if energy > 0 else 0.0
        else:
            pruned, error = weight * keep, None
        absorb(layer, pruned)
        return PrunedLayer(layer.name, weight.numel(), int((layer.base.weight == 0).sum()), error)

    def _masks(self) -> dict[str, Tensor]:
        settings, sensitivities = self.settings, self._propagation.result()
        scores = {}
        for layer in self.layers:
            weight = effective_weight(layer)
            if settings.saliency == "wanda":
                saliency = wanda_saliency(weight, self._statistics[layer.name].energy)
            else:
                saliency = magnitude_saliency(weight)
            scores[layer.name] = foresight_scores(saliency, sensitivities.get(layer.name))
        if settings.n_of_m is not None:
            return {name: n_of_m_mask(score, *settings.n_of_m) for name, score in scores.items()}
        match settings.comparison_group:
            case "row":
                return {name: row_mask(score, settings.sparsity) for name, score in scores.items()}
            case "matrix":
                return {
                    name: pooled_masks([score], settings.sparsity, settings.floor)[0] for name, score in scores.items()
                }
            case "block":
                pooled = pooled_masks(list(scores.values()), settings.sparsity, settings.floor)
                return dict(zip(scores, pooled, strict=True))

    def _require_finite_statistics(self) -> None:
        for layer in self.layers:
            statistics = self._statistics.get(layer.name)
            if statistics is None or statistics.count == 0:
                raise EfxError(
                    f"{layer.name} saw no calibration data: check that the dataset is not empty and that the model "
                    "calls this layer"
                )
            if not statistics.energy.isfinite().all():
                raise EfxError(
                    f"the calibration inputs of {layer.name} contain NaN or infinity: check the model's weights and "
                    "calibrate in bfloat16 or float32"
                )
