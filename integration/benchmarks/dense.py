"""Dense linear layers as vLLM runs them on a CPU: what sparse ones are measured against.

A weight is in one of these forms:
    bf16  by oneDNN
    fp32  by oneDNN, with activations in float32
    int8  a scale per row, activations quantized by token (W8A8): by oneDNN, or with AMX by a kernel of vLLM's own
    int4  a bfloat16 scale per row and 128 inputs (W4A16): by vLLM's `cpu_gemm_wna16`, or with AMX, where vLLM quantizes
          activations too, by its `int4_scaled_mm_cpu`
"""

from collections.abc import Callable

import torch
from torch import Tensor

BITS = {"bf16": 16, "fp32": 32, "int8": 8, "int4": 4}  # of a weight
GROUP = 128  # inputs that share a scale of int4

Linear = Callable[[Tensor], Tensor]


class Layers:
    """Copies of one weight in one form, each in memory of its own.

    Args:
        form: one of `BITS`.
        weight: [out, in], bfloat16; for int4, 32 divides `out` and 128 `in`.
        count: of copies.
    """

    def __init__(self, form: str, weight: Tensor, count: int) -> None:
        make = {"bf16": _onednn, "fp32": _onednn_float32, "int8": _int8, "int4": _int4}[form]
        self.dtype = torch.float32 if form == "fp32" else torch.bfloat16  # of activations
        self.linears = [make(weight) for _ in range(count)]

    def __call__(self, x: Tensor, used: int) -> list[Tensor]:
        """The products of x [tokens, in], of `dtype`, with the first `used` copies: [tokens, out] each."""
        return [linear(x) for linear in self.linears[:used]]


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Quantize symmetrically, to the nearest value of so many bits, but no weight to zero that was not.

    Args:
        weight: [out, in]; some weight of each group is not zero.
        group: adjacent inputs that share a scale; it divides `in`.

    Returns:
        The values, int8 [out, in], and their scales, float32 [out, in / group], which bfloat16 holds.
    """
    most = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(-1, keepdim=True) / most).bfloat16().float()
    values = (groups.abs() / scales).round().clamp(1, most) * groups.sign()
    return values.flatten(1).to(torch.int8), scales.squeeze(-1)


def _onednn(weight: Tensor) -> Linear:
    from vllm import _custom_ops

    handler = _custom_ops.create_onednn_mm(weight.t(), 32)
    return lambda x: _custom_ops.onednn_mm(handler, x, None)


def _onednn_float32(weight: Tensor) -> Linear:
    return _onednn(weight.float())


def _int8(weight: Tensor) -> Linear:
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
    from vllm.utils.torch_utils import set_default_torch_dtype

    values, scales = quantize(weight, 8, weight.shape[1])
    layer = torch.nn.Module()
    layer.weight, layer.weight_scale = _parameter(values), _parameter(scales)
    layer.input_scale = layer.input_zero_point = layer.bias = None  # activations are quantized as they come
    layer.logical_widths = [len(weight)]
    config = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)
    names = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")
    kernel = cpu.CPUInt8ScaledMMLinearKernel(config, names)
    with set_default_torch_dtype(torch.bfloat16):  # of results
        kernel.process_weights_after_loading(layer)
    return lambda x: kernel.apply_weights(layer, x)


def _int4(weight: Tensor) -> Linear:
    from vllm.model_executor.kernels.linear.mixed_precision import cpu
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    values, scales = quantize(weight, 4, GROUP)
    packed = pack_quantized_values_into_int32(values.int() + 8, scalar_types.uint4b8, packed_dim=1)
    layer = torch.nn.Module()
    layer.weight_packed, layer.weight_scale = _parameter(packed), _parameter(scales.bfloat16())
    layer.weight_packed.input_dim = layer.weight_packed.packed_dim = 1
    layer.weight_packed.output_dim = layer.weight_scale.output_dim = 0
    layer.bias = None
    shape = (weight.shape[1], weight.shape[0])
    config = MPLinearLayerConfig(shape, shape, scalar_types.uint4b8, torch.bfloat16, GROUP, zero_points=False)
    kernel = cpu.CPUWNA16LinearKernel(config, "weight_packed", "weight_scale", "weight_zero_point")
    kernel.process_weights_after_loading(layer)
    return lambda x: kernel.apply_weights(layer, x)


def _parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
