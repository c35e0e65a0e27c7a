"""Quantization of a masked weight that keeps its zeros and lets kept weights make up for each other's rounding.

With q the quantized row of a masked row w and G the Gram of the inputs, rounding costs (w − q) G (w − q)ᵀ. Rounding to
nearest minimises that for each weight as if the others were exact. Here weights are gone through one after the other
instead, each set to the point of its grid that is best given all others as they stand (coordinate descent; its first
pass is GPTQ's error feedback, arXiv 2210.17323, with each error spread over the kept weights of the row alone). Pruned
weights are never touched, so that nothing has to be taken back. In between, each scale is set to its least squares
optimum given the integers. No step raises the error of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from efx_plugin.method.repair import output_error

# Columns whose changes are applied to all others in one product, and parts of them in which changes are gathered.
BLOCK, PART = 128, 16
# Rows are worked on in chunks of this many numbers, or of this many rows where a column is to fill vector registers.
CHUNK, LEAST_ROWS = 2**20, 256
# Scales are tried that clip at these fractions of the largest weight of a group, by bits of a weight.
CLIPPINGS = {4: [1 - 0.02 * step for step in range(31)], 8: [1 - 0.02 * step for step in range(11)]}
# Passes over all weights between two adjustments of the scales, and how often scales are adjusted.
PASSES, ADJUSTMENTS = 2, 2


@dataclass(frozen=True)
class Grid:
    """The numbers that a quantized weight can be: its group's scale times a signed integer of `bits` bits.

    Attributes:
        bits: 4 or 8.
        group: consecutive weights of a row that share a scale, a divisor of its length; None for the whole row.
        scale_dtype: dtype that scales are stored in, which they are rounded to before weights are.
    """

    bits: int
    group: int | None = None
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def lowest(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    def width(self, columns: int) -> int:
        """Weights that share a scale, in a row of that many.

        Raises:
            ValueError: groups do not divide it.
        """
        width = self.group or columns
        if columns % width:
            raise ValueError(f"groups of {width} weights do not divide rows of {columns}")
        return width

    def round_scale(self, scale: Tensor) -> Tensor:
        """The nearest scales that can be stored, in fp32, at least the smallest normal number."""
        return scale.to(self.scale_dtype).float().clamp_min(torch.finfo(self.scale_dtype).tiny)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid.

    Attributes:
        integers: int8 [out, in], 0 where a weight is pruned.
        scales: fp32 [out, groups], each a number of the grid's `scale_dtype`.
    """

    integers: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:
        """The integers times their scales, fp32 [out, in]."""
        return self.integers * _spread(self.scales, self.integers.shape[1])


def round_to_nearest(weight: Tensor, keep: Tensor, scales: Tensor, grid: Grid) -> QuantizedWeight:
    """Each kept weight at the nearest point of the grid.

    Args:
        weight: [out, in].
        keep: mask, bool [out, in].
        scales: fp32 [out, groups].
    """
    integers = (weight.float() / _spread(scales, weight.shape[1])).round_().clamp_(grid.lowest, grid.highest)
    return QuantizedWeight(integers.mul_(keep).to(torch.int8), scales)


