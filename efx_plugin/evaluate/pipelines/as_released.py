"""The authors' public code as it was released, where it differs from their paper: a baseline, and nothing to prune by.

Scores of q, k, gate and up are multiplied by norms of a neighbour's weights that belong to input channels rather than
to outputs, so that the factor varies along a row and the mask is not Wanda's. Those of v, o and down have a factor per
output, which cancels within a row. Partial Brain Surgeon is given the roots of the energies. After each third of the
training but the last, the adapter is merged, what is pruned is zeroed, and a new adapter starts where the old one
was, with the optimizer's moments of the old one; the last mask is that of new scores alone, without a repair.

Two things are better here than there: scores and repair know the adapter's scale, and calibration is on the domain.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.blocks import plan_blocks
from efx_plugin.engine.decide import Decision, RunningScores
from efx_plugin.engine.sequential import prune_in_sequence
from efx_plugin.errors import EfxError
from efx_plugin.evaluate.pipelines.draft import Draft
from efx_plugin.method.repair import paper_update, updated_weight
from efx_plugin.method.scores import update_average
from efx_plugin.model.adapters import (
    LinearLayer,
    absorb,
    active_adapters,
    effective_weight,
    inner_model,
    linear_layers,
    stacked_adapter,
)
from efx_plugin.training.schedule import Schedule

# The third of the training after which it is pruned, and how much of an average is new.
_PRUNINGS, _NEW_SCORE_WEIGHT = 3, 0.5
# The ridge of the repair is a constant that is nothing beside the system's diagonal.
_RIDGE = 1e-6


class AsReleased(TrainerCallback):
    """Prunes a PeftModel three times while it trains.

    Args:
        draft: its task says how much to prune and what to calibrate on.
    """

    def __init__(self, draft: Draft) -> None:
        task = draft.task
        self._arguments = PruningArguments(
            sparsity=task.sparsity,
            mask_structure=task.mask_structure,
            ignore=draft.ignored(),
            saliency="wanda",
            propagation="none",
            comparison_group="row",
            allocation="uniform",
            repair="none",
        )
        self._batches = draft.batches()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps = Schedule(1 / _PRUNINGS, _PRUNINGS, 0).steps(state.max_steps)
        self._scores = _ReleasedScores(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step not in self._steps:
            return
        last = state.global_step == self._steps[-1]
        if last:
            self._scores.forget()
        prune_in_sequence(
            kwargs["model"],
            plan_blocks(kwargs["model"], self._arguments),
            self._arguments,
            self._batches,
            store=self._store_last if last else self._store,
            running=self._scores,
        )

    def _store(self, layer: LinearLayer, decision: Decision) -> None:
        """Repair, merge, zero, and start a new adapter."""
        weight, adapter = effective_weight(layer), stacked_adapter(layer)
        if adapter is not None:
            root = self._scores.energies[layer.name].sqrt()
            update = paper_update(weight, decision.keep, root, adapter, dampening_frac=_RIDGE)
            weight = updated_weight(weight, decision.keep, update, adapter)
        absorb(layer, weight * decision.keep)
        for name in active_adapters(layer):
            nn.init.kaiming_uniform_(layer.lora.lora_A[name].weight, a=math.sqrt(5))

    def _store_last(self, layer: LinearLayer, decision: Decision) -> None:
        absorb(layer, effective_weight(layer) * decision.keep)


class _ReleasedScores(RunningScores):
    """Scores of Wanda, which the engine computes, turned into those of the released code.

    Attributes:
        energies: E[x²] of each layer's inputs, fp32 [in] by name, of the last pruning.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(_NEW_SCORE_WEIGHT)
        self.energies: dict[str, Tensor] = {}
        self._layers = {layer.name: layer for layer in linear_layers(model)}
        inner: Any = inner_model(model)
        config = inner.config.get_text_config()
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads

    def forget(self) -> None:
        """Let the next scores stand alone."""
        self.averages.clear()

    def blend(self, names: Sequence[str], scores: Sequence[Tensor]) -> list[Tensor]:
        """The averages of |U| ‖x‖ times the released factor; they are not normalised.

        Args:
            scores: U² e of each layer, fp32 [out, in].
        """
        for name, score in zip(names, scores, strict=True):
            squares = effective_weight(self._layers[name]).square().sum(dim=0)
            self.energies[name] = (score.sum(dim=0) / squares).where(squares > 0, 0)
            new = score.sqrt() * self._factor(name)
            old = self.averages.get(name)
            self.averages[name] = new if old is None else update_average(old, new, self._new_score_weight)
        return [self.averages[name] for name in names]

    def _factor(self, name: str) -> Tensor | float:
        """What the released code multiplies scores with, as far as it varies along a row; [out, in] or [1, in]."""
        block, _, projection = name.rpartition(".")
        if projection in ("gate_proj", "up_proj"):
            return self._weight(f"{block}.down_proj").square().sum(dim=1).sqrt().unsqueeze(0)
        if projection == "q_proj":
            keys = self._weight(f"{block}.k_proj").unflatten(0, (self._kv_heads, -1))
            norms = keys.square().sum(dim=1).sqrt()
            return self._per_head(norms.repeat_interleave(self._heads // self._kv_heads, dim=0), name)
        if projection == "k_proj":
            queries = self._weight(f"{block}.q_proj").unflatten(0, (self._kv_heads, self._heads // self._kv_heads, -1))
            squares = queries.square().sum(dim=2)
            return self._per_head(squares.mean(dim=1).sqrt(), name)
        if projection in ("v_proj", "o_proj", "down_proj"):
            return 1.0
        raise EfxError(
            f"the released code knows q, k, v, o, gate, up and down_proj, and {name} is none of them: leave the "
            "pipeline as-released out"
        )

    def _per_head(self, norms: Tensor, name: str) -> Tensor:
        """[heads, in] to [out, in]."""
        rows = self._layers[name].base.out_features
        return norms.repeat_interleave(rows // len(norms), dim=0)

    def _weight(self, name: str) -> Tensor:
        return effective_weight(self._layers[name])
