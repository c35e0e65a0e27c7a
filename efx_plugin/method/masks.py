"""Masks from scores. A mask is bool, True where a weight is kept; the lowest scores are pruned.

Counts are exact to one weight, and of equal scores the first are pruned. Scores are fp32 and not negative.
"""

import math

import torch
from torch import Tensor


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Prune the lowest round(sparsity · in) scores of every row (Wanda's comparison group).

    Args:
        scores: [out, in].
        sparsity: fraction to prune.
    """
    return ~lowest_per_row(scores, round(sparsity * scores.shape[1]))


def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Prune the n lowest scores of every m consecutive inputs of a row.

    Args:
        scores: [out, in], `in` divisible by m.

    Raises:
        ValueError: `in` is not divisible by m, or not 0 < n < m.
    """
    out_features, in_features = scores.shape
    require_n_of_m(n, m, in_features)
    return ~lowest_per_row(scores.reshape(-1, m), n).reshape(out_features, in_features)


def require_n_of_m(n: int, m: int, in_features: int) -> None:
    """ValueError unless n of every m consecutive inputs can be pruned."""
    if not 0 < n < m:
        raise ValueError(f"mask structure {n}:{m} must prune between 1 and {m - 1} of {m}")
    if in_features % m:
        raise ValueError(f"mask structure {n}:{m} needs a number of inputs divisible by {m}, not {in_features}")


def pooled_masks(scores: list[Tensor], sparsity: float, floor: float | None = None) -> list[Tensor]:
    """Prune the lowest entries of several matrices in competition, `sparsity` of them in all.

    Without a floor, pooling empties the rows whose outputs matter least to the estimate and the network with them.
    With the floor only the lowest entries of each row are eligible, see `most_of_a_row`.

    Args:
        scores: matrices [out, in] in one common unit; a single one gives the `matrix` comparison group.
        sparsity: fraction to prune of all entries together.
        floor: at least 1; None makes every entry eligible.
    """
    eligible = None if floor is None else [_eligible(matrix, most_of_a_row(sparsity, floor)) for matrix in scores]
    pruned = lowest(scores, round(sparsity * sum(matrix.numel() for matrix in scores)), eligible)
    return [part.logical_not_() for part in pruned]


def allocate(scores: list[Tensor], sparsity: float, floor: float | None = None) -> list[float]:
    """The fraction that each of several matrices loses when their entries compete as in `pooled_masks`.

    It is the sparsity for a mask of each matrix that is chosen otherwise, as `obs_mask` does. Fractions are whole
    counts over sizes: round(fraction · out · in), summed over the matrices, is round(sparsity · total).

    Args:
        scores, sparsity, floor: as in `pooled_masks`.
    """
    masks = pooled_masks(scores, sparsity, floor)
    return [(mask.numel() - int(mask.count_nonzero())) / mask.numel() for mask in masks]


def most_of_a_row(sparsity: float, floor: float) -> float:
    """The largest fraction of a row that may be pruned where `sparsity` of all entries is.

    A row loses at most floor times what rows lose on average, and keeps at least 2 - floor times what they keep. At
    50 % the two are one; of more sparse matrices the second alone leaves something of every row.
    """
    return min(floor * sparsity, 1 - (2 - floor) * (1 - sparsity), 1.0)


def _eligible(scores: Tensor, fraction: float) -> Tensor | None:
    """The lowest fraction · in entries of each row, and one more where that is no whole number; None for all."""
    count = math.ceil(fraction * scores.shape[1])
    return lowest_per_row(scores, count) if count < scores.shape[1] else None


def lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """True at exactly `count` lowest entries of each row."""
    lowest = scores.topk(count, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def lowest(scores: list[Tensor], count: int, eligible: list[Tensor | None] | None = None) -> list[Tensor]:
    """True at exactly `count` lowest entries of several tensors together; ties at the threshold go to the first.

    Args:
        scores: fp32 or float64, of any shapes but one dtype.
        eligible: bool masks of the entries that may be chosen, `count` of them at least; None stands for all.
    """
    if count == 0:
        return [torch.zeros_like(part, dtype=torch.bool) for part in scores]
    eligible = eligible or [None] * len(scores)
    threshold = _kth_lowest(scores, count, eligible)
    chosen = [
        (part <= threshold) if allowed is None else (part <= threshold).logical_and_(allowed)
        for part, allowed in zip(scores, eligible, strict=True)
    ]
    excess = sum(int(part.count_nonzero()) for part in chosen) - count
    for part, marked in zip(reversed(scores), reversed(chosen), strict=True):
        if excess:
            ties = ((part == threshold) & marked).nonzero()[-excess:]
            marked[tuple(ties.T)] = False
            excess -= len(ties)
    return chosen


def _kth_lowest(scores: list[Tensor], count: int, eligible: list[Tensor | None]) -> Tensor:
    """The count-th lowest of the eligible entries: radix selection, without copying, sorting or moving a score.

    Non-negative floating-point numbers are ordered as the integers that their bits spell. From the leading 16 bits
    on, a histogram of each 16-bit digit, over the entries that share the digits before it, tells the next digit.
    """
    integer = torch.int32 if scores[0].dtype == torch.float32 else torch.int64
    number = None
    for shift in range(scores[0].itemsize * 8 - 16, -1, -16):
        counts = torch.zeros(2**16, dtype=torch.int64, device=scores[0].device)
        for part, allowed in zip(scores, eligible, strict=True):
            bits = part.view(integer)
            digits = (bits >> shift).bitwise_and_(0xFFFF).add_(1)  # 0 is for entries that are out
            if number is not None:
                digits.mul_((bits >> shift + 16) == number)
            if allowed is not None:
                digits.mul_(allowed)
            counts += digits.flatten().bincount(minlength=2**16 + 1)[1:]
        cumulative = counts.cumsum(0)
        digit = int(torch.searchsorted(cumulative, count))
        count -= int(cumulative[digit] - counts[digit])
        number = digit if number is None else number << 16 | digit
    return torch.tensor(number, dtype=integer, device=scores[0].device).view(scores[0].dtype)
