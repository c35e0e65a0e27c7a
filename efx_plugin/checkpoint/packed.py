"""Pruned weights of fewer than eight bits: stored as compressed-tensors packs them, with their zeros written out.

No sparse format stores such values. The checkpoint is a plain one (`pack-quantized`), which vLLM and transformers open
by themselves; its zeros are exact, so that whoever reads it may leave them out again.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efx_plugin.checkpoint import storage_plan
from efx_plugin.checkpoint.config import VERSION, sparsity_of
from efx_plugin.checkpoint.formats import pack_quantized
from efx_plugin.checkpoint.model_card import packed_card
from efx_plugin.checkpoint.plain import write_plain
from efx_plugin.checkpoint.storage import safetensors_file
from efx_plugin.errors import SparseCheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_PACKED = ".weight_packed"


def write_packed(
    directory: str | os.PathLike[str],
    state: "Mapping[str, Tensor]",
    config: Mapping[str, Any],
    quantization: Mapping[str, Any],
    *,
    max_shard_size: int,
    metadata: Mapping[str, Any],
    recipe: str | None,
    extras: Callable[[Path], None],
    progress: bool,
) -> None:
    """Write the state of a model whose quantized weights are packed, see `quantized.packed_state`.

    Args:
        config: the model's own config.
        quantization: how the weights are quantized, see `quantized.packed_config`.
        recipe: text of the recipe that made the model.
        directory, max_shard_size, metadata, extras, progress: see `write_plain`.

    Raises:
        EfxError: the destination exists or its disk is full, or a tensor holds NaN or infinity.
    """
    for name, tensor in state.items():
        storage_plan.check_finite(name, tensor)
    source = storage_plan.Source(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()},
        lambda name: state[name].detach().cpu().contiguous(),
    )
    described = {**config, "quantization_config": {**quantization, "version": VERSION}}
    zeros = _sparsity(state, source.read, quantization)
    write_plain(
        directory,
        source,
        [storage_plan.Item(name, None, {name: layout}) for name, layout in source.layout.items()],
        described,
        packed_card(Path(directory).name, described, metadata, zeros, recipe),
        max_shard_size=max_shard_size,
        metadata=metadata,
        extras=extras,
        progress=progress,
    )


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a checkpoint whose quantized weights are packed and not stored sparsely."""
    return (
        sparsity_of(config) is None and (config.get("quantization_config") or {}).get("format") == pack_quantized.NAME
    )


def width(quantization: Mapping[str, Any]) -> int:
    """The bits of a packed weight, by a quantization_config.

    Raises:
        SparseCheckpointError: there is none, or weights have different ones.
    """
    found = {group["weights"]["num_bits"] for group in quantization["config_groups"].values() if group["weights"]}
    if len(found) != 1:
        raise SparseCheckpointError(
            f"quantized weights of {' and '.join(map(str, sorted(found))) or 'no'} bits are not told apart here: "
            "transformers reads them"
        )
    return int(found.pop())


def weights_in(names: Iterable[str]) -> list[str]:
    """The names that packed weights have when they are dense, among the names of tensors."""
    return [name.removesuffix("_packed") for name in names if name.endswith(_PACKED)]


def read_integers(read: "Callable[[str], Tensor]", weight: str, bits: int) -> "Tensor":
    """The integers of a packed weight, int8 [rows, columns].

    Args:
        read: a tensor of the checkpoint by its name.
        weight: one of `weights_in`.
        bits: see `width`.

    Raises:
        SparseCheckpointError: its tensors disagree.
    """
    parts = {part: read(f"{weight.removesuffix('weight')}{part}") for part in pack_quantized.layout(0, 0)}
    return pack_quantized.decompress(parts, weight.removesuffix(".weight"), bits)


def sizes(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> dict[str, float]:
    """What `reader.sizes` says, of a packed checkpoint: it takes the same bytes with zeros and without.

    Args:
        directory: it.
        config: the content of its config.json.

    Raises:
        SparseCheckpointError: a file is missing or corrupt.
    """
    index = safetensors_file.read_index(directory)
    linears = sum(stored.nbytes for name, stored in index.items() if name.endswith(_PACKED))
    every = sum(stored.nbytes for stored in index.values())
    return {
        "sparsity": _sparsity(
            index, lambda name: safetensors_file.read_tensor(directory, index[name]), config["quantization_config"]
        ),
        "linear_bytes_dense": linears,
        "linear_bytes_sparse": linears,
        "bytes_dense": every,
        "bytes_on_disk": every,
    }


def _sparsity(names: Iterable[str], read: "Callable[[str], Tensor]", quantization: Mapping[str, Any]) -> float:
    """The fraction of zeros in the packed weights."""
    bits = width(quantization)
    zeros = weights = 0
    for weight in weights_in(names):
        integers = read_integers(read, weight, bits)
        zeros += integers.numel() - int(integers.count_nonzero())
        weights += integers.numel()
    return zeros / weights
