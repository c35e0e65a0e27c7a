"""Training of a pruned model on its kept weights: what was pruned stays zero, and the domain is learned anew.

Each linear layer that has zeros computes with its masked weight, whose gradient is zero wherever the weight was pruned.
Its kept weights are trained in float32 and rounded once at the end; all other parameters stay as they are.

The loss is the cross-entropy of the text; with a teacher, the dense expert, half of it is the Kullback-Leibler
divergence of the model's next-token distribution from the teacher's. On text that a dense model wrote it is that
divergence alone: of what the teacher wrote cross-entropy would be a noisy estimate.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.offload import remove_dispatch
from loguru import logger
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.engine.compute_dtype import choose_for, computed_in, convert, restore
from efx_plugin.errors import EfxError
from efx_plugin.machine import free_memory, to_accelerator
from efx_plugin.model.adapters import LinearLayer, linear_layers
from efx_plugin.model.masked import install_mask, remove_mask

# Bytes of a trained weight: itself in float32, its gradient, and two averages of AdamW.
_BYTES = 16
_CHECKPOINTS = 5  # in a run, besides the end
_TEACHING = 0.5  # the teacher's part in the loss on text of the user's
_NOT_PREDICTED = -100  # a label for which the loss counts nothing


@dataclass(frozen=True)
class Healed:
    """What healing did.

    Attributes:
        tokens: that were trained on.
        before, after: perplexity of the validation sequences.
    """

    tokens: int
    before: float
    after: float


class UnderMasks(TrainerCallback):
    """Training under masks that stay, bool [out, in] by name of the layer, True where a weight is kept."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in linear_layers(kwargs["model"]):
            if layer.name in self._masks:
                install_mask(layer, self._masks[layer.name])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in linear_layers(kwargs["model"]):
            remove_mask(layer)


def heal(
    model: PreTrainedModel,
    training: Tensor,
    validation: Tensor,
    *,
    learning_rate: float,
    batch_size: int,
    folder: Path,
    seed: int = 0,
    teacher: PreTrainedModel | None = None,
    written: Tensor | None = None,
) -> Healed:
    """Train the kept weights once over the training and the written sequences, see `once_over`, in place.

    Args:
        model: a plain causal language model with zeros in its linear layers.
        training, validation: int64 [n, length] of token ids.
        learning_rate: at its peak.
        batch_size: sequences of a step.
        folder: for checkpoints of the Trainer; a run that finds one there goes on from it, and ends as it would have.
        seed: of the order of the sequences.
        teacher: a plain model with the same vocabulary; it stays as it is.
        written: int64 [n, length] of token ids that a dense model wrote, of which the teacher's predictions
            are learned; needs the teacher.

    Raises:
        EfxError: no linear layer of the decoder blocks has zeros, the memory does not suffice, or there is written text
            without a teacher.
    """
    labels = training
    if written is not None:
        if teacher is None:
            raise EfxError("of written text only the teacher's predictions are learned: pass the teacher too")
        labels = torch.cat([training, torch.full_like(written, _NOT_PREDICTED)])
        training = torch.cat([training, written])
    with _without_oneshot(model):
        layers = {layer.name: layer for layer in linears_in_blocks(model)}
        masks = {name: layer.base.weight.detach() != 0 for name, layer in layers.items()}
        masks = {name: keep for name, keep in masks.items() if not keep.all()}
        if not masks:
            raise EfxError("no linear layer of the decoder blocks has zeros: prune the model first, with efx prune")
        to_accelerator(model)
        with computed_in(model, choose_for(model).dtype):
            before = validation_loss(model, validation)
        dtypes = _make_trainable(model, [layers[name] for name in masks])
        trainer = _Trainer(
            teacher,
            model=model,
            callbacks=[UnderMasks(masks)],
            **once_over(
                training,
                folder,
                learning_rate,
                batch_size,
                seed,
                labels,
                save_strategy="steps",
                save_steps=math.ceil(len(training) / batch_size / _CHECKPOINTS),
                save_total_limit=1,
            ),
        )
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
        model.requires_grad_(False)
        restore(model, dtypes)
        with computed_in(model, choose_for(model).dtype):
            after = validation_loss(model, validation)
    return Healed(training.numel(), _perplexity(before), _perplexity(after))


