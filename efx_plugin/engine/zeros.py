"""Which weights are zero, remembered as a bit for each weight while others write to them."""

from collections.abc import Mapping

import numpy as np
import torch
from compressed_tensors.utils import update_offload_parameter
from torch import Tensor, nn


def pack_mask(keep: Tensor) -> Tensor:
    """A bool mask as bits on the CPU, uint8 [ceil(size / 8)]."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy()))


def unpack_mask(bits: Tensor, shape: torch.Size) -> Tensor:
    """The bool mask of `shape` that `pack_mask` packed."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).bool().reshape(shape)


@torch.no_grad()
def restore_zeros(layers: Mapping[str, nn.Linear], kept: Mapping[str, Tensor]) -> tuple[int, int]:
    """Make what was zero zero again. Zero lies on every grid of quantization, so that it may be quantized already.

    Args:
        layers: linear layers by name.
        kept: masks of what was not zero, packed by `pack_mask`, by the name of the layer; of some layers or all.

    Returns:
        How many zeros had been filled, and how many there are.
    """
    filled = zeros = 0
    for name, bits in kept.items():
        weight = layers[name].weight
        keep = unpack_mask(bits, weight.shape).to(weight.device)
        zeros += int((~keep).sum())
        if count := int((weight != 0).logical_and(~keep).sum()):
            filled += count
            update_offload_parameter(layers[name], "weight", torch.where(keep, weight, 0))
    return filled, zeros
