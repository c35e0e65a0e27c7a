"""How vLLM loads and runs a sparse linear layer."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, register_weight_loader_v2_supported_method

from efx_plugin.kernels import PackedWeight, kernel_summary, sparse_linear
from efx_plugin.serving.launch import PLUGIN
from efx_plugin.serving.quantized import Int8Scheme
from efx_plugin.serving.weight_loader import SparseWeightLoader
from efx_plugin.version import __version__

logger = init_logger("vllm.efx_plugin")


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """Loads a layer from its sparse shards and runs it on `efx::sparse_linear`.

    Args:
        format_name: the checkpoint's sparse format.
        shards: names of the checkpoint's modules that the layer fuses, in order; its own name if it fuses none.
        scheme: how the weight is quantized as well; None if it is not.
    """

    def __init__(self, format_name: str, shards: list[str], scheme: Int8Scheme | None = None) -> None:
        self.format_name = format_name
        self.shards = shards
        self.scheme = scheme

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer empty parameters under the checkpoint's names, which lead the tensors to our loader."""
        layer.sparse_loader = SparseWeightLoader(
            layer,
            self.format_name,
            self.shards,
            self.scheme,
            shape=(sum(output_partition_sizes), input_size_per_partition),
            dtype=params_dtype,
            dense_loader=extra_weight_attrs["weight_loader"],
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Take over the packed weight.

        Raises:
            SparseCheckpointError: parts of the layer were not in the checkpoint.
        """
        layer.packed_weight = layer.sparse_loader.finish()
        del layer.sparse_loader
        announce(layer.packed_weight)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_linear(x, layer.packed_weight, bias)


def announce(packed: PackedWeight) -> None:
    """Log the kernel of a layer that has been loaded, and let vLLM know it."""
    _tell_cache(packed.kernel)
    # The line is the same for every layer, so that each process logs it once.
    logger.info_once(
        "efx-plugin: sparse layers run on the %s kernel (%s).",
        packed.kernel,
        kernel_summary(packed),
        scope="process",
    )


def _tell_cache(kernel: str) -> None:
    """Make the kernel a part of vLLM's configuration, under whose hash vLLM keeps compiled graphs for later starts.

    A graph names the kernel and has its tensors for inputs. vLLM loads it again without looking whether they are still
    the same: another machine, EFX_KERNEL or a library that was missing change them.
    """
    vllm_config = get_current_vllm_config_or_none()  # none where a layer is loaded by itself: nothing is compiled then
    config = vllm_config and vllm_config.additional_config
    if isinstance(config, dict):  # of a platform outside of vLLM it may be an object, which is left alone
        kernels = {*config.get(PLUGIN, {}).get("kernels", ()), kernel}
        config[PLUGIN] = {"kernels": sorted(kernels), "version": __version__}


def kernels_in_use(model: torch.nn.Module) -> list[str]:
    """Names of the kernels that the sparse layers of a loaded vLLM model run on; empty for a dense model."""
    packed = (getattr(module, "packed_weight", None) for module in model.modules())
    return sorted({weight.kernel for weight in packed if isinstance(weight, PackedWeight)})
