"""Pruned weights of four bits (W4A16): vLLM loads them as it loads all weights of that format, we pack them sparse.

On disk they are `pack-quantized`, which has no room for a mask and says nothing about zeros, so that a vLLM without
this plugin serves them as well, dense. Here the zeros of each layer are counted once it has been loaded.
"""

import re

import torch
from torch import Tensor
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsWNA16,
)
from vllm.platforms import current_platform

from efx_plugin.checkpoint.formats.pack_quantized import unpack
from efx_plugin.kernels import pack, sparse_linear
from efx_plugin.kernels.pruned_int4 import why_dense
from efx_plugin.serving.linear_method import announce

logger = init_logger("vllm.efx_plugin")


def sparse_if_pruned(scheme: CompressedTensorsScheme | None) -> CompressedTensorsScheme | None:
    """The scheme that vLLM has chosen for a linear layer, or ours in its place: of symmetric four-bit weights on a CPU,
    whose activations are not quantized."""
    if (
        scheme is None
        or type(scheme) is not CompressedTensorsWNA16
        or scheme.num_bits != 4
        or not scheme.symmetric
        or not current_platform.is_cpu()
    ):
        return scheme
    return SparseW4A16(
        scheme.strategy,
        scheme.num_bits,
        None if scheme.group_size == -1 else scheme.group_size,
        scheme.symmetric,
        scheme.layer_name,
    )


def quantizes_activations(dtype: torch.dtype) -> bool:
    """Whether vLLM multiplies weights of four bits with activations of 8 on this CPU, and so do we.

    It does with AMX, where that is the faster arithmetic, unless VLLM_CPU_INT4_W4A8 is 0.
    """
    return envs.VLLM_CPU_INT4_W4A8 and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


class SparseW4A16(CompressedTensorsWNA16):
    """Packs a layer sparse where it has zeros enough and a sparse kernel takes it, and is vLLM's scheme otherwise."""

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Take over the packed weight in place of vLLM's parameters, or leave all to vLLM and say why."""
        words: Tensor = layer.weight_packed.data
        shape = torch.Size([words.shape[0], layer.input_size_per_partition])
        weight = unpack(words, self.num_bits, shape)
        scales = layer.weight_scale.data.float()
        if reason := why_dense(weight, scales, layer.params_dtype):
            # The same words for every layer, so that each process logs them once.
            name = re.sub(r"\.\d+\.", ".*.", str(self.layer_name))
            logger.info_once("efx-plugin: %s are served dense: %s.", name, reason, scope="process")
            super().process_weights_after_loading(layer)
            return
        layer.packed_weight = pack(
            weight,
            scales=scales,
            dtype=layer.params_dtype,
            quantize_activations=quantizes_activations(layer.params_dtype),
        )
        for name in ("weight_scale", "weight_shape"):
            delattr(layer, name)
        # vLLM's LoRA layers ask this one for its device.
        layer.weight_packed = torch.nn.Parameter(words.new_empty(0), requires_grad=False)
        announce(layer.packed_weight)

    def apply_weights(self, layer: LinearBase, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T, and `bias`."""
        if hasattr(layer, "packed_weight"):
            return sparse_linear(x, layer.packed_weight, bias)
        y: Tensor = super().apply_weights(layer, x, bias)
        return y
