"""The reference kernel: torch's own linear on a weight that is kept dense.

It defines what the other kernels compute, and runs wherever torch does. On a CPU the weight is reordered once into
oneDNN's blocked layout, which spares the reordering that `torch.nn.functional.linear` repeats in every call. int8
weights are kept as float32, which holds them and nearly all of their sums exactly; those of four bits are multiplied
with the scales of their groups first, and kept as they came for `unpack`.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from efx_plugin.kernels.groups import group_size


class ReferenceKernel:
    name = "reference"
    summary = "weights expanded to dense once at load: tokens as dense, no gain in memory or speed"
    device = None

    def obstacle(self, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> None:
        """It takes every weight."""

    def pack(self, weight: Tensor, scales: Tensor | None, quantize_activations: bool) -> tuple[Tensor, ...]:
        """Prepare `weight` [out, in] for `linear`: the weight, in oneDNN's layout where oneDNN takes the dtype, and for
        int8 the scales and whether activations are quantized, and for four bits the weight in int8.
        """
        if scales is None:
            return (_prepare(weight),)
        if scales.ndim == 2:
            in_features = weight.shape[1]
            scale = scales.repeat_interleave(group_size(in_features, scales), 1)[:, :in_features]
            return _prepare(weight * scale), scales.clone(), torch.tensor(quantize_activations), weight.clone()
        return _prepare(weight.float()), scales.clone(), torch.tensor(quantize_activations)

    def linear(self, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x [..., in] times the packed weight, plus `bias` [out] if given: [..., out], contiguous."""
        weight, *quantized = packed
        if not quantized:
            return _linear(x, weight, bias)
        scales, quantize_activations, *four_bits = quantized
        if four_bits:
            scales = scales.new_ones(())  # the weight has its own
        activations = x.float()
        if quantize_activations:
            x_scales = activations.abs().amax(-1, keepdim=True) / 127
            activations = (activations * x_scales.reciprocal().nan_to_num(posinf=0)).round()
            scales = scales * x_scales
        y = _linear(activations, weight, None) * scales
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def unpack(self, packed: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and its scales, of new memory."""
        weight, *quantized = packed
        if len(quantized) == 3:
            return quantized[2].clone(), quantized[0].clone()
        dense = weight.to_dense() if weight.is_mkldnn else weight.clone()
        return (dense.to(torch.int8), quantized[0].clone()) if quantized else (dense, None)


KERNEL = ReferenceKernel()


def _prepare(weight: Tensor) -> Tensor:
    if _onednn_takes(weight):
        return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, None))
    return weight.clone(memory_format=torch.contiguous_format)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_mkldnn:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return torch.nn.functional.linear(x, weight, bias)


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
