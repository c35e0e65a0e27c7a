"""The operator `efx::sparse_linear`, and the packed weights that it takes.

The operator carries the kernel's name and its tensors, whatever they are, so that a further kernel changes neither the
schema nor any caller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.kernels.groups import group_size
from efx_plugin.kernels.registry import choose, find


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A sparse weight in the layout of one kernel.

    Attributes:
        tensors: what the kernel reads; layout and dtypes are the kernel's own business.
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: the dtype of activations, bias and result.
        kernel: the kernel's name.
        scheme: of integers, "W8A16" or "W4A16", with quantized activations "W8A8" or "W4A8"; else None.
        reason: why it is not the best kernel that there is; None if it is.
    """

    tensors: tuple[Tensor, ...]
    out_features: int
    in_features: int
    dtype: torch.dtype
    kernel: str
    scheme: str | None
    reason: str | None


def pack(
    weight: Tensor,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    quantize_activations: bool = False,
) -> PackedWeight:
    """Pack a weight [out, in] with zeros in it for the best kernel of its device and dtype.

    Args:
        weight: floating point, or int8 with `scales`.
        scales: float32 [out]; row o of the weight is scales[o] times its int8 values. Or float32 [out, groups], for
            values from -8 to 7, which are packed in four bits each: 32, 64 or 128 adjacent inputs share a scale of a
            row, the last of them maybe fewer, or all inputs do (`groups.group_size`).
        dtype: of activations and result; for a floating-point weight its own, which is the default.
        quantize_activations: for int8 weights: activations are quantized too, each row x to round(x / s) with
            s = max |x| / 127; the kernel for GPUs leaves them as they are, and warns.

    Raises:
        EfxError: the arguments do not fit together, or EFX_KERNEL asks for what is not there.
    """
    if weight.ndim != 2 or not (weight.is_floating_point() or weight.dtype == torch.int8):
        raise EfxError(
            f"a sparse linear weight must be a floating-point or int8 matrix, not {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    out_features, in_features = weight.shape
    if weight.dtype == torch.int8:
        if dtype is None or scales is None or scales.dtype != torch.float32 or not _fit(scales, out_features):
            raise EfxError(
                "an int8 weight needs the dtype of activations, and float32 scales, one per row, or per row and group "
                "of inputs"
            )
        if scales.ndim == 2:
            _check_four_bits(weight, scales)
    elif scales is not None or quantize_activations or dtype not in (None, weight.dtype):
        raise EfxError(f"scales, quantized activations and a dtype of their own belong to int8, not to {weight.dtype}")
    dtype = dtype or weight.dtype
    kernel, reason = choose(weight, dtype, scales)
    tensors = kernel.pack(weight, scales, quantize_activations)
    scheme = None
    if scales is not None:
        scheme = f"W{8 if scales.ndim == 1 else 4}A{8 if quantize_activations else 16}"
    return PackedWeight(tensors, out_features, in_features, dtype, kernel.name, scheme, reason)


def _fit(scales: Tensor, out_features: int) -> bool:
    return scales.ndim in (1, 2) and len(scales) == out_features and scales.numel() >= out_features


def _check_four_bits(weight: Tensor, scales: Tensor) -> None:
    group_size(weight.shape[1], scales)
    if weight.numel() and (weight.min() < -8 or weight.max() > 7):
        raise EfxError(
            f"weights with scales for groups of inputs have four bits, values from -8 to 7, not from "
            f"{int(weight.min())} to {int(weight.max())}"
        )


def unpack(packed: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """What `pack` was given, to the bit but for the sign of zeros.

    Returns:
        The dense weight [out, in], of the packed weight's dtype, and None; or int8 and its float32 scales, [out] or
        [out, groups].
    """
    weight, scales = find(packed.kernel).unpack(packed.tensors)
    return (weight.to(packed.dtype) if scales is None else weight), scales


def kernel_summary(packed: PackedWeight) -> str:
    """What the kernel of `packed` does, and why it is not a better one if it is not: a phrase for a log line."""
    summary = find(packed.kernel).summary
    if packed.scheme is not None:
        summary = f"{packed.scheme}: {summary}"
    return summary if packed.reason is None else f"{summary}; {packed.reason}"


def sparse_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for a packed W. For inference: no gradient is defined.

    Args:
        x: activations [..., in_features], of the packed weight's dtype and on its device.
        packed: W, from `pack`.
        bias: [out_features], of the same dtype, or None.

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
    y: Tensor = torch.ops.efx.sparse_linear(x, packed.tensors, bias, packed.out_features, packed.kernel)
    return y


def _sparse_linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    return find(kernel).linear(x, packed, bias, out_features)


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
