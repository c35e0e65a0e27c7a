"""Bits per weight over the target layers, the linear layers inside the decoder blocks; zeros count as weights.

Everything that belongs to a weight counts: its values, the mask that says where they stand, scales and zero points.
Embeddings, norms and the output layer are the same in every pipeline and count nowhere.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from efx_plugin.checkpoint import quantized
from efx_plugin.checkpoint.packed import read_integers
from efx_plugin.checkpoint.reader import (
    expand_weight,
    group_parts,
    read_config,
    read_dense_layout,
    read_sparsity_config,
)
from efx_plugin.checkpoint.storage import safetensors_file
from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.errors import EfxError
from efx_plugin.kernels.op import PackedWeight, pack
from efx_plugin.kernels.pruned_int4 import why_dense

# What lies beside a quantized weight and is needed to use it.
_SCALES = ("weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx")
_PACKED = "weight_packed"


class Size(NamedTuple):
    """Rows, columns and non-zeros of a weight."""

    rows: int
    columns: int
    nonzeros: int


def sizes(model: nn.Module) -> list[Size]:
    """Of the target layers of a model with its zeros in place, in order."""
    weights = (layer.base.weight for layer in linears_in_blocks(model))
    return [Size(weight.shape[0], weight.shape[1], int(weight.count_nonzero())) for weight in weights]


def stored(directory: Path) -> float:
    """Bits per weight on disk, over the weights of a checkpoint that are compressed or quantized.

    Raises:
        EfxError: none of its weights is, or a file is corrupt.
    """
    index = safetensors_file.read_index(directory)
    layers = _layers(directory, index)
    bits = sum(8 * index[name].nbytes for layer in layers for name in layer.tensors)
    return bits / sum(layer.weights for layer in layers)


def served(directory: Path) -> float:
    """Bits per weight in vLLM's memory, over the same weights: packed by the kernel that this machine takes for each,
    where they are sparse, or of four bits and pruned; what else is quantized is served as it is stored.

    Raises:
        EfxError: none of its weights is compressed or quantized, no kernel takes a weight, or a file is corrupt.
    """
    config, index = read_config(directory), safetensors_file.read_index(directory)
    scheme = quantized.of_config(config, directory)
    groups = [] if scheme is None else list(scheme.config_groups.values())
    activations = any(group.input_activations for group in groups)
    int4 = not activations and {(group.weights.num_bits, group.weights.symmetric) for group in groups} == {(4, True)}
    layers = _layers(directory, index)
    bits = 0
    for layer in layers:
        if not layer.parts:
            packed = _pack_int4(directory, index, layer.module) if int4 else None
            tensors = [index[name] for name in layer.tensors] if packed is None else packed.tensors
            bits += sum(8 * tensor.nbytes for tensor in tensors)
            continue
        weight = expand_weight(directory, index, layer.parts, read_sparsity_config(directory)["format"])
        scales = index.get(f"{layer.module}.weight_scale")
        if scales is None:
            packed = pack(weight)
        else:
            read = safetensors_file.read_tensor(directory, scales)
            packed = pack(weight, scales=read.float().flatten(), dtype=read.dtype, quantize_activations=activations)
        bits += sum(8 * tensor.nbytes for tensor in packed.tensors)
    return bits / sum(layer.weights for layer in layers)


def _pack_int4(directory: Path, index: dict[str, safetensors_file.StoredTensor], module: str) -> PackedWeight | None:
    """A weight of four bits as vLLM gets it from us; None where it stays dense."""

    def read(name: str) -> torch.Tensor:
        return safetensors_file.read_tensor(directory, index[name])

    weight, scales = read_integers(read, f"{module}.weight", 4), read(f"{module}.weight_scale")
    if why_dense(weight, scales.float(), scales.dtype):
        return None
    return pack(weight, scales=scales.float(), dtype=scales.dtype)


class _StoredLayer(NamedTuple):
    module: str
    parts: dict[str, str]  # names of the tensors of a sparse weight by part; empty for one that is not sparse
    tensors: list[str]  # names of all tensors of the weight, scales included
    weights: int  # zeros included


def _layers(directory: Path, index: dict[str, safetensors_file.StoredTensor]) -> list[_StoredLayer]:
    """The layers whose weights are compressed or quantized."""
    sparse = group_parts(index)
    layout = read_dense_layout(directory) if sparse else {name: (one.dtype, one.shape) for name, one in index.items()}
    scaled = [name.rpartition(".")[0] for name in index if name.endswith((f".{_PACKED}", ".weight_scale"))]
    layers = []
    for module in dict.fromkeys([*(weight.removesuffix(".weight") for weight in sparse), *scaled]):
        parts = sparse.get(f"{module}.weight", {})
        names = [*parts.values(), *(f"{module}.{part}" for part in ("weight", _PACKED, *_SCALES))]
        if f"{module}.weight" in layout:
            weights = math.prod(layout[f"{module}.weight"][1])
        else:
            weights = int(safetensors_file.read_tensor(directory, index[f"{module}.weight_shape"]).prod())
        layers.append(_StoredLayer(module, parts, [name for name in names if name in index], weights))
    if not layers:
        raise EfxError(f"{directory} is dense: all of its weights take the bits of their dtype")
    return layers
