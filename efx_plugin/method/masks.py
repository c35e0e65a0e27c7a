"""Masks from scores. A mask is bool, True where a weight is kept; the lowest scores are pruned."""

import math

import torch
from torch import Tensor


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Prune the lowest round(sparsity · in) scores of every row (Wanda's comparison group).

    Args:
        scores: [out, in].
        sparsity: fraction to prune.
    """
    return ~_lowest_per_row(scores, round(sparsity * scores.shape[1]))


def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Prune the n lowest scores of every m consecutive inputs of a row.

    Args:
        scores: [out, in], `in` divisible by m.

    Raises:
        ValueError: `in` is not divisible by m, or not 0 < n < m.
    """
    out_features, in_features = scores.shape
    if not 0 < n < m:
        raise ValueError(f"mask structure {n}:{m} must prune between 1 and {m - 1} of {m}")
    if in_features % m:
        raise ValueError(f"mask structure {n}:{m} needs a number of inputs divisible by {m}, not {in_features}")
    return ~_lowest_per_row(scores.reshape(-1, m), n).reshape(out_features, in_features)


def pooled_masks(scores: list[Tensor], sparsity: float, floor: float | None = None) -> list[Tensor]:
    """Prune the lowest entries of several matrices in competition, `sparsity` of them in all.

    Without a floor, pooling empties the rows whose outputs matter least to the estimate and the network with them.
    The floor makes only the lowest floor · sparsity · in entries of each row eligible.

    Args:
        scores: matrices [out, in] in one common unit; a single one gives the `matrix` comparison group.
        sparsity: fraction to prune of all entries together.
        floor: at least 1; None makes every entry eligible.
    """
    pools = []
    for matrix in scores:
        eligible = matrix.shape[1] if floor is None else math.ceil(floor * sparsity * matrix.shape[1])
        if eligible < matrix.shape[1]:
            matrix = matrix.masked_fill(~_lowest_per_row(matrix, eligible), math.inf)
        pools.append(matrix.flatten())
    sizes = [pool.numel() for pool in pools]
    pruned = _lowest(torch.cat(pools), round(sparsity * sum(sizes)))
    return [~part.reshape(matrix.shape) for part, matrix in zip(pruned.split(sizes), scores, strict=True)]


def _lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """True at exactly `count` lowest entries of each row."""
    lowest = scores.topk(count, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """True at exactly `count` lowest entries of a 1-D tensor; ties at the threshold go to the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    lowest = scores < threshold
    ties = (scores == threshold).nonzero().flatten()[: count - int(lowest.sum())]
    lowest[ties] = True
    return lowest
