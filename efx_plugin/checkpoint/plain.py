"""Writes a checkpoint that vLLM and transformers open by themselves."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_plugin.checkpoint import storage_plan
from efx_plugin.checkpoint.storage import atomic, shards


def write_plain(
    directory: str | os.PathLike[str],
    source: storage_plan.Source,
    items: Sequence[storage_plan.Item],
    config: Mapping[str, Any],
    card: str,
    *,
    max_shard_size: int,
    metadata: Mapping[str, Any],
    extras: Callable[[Path], None],
    progress: bool,
) -> int:
    """Write the directory, and return the bytes of its weights.

    Args:
        source: its weights, of which `items` says how they are stored.
        config: the content of its config.json.
        card: the text of its README.md.
        extras: what adds the other files, called with the directory.

    Raises:
        EfxError: the destination exists or its disk is full.
    """
    needed = sum(item.nbytes for item in items)
    with atomic.new_directory(directory, needed) as destination:
        with shards.progress_bar("writing", needed, progress) as bar:
            shards.write_shards(destination, source, storage_plan.make_shards(items, max_shard_size), bar.update)
        shards.write_json(destination / "config.json", config)
        extras(destination)
        shards.write_json(destination / shards.PROVENANCE_FILE, metadata)
        (destination / "README.md").write_text(card)
    return needed
