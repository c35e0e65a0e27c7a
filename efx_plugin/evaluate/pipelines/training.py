"""How every trained pipeline trains: a new LoRA adapter, the same tokens, and the same choice of learning rates.

Each rate trains an expert of its own, once over the training sequences, and the one that predicts the validation
sequences best is the pipeline's result. No document is in both.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Trainer,
    TrainerCallback,
    set_seed,
)

from efx_plugin.errors import EfxError
from efx_plugin.evaluate.pipelines.draft import Draft
from efx_plugin.evaluate.pipelines.protocol import PipelineResult, PipelineTask
from efx_plugin.training.healing import once_over, validation_loss

# Arguments of every trained pipeline: the rates to choose from, at their peak, and the sequences of a step.
CHOICES: dict[str, Any] = {"learning_rates": (3e-4, 1e-3, 3e-3), "batch_size": 4}


def adapt(draft: Draft) -> None:
    """Put a new adapter on a plain model: of the configuration of the task's adapter, else of rank 8 on every layer.

    Raises:
        EfxError: the configuration cannot be read, or does not fit the model.
    """
    task = draft.task
    set_seed(task.seed)
    try:
        if task.adapter is None:
            config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        else:
            config = LoraConfig.from_pretrained(task.adapter)
            config.inference_mode, config.init_lora_weights = False, True
        draft.network = get_peft_model(draft.merge(), config)
    except (ValueError, TypeError, OSError) as error:
        raise EfxError(f"{task.adapter} does not describe a LoRA adapter for {task.model}: {error}") from error


def train(draft: Draft, rate: float, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train the adapter of a draft once over the task's training sequences, see `once_over`."""
    task, sequences = draft.task, draft.task.training
    batch_size = task.arguments.get("batch_size", CHOICES["batch_size"])
    trainer = Trainer(
        model=draft.network,
        callbacks=list(callbacks),
        **once_over(
            sequences,
            task.output / "trainer",
            rate,
            batch_size,
            task.seed,
            bf16=next(draft.network.parameters()).dtype == torch.bfloat16,
            save_strategy="no",
        ),
    )
    trainer.train()
    # The Trainer leaves the model's forward under autocast.
    draft.network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()


def best_of_rates(task: PipelineTask, make: Callable[[float], Draft], *notes: str) -> PipelineResult:
    """The expert of the rate that predicts the validation sequences best; it predicts them badly where it diverged.

    Memory holds one model: the best one so far waits in a file.

    Args:
        make: trains at a rate, from the start, and leaves a sparse model.
        notes: for the result.

    Raises:
        EfxError: there are no validation sequences.
    """
    if not len(task.validation):
        raise EfxError("there is no validation text to choose the learning rate on: pass more documents")
    path, losses = task.output / "best.pt", dict[float, float]()
    for rate in task.arguments.get("learning_rates", CHOICES["learning_rates"]):
        draft = make(rate)
        losses[rate] = validation_loss(draft.merge(), task.validation)
        if losses[rate] <= min(losses.values()):
            torch.save(draft.network.state_dict(), path)
    best = min(losses, key=losses.__getitem__)
    draft.network.load_state_dict(torch.load(path))
    path.unlink()
    perplexities = ", ".join(f"{math.exp(loss):.2f} at {rate:g}" for rate, loss in losses.items())
    draft.notes += [
        *notes,
        f"trained on {task.training.numel():,} tokens with the learning rate {best:g}, chosen by perplexity on "
        f"{task.validation.numel():,} of other documents: {perplexities}",
    ]
    if len(losses) > 1 and best in (min(losses), max(losses)):
        draft.notes.append("the chosen learning rate is at an end of the range that was tried")
    return draft.finish()
