"""How one sparsity is spread over matrices too many to hold the scores of at once."""

import math

import torch
from torch import Tensor

from efx_plugin.method.masks import most_of_a_row

# Scores are counted by their sign, exponent and seven bits of mantissa: a threshold is found to within 0.8 %.
_BINS = 1 << 15


class ScoreCounts:
    """Counts of the scores of several groups of matrices, from which each group's share of the pruning follows.

    Args:
        sparsity: fraction to prune of all entries together.
        floor: see `most_of_a_row`, at least 1.
    """

    def __init__(self, sparsity: float, floor: float):
        self._sparsity, self._floor = sparsity, floor
        self._eligible: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}

    def add(self, group: str, scores: Tensor) -> None:
        """Count the scores, fp32 [out, in] and not negative, of a matrix of the group."""
        count = math.ceil(most_of_a_row(self._sparsity, self._floor) * scores.shape[1])
        lowest = scores.float().topk(count, dim=1, largest=False, sorted=False).values
        # The upper half of a float that is not negative orders as the float does.
        bins = torch.bincount(lowest.contiguous().view(torch.int32).flatten() >> 16, minlength=_BINS)
        self._eligible[group] = self._eligible.get(group, 0) + bins
        self._sizes[group] = self._sizes.get(group, 0) + scores.numel()

    def sparsities(self) -> dict[str, float]:
        """The fraction that each group loses when all entries compete: those below one threshold for all."""
        total = round(self._sparsity * sum(self._sizes.values()))
        cumulative = torch.stack(list(self._eligible.values())).sum(dim=0).cumsum(0)
        threshold = int(torch.searchsorted(cumulative, total))
        below = int(cumulative[threshold - 1]) if threshold else 0
        part = (total - below) / max(1, int(cumulative[threshold]) - below)
        return {
            group: (int(bins[:threshold].sum()) + part * int(bins[threshold])) / self._sizes[group]
            for group, bins in self._eligible.items()
        }
