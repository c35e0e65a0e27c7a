"""The files of a checkpoint directory: shards with their index, JSON, and what is copied from another directory."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from efx_plugin.checkpoint.storage import checksums, safetensors_file
from efx_plugin.checkpoint.storage.prefetch import map_ahead
from efx_plugin.checkpoint.storage_plan import Item, Source

# What an export does not copy: weights in any form, and what it writes itself.
_NOT_COPIED_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)
PROVENANCE_FILE = "provenance.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NOT_COPIED = ("config.json", "README.md", PROVENANCE_FILE, checksums.FILE, ADAPTER_CONFIG)
_COPIED_DIRECTORY = "additional_chat_templates"


def write_shards(destination: Path, source: Source, shards: list[list[Item]], written: Callable[[int], object]) -> None:
    """Write every shard, their checksums and, if there are several, the index; `written` is told bytes written."""
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}
    for number, items in enumerate(shards, start=1):
        file = (
            safetensors_file.SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        layout = {name: described for item in items for name, described in item.layout.items()}
        sums[file] = safetensors_file.write_file(destination / file, layout, _stored_tensors(source, items), written)
        weight_map |= dict.fromkeys(layout, file)
    checksums.write(destination, sums)
    if len(shards) > 1:
        total = sum(item.nbytes for items in shards for item in items)
        write_json(
            destination / safetensors_file.INDEX_FILE,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights of a whole model in safetensors."""
    return any((directory / name).is_file() for name in (safetensors_file.SINGLE_FILE, safetensors_file.INDEX_FILE))


def has_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter with its weights; a config alone is left over from a merge."""
    return all(any((directory / name).is_file() for name in names) for names in ((ADAPTER_CONFIG,), ADAPTER_WEIGHTS))


def companions(source: Path) -> dict[str, Path]:
    """What lies beside the weights, by name: tokenizer, chat template, generation config, recipe and the like."""
    found = {
        path.name: path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _NOT_COPIED
        and not path.name.endswith(_NOT_COPIED_SUFFIXES)
    }
    if (source / _COPIED_DIRECTORY).is_dir():
        found[_COPIED_DIRECTORY] = source / _COPIED_DIRECTORY
    return found


def copy_companions(companions: Mapping[str, Path], destination: Path) -> None:
    """Copy files and directories as they are, each to its name."""
    for name, path in companions.items():
        if path.is_dir():
            shutil.copytree(path, destination / name)
        else:
            shutil.copyfile(path, destination / name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file for humans to read."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def progress_bar(what: str, total: int, progress: bool) -> "tqdm[NoReturn]":
    """A bar of bytes, shown if it takes longer than two seconds."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, delay=2, disable=not progress)


def _stored_tensors(source: Source, items: Iterable[Item]) -> Iterator[tuple[str, torch.Tensor]]:
    def compress(item: Item) -> list[tuple[str, torch.Tensor]]:
        weight = source.read(item.name)
        if item.compress is None:
            return [(item.name, weight)]
        return list(zip(item.layout, item.compress(weight).values(), strict=True))

    for tensors in map_ahead(compress, items):
        yield from tensors
