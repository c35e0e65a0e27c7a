"""The operator `efx::sparse_linear`, the kernels behind it, and the packed weights they take.

A kernel is a module with `pack(weight) -> tuple of tensors`, `linear(x, tensors, bias) -> y` and `SUMMARY`, a phrase
for the log. The operator carries the kernel's name and its tensors, whatever they are, so that a further kernel changes
neither the schema nor any caller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.kernels import reference

KERNELS = {"reference": reference}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A sparse weight in the layout of one kernel.

    Attributes:
        tensors: what the kernel reads; layout and dtypes are the kernel's own business.
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: the weight's dtype, which activations must share.
        kernel: the kernel's name, a key of `KERNELS`.
    """

    tensors: tuple[Tensor, ...]
    out_features: int
    in_features: int
    dtype: torch.dtype
    kernel: str


def pack(weight: Tensor) -> PackedWeight:
    """Pack a weight [out, in] with zeros in it, floating point, for the best kernel of its device and dtype.

    Raises:
        EfxError: `weight` is not a floating-point matrix.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise EfxError(
            f"a sparse linear weight must be a floating-point matrix, not {weight.dtype} of shape {tuple(weight.shape)}"
        )
    out_features, in_features = weight.shape
    return PackedWeight(reference.pack(weight), out_features, in_features, weight.dtype, "reference")


def kernel_summary(packed: PackedWeight) -> str:
    """What the kernel of `packed` does and what it is worth, as a phrase for a log line."""
    return KERNELS[packed.kernel].SUMMARY


def sparse_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for a packed W. For inference: no gradient is defined.

    Args:
        x: activations [..., in_features], of the weight's dtype and on its device.
        packed: W, from `pack`.
        bias: [out_features], or None.

    Returns:
        [..., out_features], of x's dtype.

    Raises:
        EfxError: x does not fit the weight.
    """
    if x.shape[-1] != packed.in_features or x.dtype != packed.dtype:
        raise EfxError(
            f"activations of shape {tuple(x.shape)} and {x.dtype} do not fit a sparse weight of shape "
            f"({packed.out_features}, {packed.in_features}) and {packed.dtype}"
        )
    return torch.ops.efx.sparse_linear(x, packed.tensors, bias, packed.out_features, packed.kernel)


def _sparse_linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    return KERNELS[kernel].linear(x, packed, bias)


def _sparse_linear_fake(x: Tensor, packed: list[Tensor], bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


if not hasattr(torch.ops.efx, "sparse_linear"):  # a second import of this module must not define it again
    _LIBRARY = torch.library.Library("efx", "FRAGMENT")
    _LIBRARY.define(
        "sparse_linear(Tensor x, Tensor[] packed, Tensor? bias, int out_features, str kernel) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    # Not per device: packed weights may have a layout (oneDNN's) that is a dispatch key of its own.
    _LIBRARY.impl("sparse_linear", _sparse_linear, "CompositeExplicitAutograd")
    torch.library.register_fake("efx::sparse_linear", _sparse_linear_fake, lib=_LIBRARY)
