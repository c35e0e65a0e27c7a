"""From the tensors of a sparse checkpoint to the packed weight of one vLLM layer.

vLLM's parameters slice rectangles, and the rows of a sparse weight are ragged. So the tensors of a layer are collected
first. Then each shard of it (q_proj of a qkv_proj, say) is expanded and handed to the layer's own loader, which knows
about fused layers, tensor parallelism and replicated heads, and writes into a dense staging weight; that is packed and
dropped. So one layer is staged at a time and one shard expanded, in whatever order the tensors come: files are read by
name, which puts o_proj between k_proj and q_proj.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

from efx_plugin.errors import EfxError, SparseCheckpointError
from efx_plugin.kernels import PackedWeight, pack
from efx_plugin.serving.quantized import Int8Scheme
from efx_plugin.serving.shards import Member, ShardCollector, ShardId, placeholder_dtypes


class SparseWeightLoader:
    """Assembles one layer's weight. Registers an empty parameter on the layer for each name in the checkpoint.

    Args:
        layer: the vLLM layer.
        format_name: the name of the checkpoint's sparse format.
        shards: names of the checkpoint's modules that the layer fuses, for messages.
        scheme: how the weight is quantized as well: int8 with `weight_scale` [rows, 1] beside it. None if it is not.
        shape: [out, in] of the weight on this rank.
        dtype: of activations; the weight is served in it unless it is quantized.
        dense_loader: the layer's own weight loader, as for a dense weight.
    """

    def __init__(
        self,
        layer: LinearBase,
        format_name: str,
        shards: list[str],
        scheme: Int8Scheme | None,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        dense_loader: Callable[..., None],
    ) -> None:
        self.layer = layer
        self.scheme = scheme
        self.shape = shape
        self.dtype = dtype
        self.dense_loader = dense_loader
        self.packed: PackedWeight | None = None
        self.shards = ShardCollector(
            layer.prefix,
            type(layer).__name__,
            _rows_in_checkpoint(layer),
            layer.input_size,
            shards,
            format_name=format_name,
            scheme=scheme,
            dtype=dtype,
        )
        self.entrance = _Entrance(layer.prefix, self)
        for part, part_dtype in self.shards.parts.items():
            layer.register_parameter(part, _placeholder(part_dtype, self.entrance.of(part)))
        # vLLM's LoRA layers look at `weight` too, for its device; so it stays when the others go.
        layer.register_parameter("weight", _placeholder(dtype, self.entrance.of("weight")))
        self.device = layer.weight.device

    def finish(self) -> PackedWeight:
        """The packed weight, once the whole checkpoint has been read. Removes the empty parameters.

        Raises:
            SparseCheckpointError: tensors are missing.
        """
        if self.packed is None:
            raise self.shards.missing()
        for name in self.shards.parts:
            delattr(self.layer, name)
        self.entrance.close()
        return self.packed

    def load(self, part: str, tensor: Tensor, shard: ShardId) -> None:
        """Take a tensor of the checkpoint; the layer is packed when the last one has come.

        Raises:
            SparseCheckpointError: it does not belong there.
        """
        if part == "weight":
            raise SparseCheckpointError(
                f"{self.shards.name(shard)}.weight is stored dense, but config.json says that it is sparse: add it to "
                "`ignore` in sparsity_config or export the model again"
            )
        self.shards.add(part, tensor, shard)
        if self.shards.is_complete:
            self.packed = self._pack()

    def _pack(self) -> PackedWeight:
        rows, _ = self.shape
        if self.scheme is None:
            weight, scales = self._staging(ModelWeightParameter, self.shape, self.dtype, input_dim=1), None
        else:
            weight = self._staging(ModelWeightParameter, self.shape, torch.int8, input_dim=1)
            scales = self._staging(ChannelQuantScaleParameter, (rows, 1), torch.float32)
        while self.shards:
            self._stage(weight, scales, *self.shards.pop())
        if scales is None:
            return pack(weight.data)
        return pack(
            weight.data, scales=scales.data.flatten(), dtype=self.dtype, quantize_activations=self.scheme == "W8A8"
        )

    def _stage(
        self, weight: Tensor, scales: Tensor | None, shard: ShardId, expanded: Tensor, scale: Tensor | None
    ) -> None:
        arguments = () if shard is None else (shard,)
        self.dense_loader(weight, expanded, *arguments)
        if scales is not None:
            self.dense_loader(scales, scale, *arguments)

    def _staging(
        self, kind: type[BasevLLMParameter], shape: tuple[int, int], dtype: torch.dtype, **dims: int
    ) -> BasevLLMParameter:
        staging = kind(
            data=torch.empty(shape, dtype=dtype, device=self.device),
            output_dim=0,
            weight_loader=self.dense_loader,
            **dims,
        )
        # The layer's own rank: a layer that is replicated has rank 0 of 1 on every worker.
        staging.tp_rank, staging.tp_size = self.layer.tp_rank, self.layer.tp_size
        return staging


class _Entrance:
    """Where the tensors of a layer come in, until it is closed.

    vLLM keeps copies of a layer's first parameters, and with them this, to load new weights in place one day. So this
    must not keep the layer and its weights alive.
    """

    def __init__(self, layer: str, loader: SparseWeightLoader) -> None:
        self._layer = layer
        self._loader: SparseWeightLoader | None = loader

    def of(self, part: str) -> Callable[..., None]:
        """vLLM's weight loader for a tensor of that name."""

        def load(param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
            if self._loader is None:
                raise EfxError(
                    f"{self._layer} is sparse, and weights cannot be loaded in place into sparse layers: start vLLM "
                    "anew with the new checkpoint"
                )
            self._loader.load(part, loaded_weight, loaded_shard_id)

        return load

    def close(self) -> None:
        self._loader = None


def refuse_parts(layer: torch.nn.Module, prefix: str, format_name: str) -> None:
    """Make the tensors of a sparse weight end in our sentence on a layer that is not loaded sparse."""
    if isinstance(layer, LinearBase) and not isinstance(layer, GateLinear):
        reason = "but sparsity_config in config.json does not say so: correct its `targets` and `ignore`"
    else:
        reason = "but vLLM runs embeddings, heads and routers dense only: add it to `ignore`"

    def refusal(part: str) -> Callable[..., NoReturn]:
        def refuse(param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> NoReturn:
            raise SparseCheckpointError(f"{prefix} is stored sparse (as {part}), {reason} and export the model again")

        return refuse

    for part, dtype in placeholder_dtypes(format_name, torch.get_default_dtype()).items():
        layer.register_parameter(part, _placeholder(dtype, refusal(part)))


def refuse_expert_parts(layer: RoutedExperts, prefix: str, format_name: str) -> None:
    """Make the tensors of a sparse expert end in our sentence; vLLM has fused all experts into two weights."""

    def refuse(part: str, **arguments: Any) -> NoReturn:
        raise SparseCheckpointError(
            f"{prefix} are stored sparse (as {part}), but vLLM runs fused experts dense only: load the checkpoint with "
            "efx_plugin.load_sparse and save it with efx_plugin.save_sparse, which leaves experts dense"
        )

    for part in placeholder_dtypes(format_name, torch.get_default_dtype()):
        for weight in ("w13", "w2"):
            # vLLM finds these by name. They are no parameters, because it moves an expert's parameters between ranks.
            setattr(layer, f"{weight}_{part}", SimpleNamespace(weight_loader=partial(refuse, part)))


def _placeholder(dtype: torch.dtype, loader: Callable[..., None]) -> torch.nn.Parameter:
    """An empty parameter that stands for a tensor of the checkpoint and leads it to `loader`, which has a name."""
    placeholder = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    vars(placeholder)["weight_loader"] = loader
    return placeholder


def _rows_in_checkpoint(layer: LinearBase) -> dict[Member, int]:
    """Rows of each shard as stored, by vLLM's id of the shard: before tensor parallelism, heads not replicated."""
    if isinstance(layer, QKVParallelLinear):
        return {
            "q": layer.total_num_heads * layer.head_size,
            "k": layer.total_num_kv_heads * layer.head_size,
            "v": layer.total_num_kv_heads * layer.v_head_size,
        }
    return dict(enumerate(getattr(layer, "output_sizes", [layer.output_size])))
