"""The model with its adapter, pruned at once and then healed, as by `efx prune --generate` and `efx heal --generate`.

No more text is needed than for pruning: the dense expert writes what is calibrated and trained on besides, see
`write_sequences` and `write_general`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from torch import Tensor
from transformers import PreTrainedModel

from efx_plugin.compress.calibration import start_of_text
from efx_plugin.compress.general_text import write_general
from efx_plugin.compress.request import HealRequest
from efx_plugin.evaluate.pipelines.arguments import take_arguments
from efx_plugin.evaluate.pipelines.draft import Draft
from efx_plugin.evaluate.pipelines.one_shot import expert_modifier, sparsegpt_modifier
from efx_plugin.evaluate.pipelines.protocol import PipelineResult, PipelineTask
from efx_plugin.model.loading import inspect_sources
from efx_plugin.training.generation import write_sequences
from efx_plugin.training.healing import heal

# Arguments of both pipelines: sequences that the dense expert writes for each one of the calibration text, and how is
# trained on them.
_CHOICES: dict[str, Any] = {
    "written": 4,
    "learning_rate": HealRequest.learning_rate,
    "batch_size": HealRequest.batch_size,
}
_HELD_OUT = 10  # of so many calibration sequences one is not trained on, to see what healing does


def expert(task: PipelineTask) -> PipelineResult:
    """EfficientXpertModifier, whose arguments it takes as well, and healing."""
    return _prune_and_heal(task, expert_modifier, merged=False)


def sparsegpt(task: PipelineTask) -> PipelineResult:
    """llm-compressor's SparseGPTModifier, and healing."""
    take_arguments(task, **_CHOICES)
    return _prune_and_heal(task, sparsegpt_modifier, merged=True)


def _prune_and_heal(task: PipelineTask, modifier: Callable[[Draft], Modifier], *, merged: bool) -> PipelineResult:
    """Prune the model, merged first or not, with those of the task's arguments that are not healing's, and heal it."""
    pruning, healing = dict[str, Any](), dict(_CHOICES)
    for name, value in task.arguments.items():
        (healing if name in _CHOICES else pruning)[name] = value
    draft = Draft.load(replace(task, arguments=pruning), adapted=True)
    dense = draft.keep_dense()
    if merged:
        draft.merge()
    sources, text = inspect_sources(task.model, task.adapter), task.calibration
    count, start = healing.pop("written") * len(text), start_of_text(draft.tokenizer)
    written = write_sequences(sources.load_merged(), text, count, start=start, seed=task.seed)
    draft.calibrate(modifier(draft), written=written)
    general = write_general(sources, text, count // 2, tokenizer=draft.tokenizer, seed=task.seed)
    _heal(draft, sources.load_merged(), torch.cat([written[len(general) :], general]), **healing)
    return draft.finish(dense)


def _heal(draft: Draft, teacher: PreTrainedModel, written: Tensor, *, learning_rate: float, batch_size: int) -> None:
    task, text = draft.task, draft.task.calibration
    held_out = max(1, len(text) // _HELD_OUT)
    own, others = text[:-held_out], text[-held_out:]
    healed = heal(
        draft.merge(),
        own,
        others,
        learning_rate=learning_rate,
        batch_size=batch_size,
        folder=task.output / "healing",
        seed=task.seed,
        teacher=teacher,
        written=written,
    )
    draft.notes.append(
        f"healed on {own.numel():,} calibration tokens and {written.numel():,} that the dense expert wrote, half of "
        f"them without its adapter: the perplexity of the other {others.numel():,} calibration tokens went from "
        f"{healed.before:.2f} to {healed.after:.2f}"
    )
