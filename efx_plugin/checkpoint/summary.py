"""What is in a sparse checkpoint: sizes, sparsity by layer and projection, 2:4 compliance, whether it is sound."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from efx_plugin.checkpoint import fit, model_weights, packed, quantized
from efx_plugin.checkpoint.codec import bits
from efx_plugin.checkpoint.formats import pack_quantized
from efx_plugin.checkpoint.formats.protocol import Layout
from efx_plugin.checkpoint.reader import (
    expand_weight,
    group_parts,
    read_config,
    read_dense_layout,
    read_sparsity_config,
)
from efx_plugin.checkpoint.storage import checksums, safetensors_file
from efx_plugin.checkpoint.storage.prefetch import map_ahead
from efx_plugin.errors import SparseCheckpointError


@dataclass(frozen=True)
class CompressedWeight:
    """One compressed weight.

    Attributes:
        layer: number of its decoder block, None outside of one.
        projection: its module within the block, such as `self_attn.q_proj`; the whole name outside of one.
        size: number of weights, zeros included.
        zeros: number of zeros.
        two_of_four: at most two of every aligned four in a row are not zero.
    """

    name: str
    layer: int | None
    projection: str
    size: int
    zeros: int
    two_of_four: bool


@dataclass(frozen=True)
class Summary:
    """A checkpoint at a glance.

    Attributes:
        parameters: of the whole model, zeros included.
        bytes_dense, bytes_on_disk: of all weights.
        bits_per_weight: of the compressed weights on disk, with masks and scales; zeros count as weights.
        checksums: "absent", "not checked" or "match".
    """

    directory: str
    format: str
    dtype: str
    parameters: int
    bytes_dense: int
    bytes_on_disk: int
    bits_per_weight: float
    weights: list[CompressedWeight]
    checksums: str

    @property
    def sparsity(self) -> float:
        return _sparsity(self.weights)

    @property
    def two_of_four(self) -> bool:
        return all(weight.two_of_four for weight in self.weights)

    @property
    def by_projection(self) -> dict[str, float]:
        """Sparsity of each projection over all layers."""
        return _grouped(self.weights, "projection")

    @property
    def by_layer(self) -> dict[int | None, float]:
        """Sparsity of each decoder block."""
        return _grouped(self.weights, "layer")

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        return asdict(self) | {
            "sparsity": self.sparsity,
            "two_of_four": self.two_of_four,
            "by_projection": self.by_projection,
            "by_layer": {str(layer): sparsity for layer, sparsity in self.by_layer.items()},
        }


def summarize(directory: str | os.PathLike[str], *, verify: bool = False) -> Summary:
    """Look into a checkpoint of pruned weights: every weight of them is read, checked and expanded, and its zeros are
    counted. They are stored sparsely, or with few bits each and zeros and all, see `packed`.

    Zeros that a format stores, as sparse-24-bitmask does where four weights have fewer than two non-zeros, are zeros.

    Args:
        directory: a local checkpoint.
        verify: compare with the model of config.json, read the other tensors and compare checksums as well.

    Raises:
        SparseCheckpointError: anything that was looked at is missing, corrupt or inconsistent.
    """
    directory = Path(directory)
    index = safetensors_file.read_index(directory)
    config = read_config(directory)
    is_packed = packed.is_packed(config)
    contents = _packed(directory, index, config["quantization_config"]) if is_packed else _sparse(directory, index)
    if not contents.weights:
        raise SparseCheckpointError(f"{directory} says that it is {contents.format}, but no weight in it is compressed")

    def look(name: str) -> CompressedWeight:
        weight = contents.read(name)
        mask = bits.nonzero_mask(weight.reshape(-1, weight.shape[-1]))
        nonzeros = int(bits.row_counts(mask).sum())
        layer, projection = place(name.removesuffix(".weight"))
        is_24 = bits.is_24(mask, weight.shape[-1])
        return CompressedWeight(name, layer, projection, weight.numel(), weight.numel() - nonzeros, is_24)

    if verify:
        skeleton = model_weights.skeleton(model_weights.read_model_config(directory))
        fit.check_fit(skeleton, contents.layout, directory)
    weights = list(map_ahead(look, contents.weights))
    modules = {name.removesuffix(".weight") for name in contents.weights}
    theirs = [name for name in index if name.rpartition(".")[0] in modules and not name.endswith(".bias")]
    if verify:
        for name in contents.layout.keys() - set(contents.weights):
            safetensors_file.read_tensor(directory, index[name])
    return Summary(
        directory=str(directory),
        format=contents.format,
        dtype=contents.dtype,
        parameters=sum(
            math.prod(shape) for name, (_, shape) in contents.layout.items() if not quantized.is_parameter(name)
        ),
        bytes_dense=contents.bytes_dense,
        bytes_on_disk=sum(stored.nbytes for stored in index.values()),
        bits_per_weight=8 * sum(index[name].nbytes for name in theirs) / sum(weight.size for weight in weights),
        weights=sorted(weights, key=lambda weight: (weight.layer is None, weight.layer, weight.projection)),
        checksums=checksums.check(directory) if verify else checksums.status(directory),
    )


class _Contents(NamedTuple):
    """What a checkpoint has of compressed weights, however they are stored.

    Attributes:
        dtype: of the weights, by its name.
        weights: the names of those that are compressed.
        read: one of them.
        layout: dtype and shape of every tensor by its dense name.
    """

    format: str
    dtype: str
    weights: list[str]
    read: Callable[[str], torch.Tensor]
    layout: Layout
    bytes_dense: int


def _sparse(directory: Path, index: Mapping[str, safetensors_file.StoredTensor]) -> _Contents:
    format_name = read_sparsity_config(directory)["format"]
    layout, compressed = read_dense_layout(directory), group_parts(index)
    dtype = next((str(layout[name][0]).removeprefix("torch.") for name in compressed), "")

    def read(name: str) -> torch.Tensor:
        return expand_weight(directory, index, compressed[name], format_name)

    bytes_dense = sum(safetensors_file.nbytes(*described) for described in layout.values())
    return _Contents(format_name, dtype, list(compressed), read, layout, bytes_dense)


def _packed(
    directory: Path, index: Mapping[str, safetensors_file.StoredTensor], quantization: Mapping[str, Any]
) -> _Contents:
    width, weights = packed.width(quantization), packed.weights_in(index)

    def stored(name: str) -> torch.Tensor:
        return safetensors_file.read_tensor(directory, index[name])

    layout: Layout = {name: (one.dtype, one.shape) for name, one in index.items()}
    for name in weights:
        del layout[f"{name}_packed"]
        layout[name] = (torch.int8, tuple(stored(f"{name}_shape").flatten().tolist()))

    def read(name: str) -> torch.Tensor:
        return packed.read_integers(stored, name, width)

    bytes_dense = sum(one.nbytes for one in index.values())
    return _Contents(pack_quantized.NAME, f"int{width}", weights, read, layout, bytes_dense)


def place(name: str) -> tuple[int | None, str]:
    """The number of a layer's decoder block, None outside of one, and its name within the block."""
    match = re.fullmatch(r".*?\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _sparsity(weights: Iterable[CompressedWeight]) -> float:
    weights = list(weights)
    return sum(weight.zeros for weight in weights) / max(1, sum(weight.size for weight in weights))


def _grouped(weights: Iterable[CompressedWeight], attribute: str) -> dict[Any, float]:
    groups = defaultdict(list)
    for weight in weights:
        groups[getattr(weight, attribute)].append(weight)
    return {key: _sparsity(group) for key, group in groups.items()}
