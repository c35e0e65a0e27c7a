"""What a checkpoint was made of: base model, adapter, calibration, figures, licence.

It lies in a file of its own beside the weights, so that every export, sparse or dense, passes on what the one before it
knew; the model card is only its readable form.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from efx_plugin.checkpoint.storage import safetensors_file, shards
from efx_plugin.errors import EfxError, SparseCheckpointError

KEYS = (
    *("base_model", "adapter", "calibration", "healing", "figures"),
    *("license", "license_name", "license_link", "language"),
)

# What the card of the base model says of itself that holds for whatever is made of it.
_INHERITED = ("license", "license_name", "license_link", "language")

_LOGGER = logging.getLogger(__name__)


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The metadata that a caller gives, as JSON holds it, if it has no key but those of `KEYS`.

    Raises:
        EfxError: naming the key that is not one of them.
    """
    metadata = dict(metadata or {})
    for key in metadata:
        if key not in KEYS:
            raise EfxError(f"metadata has the key {key!r}: the model card has room for {', '.join(KEYS)}")
    plain: dict[str, Any] = json.loads(json.dumps(metadata, default=str))
    return plain


def of_directory(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What is known of a local model: what it was made of, else its own name as that of the base model.

    Raises:
        SparseCheckpointError: its provenance.json is not what this package writes.
    """
    directory = Path(directory)
    path = directory / shards.PROVENANCE_FILE
    if path.is_file():
        found = safetensors_file.parse_json(path, path.read_bytes())
        figures = found.get("figures", {})
        if not (set(found) <= set(KEYS) and isinstance(figures, Mapping)):
            raise SparseCheckpointError(f"{path} does not say what the model was made of: correct or remove it")
        return found
    return {"base_model": public_name(directory), **_inherited(directory / "README.md")}


def public_name(model: str | os.PathLike[str]) -> str:
    """The name of a model for others to read: of a local directory the last part, or what the hub's cache tells."""
    if not os.path.isdir(model):
        return str(model)
    path = Path(model).absolute()
    cached = re.fullmatch(r"models--(.+?)--(.+)", path.parent.parent.name) if path.parent.name == "snapshots" else None
    return f"{cached[1]}/{cached[2]}" if cached else path.name


def _inherited(card: Path) -> dict[str, Any]:
    """Licence and language from the front matter of a model card; nothing where it has none."""
    if not card.is_file():
        return {}
    try:
        front: dict[str, Any] = metadata_load(card) or {}
    except Exception as error:  # whatever YAML stumbles over
        _LOGGER.warning(
            "The licence of the base model is not passed on, because the front matter of %s is no YAML (%s)",
            card,
            " ".join(str(error).split()),
        )
        return {}
    return {key: front[key] for key in _INHERITED if front.get(key)}
