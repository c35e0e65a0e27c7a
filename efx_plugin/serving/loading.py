"""From the ragged tensors of a sparse checkpoint to the packed weight of one vLLM layer.

vLLM's parameters slice rectangles, and the rows of a sparse weight are ragged. So the tensors of a shard (q_proj of a
qkv_proj, say) are set aside until all have come; then the shard is validated, expanded, and handed to the layer's own
loader, which knows about fused layers, tensor parallelism and replicated heads, and writes into a dense staging
weight. When the last shard is in, the staging weight is packed and dropped: one dense layer is staged at a time.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.parameter import ModelWeightParameter

from efx_plugin.checkpoint import FORMATS, decompress
from efx_plugin.errors import SparseCheckpointError
from efx_plugin.kernels import PackedWeight, pack

# As vLLM's loaders name a shard: "q", 0, several at once, or none for a weight that is whole in the checkpoint.
ShardId = str | int | tuple[int, ...] | None


class SparseWeightLoader:
    """Assembles one layer's weight. Registers an empty parameter on the layer for each name in the checkpoint.

    Args:
        layer: the vLLM layer.
        format_name: the checkpoint's sparse format, a key of `FORMATS`.
        shards: names of the checkpoint's modules that the layer fuses, for messages.
        shape: [out, in] of the weight on this rank.
        dtype: the dtype in which it is served.
        dense_loader: the layer's own weight loader, as for a dense weight.
    """

    def __init__(
        self,
        layer: LinearBase,
        format_name: str,
        shards: list[str],
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        dense_loader: Callable[..., None],
    ) -> None:
        self.layer = layer
        self.format_name = format_name
        self.shape = shape
        self.dtype = dtype
        self.dense_loader = dense_loader
        self.rows = _rows_in_checkpoint(layer)
        self.names = dict(zip(self.rows, shards, strict=True)) if len(shards) == len(self.rows) else {}
        self.parts: dict[ShardId, dict[str, Tensor]] = {}
        self.loaded: set[str | int] = set()
        self.staging: ModelWeightParameter | None = None
        self.packed: PackedWeight | None = None
        self.part_names = _add_placeholders(layer, format_name, dtype, self._load_part)
        # vLLM's LoRA layers look at `weight` too, for its device; so it stays when the others go.
        _add_placeholder(layer, "weight", dtype, self._refuse_dense)
        self.device = layer.weight.device

    def finish(self) -> PackedWeight:
        """The packed weight, once the whole checkpoint has been read. Removes the empty parameters.

        Raises:
            SparseCheckpointError: tensors are missing.
        """
        if self.packed is None:
            shard = next(shard for shard in self.rows if shard not in self.loaded)
            parts = next((parts for key, parts in self.parts.items() if shard in self._members(key)), {})
            missing = ", ".join(part for part in self.part_names if part not in parts)
            raise SparseCheckpointError(
                f"{self._name(shard)} is sparse according to config.json, but the checkpoint lacks its {missing}: "
                "download the checkpoint again, or add the layer to `ignore` in sparsity_config if it is dense"
            )
        for name in self.part_names:
            delattr(self.layer, name)
        return self.packed

    def _load_part(self, part: str, param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        shard = tuple(loaded_shard_id) if isinstance(loaded_shard_id, list) else loaded_shard_id
        parts = self.parts.setdefault(shard, {})
        if part in parts or self.loaded.intersection(self._members(shard)):
            raise SparseCheckpointError(f"{self._name(shard)}.{part} is in the checkpoint twice: export it again")
        parts[part] = loaded_weight
        if len(parts) == len(self.part_names):
            self._load_shard(shard, self.parts.pop(shard))

    def _load_shard(self, shard: ShardId, parts: dict[str, Tensor]) -> None:
        name = self._name(shard)
        if not parts["compressed"].is_floating_point() or parts["compressed"].itemsize == 1:
            raise SparseCheckpointError(
                f"{name}.compressed holds quantized values ({parts['compressed'].dtype}), and efx-plugin does not "
                "serve weights that are both sparse and quantized yet: export the model again with "
                'efx_plugin.checkpoint.export_checkpoint(SOURCE, DESTINATION, structure="dense"), and serve that'
            )
        members = self._members(shard)
        expected = [sum(self.rows[member] for member in members), self.layer.input_size]
        declared = parts["shape"].flatten()
        if declared.numel() == 2 and declared.tolist() != expected:  # before anything is allocated for it
            raise SparseCheckpointError(
                f"{name}.shape declares {declared.tolist()}, but by config.json the weight is {expected}: the "
                "checkpoint is corrupt or belongs to another model, download or export it again"
            )
        dense = decompress(self.format_name, parts, where=name)
        if self.staging is None:
            self.staging = self._new_staging()
        self.dense_loader(self.staging, dense, *(() if shard is None else (shard,)))
        self.loaded.update(members)
        if len(self.loaded) == len(self.rows):
            self.packed = pack(self.staging.data)
            self.staging = None

    def _new_staging(self) -> ModelWeightParameter:
        staging = ModelWeightParameter(
            data=torch.empty(self.shape, dtype=self.dtype, device=self.device),
            input_dim=1,
            output_dim=0,
            weight_loader=self.dense_loader,
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

    def _refuse_dense(self, param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        raise SparseCheckpointError(
            f"{self._name(loaded_shard_id)}.weight is stored dense, but config.json says that it is sparse: add it to "
            "`ignore` in sparsity_config or export the model again"
        )

    def _name(self, shard: ShardId) -> str:
        return self.names.get(shard, self.layer.prefix)


def refuse_parts(layer: torch.nn.Module, prefix: str, format_name: str) -> None:
    """Make the tensors of a sparse weight end in our sentence on a layer that is not loaded sparse."""
    if isinstance(layer, LinearBase):
        reason = "but sparsity_config in config.json does not say so: correct its `targets` and `ignore`"
    else:
        reason = "but vLLM runs embeddings and heads dense only: add it to `ignore`"

    def refuse(part: str, param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        raise SparseCheckpointError(f"{prefix} is stored sparse (as {part}), {reason} and export the model again")

    _add_placeholders(layer, format_name, torch.get_default_dtype(), refuse)


def _add_placeholders(
    layer: torch.nn.Module, format_name: str, dtype: torch.dtype, loader: Callable[..., None]
) -> tuple[str, ...]:
    """Register a placeholder for each tensor of a sparse weight; `loader` gets the tensor's name first."""
    layout = FORMATS[format_name].layout(0, 0, 0, dtype)
    for name, (part_dtype, _) in layout.items():
        _add_placeholder(layer, name, part_dtype, partial(loader, name))
    return tuple(layout)


def _add_placeholder(layer: torch.nn.Module, name: str, dtype: torch.dtype, loader: Callable[..., None]) -> None:
    placeholder = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    placeholder.weight_loader = loader
    layer.register_parameter(name, placeholder)


def _rows_in_checkpoint(layer: LinearBase) -> dict[str | int, int]:
    """Rows of each shard as stored, by vLLM's id of the shard: before tensor parallelism, heads not replicated."""
    if isinstance(layer, QKVParallelLinear):
        return {
            "q": layer.total_num_heads * layer.head_size,
            "k": layer.total_num_kv_heads * layer.head_size,
            "v": layer.total_num_kv_heads * layer.v_head_size,
        }
    return dict(enumerate(getattr(layer, "output_sizes", [layer.output_size])))
