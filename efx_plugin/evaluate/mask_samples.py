"""Which weights a sparse model keeps, in a sample of rows that is the same for every model of one architecture.

A cell leaves its sample behind, so that masks can be compared after the models are gone.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# Kept or not, packed bits [rows, ceil(columns / 8)], by name of the layer.
MaskSample = Mapping[str, npt.NDArray[np.uint8]]

_WEIGHTS = 2**17  # of a layer; an overlap is off by .2 % or so


def sample(model: Any) -> dict[str, npt.NDArray[np.uint8]]:
    """Of each target layer evenly spaced rows, of 131,072 weights together or all that there are."""
    from efx_plugin.engine.blocks import linears_in_blocks

    found = {}
    for layer in linears_in_blocks(model):
        rows, columns = layer.base.weight.shape
        chosen = np.unique(np.linspace(0, rows - 1, min(rows, max(1, _WEIGHTS // columns))).round().astype(np.int64))
        found[layer.name] = np.packbits((layer.base.weight[chosen] != 0).cpu().numpy(), axis=1)
    return found


def overlap(one: MaskSample, other: MaskSample) -> dict[str, float]:
    """Intersection over union of the kept weights, by name of the layer. Two independent masks of sparsity s have
    (1 - s) / (1 + s): a third at 50 %."""
    shares = {}
    for name, bits in one.items():
        common = np.bitwise_count(bits & other[name]).sum()
        shares[name] = float(common / max(1, np.bitwise_count(bits | other[name]).sum()))
    return shares
