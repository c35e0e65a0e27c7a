"""Which kernel a weight is packed for, and why it is not a better one.

`EFX_KERNEL` forces a kernel by its name, for debugging.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.kernels import native, reference

REFERENCE = "reference"
MOST_INT8_COLUMNS = 65_536


class Choice(NamedTuple):
    kernel: str
    reason: str | None  # why it is not the best there is; None if it is


def find(name: str) -> native.NativeKernel | reference.ReferenceKernel:
    """The kernel of that name."""
    return reference.KERNEL if name == REFERENCE else native.kernels()[name]


def choose(weight: Tensor, dtype: torch.dtype) -> Choice:
    """The kernel for a weight [out, in], of a floating dtype or int8, and activations of `dtype`.

    Raises:
        EfxError: EFX_KERNEL names no kernel, or one that cannot run here.
    """
    forced = os.environ.get("EFX_KERNEL")
    obstacle = _obstacle(weight, dtype)
    available = [] if obstacle else [kernel.name for kernel in native.kernels().values() if kernel.is_supported]
    if forced:
        return Choice(_check(forced, available, obstacle), f"EFX_KERNEL={forced} is set")
    if obstacle:
        return Choice(REFERENCE, obstacle)
    best = next(iter(native.kernels()))
    reason = None if available[0] == best else f"this processor lacks what {best} needs"
    return Choice(available[0], reason)


def _check(name: str, available: list[str], obstacle: str | None) -> str:
    if name == REFERENCE or name in available:
        return name
    if name in native.SUMMARIES:
        raise EfxError(
            f"EFX_KERNEL={name}, but {obstacle or 'this processor lacks its instructions'}: unset it, or choose one of "
            f"{', '.join([*available, REFERENCE])}"
        )
    raise EfxError(f"EFX_KERNEL={name} is no kernel: choose one of {', '.join([*native.SUMMARIES, REFERENCE])}")


def _obstacle(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why no sparse kernel takes the weight."""
    if weight.device.type != "cpu":
        return f"there is no sparse kernel for {weight.device.type} devices"
    if native.library() is None:
        return (
            "efx-plugin was installed without a C++ compiler: install g++ and run "
            "`pip install --force-reinstall --no-deps efx-plugin`"
        )
    if weight.numel() == 0:
        return "the weight is empty"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"the sparse kernels take bfloat16 and float32 activations, not {str(dtype).removeprefix('torch.')}"
    if weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float()):
        return "the weights are float32 values that bfloat16 cannot hold"
    if weight.dtype == torch.int8 and weight.shape[1] > MOST_INT8_COLUMNS:
        return f"a row has more than {MOST_INT8_COLUMNS} int8 weights, whose products may overflow their sum"
    return None
