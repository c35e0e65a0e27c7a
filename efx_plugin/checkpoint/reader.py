"""From a directory back to dense weights."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from efx_plugin.checkpoint import fit, model_weights, packed, quantized
from efx_plugin.checkpoint.config import sparsity_of
from efx_plugin.checkpoint.formats.protocol import SHAPE, Layout
from efx_plugin.checkpoint.formats.registry import decompress, dense_layout, find_format, part_names
from efx_plugin.checkpoint.storage import safetensors_file
from efx_plugin.errors import SparseCheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_sparsity_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The `sparsity_config` of a directory's config.json, with a `format` that is known.

    Raises:
        SparseCheckpointError: there is none, or its format is unknown.
    """
    config = read_config(directory)
    sparsity = sparsity_of(config)
    if sparsity is None:
        raise SparseCheckpointError(
            f"{Path(directory) / 'config.json'} has no sparsity_config: load this dense checkpoint with transformers"
        )
    find_format(sparsity.get("format"), "config.json")
    return sparsity


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json as it is.

    Raises:
        SparseCheckpointError: it is missing or not JSON.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise SparseCheckpointError(f"{path} does not exist: is this a checkpoint?")
    return safetensors_file.parse_json(path, path.read_bytes())


def group_parts(index: Mapping[str, safetensors_file.StoredTensor]) -> dict[str, dict[str, str]]:
    """The compressed weights of an index: name of the dense weight -> {part: name of the tensor}.

    A part is called after the weight's module. Releases up to 0.8.1 called it after the weight itself, as in
    `q_proj.weight.compressed`, and compressed biases as well.

    Raises:
        SparseCheckpointError: a weight is stored more than once.
    """
    weights: dict[str, dict[str, str]] = {}
    known = part_names()
    for name, stored in index.items():
        prefix, _, part = name.rpartition(".")
        if part not in known:
            continue
        weight = prefix if prefix.endswith((".weight", ".bias")) else f"{prefix}.weight"
        parts = weights.setdefault(weight, {})
        twin = parts.get(part) or (weight if weight in index else None)
        if twin is not None:
            raise SparseCheckpointError(
                f"{stored.file}: {name} and {twin} store the same weight: only one can be right"
            )
        parts[part] = name
    return weights


def describe(index: Mapping[str, safetensors_file.StoredTensor], parts: Mapping[str, str]) -> str:
    """What an error calls a compressed weight: the files it lies in, and the prefix of its tensors."""
    where = " and ".join(sorted({index[name].file for name in parts.values()}))
    return f"{where}: {next(iter(parts.values())).rpartition('.')[0]}"


