"""An adapter's folder on disk: its config and the shapes of its tensors. No tensor is read."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from efx_plugin.checkpoint.storage import safetensors_file
from efx_plugin.checkpoint.storage.shards import ADAPTER_CONFIG, ADAPTER_WEIGHTS, has_weights
from efx_plugin.errors import EfxError, UsageError, one_line
from efx_plugin.model.adapter_kinds import refuse_config, refuse_type
from efx_plugin.model.model_files import CLASSIFIERS, inner_folders, read_json

_SAFETENSORS, _PICKLED = ADAPTER_WEIGHTS
# Initializations that change the base weights in a way that cannot be repeated when the adapter is loaded.
_ONCE_ONLY = ("pissa_niter", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder.

    Attributes:
        folder: the folder.
        config: of the adapter.
        tensors: every stored tensor by name, without its values: on the meta device.
        notices: sentences about what is not as one might expect.
    """

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, Tensor]
    notices: tuple[str, ...]

    def is_copy(self, name: str) -> bool:
        """Whether a tensor is stored under another name too, as PEFT does with resized embeddings."""
        for wrapper in (".modules_to_save.", ".original_module."):
            module, wrapped, leaf = name.rpartition(wrapper)
            if wrapped:
                return f"{module}.{leaf}" in self.tensors
        _, wrapped, leaf = name.rpartition(".token_adapter.")
        return bool(wrapped) and sum(other.endswith(wrapped + leaf) for other in self.tensors) > 1


def read_adapter(folder: Path, model_class: str, base: Path) -> AdapterFiles:
    """Look at an adapter's folder.

    Args:
        folder: the folder.
        model_class: name of the class of the model that the adapter is for.
        base: the model's folder.

    Raises:
        EfxError: it holds no LoRA adapter that can be merged into such a model, or a file is missing or corrupt.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no directory {folder}: pass the directory of an adapter")
    if not (folder / ADAPTER_CONFIG).is_file():
        if inner := inner_folders(folder, ADAPTER_CONFIG):
            raise UsageError(f"{folder} holds no adapter itself, but {inner[-1].name} inside does: pass {inner[-1]}")
        if has_weights(folder):
            raise UsageError(f"{folder} is a whole model, not an adapter: pass it as MODEL, without --adapter")
        raise UsageError(f"{folder} has no {ADAPTER_CONFIG}: pass the directory that PEFT's save_pretrained wrote")
    raw = read_json(folder / ADAPTER_CONFIG)
    refuse_type(raw.get("peft_type"), f"the adapter in {folder}")
    for name, value in raw.items():
        if value and name not in {field.name for field in dataclasses.fields(LoraConfig)}:
            raise EfxError(
                f"{folder / ADAPTER_CONFIG} sets {name}, which this release of PEFT does not know: update peft, "
                "or merge the adapter with the release that trained it"
            )
    if str(raw.get("init_lora_weights")).startswith(_ONCE_ONLY):
        raise EfxError(
            f"the adapter in {folder} was initialized by {raw['init_lora_weights']}, which changed the base "
            "weights: save it as plain LoRA with path_initial_model_for_weight_conversion in PEFT's save_pretrained"
        )
    try:
        config = LoraConfig.from_pretrained(folder)
    except Exception as error:  # PEFT checks its fields in many ways
        raise EfxError(f"PEFT cannot use {folder / ADAPTER_CONFIG}: {one_line(error)}") from error
    refuse_config(config, f"the adapter in {folder}")
    _refuse_other_task(folder, config, model_class)
    notices = []
    named = config.base_model_name_or_path
    if named and Path(named).name != base.resolve().name:
        notices.append(f"the adapter was trained on {named} and is merged into {base}")
    return AdapterFiles(folder, config, _read_tensors(folder), tuple(notices))


def _refuse_other_task(folder: Path, config: LoraConfig, model_class: str) -> None:
    task = str(getattr(config.task_type, "value", config.task_type) or "")
    head = next((kind for kind, ending in CLASSIFIERS.items() if model_class.endswith(ending)), "CAUSAL_LM")
    if task not in ("", "None", "FEATURE_EXTRACTION", head):
        raise EfxError(
            f"the adapter in {folder} was trained for the task {task}, but the model is a {model_class}: pass the "
            f"{'classifier' if task in CLASSIFIERS else 'model'} that it was trained on, saved whole with "
            "save_pretrained"
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / _SAFETENSORS
    if path.is_file():
        tensors = safetensors_file.on_meta(safetensors_file.read_header(path))
    elif (path := folder / _PICKLED).is_file():
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # pickle fails in many ways
            raise EfxError(f"{path} cannot be read ({one_line(error)}): copy it anew") from error
    else:
        raise EfxError(f"{folder} has no {_SAFETENSORS}: the adapter was not saved whole, copy it anew")
    return tensors
