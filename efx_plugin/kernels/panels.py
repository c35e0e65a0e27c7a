"""Products by a library for dense matrices: panels of a packed weight's rows are expanded one after the other, into one
buffer.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Panel = tuple[int, int]  # the first row and the number of rows


def cut(rows: int, most: int, unit: int) -> tuple[Panel, ...]:
    """Panels of a weight, of about the same height: at most `most` rows, and but for the last a multiple of `unit`.

    Args:
        most: at least `unit`.
    """
    count = math.ceil(rows / (most // unit * unit))
    step = math.ceil(rows / count / unit) * unit
    return tuple((first, min(step, rows - first)) for first in range(0, rows, step))


@torch.no_grad()  # torch refuses to write results in place where a gradient is asked for
def multiply(
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    panels: Iterable[Panel],
    buffer: Tensor,
    expand: Callable[[int, int, Tensor], None],
) -> None:
    """Set y [tokens, out] to x [tokens, in] times the transposed weight, plus bias [out] if given.

    Args:
        x, bias, y: of one dtype.
        panels: of all rows of the weight.
        buffer: of the same dtype, one row that has room for the highest panel.
        expand: called with a panel's first row, its number of rows, and room for it [rows, in], which it fills.
    """
    columns = x.shape[1]
    for first, rows in panels:
        dense = buffer[: rows * columns].view(rows, columns)
        expand(first, rows, dense)
        part = y[:, first : first + rows]
        if bias is None:
            torch.mm(x, dense.T, out=part)
        else:
            torch.addmm(bias[first : first + rows], x, dense.T, out=part)