def clipped_scales(weight: Tensor, keep: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """Scales for rounding to nearest, fp32 [out, groups]: of `CLIPPINGS`, those of least error within each group.

    The error of a group is that of its kept weights against the part of the Gram that belongs to the group. A group
    without a kept weight gets the smallest scale that can be stored.

    Args:
        weight: [out, in].
        keep: mask, bool [out, in].
        gram: Gram of the layer's inputs, fp32 [in, in].
    """
    width = grid.width(weight.shape[1])
    scales = torch.empty(len(weight), weight.shape[1] // width, device=weight.device)
    for rows in chunks(*weight.shape):
        for group, start in enumerate(range(0, weight.shape[1], width)):
            columns = slice(start, start + width)
            masked = weight[rows, columns].float() * keep[rows, columns]
            scales[rows, group] = _clipped_scale(masked, gram[columns, columns], grid)
    return scales


def _clipped_scale(masked: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """The scale of each row of one group [rows, width], fp32 [rows]."""
    largest = masked.abs().amax(dim=1) / ((grid.highest - grid.lowest) / 2)
    best = scale = grid.round_scale(largest)
    least = torch.full_like(largest, torch.inf)
    for clipping in CLIPPINGS[grid.bits]:
        scale = grid.round_scale(largest * clipping).unsqueeze(1)
        error = masked - (masked / scale).round_().clamp_(grid.lowest, grid.highest).mul_(scale)
        cost = torch.linalg.vecdot(error @ gram, error)
        better = cost < least
        least, best = torch.where(better, cost, least), torch.where(better, scale.squeeze(1), best)
    return best


def quantize_kept(
    weight: Tensor, keep: Tensor, gram: Tensor, grid: Grid, *, dampening_frac: float = 0.01
) -> QuantizedWeight:
    """The kept weights on a grid, chosen together so that E‖(W − Q) x‖² is small for every row.

    No row has a larger error than rounding to nearest gives it with the same scales.

    Args:
        weight: masked and repaired weight W, [out, in].
        keep: mask, bool [out, in].
        gram: Gram of the layer's inputs, fp32 [in, in].
        grid: the grid.
        dampening_frac: fraction of the mean diagonal of the Gram that is added to its diagonal in the descent, as in
            a repair.

    Raises:
        ValueError: the grid's groups do not divide the inputs.
    """
    width = grid.width(weight.shape[1])
    scales = clipped_scales(weight, keep, gram, grid)
    damping = dampening_frac * float(gram.diagonal().mean())
    if not damping > 0:  # the layer saw nothing but zeros, and any weights do
        return round_to_nearest(weight, keep, scales, grid)
    damped = gram.clone()
    damped.diagonal().add_(damping)
    integers = torch.empty_like(weight, dtype=torch.int8)
    for rows in chunks(*weight.shape):
        masked = weight[rows].float() * keep[rows]
        descent = _Descent(masked, keep[rows], scales[rows], damped, width, grid)
        for _ in range(ADJUSTMENTS):
            descent.choose_integers()
            descent.adjust_scales()
        descent.choose_integers()
        found = descent.result()
        nearest = round_to_nearest(masked, keep[rows], found.scales, grid)
        worse = output_error(masked, found.weight, gram) > output_error(masked, nearest.weight, gram)
        integers[rows] = torch.where(worse.unsqueeze(1), nearest.integers, found.integers)
        scales[rows] = found.scales
    return QuantizedWeight(integers, scales)


class _Descent:
    """Coordinate descent on (w − q) H (w − q)ᵀ for some rows, from rounding to nearest on.

    Everything is transposed, so that the weights of a column lie together.

    Args:
        masked: w, fp32 [rows, in], zero where a weight is pruned.
        keep: mask, bool [rows, in].
        scales: fp32 [rows, groups].
        gram: H, fp32 [in, in], positive definite.
        width: weights of a row that share a scale.
    """

    def __init__(self, masked: Tensor, keep: Tensor, scales: Tensor, gram: Tensor, width: int, grid: Grid):
        self._gram, self._width, self._grid = gram, width, grid
        self._mask = keep.T.to(torch.float32, memory_format=torch.contiguous_format)
        self._weight = masked.T.contiguous()
        self._scales = scales.T.contiguous()
        self._integers = round_to_nearest(masked, keep, scales, grid).integers.T.float().contiguous()

    def result(self) -> QuantizedWeight:
        return QuantizedWeight(self._integers.T.to(torch.int8), self._scales.T)

    def _slope(self) -> Tensor:
        """H (w − q), half of what the error falls by per unit that a weight is raised, [in, rows]."""
        spread = self._scales.repeat_interleave(self._width, dim=0)
        return self._gram @ (self._weight - self._integers * spread)

    def choose_integers(self) -> None:
        """Set every kept weight to its best integer given all others, in turn, `PASSES` times."""
        slope, size = self._slope(), len(self._gram)
        for _ in range(PASSES):
            for start in range(0, size, BLOCK):
                stop = min(start + BLOCK, size)
                changes = self._choose_block(slope[start:stop].clone(), start, stop)
                slope.addmm_(self._gram[:, start:stop], changes, alpha=-1)

    def _choose_block(self, slope: Tensor, start: int, stop: int) -> Tensor:
        """How much the weights of a block of columns change, [columns, rows]."""
        gram = self._gram[start:stop, start:stop]
        pivots = gram.diagonal().tolist()
        changes = torch.empty_like(slope)
        for first in range(0, stop - start, PART):
            last = min(first + PART, stop - start)
            if first:
                slope[first:last].addmm_(gram[first:last, :first], changes[:first], alpha=-1)
            for index in range(first, last):
                if index > first:
                    slope[index].addmv_(changes[first:index].T, gram[first:index, index], alpha=-1)
                column = start + index
                scale, integer = self._scales[column // self._width], self._integers[column]
                best = torch.addcdiv(integer, slope[index], scale, value=1 / pivots[index]).round_()
                best.clamp_(self._grid.lowest, self._grid.highest).mul_(self._mask[column])
                torch.sub(best, integer, out=changes[index]).mul_(scale)
                integer.copy_(best)
        return changes

    def adjust_scales(self) -> None:
        """Set every scale to the best given the integers and all other scales of its row, in turn."""
        slope = self._slope()
        for group, scale in enumerate(self._scales):
            columns = slice(group * self._width, (group + 1) * self._width)
            integers = self._integers[columns]
            image = self._gram[:, columns] @ integers
            fall = torch.linalg.vecdot(integers, slope[columns], dim=0)
            curvature = torch.linalg.vecdot(integers, image[columns], dim=0)
            wanted = scale + (fall / curvature).where(curvature > 0, 0)
            change = self._grid.round_scale(wanted.where(wanted > 0, scale)) - scale
            # Rounded, the step may have become too long to help.
            change = change.where(2 * change * fall > change * change * curvature, 0)
            scale.add_(change)
            slope.addcmul_(image, change, value=-1)


def _spread(scales: Tensor, columns: int) -> Tensor:
    """The scale of each weight, [out, in]."""
    return scales.repeat_interleave(columns // scales.shape[1], dim=1)


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows of `width` numbers each."""
    size = max(CHUNK // width, LEAST_ROWS)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
