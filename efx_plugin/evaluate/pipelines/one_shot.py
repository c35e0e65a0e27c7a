"""The model with its adapter, pruned at once: by llm-compressor's own modifiers, by ours, and by two simple ones."""

from collections.abc import Callable

import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from torch import Tensor

from efx_plugin.engine.arguments import Quantization
from efx_plugin.evaluate.pipelines.arguments import take_arguments
from efx_plugin.evaluate.pipelines.draft import Draft
from efx_plugin.evaluate.pipelines.protocol import PipelineResult, PipelineTask
from efx_plugin.method.masks import n_of_m_mask, pooled_masks, row_mask
from efx_plugin.method.scores import magnitude_saliency
from efx_plugin.model.adapters import write_parameter
from efx_plugin.modifier import EfficientXpertModifier


def random(task: PipelineTask) -> PipelineResult:
    """Weights chosen by lot, the same number of every row: what any method has to beat."""
    generator = torch.Generator().manual_seed(task.seed)
    return _by_weights(task, lambda weight: torch.rand(weight.shape, generator=generator), row_mask)


def magnitude(task: PipelineTask) -> PipelineResult:
    """The smallest weights of every matrix, or of every M."""
    return _by_weights(task, magnitude_saliency, lambda scores, sparsity: pooled_masks([scores], sparsity)[0])


def wanda(task: PipelineTask) -> PipelineResult:
    """llm-compressor's WandaPruningModifier on the merged model."""
    return _by_modifier(task, wanda_modifier)


def sparsegpt(task: PipelineTask) -> PipelineResult:
    """llm-compressor's SparseGPTModifier on the merged model."""
    return _by_modifier(task, sparsegpt_modifier)


def expert(task: PipelineTask) -> PipelineResult:
    """EfficientXpertModifier, whose arguments it takes, on the model with its adapter not merged yet."""
    draft = Draft.load(task, adapted=True)
    dense = draft.keep_dense()
    draft.calibrate(expert_modifier(draft))
    return draft.finish(dense)


def wanda_modifier(draft: Draft) -> Modifier:
    task = draft.task
    return WandaPruningModifier(
        sparsity=task.sparsity, mask_structure=task.mask_structure, targets=["Linear"], ignore=draft.ignored()
    )


def sparsegpt_modifier(draft: Draft) -> Modifier:
    task = draft.task
    return SparseGPTModifier(
        sparsity=task.sparsity, mask_structure=task.mask_structure, targets=["Linear"], ignore=draft.ignored()
    )


def expert_modifier(draft: Draft, quantization: Quantization | None = None) -> EfficientXpertModifier:
    task = draft.task
    return EfficientXpertModifier(
        sparsity=task.sparsity,
        mask_structure=task.mask_structure,
        ignore=draft.ignored(),
        quantization=quantization,
        **({"seed": task.seed} | task.arguments),
    )


def _by_modifier(task: PipelineTask, modifier: Callable[[Draft], Modifier]) -> PipelineResult:
    take_arguments(task)
    draft = Draft.load(task, adapted=True)
    dense = draft.keep_dense()
    draft.merge()
    draft.calibrate(modifier(draft))
    return draft.finish(dense)


def _by_weights(
    task: PipelineTask, score: Callable[[Tensor], Tensor], mask: Callable[[Tensor, float], Tensor]
) -> PipelineResult:
    """Prune each matrix by scores of its weights alone; `mask` is that of unstructured sparsity."""
    take_arguments(task)
    draft = Draft.load(task, adapted=True)
    dense = draft.keep_dense()
    draft.merge()
    n, m = map(int, task.mask_structure.split(":"))
    for layer in draft.targets:
        weight = layer.base.weight.detach()
        scores = score(weight)
        keep = n_of_m_mask(scores, n, m) if m else mask(scores, task.sparsity)
        write_parameter(layer.base, weight * keep)
    return draft.finish(dense)
