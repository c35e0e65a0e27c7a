"""From the ragged tensors of a sparse checkpoint to the packed weight of one vLLM layer.

vLLM's parameters slice rectangles, and the rows of a sparse weight are ragged. So the tensors of a layer are set aside,
sparse as they are, until the last one has come. Then each shard of it (q_proj of a qkv_proj, say) is validated,
expanded, and handed to the layer's own loader, which knows about fused layers, tensor parallelism and replicated heads,
and writes into a dense staging weight; that is packed and dropped. So one layer is staged at a time and one shard
expanded, in whatever order the tensors come: files are read by name, which puts o_proj between k_proj and q_proj.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

from efx_plugin.checkpoint.formats.registry import decompress, dense_layout, find_format, part_dtypes
from efx_plugin.errors import SparseCheckpointError
from efx_plugin.kernels import PackedWeight, pack
from efx_plugin.serving.quantized import Int8Scheme

# As vLLM's loaders name a shard: "q", 0, several at once, or none for a weight that is whole in the checkpoint.
ShardId = str | int | tuple[int, ...] | None


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
        self.format_name = format_name
        self.scheme = scheme
        self.shape = shape
        self.dtype = dtype
        self.dense_loader = dense_loader
        self.rows = _rows_in_checkpoint(layer)
        self.names = dict(zip(self.rows, shards, strict=True)) if len(shards) == len(self.rows) else {}
        self.parts: dict[ShardId, dict[str, Tensor]] = {}
        self.arrived: set[tuple[str | int, str]] = set()
        self.packed: PackedWeight | None = None
        placeholders = _placeholder_dtypes(format_name, dtype if scheme is None else torch.int8)
        if scheme is not None:
            placeholders["weight_scale"] = torch.float32
        self.part_names = tuple(placeholders)
        for part, part_dtype in placeholders.items():
            layer.register_parameter(part, _placeholder(part_dtype, partial(self._load_part, part)))
        # vLLM's LoRA layers look at `weight` too, for its device; so it stays when the others go.
        layer.register_parameter("weight", _placeholder(dtype, self._refuse_dense))
        self.device = layer.weight.device

    def finish(self) -> PackedWeight:
        """The packed weight, once the whole checkpoint has been read. Removes the empty parameters.

        Raises:
            SparseCheckpointError: tensors are missing.
        """
        if self.packed is None:
            missing = {
                shard: [part for part in self.part_names if (shard, part) not in self.arrived] for shard in self.rows
            }
            shard = next(shard for shard in self.rows if missing[shard])
            raise SparseCheckpointError(
                f"{self._name(shard)} is sparse according to config.json, but the checkpoint lacks its "
                f"{', '.join(missing[shard])}: download the checkpoint again, or add the layer to `ignore` in "
                "sparsity_config if it is dense"
            )
        for name in self.part_names:
            delattr(self.layer, name)
        return self.packed

    def _load_part(self, part: str, param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        shard = tuple(loaded_shard_id) if isinstance(loaded_shard_id, list) else loaded_shard_id
        arrived = {(member, part) for member in self._members(shard)}
        if arrived & self.arrived:
            raise SparseCheckpointError(f"{self._name(shard)}.{part} is in the checkpoint twice: export it again")
        self.arrived |= arrived
        self.parts.setdefault(shard, {})[part] = loaded_weight
        if len(self.arrived) == len(self.rows) * len(self.part_names):
            self.packed = self._pack()

    def _pack(self) -> PackedWeight:
        rows, _ = self.shape
        if self.scheme is None:
            weight, scales = self._staging(ModelWeightParameter, self.shape, self.dtype, input_dim=1), None
        else:
            weight = self._staging(ModelWeightParameter, self.shape, torch.int8, input_dim=1)
            scales = self._staging(ChannelQuantScaleParameter, (rows, 1), torch.float32)
        while self.parts:
            shard, parts = self.parts.popitem()
            arguments = () if shard is None else (shard,)
            if scales is not None:
                self.dense_loader(scales, self._checked_scale(shard, parts.pop("weight_scale", None)), *arguments)
            self.dense_loader(weight, self._expanded(shard, parts), *arguments)
        if scales is None:
            return pack(weight.data)
        return pack(
            weight.data, scales=scales.data.flatten(), dtype=self.dtype, quantize_activations=self.scheme == "W8A8"
        )

    def _expanded(self, shard: ShardId, parts: dict[str, Tensor]) -> Tensor:
        name, expected = self._name(shard), [self._rows_of(shard), self.layer.input_size]
        dtype, declared = dense_layout(self.format_name, parts, where=name)
        if list(declared) != expected:  # before anything is allocated for it
            raise SparseCheckpointError(
                f"{name}.shape declares {list(declared)}, but by config.json the weight is {expected}: the checkpoint "
                "is corrupt or belongs to another model, download or export it again"
            )
        if self.scheme is None and dtype.itemsize == 1:
            raise SparseCheckpointError(
                f"{name} holds quantized values ({dtype}), but config.json quantizes nothing of that name: "
                "export the model again"
            )
        if self.scheme is not None and dtype != torch.int8:
            raise SparseCheckpointError(
                f"{name} is of {dtype}, but config.json makes it int8 ({self.scheme}): export the model again"
            )
        return decompress(self.format_name, parts, where=name)

    def _checked_scale(self, shard: ShardId, scale: Tensor | None) -> Tensor:
        expected = (self._rows_of(shard), 1)
        if scale is None or tuple(scale.shape) != expected or not torch.isfinite(scale.float()).all():
            raise SparseCheckpointError(
                f"{self._name(shard)}.weight_scale is not {list(expected)} finite numbers, one per row of the weight: "
                "the checkpoint is corrupt, download or export it again"
            )
        return scale

    def _staging(
        self, kind: type[BasevLLMParameter], shape: tuple[int, int], dtype: torch.dtype, **dims: int
    ) -> Tensor:
        staging = kind(
            data=torch.empty(shape, dtype=dtype, device=self.device),
            output_dim=0,
            weight_loader=self.dense_loader,
            **dims,
        )
        # The layer's own rank: a layer that is replicated has rank 0 of 1 on every worker.
        staging.tp_rank, staging.tp_size = self.layer.tp_rank, self.layer.tp_size
        return staging

    def _members(self, shard: ShardId) -> tuple[str | int, ...]:
        members = tuple(self.rows) if shard is None else shard if isinstance(shard, tuple) else (shard,)
        if unknown := [member for member in members if member not in self.rows]:
            raise SparseCheckpointError(
                f"{self.layer.prefix} has a shard {unknown[0]!r}, and efx-plugin cannot serve sparse layers of type "
                f"{type(self.layer).__name__}: export again with it in `ignore`"
            )
        return members

    def _rows_of(self, shard: ShardId) -> int:
        return sum(self.rows[member] for member in self._members(shard))

    def _refuse_dense(self, param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        raise SparseCheckpointError(
            f"{self._name(loaded_shard_id)}.weight is stored dense, but config.json says that it is sparse: add it to "
            "`ignore` in sparsity_config or export the model again"
        )

    def _name(self, shard: ShardId) -> str:
        return self.names.get(shard, self.layer.prefix)


def refuse_parts(layer: torch.nn.Module, prefix: str, format_name: str) -> None:
    """Make the tensors of a sparse weight end in our sentence on a layer that is not loaded sparse."""
    if isinstance(layer, LinearBase) and not isinstance(layer, GateLinear):
        reason = "but sparsity_config in config.json does not say so: correct its `targets` and `ignore`"
    else:
        reason = "but vLLM runs embeddings, heads and routers dense only: add it to `ignore`"

    def refuse(part: str, param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        raise SparseCheckpointError(f"{prefix} is stored sparse (as {part}), {reason} and export the model again")

    for part, dtype in _placeholder_dtypes(format_name, torch.get_default_dtype()).items():
        layer.register_parameter(part, _placeholder(dtype, partial(refuse, part)))


def refuse_expert_parts(layer: RoutedExperts, prefix: str, format_name: str) -> None:
    """Make the tensors of a sparse expert end in our sentence; vLLM has fused all experts into two weights."""

    def refuse(part: str, **arguments) -> None:
        raise SparseCheckpointError(
            f"{prefix} are stored sparse (as {part}), but vLLM runs fused experts dense only: load the checkpoint with "
            "efx_plugin.load_sparse and save it with efx_plugin.save_sparse, which leaves experts dense"
        )

    for part in _placeholder_dtypes(format_name, torch.get_default_dtype()):
        for weight in ("w13", "w2"):
            # vLLM finds these by name. They are no parameters, because it moves an expert's parameters between ranks.
            setattr(layer, f"{weight}_{part}", SimpleNamespace(weight_loader=partial(refuse, part)))


def _placeholder_dtypes(format_name: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The tensors of a sparse weight of that dtype, by name."""
    return part_dtypes(find_format(format_name, "config.json"), dtype)


def _placeholder(dtype: torch.dtype, loader: Callable[..., None]) -> torch.nn.Parameter:
    """An empty parameter that stands for a tensor of the checkpoint and leads it to `loader`."""
    placeholder = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    placeholder.weight_loader = loader
    return placeholder


def _rows_in_checkpoint(layer: LinearBase) -> dict[str | int, int]:
    """Rows of each shard as stored, by vLLM's id of the shard: before tensor parallelism, heads not replicated."""
    if isinstance(layer, QKVParallelLinear):
        return {
            "q": layer.total_num_heads * layer.head_size,
            "k": layer.total_num_kv_heads * layer.head_size,
            "v": layer.total_num_kv_heads * layer.v_head_size,
        }
    return dict(enumerate(getattr(layer, "output_sizes", [layer.output_size])))
