"""What is in a sparse checkpoint: sizes, sparsity by layer and projection, 2:4 compliance, whether it is sound."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from efx_plugin.checkpoint import fit, model_weights
from efx_plugin.checkpoint.codec import bits
from efx_plugin.checkpoint.reader import expand_weight, group_parts, read_dense_layout, read_sparsity_config
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
        checksums: "absent", "not checked" or "match".
    """

    directory: str
    format: str
    dtype: str
    parameters: int
    bytes_dense: int
    bytes_on_disk: int
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
    """Look into a sparse checkpoint: every compressed weight is read, checked and expanded, and its zeros are counted.

    Zeros that a format stores, as sparse-24-bitmask does where four weights have fewer than two non-zeros, are zeros.

    Args:
        directory: a local sparse checkpoint.
        verify: compare with the model of config.json, read the other tensors and compare checksums as well.

    Raises:
        SparseCheckpointError: anything that was looked at is missing, corrupt or inconsistent.
    """
    directory = Path(directory)
    format_name = read_sparsity_config(directory)["format"]
    layout = read_dense_layout(directory)
    index = safetensors_file.read_index(directory)
    compressed = group_parts(index)
    if not compressed:
        raise SparseCheckpointError(f"{directory} says that it is {format_name}, but no weight in it is compressed")

    def look(name: str) -> CompressedWeight:
        weight = expand_weight(directory, index, compressed[name], format_name)
        mask = bits.nonzero_mask(weight.reshape(-1, weight.shape[-1]))
        nonzeros = int(bits.row_counts(mask).sum())
        layer, projection = place(name.removesuffix(".weight"))
        is_24 = bits.is_24(mask, weight.shape[-1])
        return CompressedWeight(name, layer, projection, weight.numel(), weight.numel() - nonzeros, is_24)

    if verify:
        fit.check_fit(model_weights.skeleton(model_weights.read_model_config(directory)), layout, directory)
    weights = list(map_ahead(look, compressed))
    if verify:
        for name in layout.keys() - compressed.keys():
            safetensors_file.read_tensor(directory, index[name])
    dtype, _ = layout[weights[0].name]
    return Summary(
        directory=str(directory),
        format=format_name,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(math.prod(shape) for _, shape in layout.values()),
        bytes_dense=sum(safetensors_file.nbytes(*described) for described in layout.values()),
        bytes_on_disk=sum(stored.nbytes for stored in index.values()),
        weights=sorted(weights, key=lambda weight: (weight.layer is None, weight.layer, weight.projection)),
        checksums=checksums.check(directory) if verify else checksums.status(directory),
    )


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
