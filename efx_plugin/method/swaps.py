"""Swaps: pruned weights come back in place of kept ones where that lowers the error of a repaired row.

A mask is chosen before its weights are repaired, from what each weight costs by itself or in one sweep. Once the kept
weights K of a row are fitted (`repair_weights`), the Gram tells what another mask would be worth. With y what the layer
is to give, and the residual r = E[(y − W x) xᵀ] per row,

    to remove kept weight j raises the error by  w_j² / [(G_KK)⁻¹]_jj,
    to bring back pruned weight q lowers it by   r_q² / (G_qq − G_qK (G_KK)⁻¹ G_Kq),

where the others make up for either. Both denominators are the variance of one input that the kept ones do not explain.
Here what all others do not explain stands for it, 1 / [(G + λ I)⁻¹]_ii: it is the same for all rows, and one inverse
gives it. (Six rounds take 15.1 % off the errors of layers of SmolLM2-135M at 50 %; with the mean of the exact one over
sampled rows 15.8.)

So the worst kept weights of a row are swapped for the best pruned ones, many at once, and the row is fitted again.
Where its error has not fallen it goes back and tries a third as many. SparseSwaps (arXiv 2512.10922) swaps on the Gram
as well, one pair at a time and without a repair.
"""

import math

import torch
from torch import Tensor

from efx_plugin.method.obs import reversed_cholesky
from efx_plugin.method.repair import change_of_weights, chunks

# Conjugate gradient steps of the first fit, and of the fit after every round: with three a sixth less is gained, with
# two a third less.
FIRST_STEPS, STEPS = 10, 4
# The fraction of a row that may be swapped in one round at first.
AT_ONCE = 0.03


def swap_pruned(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    *,
    rounds: int,
    n_of_m: tuple[int, int] | None = None,
    drift: Tensor | None = None,
    share: float = 1.0,
    dampening_frac: float = 0.01,
) -> Tensor:
    """A mask of the same number of weights in each row under which the repaired row errs less: bool [out, in].

    Args:
        weight: effective weight U before pruning, [out, in].
        keep: the mask to start from, bool [out, in], True where a weight is kept.
        gram: Gram of the layer's inputs, fp32 [in, in].
        rounds: of swaps, each as expensive as six steps of a repair.
        n_of_m: (n, m) where n of every m consecutive inputs are pruned: swaps stay among these m. None lets any two
            weights of a row be swapped.
        drift, share, dampening_frac: as in `repair_weights`.

    Raises:
        ValueError: the Gram is not finite or not positive definite.
    """
    damping = dampening_frac * float(gram.diagonal().mean())
    if not damping > 0:  # the layer saw nothing but zeros: any mask does
        return keep
    unexplained = 1 / torch.cholesky_inverse(reversed_cholesky(gram, dampening_frac)).diagonal().flip(0)
    swapped = torch.empty_like(keep)
    for rows in chunks(*weight.shape):
        row_swaps = _RowSwaps(weight[rows], keep[rows], gram, drift, share, damping)
        for _ in range(rounds):
            row_swaps.swap(unexplained, n_of_m)
        swapped[rows] = row_swaps.keep
    return swapped


class _RowSwaps:
    """Some rows of a layer with a mask, fitted weights and what these leave of the output.

    Attributes:
        keep: the mask, bool [rows, in].
    """

    def __init__(self, weight: Tensor, keep: Tensor, gram: Tensor, drift: Tensor | None, share: float, damping: float):
        self.keep, self._weight, self._gram, self._damping = keep, weight.float(), gram, damping
        self._target = self._weight @ gram
        if drift is not None:
            self._target.addmm_(self._weight, drift, alpha=share)
        self._fitted, self._residual = self._fit(keep, self._weight * keep, FIRST_STEPS)
        self._most = torch.full((len(weight), 1), AT_ONCE * weight.shape[1], device=weight.device)

    def swap(self, unexplained: Tensor, n_of_m: tuple[int, int] | None) -> None:
        """One round."""
        gain = (self._residual.square() / unexplained).masked_fill_(self.keep, -1)
        cost = (self._fitted.square() * unexplained).masked_fill_(~self.keep, torch.inf)
        swapped = _best_swaps(gain, cost, self._most, None if n_of_m is None else n_of_m[1])
        keep = self.keep ^ swapped
        fitted, residual = self._fit(keep, self._fitted * keep, STEPS)
        # The error is quadratic, with -2 r as its gradient.
        better = torch.linalg.vecdot(fitted - self._fitted, residual + self._residual).unsqueeze(1) > 0
        self.keep = keep.where(better, self.keep)
        self._fitted = fitted.where(better, self._fitted)
        self._residual = residual.where(better, self._residual)
        self._most = self._most.where(better, self._most / 3)

    def _fit(self, keep: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The kept weights after some steps from `start`, and their residual r; both [rows, in]."""
        lacking = torch.add(self._target - start @ self._gram, self._weight - start, alpha=self._damping)
        inverse = 1 / (self._gram.diagonal() + self._damping)
        fitted = start + change_of_weights(lacking * keep, keep, self._gram, inverse, self._damping, steps)
        return fitted, self._target - fitted @ self._gram


def _best_swaps(gain: Tensor, cost: Tensor, most: Tensor, group: int | None) -> Tensor:
    """The weights to swap, those that come back and those that go: bool [rows, in].

    Args:
        gain: of bringing back each pruned weight, negative for kept ones, [rows, in].
        cost: of removing each kept weight, infinite for pruned ones, [rows, in].
        most: swaps of each row at most, [rows, 1]; one is always tried.
        group: consecutive weights among which two may be swapped; None for all of a row.
    """
    width = gain.shape[1]
    count = math.ceil(AT_ONCE * width)
    if group is None:
        gains, back = gain.topk(count)
        costs, gone = cost.topk(count, largest=False)
        profit = gains - costs
    else:
        gains, back = gain.unflatten(1, (-1, group)).max(dim=2)
        costs, gone = cost.unflatten(1, (-1, group)).min(dim=2)
        profit, groups = (gains - costs).topk(min(count, width // group))
        first = groups * group
        back, gone = first + back.gather(1, groups), first + gone.gather(1, groups)
    pays = (profit > 0) & (torch.arange(profit.shape[1], device=gain.device) < most)
    return torch.zeros_like(gain, dtype=torch.bool).scatter_(1, back, pays).scatter_(1, gone, pays)
