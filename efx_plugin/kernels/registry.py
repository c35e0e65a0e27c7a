"""The kernels, which of them a weight is packed for, and why it is not a better one.

`EFX_KERNEL` forces a kernel by its name, for debugging. A new kernel is a class in a new file and a line here.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.kernels import native, reference
from efx_plugin.kernels.cuda import kernel as cuda
from efx_plugin.kernels.protocol import Kernel

# Of those for the device the first without an obstacle is taken; the last has none.
KERNELS: tuple[Kernel, ...] = (*native.KERNELS, cuda.KERNEL, reference.KERNEL)


class Choice(NamedTuple):
    kernel: Kernel
    reason: str | None  # why it is not the best there is; None if it is


@cache
def find(name: str) -> Kernel:
    """The kernel of that name."""
    return {kernel.name: kernel for kernel in KERNELS}[name]


def choose(weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Choice:
    """The kernel for a weight [out, in], of a floating dtype or int8 with `scales`, and activations of `dtype`.

    Raises:
        EfxError: EFX_KERNEL names no kernel, or one that cannot take the weight here.
    """
    if forced := os.environ.get("EFX_KERNEL"):
        return Choice(_forced(forced, weight, dtype, scales), f"EFX_KERNEL={forced} is set")
    device = weight.device.type
    fit = [kernel for kernel in KERNELS if kernel.device in (device, None)]
    reason = None if any(kernel.device for kernel in fit) else f"there is no sparse kernel for {device} devices"
    for kernel in fit:
        obstacle = kernel.obstacle(weight, dtype, scales)
        if obstacle is None:
            return Choice(kernel, reason)
        reason = reason or obstacle
    raise EfxError(f"no kernel takes a weight of {weight.dtype} and shape {tuple(weight.shape)}: {reason}")


def _forced(name: str, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Kernel:
    device = weight.device.type
    obstacles = {
        kernel.name: f"that kernel runs on {kernel.device} devices, and the weights are on a {device} device"
        if kernel.device not in (device, None)
        else kernel.obstacle(weight, dtype, scales)
        for kernel in KERNELS
    }
    if name not in obstacles:
        raise EfxError(f"EFX_KERNEL={name} is no kernel: choose one of {', '.join(obstacles)}")
    if obstacles[name] is not None:
        available = [other for other, obstacle in obstacles.items() if obstacle is None]
        raise EfxError(f"EFX_KERNEL={name}, but {obstacles[name]}: unset it, or choose one of {', '.join(available)}")
    return find(name)