def expand(directory: str | os.PathLike[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a sparse checkpoint under its dense name, one at a time, compressed weights expanded.

    Of a checkpoint that is quantized as well these are the quantized weights and their scales.

    Raises:
        SparseCheckpointError: anything in the directory is missing, corrupt or inconsistent.
    """
    format_name = read_sparsity_config(directory)["format"]
    index = safetensors_file.read_index(directory)
    compressed = group_parts(index)
    parts_of_weights = {name for parts in compressed.values() for name in parts.values()}
    for name, stored in index.items():
        if name not in parts_of_weights:
            yield name, safetensors_file.read_tensor(directory, stored)
    for weight, parts in compressed.items():
        yield weight, expand_weight(directory, index, parts, format_name)


def expand_weight(
    directory: str | os.PathLike[str],
    index: Mapping[str, safetensors_file.StoredTensor],
    parts: Mapping[str, str],
    format_name: str,
) -> torch.Tensor:
    """Read and expand one compressed weight, given as `group_parts` gives it.

    Raises:
        SparseCheckpointError: its tensors are truncated, or disagree with each other.
    """
    tensors = {part: safetensors_file.read_tensor(directory, index[name]) for part, name in parts.items()}
    return decompress(format_name, tensors, where=describe(index, parts))


def read_dense_layout(directory: str | os.PathLike[str]) -> Layout:
    """Dtype and shape of every tensor under its dense name, from headers and the declared shapes alone.

    Raises:
        SparseCheckpointError: the directory is no sparse checkpoint, or a declared shape disagrees with its parts.
    """
    format_name = read_sparsity_config(directory)["format"]
    index = safetensors_file.read_index(directory)
    layout: Layout = {name: (stored.dtype, stored.shape) for name, stored in index.items()}
    for weight, parts in group_parts(index).items():
        tensors = {part: _stand_in(directory, part, index[name]) for part, name in parts.items()}
        described = dense_layout(format_name, tensors, where=describe(index, parts))
        for name in parts.values():
            del layout[name]
        layout[weight] = described
    return layout


def _stand_in(directory: str | os.PathLike[str], part: str, stored: safetensors_file.StoredTensor) -> torch.Tensor:
    if part == SHAPE:
        return safetensors_file.read_tensor(directory, stored)
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def linear_bytes(directory: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of the compressed weights: `sparse` as they lie on disk, with all their parts, `dense` as they would in
    their own dtype, which is that of a byte if they are quantized. Scales are in neither.

    Raises:
        SparseCheckpointError: the directory is no sparse checkpoint, or a declared shape disagrees with its parts.
    """
    layout = read_dense_layout(directory)
    index = safetensors_file.read_index(directory)
    compressed = group_parts(index)
    return {
        "dense": sum(safetensors_file.nbytes(*layout[weight]) for weight in compressed),
        "sparse": sum(index[name].nbytes for parts in compressed.values() for name in parts.values()),
    }


def sizes(directory: str | os.PathLike[str]) -> dict[str, float]:
    """How sparse a checkpoint is and what that saves, from its config and headers alone where it is stored sparsely.

    Returns:
        `sparsity`, the fraction of zeros in the compressed weights; `linear_bytes_dense` and `linear_bytes_sparse`, see
        `linear_bytes`; `bytes_dense` and `bytes_on_disk` of all weights.

    Raises:
        SparseCheckpointError: the directory is neither a sparse checkpoint nor a packed one, or is inconsistent.
    """
    config = read_config(directory)
    if packed.is_packed(config):
        return packed.sizes(directory, config)
    linears = linear_bytes(directory)
    return {
        "sparsity": read_sparsity_config(directory)["global_sparsity"],
        "linear_bytes_dense": linears["dense"],
        "linear_bytes_sparse": linears["sparse"],
        "bytes_dense": sum(safetensors_file.nbytes(*described) for described in read_dense_layout(directory).values()),
        "bytes_on_disk": sum(stored.nbytes for stored in safetensors_file.read_index(directory).values()),
    }


def load_sparse(directory: str | os.PathLike[str]) -> "PreTrainedModel":
    """Load a sparse checkpoint as a plain transformers model with dense weights, in either format, from this package or
    from compressed-tensors 0.8 to 0.14.

    Weights that are quantized as well are multiplied with their scales, as compressed-tensors does it; activations are
    not quantized in a plain model.

    Args:
        directory: a local directory as `save_sparse` or `export_checkpoint` writes it.

    Returns:
        The model on the CPU, in evaluation mode, in the dtype of its config, to be saved, trained or pruned like any.

    Raises:
        SparseCheckpointError: anything in the directory is missing, corrupt or inconsistent, or does not fit the model.
        EfxError: transformers has no class for the model, or compressed-tensors is missing and the checkpoint is
            quantized as well.
    """
    from transformers import GenerationConfig

    directory = Path(directory)
    read_sparsity_config(directory)
    quantization = quantized.of_config(read_config(directory), directory)
    config = model_weights.read_model_config(directory)
    skeleton = model_weights.skeleton(config)
    fit.check_fit(skeleton, read_dense_layout(directory), directory)
    state = dict(expand(directory))
    if quantization is not None:
        state = quantized.dequantize(state, quantization, skeleton, directory)
    model = model_weights.model_class(config).from_pretrained(None, config=config, state_dict=state, dtype="auto")
    if (directory / "generation_config.json").is_file() and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except OSError as error:
            raise SparseCheckpointError(
                f"{directory / 'generation_config.json'} is not the JSON it should hold: copy it anew, or remove it"
            ) from error
    model.config._name_or_path = str(directory)
    return model
