"""What is to become of one linear layer: arguments, weight and calibration in, a mask and a repaired weight out.

Nothing here knows a model, a process or where a decision is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.errors import EfxError
from efx_plugin.method.masks import allocate, n_of_m_mask, pooled_masks, row_mask
from efx_plugin.method.obs import obs_mask
from efx_plugin.method.quantize import Grid, quantize_kept
from efx_plugin.method.repair import adapter_update, output_error, paper_update, repair_weights, updated_weight
from efx_plugin.method.scores import foresight_scores, magnitude_saliency, update_average, wanda_saliency
from efx_plugin.method.statistics import InputStatistics
from efx_plugin.method.swaps import swap_pruned

# Errors of a layer are reported from this many of its rows, or a few more: each row costs a product with the Gram.
MEASURED_ROWS = 256


@dataclass(frozen=True)
class Evidence:
    """What calibration found out about one layer.

    Attributes:
        statistics: second moments of its inputs; None for a starved layer that no token reached.
        sensitivity: c, fp32 [out]; None counts every output alike.
        starved: it belongs to an expert that too few tokens reach. Its scores come from weights alone, and it is not
            repaired.
    """

    statistics: InputStatistics | None
    sensitivity: Tensor | None = None
    starved: bool = False

    @property
    def known(self) -> InputStatistics:
        """The statistics of a layer that saw data."""
        if self.statistics is None:
            raise RuntimeError("a layer without calibration data is decided on by its weights alone")
        return self.statistics


@dataclass(frozen=True)
class Decision:
    """What is to become of one linear layer.

    Attributes:
        keep: mask, bool [out, in], True where a weight is kept.
        weight: the pruned and repaired effective weight, fp32 [out, in], zero where `keep` is False; on its grid where
            it is quantized as well.
        update: what repair "paper" or "adapter" adds to B, fp32 [out, rank of all adapters]; None for other repairs.
        errors: squared errors of the output on the calibration inputs with no weight at all, masked, and repaired,
            against the unpruned weight on the same inputs, fp32 [3] on the CPU; NaN where no Gram was kept.
        scales: of a weight that is quantized as well, fp32 [out, groups]; else None.
    """

    keep: Tensor
    weight: Tensor
    update: Tensor | None
    errors: Tensor
    scales: Tensor | None = None


class RunningScores:
    """Averages of scores over the refreshes of a mask (paper, eta).

    Attributes:
        averages: fp32 [out, in] by name of the layer; empty before the first refresh.

    Args:
        new_score_weight: weight of the new scores; the old average has the rest.
    """

    def __init__(self, new_score_weight: float):
        self.averages: dict[str, Tensor] = {}
        self._new_score_weight = new_score_weight

    def blend(self, names: Sequence[str], scores: Sequence[Tensor]) -> list[Tensor]:
        """The averages after the new scores of competing matrices, divided by their mean, are blended in."""
        mean = sum(float(score.sum()) for score in scores) / sum(score.numel() for score in scores)
        for name, score in zip(names, scores, strict=True):
            new = score / mean if mean > 0 else score
            old = self.averages.get(name)
            self.averages[name] = new if old is None else update_average(old, new, self._new_score_weight)
        return [self.averages[name] for name in names]

    def of_sweep(self, name: str, weight: Tensor) -> tuple[Tensor, float]:
        """The average that `obs_mask` blends as it goes, [out, in], and the weight of the new scores."""
        momentum = self._new_score_weight if name in self.averages else 1.0
        return self.of(name, weight), momentum

    def of(self, name: str, weight: Tensor) -> Tensor:
        """The average of a layer with that weight, zeros at first."""
        return self.averages.setdefault(name, torch.zeros_like(weight))


def layer_scores(arguments: PruningArguments, weight: Tensor, evidence: Evidence) -> Tensor:
    """Scores of every weight by itself, fp32 [out, in], of the effective weight fp32 [out, in]."""
    if arguments.saliency == "magnitude" or evidence.starved:
        return foresight_scores(magnitude_saliency(weight), evidence.sensitivity)
    return foresight_scores(wanda_saliency(weight, evidence.known.energy), evidence.sensitivity)


def compete_for_shares(arguments: PruningArguments, scores: Sequence[Tensor], sparsity: float) -> list[float]:
    """The sparsity of each matrix when all entries of all matrices compete and `sparsity` of them goes."""
    return allocate(list(scores), sparsity, arguments.floor)


def compete_for_masks(
    arguments: PruningArguments,
    names: Sequence[str],
    scores: Sequence[Tensor],
    sparsity: float,
    running: RunningScores | None,
) -> list[Tensor]:
    """Masks, bool [out, in], when all entries of all matrices compete and the lowest `sparsity` of them goes."""
    blended = list(scores) if running is None else running.blend(names, scores)
    return pooled_masks(blended, sparsity, arguments.floor)


def choose_mask(
    arguments: PruningArguments,
    name: str,
    weight: Tensor,
    evidence: Evidence,
    sparsity: float,
    running: RunningScores | None = None,
) -> Tensor:
    """The mask of one matrix on its own, bool [out, in], True where a weight is kept.

    Args:
        weight: effective weight, fp32 [out, in].
        running: averages of scores that the new ones are blended into; None takes the new ones alone.

    Raises:
        EfxError: the Gram cannot be factored.
    """
    if arguments.saliency == "obs" and not evidence.starved:
        average, momentum = (None, 1.0) if running is None else running.of_sweep(name, weight)
        try:
            return obs_mask(
                weight,
                evidence.known.gram,
                sparsity,
                sensitivity=evidence.sensitivity,
                group="row" if arguments.comparison_group == "row" else "matrix",
                floor=arguments.floor,
                n_of_m=arguments.n_of_m,
                dampening_frac=arguments.dampening_frac,
                average=average,
                momentum=momentum,
            )
        except ValueError as error:
            raise EfxError(f"{name}: {error}") from error
    scores = [layer_scores(arguments, weight, evidence)]
    if running is not None:
        scores = running.blend([name], scores)
    if arguments.n_of_m is not None:
        return n_of_m_mask(scores[0], *arguments.n_of_m)
    if arguments.comparison_group == "row":
        return row_mask(scores[0], sparsity)
    return pooled_masks(scores, sparsity, arguments.floor)[0]


def swap(arguments: PruningArguments, name: str, weight: Tensor, keep: Tensor, evidence: Evidence) -> Tensor:
    """The mask of one matrix after the rounds of swaps that are asked for, bool [out, in].

    Args:
        weight: effective weight, fp32 [out, in].
        keep: mask, bool [out, in].

    Raises:
        EfxError: the Gram cannot be factored.
    """
    if not arguments.swap_rounds or evidence.starved:
        return keep
    statistics = evidence.known
    try:
        return swap_pruned(
            weight,
            keep,
            statistics.gram,
            rounds=arguments.swap_rounds,
            n_of_m=arguments.n_of_m,
            drift=statistics.drift,
            share=arguments.dense_targets,
            dampening_frac=arguments.dampening_frac,
        )
    except ValueError as error:
        raise EfxError(f"{name}: {error}") from error


def decide(
    arguments: PruningArguments,
    name: str,
    weight: Tensor,
    keep: Tensor,
    evidence: Evidence,
    adapter: Tensor | None,
    grid: Grid | None = None,
) -> Decision:
    """Mask, repair and perhaps quantize one matrix.

    Args:
        weight: effective weight, fp32 [out, in].
        keep: mask, bool [out, in].
        adapter: A of its adapters times their scalings, fp32 [rank, in]; None where the repair uses none, and of a
            layer that has none, which a repair of the adapter leaves as it is masked.
        grid: what its weights are rounded to; None leaves them as they are. Needs a Gram.
    """
    unknown, update = torch.full((3,), torch.nan), None
    if evidence.starved:
        if arguments.uses_adapter and adapter is not None:
            update = weight.new_zeros(len(weight), len(adapter))
        return Decision(keep, weight * keep, update, unknown)
    statistics = evidence.known
    if arguments.repair == "none" or (arguments.uses_adapter and adapter is None):
        pruned = weight * keep
    elif arguments.repair == "weights":
        pruned = repair_weights(
            weight,
            keep,
            statistics.gram,
            drift=statistics.drift,
            share=arguments.dense_targets,
            steps=arguments.repair_steps,
            dampening_frac=arguments.dampening_frac,
        )
    else:
        assert adapter is not None
        if arguments.repair == "paper":
            update = paper_update(
                weight,
                keep,
                statistics.energy,
                adapter,
                kappa=arguments.kappa,
                dampening_frac=arguments.dampening_frac,
            )
        else:
            update = adapter_update(
                weight,
                keep,
                statistics.gram,
                adapter,
                drift=statistics.drift,
                share=arguments.dense_targets,
                steps=arguments.repair_steps,
                dampening_frac=arguments.dampening_frac,
            )
        pruned = updated_weight(weight, keep, update, adapter)
    scales = None
    if grid is not None:
        quantized = quantize_kept(pruned, keep, statistics.gram, grid, dampening_frac=arguments.dampening_frac)
        pruned, scales = quantized.weight, quantized.scales
    errors = _errors(weight, keep, pruned, statistics.gram) if statistics.full else unknown
    return Decision(keep, pruned, update, errors, scales)


def _errors(weight: Tensor, keep: Tensor, pruned: Tensor, gram: Tensor) -> Tensor:
    rows = slice(None, None, max(1, len(weight) // MEASURED_ROWS))
    some = weight[rows]
    others = (torch.zeros_like(some), some * keep[rows], pruned[rows])
    return torch.stack([output_error(some, other, gram).sum() for other in others]).cpu()
