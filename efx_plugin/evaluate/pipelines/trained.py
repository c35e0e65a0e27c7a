"""Pipelines that train an adapter from the start: ours, the published schedule, and rivals that prune first.

They train on the same tokens, once over them, and each chooses its learning rate from the same ones; see `training`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from torch import nn
from transformers import TrainerCallback

from efx_plugin.engine.blocks import PlannedBlock, plan_blocks
from efx_plugin.evaluate.pipelines.arguments import take_arguments
from efx_plugin.evaluate.pipelines.as_released import AsReleased
from efx_plugin.evaluate.pipelines.draft import Draft
from efx_plugin.evaluate.pipelines.one_shot import sparsegpt_modifier, wanda_modifier
from efx_plugin.evaluate.pipelines.protocol import PipelineResult, PipelineTask
from efx_plugin.evaluate.pipelines.training import CHOICES, adapt, best_of_rates, train
from efx_plugin.model.adapters import active_adapters, merge_adapters
from efx_plugin.training import EfficientXpertCallback
from efx_plugin.training.healing import UnderMasks
from efx_plugin.training.recorder import Recording


def wanda_then_lora(task: PipelineTask) -> PipelineResult:
    """The base model pruned by llm-compressor's WandaPruningModifier, then LoRA under its mask."""
    return _prune_then_train(task, wanda_modifier)


def sparsegpt_then_lora(task: PipelineTask) -> PipelineResult:
    """The base model pruned by llm-compressor's SparseGPTModifier, then LoRA under its mask."""
    return _prune_then_train(task, sparsegpt_modifier)


def _prune_then_train(task: PipelineTask, modifier: Callable[[Draft], Modifier]) -> PipelineResult:
    take_arguments(task, **CHOICES)
    pruned = Draft.load(task, adapted=False)
    pruned.calibrate(modifier(pruned))
    path = task.output / "pruned.pt"
    torch.save(pruned.network.state_dict(), path)
    del pruned
    return best_of_rates(task, partial(_train_under_mask, task, path))


def _train_under_mask(task: PipelineTask, path: Path, rate: float) -> Draft:
    draft = Draft.load(task, adapted=False)
    draft.network.load_state_dict(torch.load(path))
    masks = {layer.name: layer.base.weight != 0 for layer in draft.targets}
    adapt(draft)
    train(draft, rate, [UnderMasks(masks)])
    device = next(draft.network.parameters()).device  # the Trainer's
    draft.network = merge_adapters(draft.network, {name: keep.to(device) for name, keep in masks.items()})
    return draft


def expert(task: PipelineTask) -> PipelineResult:
    """EfficientXpertCallback, whose arguments it takes."""
    own = {name: value for name, value in task.arguments.items() if name not in CHOICES}
    return _train_with(task, lambda draft: _OnCalibrationSet(draft, own))


def published(task: PipelineTask) -> PipelineResult:
    """The paper's schedule: after each third of the training a new mask by averaged scores, and its repair after all
    but the last."""
    take_arguments(task, **CHOICES)
    note = (
        "three thirds of one pass over the text stand for the paper's three epochs, and between the masks the adapter "
        "learns under them, which the paper leaves open"
    )
    return _train_with(task, lambda draft: _Published(draft, PUBLISHED), note)


def as_released(task: PipelineTask) -> PipelineResult:
    """The authors' public code, see `AsReleased`."""
    take_arguments(task, **CHOICES)
    note = (
        "three thirds of one pass over the text stand for three epochs; calibrated on the domain instead of C4, and "
        "with the adapter's scale, which the released code leaves out of scores and repair"
    )
    return _train_with(task, AsReleased, note)


# Arguments of EfficientXpertCallback for the paper's method.
PUBLISHED: dict[str, Any] = {
    "warmup_fraction": 1 / 3,
    "refreshes": 3,
    "final_fraction": 0.0,
    "saliency": "wanda",
    "propagation": "weight",
    "comparison_group": "row",
    "allocation": "uniform",
    "repair": "paper",
    "new_score_weight": 0.5,
}


class _OnCalibrationSet(EfficientXpertCallback):
    """Calibrates on the sequences that all pipelines calibrate on; gradients are those of training."""

    def __init__(self, draft: Draft, arguments: Mapping[str, Any]) -> None:
        task = draft.task
        given: dict[str, Any] = {
            "sparsity": task.sparsity,
            "mask_structure": task.mask_structure,
            "ignore": draft.ignored(),
            "seed": task.seed,
            "calibration_tokens": task.calibration.numel(),
        }
        super().__init__(**(given | dict(arguments)))
        self._calibration = draft.batches()

    def _take_recording(self) -> Recording:
        tokens = sum(batch.mask.numel() for batch in self._calibration)
        return replace(super()._take_recording(), batches=self._calibration, tokens=tokens)


class _Published(_OnCalibrationSet):
    """Leaves the last mask without a repair, and at all masks the layers without an adapter: it is what is moved."""

    def __init__(self, draft: Draft, arguments: Mapping[str, Any]) -> None:
        super().__init__(draft, arguments)
        self._notes = draft.notes

    def _plan(self, model: nn.Module) -> list[PlannedBlock]:
        plans = plan_blocks(model, self.arguments.model_copy(update={"repair": "none"}))
        layers = [layer for plan in plans for layer in plan.layers]
        if bare := sum(not active_adapters(layer) for layer in layers):
            self._notes.append(
                f"{bare} of the {len(layers)} layers have no adapter, which is what the published repair moves: they "
                "are pruned without a repair"
            )
        return plans

    def _prune(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, show: bool) -> dict[str, float]:
        if self._pruned == len(self._steps) - 1:
            self.arguments = self.arguments.model_copy(update={"repair": "none"})
        return super()._prune(model, optimizer, show=show)


def _train_with(task: PipelineTask, callback: Callable[[Draft], TrainerCallback], *notes: str) -> PipelineResult:
    """A new adapter trained under a callback that leaves the model sparse."""

    def make(rate: float) -> Draft:
        draft = Draft.load(task, adapted=False)
        adapt(draft)
        train(draft, rate, [callback(draft)])
        return draft

    return best_of_rates(task, make, *notes)
