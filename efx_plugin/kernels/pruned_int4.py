"""Which weights of four bits are worth packing sparse: nothing in their format says whether they were pruned."""

import os

import torch
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.kernels.groups import group_size
from efx_plugin.kernels.registry import choose

# Of the weights of a layer. Rounding to four bits makes about a sixth of them zero where nothing was pruned, and with a
# quarter of zeros the packed weight is as large as the dense one.
LEAST_ZEROS = 1 / 3


def why_dense(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> str | None:
    """Why a weight stays dense, in words that follow "they are dense:"; None where it is better packed.

    Args:
        weight: int8 [out, in] with values from -8 to 7.
        scales: float32 [out, groups].
        dtype: of activations.
    """
    if weight.count_nonzero() > (1 - LEAST_ZEROS) * weight.numel():
        return "fewer than a third of their weights are zeros"
    try:
        group_size(weight.shape[1], scales)
    except EfxError as error:
        return str(error)
    kernel, reason = choose(weight, dtype, scales)
    if kernel.device is None and "EFX_KERNEL" not in os.environ:  # that of torch, which expands them
        return f"no sparse kernel takes them, since {reason}"
    return None
