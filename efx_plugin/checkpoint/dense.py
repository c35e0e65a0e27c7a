"""Makes a plain checkpoint of a sparse one, without loading the model.

A checkpoint that was quantized as well stays quantized, so that vLLM serves it by itself. Its zeros are stored and
multiplied like any other value then.
"""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from efx_plugin.checkpoint import model_weights, provenance, quantized, storage_plan
from efx_plugin.checkpoint.config import GUARD_KEY, sparsity_of
from efx_plugin.checkpoint.fit import check_fit
from efx_plugin.checkpoint.formats import pack_quantized
from efx_plugin.checkpoint.formats.registry import find_format
from efx_plugin.checkpoint.model_card import dense_card
from efx_plugin.checkpoint.plain import write_plain
from efx_plugin.checkpoint.reader import expand_weight, group_parts, read_config, read_dense_layout
from efx_plugin.checkpoint.storage import safetensors_file, shards
from efx_plugin.errors import EfxError

NAME = "dense"

_LOGGER = logging.getLogger(__name__)


def export_dense(
    source: Path, directory: str | os.PathLike[str], *, max_shard_size: int, metadata: Mapping[str, Any], progress: bool
) -> None:
    """Write a sparse checkpoint as a plain one, quantized if it was, a few weights at a time; and say so in the log.

    Raises:
        EfxError: the source is not sparse, or the destination exists.
        SparseCheckpointError: a file of the source is missing or corrupt.
    """
    config = read_config(source)
    sparsity = sparsity_of(config)
    if sparsity is None:
        raise EfxError(f"{source} is dense already: copy it")
    skeleton = model_weights.skeleton(model_weights.read_model_config(source))
    sparse = _expanded(source, find_format(sparsity["format"], "config.json").name)
    check_fit(skeleton, sparse.layout, source)
    metadata = {**provenance.of_directory(source), **metadata}
    quantization = quantized.of_config(config, source)
    to_pack: frozenset[str] = frozenset()
    if quantization is not None:
        scaled = [name.removesuffix(".weight_scale") for name in sparse.layout if name.endswith(".weight_scale")]
        schemes = quantized.schemes_of(quantization, skeleton, scaled, source)
        to_pack = frozenset(f"{name}.weight" for name, scheme in schemes.items() if quantized.is_weight_only(scheme))
    items = [_item(name, described, name in to_pack) for name, described in sparse.layout.items()]
    described = None if quantization is None else quantized.packed_config(quantization)
    plain = _plain_config(config, described)
    needed = write_plain(
        directory,
        sparse,
        items,
        plain,
        dense_card(Path(directory).name, plain, metadata, source.absolute().name),
        max_shard_size=max_shard_size,
        metadata=metadata,
        extras=lambda destination: shards.copy_companions(shards.companions(source), destination),
        progress=progress,
    )
    stored = sum(tensor.nbytes for tensor in safetensors_file.read_index(source).values())
    _LOGGER.warning(
        "%s holds %s with its zeros written out: %s bytes instead of %s, served %s and no faster for being sparse.",
        directory,
        source,
        f"{needed:,}",
        f"{stored:,}",
        "dense" if described is None else f"dense as {described['format']}",
    )


def _expanded(directory: Path, format_name: str) -> storage_plan.Source:
    """The tensors of a sparse checkpoint under their dense names, read one by one."""
    index = safetensors_file.read_index(directory)
    compressed = group_parts(index)

    def read(name: str) -> torch.Tensor:
        if name in compressed:
            tensor = expand_weight(directory, index, compressed[name], format_name)
        else:
            tensor = safetensors_file.read_tensor(directory, index[name])
        storage_plan.check_finite(name, tensor)  # a damaged scale above all
        return tensor

    return storage_plan.Source(read_dense_layout(directory), read)


def _item(name: str, described: tuple[torch.dtype, tuple[int, ...]], pack: bool) -> storage_plan.Item:
    if not pack:
        return storage_plan.Item(name, None, {name: described})
    prefix = name.removesuffix(".weight")
    return storage_plan.Item(
        name,
        pack_quantized.compress,
        {f"{prefix}.{part}": found for part, found in pack_quantized.layout(*described[1]).items()},
    )


def _plain_config(config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json without the sparsity."""
    plain = copy.deepcopy(dict(config))
    plain.pop(GUARD_KEY, None)
    described = plain.pop("quantization_config")
    if quantization is not None:
        plain["quantization_config"] = {**quantization, "version": described.get("version")}
    return plain
