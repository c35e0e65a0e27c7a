"""What training shows before a pruning point: its last batches, and the gradients of its last steps."""

import math
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from efx_plugin.engine.distributed import gather_objects, world
from efx_plugin.engine.fisher import Fisher, FisherStatistics, is_language_model
from efx_plugin.engine.sequential import Batch
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import LinearLayer, inner_model
from efx_plugin.model.hooks import register_hook

# Arguments of a forward pass that do not change what the decoder blocks see.
_NOT_INPUTS = {"labels", "num_items_in_batch", "use_cache", "logits_to_keep"}


@dataclass(frozen=True)
class Recording:
    """What calibrates one pruning point.

    Attributes:
        batches: of this process, as many as every other process has.
        tokens: those that count, over all processes.
        fisher: measured in the gradients of training; None where that is not wanted.
    """

    batches: list[Batch]
    tokens: int
    fisher: Fisher | None


class Recorder:
    """Records training batches by a hook on the model, and gradients by hooks on its layers.

    Of the batches it keeps the last ones, as few as hold the tokens of a calibration. Their tokens count, except for
    padding and, where labels leave some tokens out of the loss, those tokens. The hooks for gradients take time, so
    they stand only in the steps whose batches are going to be kept.

    Attributes:
        step: the optimizer step that ended last, to be set by who drives it.
        watches: whether the hooks for gradients stand.

    Args:
        model: the model as it is called in training.
        tokens: that calibrate a pruning point, over all processes.
        step: the optimizer step after which recording begins.
        fisher_layers: the layers whose gradients are wanted.
    """

    def __init__(self, model: nn.Module, *, tokens: int, step: int, fisher_layers: list[LinearLayer]):
        self.step, self.watches = step, False
        self._budget = math.ceil(tokens / world()[1])
        self._batches: deque[tuple[int, Batch, int]] = deque()  # with their step and tokens
        self._current: Tensor | None = None
        self._fisher = FisherStatistics(fisher_layers, lambda: self._current) if fisher_layers else None
        self._watching = ExitStack()
        self._recording = model.register_forward_pre_hook(self._see_batch, with_kwargs=True)

    @property
    def recorded(self) -> int:
        """Tokens of the batches that are kept, of this process."""
        return sum(tokens for _, _, tokens in self._batches)

    def _see_batch(self, module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):  # an evaluation
            return
        shown = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if shown is None:
            raise EfxError(
                "EfficientXpertCallback records training batches and found neither input_ids nor inputs_embeds among "
                "the keyword arguments of the model: pass them by name in compute_loss"
            )
        mask = torch.ones(shown.shape[:2], dtype=torch.bool, device=shown.device)
        attention_mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if attention_mask is not None and attention_mask.shape == mask.shape:
            mask &= attention_mask.bool()
        if labels is not None and labels.shape == mask.shape:
            in_loss = labels != -100
            inner: Any = inner_model(module)
            if is_language_model(inner):
                in_loss[:, 0] &= in_loss[:, 1:].any(dim=1)  # the first token's own label is never used
            mask &= in_loss
        inputs = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in kwargs.items()
            if name not in _NOT_INPUTS and ((isinstance(value, Tensor) and value.dim()) or type(value) is int)
        }
        tokens = int(mask.sum())
        self._current = mask
        if not tokens:
            return
        self._batches.append((self.step, Batch(inputs, mask), tokens))
        while self.recorded - self._batches[0][2] >= self._budget:
            self._batches.popleft()
        if self._fisher is not None and self.watches:
            self._fisher.see_tokens(tokens)

    def watch_before(self, pruning_step: int) -> None:
        """Put up the hooks for gradients where the next step is one of those that fill the calibration of this pruning
        point; else take them down."""
        if self._fisher is None:
            return
        steps = len({step for step, _, _ in self._batches})
        per_step = self.recorded / steps if steps else 0
        wanted = (pruning_step - self.step - 1) * per_step < self._budget
        if wanted and not self.watches:
            self._fisher.attach(partial(register_hook, self._watching))
        elif not wanted and self.watches:
            self._watching.close()
            self._fisher.reset()
        self.watches = wanted

    def take(self) -> Recording:
        """Hand out what was recorded, and begin anew. All processes call it together.

        Raises:
            EfxError: no process has seen a token that counts, or a gradient was not finite.
        """
        # Under FSDP every forward pass is a collective: all processes take as many batches as the poorest has.
        count = min(gather_objects(len(self._batches)))
        batches = [batch for _, batch, _ in self._batches][len(self._batches) - count :]
        tokens = sum(gather_objects(sum(int(batch.mask.sum()) for batch in batches)))
        if not tokens:
            raise EfxError(
                f"training has shown no token whose label is used before the pruning point at step {self.step}, so it "
                "cannot be calibrated: check that labels are not all -100, or prune later"
            )
        recording = Recording(batches, tokens, None if self._fisher is None else self._fisher.result())
        self._batches.clear()
        self._watching.close()
        self.watches = False
        if self._fisher is not None:
            self._fisher.reset()
        return recording

    def close(self) -> None:
        """Remove every hook."""
        self._watching.close()
        self._recording.remove()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `restore` needs to go on from here: tensors by name, and values that JSON holds."""
        tensors: dict[str, Tensor] = {}
        batches = []
        for index, (step, batch, _tokens) in enumerate(self._batches):
            tensors[f"batch.{index}.mask"] = batch.mask
            held = {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor)}
            tensors |= {f"batch.{index}.inputs.{name}": value for name, value in held.items()}
            numbers = {name: value for name, value in batch.inputs.items() if name not in held}
            batches.append({"step": step, "tensors": list(held), "numbers": numbers})
        values = {"batches": batches, "watches": self.watches, "fisher_tokens": 0, "energy_tokens": {}}
        if self._fisher is not None and self.watches:
            tensors |= {f"fisher.{name}": total for name, total in self._fisher.sums.items()}
            tensors |= {f"energy.{name}": inputs.sum for name, inputs in self._fisher.inputs.items()}
            values["fisher_tokens"] = self._fisher.count
            values["energy_tokens"] = {name: inputs.count for name, inputs in self._fisher.inputs.items()}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; `watch_before` puts the hooks for gradients up again."""
        for index, batch in enumerate(values["batches"]):
            inputs = {name: tensors[f"batch.{index}.inputs.{name}"] for name in batch["tensors"]} | batch["numbers"]
            mask = tensors[f"batch.{index}.mask"]
            self._batches.append((batch["step"], Batch(inputs, mask), int(mask.sum())))
        if self._fisher is not None and values["watches"]:
            for name, total in self._fisher.sums.items():
                total.copy_(tensors[f"fisher.{name}"])
            for name, inputs in self._fisher.inputs.items():
                inputs.sum.copy_(tensors[f"energy.{name}"])
                inputs.count = values["energy_tokens"][name]
            self._fisher.count = values["fisher_tokens"]
