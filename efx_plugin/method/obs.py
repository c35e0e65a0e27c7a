"""The "obs" saliency: SparseGPT's sweep (arXiv 2301.00774), used to choose a mask and nothing else.

SparseGPT prunes the columns of a layer from left to right and lets the weights to the right make up for each loss.
With H the damped Gram and H⁻¹ = Rᵀ R, R upper triangular, pruning w_i as it stands by then costs (w_i / R_ii)², and
takes (w_i / R_ii) R_ij from every w_j to its right.

Neither H⁻¹ nor R is formed here. H = U Uᵀ with U = R⁻¹ upper triangular is one Cholesky factorisation, begun at the
last column; and if D is what the sweep has taken so far from the columns before a block B, those pruned and those that
made up for them, then the block arrives as W_B + D U_{<B,B} R_BB, where R_BB = U_BB⁻¹ is the only inverse needed.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from efx_plugin.method.masks import lowest, lowest_per_row, most_of_a_row, require_n_of_m
from efx_plugin.method.scores import update_average

# Inside a block, columns are swept one by one in parts of this many, and parts are joined by matrix products.
PART = 16
# The damping is raised tenfold this many times before a Gram counts as unusable.
RAISES = 4


def obs_mask(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    *,
    sensitivity: Tensor | None = None,
    group: Literal["matrix", "row"] = "matrix",
    floor: float | None = None,
    n_of_m: tuple[int, int] | None = None,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    average: Tensor | None = None,
    momentum: float = 1.0,
) -> Tensor:
    """The mask of SparseGPT's sweep: bool [out, in], True where a weight is kept.

    At the left edge of each block of columns the lowest (w_i / R_ii)² c_o in it are chosen, from all rows together or
    from each row alike; of n_of_m = (n, m), n of every m columns of a row when the sweep reaches them. The total is
    exact: round(sparsity · out · in) of all, round(sparsity · in) of each row, n of every m. Weights of inputs that
    are never active cost nothing and go first.

    Args:
        weight: effective weight U, [out, in].
        gram: Gram of the layer's inputs, [in, in], fp32. Everything is computed in fp32, or in float64 where it or
            the weight is.
        sparsity: fraction to prune; without effect where n_of_m is given.
        sensitivity: c, [out], or None for 1. It matters where rows compete only: in group "matrix".
        group: "matrix" lets the rows of a block of columns compete, "row" prunes each row alike.
        floor: at least 1; in group "matrix" only the lowest of a row's entries in each block of columns are eligible,
            see `most_of_a_row`, rounded up. None makes every entry eligible.
        n_of_m: (n, m) prunes n of every m consecutive inputs of a row.
        block_size: columns per block; with n_of_m the multiple of m below it.
        dampening_frac: fraction of the mean diagonal of the Gram added to its diagonal; raised tenfold, four times
            at most, while the sum is not positive definite.
        average: running average S of the scores over successive refreshes, fp32 [out, in]. It becomes
            momentum · S_new + (1 − momentum) · S in place and decides instead of S_new, which is divided by its mean
            over the columns chosen together so that refreshes compare.
        momentum: of the average; 1 overwrites it whatever it holds, as the first refresh must.

    Raises:
        ValueError: the Gram is zero, not finite or not positive definite; n_of_m does not divide the inputs; the
            group is unknown.
    """
    out_features, in_features = weight.shape
    if group not in ("matrix", "row"):
        raise ValueError(f"the comparison group of a sweep is 'matrix' or 'row', not {group!r}")
    part = PART
    if n_of_m is not None:
        require_n_of_m(*n_of_m, in_features)
        part = n_of_m[1]
        block_size = max(block_size - block_size % part, part)
    rows_compete = group == "matrix" and n_of_m is None

    def choose(start: int, columns: Tensor, pivots: Tensor) -> Tensor:
        """Which of the weights [columns, out] to prune, the first of them column `start` of the layer."""
        stop = start + len(columns)
        scores = (columns * pivots.unsqueeze(1)).square_()
        if sensitivity is not None and rows_compete:
            scores.mul_(sensitivity)
        if average is not None:
            scores.div_(scores.mean().clamp_min(torch.finfo(scores.dtype).tiny))
            running = average[:, start:stop].T
            update_average(running, scores, momentum)
            scores = running
        if rows_compete:
            count = round(sparsity * (out_features * stop)) - round(sparsity * (out_features * start))
            return lowest([scores], count, [eligible(scores, count)])[0]
        count = n_of_m[0] if n_of_m is not None else round(sparsity * stop) - round(sparsity * start)
        return lowest_per_row(scores.T, count).T

    def eligible(scores: Tensor, count: int) -> Tensor | None:
        """Which of the scores [columns, out] may be among the `count` lowest; None for all."""
        if floor is None:
            return None
        # Rounding may ask a block for a weight more than its share.
        most = max(math.ceil(most_of_a_row(sparsity, floor) * len(scores)), -(-count // out_features))
        return lowest_per_row(scores.T, most).T if most < len(scores) else None

    dtype = torch.promote_types(weight.dtype, gram.dtype)
    factor = reversed_cholesky(gram.to(dtype), dampening_frac)
    # Transposed, so that the weights of a column lie together. Behind the sweep it holds D, ahead of it U.
    work = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    work[gram.diagonal() == 0] = 0
    pruned = torch.empty_like(work, dtype=torch.bool)
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        panel, inverse = _factor_columns(factor, start, stop)
        pivots = 1 / inverse.diagonal()
        columns = work[start:stop]
        before = columns.clone()
        if start:
            columns.addmm_((panel @ inverse).T, work[:start])
        if n_of_m is None:
            pruned[start:stop] = choose(start, columns, pivots)
            if stop == in_features:
                break
        step = inverse * pivots.unsqueeze(1)  # R_ij / R_ii
        lost = torch.empty_like(columns)
        for first in range(0, stop - start, part):
            here = slice(first, min(first + part, stop - start))
            there = slice(start + here.start, start + here.stop)
            if first:
                columns[here].addmm_(step[:first, here].T, lost[:first], alpha=-1)
            if n_of_m is not None:
                pruned[there] = choose(there.start, columns[here], pivots[here])
            _sweep_part(columns[here], step[here, here], pruned[there], lost[here])
        torch.sub(before, columns, out=columns).add_(lost)
    return pruned.logical_not_().T.contiguous()


def _sweep_part(columns: Tensor, step: Tensor, pruned: Tensor, lost: Tensor) -> None:
    """Sweep a few columns [columns, out] in place; `lost` receives what each of its pruned weights had come to."""
    pruned = pruned.to(columns.dtype)
    for index in range(len(columns)):
        if index:
            columns[index].addmv_(lost[:index].T, step[:index, index], alpha=-1)
        torch.mul(columns[index], pruned[index], out=lost[index])


def reversed_cholesky(gram: Tensor, dampening_frac: float) -> Tensor:
    """Lower triangular L with L Lᵀ the damped Gram, its rows and columns in reverse order: L reversed is U."""
    mean = gram.diagonal().mean()
    if not (mean > 0 and mean.isfinite()):
        raise ValueError(
            "the Gram of the layer's calibration inputs is zero or not finite: leave the layer out, or calibrate on "
            "data that reaches it with finite activations"
        )
    for raised in range(RAISES + 1):
        # The transpose of a symmetric matrix lies in memory as LAPACK wants it, which factorises in place then.
        matrix = gram.flip(0, 1).T
        matrix.diagonal().add_(mean * dampening_frac * 10**raised)
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, info))
        if info == 0:
            return matrix
    raise ValueError(
        "the Gram of the layer's calibration inputs is not positive definite, even with "
        f"{dampening_frac * 10**RAISES:g} times its mean diagonal added: check the inputs for infinities, calibrate on "
        "more tokens or raise dampening_frac"
    )


def _factor_columns(factor: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """U_{<B,B} [start, stop − start] and R_BB = U_BB⁻¹ for the block B of columns from start to stop."""
    size = len(factor)
    columns = factor[size - stop :, size - stop : size - start].flip(0, 1)
    identity = torch.eye(stop - start, dtype=factor.dtype, device=factor.device)
    return columns[:start], torch.linalg.solve_triangular(columns[start:], identity, upper=True)
