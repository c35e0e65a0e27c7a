"""The tensors of one layer's sparse weight: collected in whatever order they come, validated, and expanded.

A layer may fuse several weights of the checkpoint, its shards (q_proj, k_proj and v_proj of a qkv_proj). The rows of a
sparse weight are ragged, so nothing can be cut out of its tensors: they are set aside, sparse as they are, until the
last one has come. Nothing here knows vLLM, but for the names that it gives to shards.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from efx_plugin.checkpoint.formats.registry import decompress, dense_layout, find_format, part_dtypes
from efx_plugin.errors import SparseCheckpointError
from efx_plugin.serving.quantized import Int8Scheme

SCALE = "weight_scale"

# A shard that the layer knows: "q", or 0.
Member = str | int

# As vLLM's loaders name a shard: a member, several at once, or None for a weight that is whole in the checkpoint.
ShardId = Member | tuple[Member, ...] | None


class ShardCollector:
    """Collects the tensors of one layer.

    Args:
        layer: the layer's name, for messages.
        kind: what sort of layer it is, for messages.
        rows: rows of each shard as stored, by the layer's own name for it, in order.
        columns: of every shard, as stored.
        names: names of the checkpoint's modules behind the shards, in order; one for a layer that is stored whole.
        format_name: the name of the checkpoint's sparse format.
        scheme: how the weight is quantized as well: int8 with `weight_scale` [rows, 1] beside it. None if it is not.
        dtype: of a weight that is not quantized, as it is served; it may be stored in another.

    Attributes:
        parts: dtypes of the tensors that each shard has in the checkpoint, by the last part of their name.
    """

    def __init__(
        self,
        layer: str,
        kind: str,
        rows: Mapping[Member, int],
        columns: int,
        names: list[str],
        *,
        format_name: str,
        scheme: Int8Scheme | None,
        dtype: torch.dtype,
    ) -> None:
        self.layer = layer
        self.kind = kind
        self.rows = rows
        self.columns = columns
        self.format_name = format_name
        self.scheme = scheme
        self.parts = placeholder_dtypes(format_name, dtype if scheme is None else torch.int8)
        if scheme is not None:
            self.parts[SCALE] = torch.float32
        self._names: dict[ShardId, str] = {}
        if len(names) == len(rows):
            self._names.update(zip(rows, names, strict=True))
        self._collected: dict[ShardId, dict[str, Tensor]] = {}
        self._arrived: set[tuple[Member, str]] = set()

    def __len__(self) -> int:
        """Shards that `pop` has not given yet."""
        return len(self._collected)

    @property
    def is_complete(self) -> bool:
        """Whether every tensor has come."""
        return len(self._arrived) == len(self.rows) * len(self.parts)

    def add(self, part: str, tensor: Tensor, shard: ShardId | list[Member] = None) -> None:
        """Set a tensor aside, in the memory of the CPU, where it is checked and expanded; there it is not copied.

        A tensor on a GPU is one of a loader that may use its memory again, once it goes on to the next.

        Raises:
            SparseCheckpointError: it has come before, or the layer has no such shard.
        """
        shard = tuple(shard) if isinstance(shard, list) else shard
        arrived = {(member, part) for member in self._members(shard)}
        if arrived & self._arrived:
            raise SparseCheckpointError(f"{self.name(shard)}.{part} is in the checkpoint twice: export it again")
        self._arrived |= arrived
        self._collected.setdefault(shard, {})[part] = tensor.cpu()

    def pop(self) -> tuple[ShardId, Tensor, Tensor | None]:
        """Validate and expand one of the shards, and forget it: its id, weight [rows, columns], scale [rows, 1] if any.

        Raises:
            SparseCheckpointError: it is corrupt, of another model, or not quantized as config.json says.
        """
        shard, parts = self._collected.popitem()
        scale = None if self.scheme is None else self._checked_scale(shard, parts.pop(SCALE, None))
        return shard, self._expanded(shard, parts), scale

    def missing(self) -> SparseCheckpointError:
        """The error that names the first shard that is not complete, and its missing tensors."""
        missing = {shard: [part for part in self.parts if (shard, part) not in self._arrived] for shard in self.rows}
        shard = next(shard for shard in self.rows if missing[shard])
        return SparseCheckpointError(
            f"{self.name(shard)} is sparse according to config.json, but the checkpoint lacks its "
            f"{', '.join(missing[shard])}: download the checkpoint again, or add the layer to `ignore` in "
            "sparsity_config if it is dense"
        )

    def name(self, shard: ShardId) -> str:
        """The checkpoint's module behind a shard; the layer's name for several at once."""
        return self._names.get(shard, self.layer)

    def _members(self, shard: ShardId) -> tuple[Member, ...]:
        members = tuple(self.rows) if shard is None else shard if isinstance(shard, tuple) else (shard,)
        if unknown := [member for member in members if member not in self.rows]:
            raise SparseCheckpointError(
                f"{self.layer} has a shard {unknown[0]!r}, and efx-plugin cannot serve sparse layers of type "
                f"{self.kind}: export again with it in `ignore`"
            )
        return members

    def _rows_of(self, shard: ShardId) -> int:
        return sum(self.rows[member] for member in self._members(shard))

    def _expanded(self, shard: ShardId, parts: dict[str, Tensor]) -> Tensor:
        name, expected = self.name(shard), [self._rows_of(shard), self.columns]
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
                f"{self.name(shard)}.weight_scale is not {list(expected)} finite numbers, one per row of the weight: "
                "the checkpoint is corrupt, download or export it again"
            )
        return scale


def placeholder_dtypes(format_name: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The tensors of a sparse weight of that dtype, name -> dtype.

    Raises:
        SparseCheckpointError: there is no such format.
    """
    return part_dtypes(find_format(format_name, "config.json"), dtype)