def once_over(
    sequences: Tensor,
    folder: Path,
    learning_rate: float,
    batch_size: int,
    seed: int,
    labels: Tensor | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of a Trainer that trains once over sequences, int64 [n, length], in batches of `batch_size`, and tells
    nobody: the rate rises over the first tenth of the steps and falls to zero, both linearly.

    Args:
        folder: for checkpoints.
        learning_rate: at its peak.
        seed: of the order of the sequences.
        labels: int64 [n, length]; the sequences themselves where there are none.
        more: of `TrainingArguments`.
    """
    return {
        "args": TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(len(sequences) / batch_size / 10),
            use_cpu=not torch.accelerator.is_available(),  # bf16 is refused on a CPU that is not asked for
            seed=seed,
            logging_strategy="no",
            report_to="none",
            **more,
        ),
        "train_dataset": [
            {"input_ids": sequence, "labels": label}
            for sequence, label in zip(sequences, sequences if labels is None else labels, strict=True)
        ],
        "data_collator": default_data_collator,
    }


class _Trainer(Trainer):
    def __init__(self, teacher: PreTrainedModel | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._teacher: nn.Module | None = teacher
        if teacher is not None:
            inner: nn.Module = teacher
            convert(inner.to(self.args.device).eval(), choose_for(inner).dtype)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # what the Trainer's own returns
        if self._teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, labels = inputs["input_ids"], inputs["labels"]
        outputs = model(input_ids=ids, use_cache=False)
        with torch.no_grad():
            wanted = self._teacher(input_ids=ids, use_cache=False).logits
        loss = torch.zeros((), device=ids.device)
        for ours, theirs, label in zip(outputs.logits, wanted, labels, strict=True):  # float32 logits are large
            predicted = ours[:-1].float().log_softmax(-1)
            divergence = F.kl_div(
                predicted, theirs[:-1].float().log_softmax(-1), reduction="batchmean", log_target=True
            )
            one = divergence
            if (label != _NOT_PREDICTED).any():
                one = (1 - _TEACHING) * F.nll_loss(predicted, label[1:]) + _TEACHING * divergence
            loss = loss + one / len(ids)
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def validation_loss(model: PreTrainedModel, sequences: Tensor) -> float:
    """Mean negative log-likelihood of a token, infinite where it is not a number.

    Args:
        sequences: int64 [n, length] of token ids.
    """
    model.eval()
    total = 0.0
    for sequence in sequences.to(model.device).split(1):
        total += float(model(input_ids=sequence, labels=sequence, use_cache=False).loss)
    mean = total / len(sequences)
    return mean if math.isfinite(mean) else math.inf


@contextmanager
def _without_oneshot(model: PreTrainedModel) -> Iterator[None]:
    """The model without what llm-compressor's oneshot leaves on it: its modules are offloaded, which masks cannot be
    installed on, and its `save_pretrained`, by which the Trainer stores checkpoints, offloads them again."""
    remove_dispatch(model)
    saving = vars(model).pop("save_pretrained", None)
    try:
        yield
    finally:
        if saving is not None:
            vars(model)["save_pretrained"] = saving


def _make_trainable(model: PreTrainedModel, layers: list[LinearLayer]) -> dict[str, torch.dtype]:
    """Leave gradients to the weights of those layers alone, in float32; all the others compute in the dtype for this
    machine. Returns the dtypes that the parameters had."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    count = sum(layer.base.weight.numel() for layer in layers)
    needed, free = _BYTES * count, free_memory()
    logger.info(
        f"healing: {count:,} weights of {len(layers)} layers are trained, zeros counted; with gradients and averages "
        f"they take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    )
    if needed > free and not torch.accelerator.is_available():
        raise EfxError(
            f"training {count:,} weights takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: heal "
            "on a larger machine, or train adapters with EfficientXpertCallback"
        )
    convert(model, choose_for(model).dtype)
    model.requires_grad_(False)
    for layer in layers:
        layer.base.weight.data = layer.base.weight.data.float()
        layer.base.weight.requires_grad_(True)
    return dtypes


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
