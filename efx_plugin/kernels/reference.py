"""The reference kernel: torch's own linear on a weight that is kept dense.

It defines what the other kernels compute, and runs wherever torch does. On a CPU the weight is reordered once into
oneDNN's blocked layout, which spares the reordering that `torch.nn.functional.linear` repeats in every call.
"""

import torch
from torch import Tensor

SUMMARY = "weights expanded to dense once at load: tokens as dense, no gain in memory or speed"


def pack(weight: Tensor) -> tuple[Tensor]:
    """Prepare `weight` [out, in] for `linear`: one tensor, in oneDNN's layout where oneDNN takes the dtype."""
    if _onednn_takes(weight):
        return (torch.ops.mkldnn._reorder_linear_weight(weight, None),)
    return (weight.clone(memory_format=torch.contiguous_format),)


def linear(x: Tensor, packed: list[Tensor], bias: Tensor | None) -> Tensor:
    """x [..., in] times the packed weight, plus `bias` [out] if given: [..., out], contiguous."""
    (weight,) = packed
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return weight.dtype == torch.float32
