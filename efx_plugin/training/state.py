"""Our files in a Trainer's checkpoint: what training under masks needs to go on and the Trainer does not save."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from efx_plugin.checkpoint.storage.atomic import sync
from efx_plugin.errors import EfxError


def write_state(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write a file that appears complete or not at all, whenever the process is killed.

    Args:
        path: in the Trainer's checkpoint.
        tensors: by name, no two of the same memory.
        values: anything that JSON holds.

    Raises:
        EfxError: the file cannot be written.
    """
    temporary = path.with_suffix(".incomplete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            temporary,
            metadata={"values": json.dumps(values)},
        )
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise EfxError(f"cannot write {path} ({error}): make room or correct its permissions") from error


def link_state(source: Path, path: Path) -> bool:
    """Give the file `source` the name `path` as well, which takes no room; False where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, path)
        sync(path.parent)
    except OSError:  # rotated away meanwhile, or a file system without links
        return False
    return True


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote.

    Raises:
        EfxError: the file is missing or torn.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = "is missing" if not path.exists() else f"cannot be read ({error})"
        raise EfxError(
            f"{path.name} {reason} in {path.parent}, so training under masks cannot go on from there: resume from an "
            "earlier checkpoint"
        ) from error
