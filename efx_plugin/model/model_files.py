"""A model's folder on disk: its config, the class that it names, and the headers of its weights. No tensor is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from efx_plugin.checkpoint.config import sparsity_in
from efx_plugin.checkpoint.storage import safetensors_file
from efx_plugin.checkpoint.storage.shards import ADAPTER_CONFIG, has_weights
from efx_plugin.errors import EfxError, UsageError, one_line

# What the name of a model's class ends in, by the task_type of an adapter for it.
CLASSIFIERS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "*.gguf", "tf_model.h5", "flax_model.msgpack")
_LANGUAGE_MODELS = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_VISION_LANGUAGE_MODELS = frozenset(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()) | frozenset(
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()
)


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder.

    Attributes:
        folder: the folder.
        config: of the model, without what only concerns how its weights are stored.
        model_class: the class that config.json names first under `architectures`.
        index: every stored tensor by name.
        trust_remote_code: whether code in the folder may run.
        notices: sentences about what is not as one might expect.
    """

    folder: Path
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    index: Mapping[str, safetensors_file.StoredTensor]
    trust_remote_code: bool
    notices: tuple[str, ...]


def read_model(folder: Path, *, trust_remote_code: bool) -> ModelFiles:
    """Look at a model's folder.

    Raises:
        EfxError: it is no folder of a decoder that can be pruned, or a file is missing or corrupt.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no directory {folder}: pass the directory of a model")
    _refuse_other_folders(folder)
    raw = read_json(folder / "config.json")
    _refuse_quantized(folder, raw)
    if "auto_map" in raw and not trust_remote_code and not _is_known(raw):
        raise EfxError(
            f"{folder} comes with code of its own, which would have to run: read it and pass --trust-remote-code"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each family checks its config in its own way
        raise EfxError(f"transformers cannot use {folder / 'config.json'}: {one_line(error)}") from error
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):
            delattr(config, key)
    notices: list[str] = []
    model_class = _model_class(folder, config, raw, trust_remote_code, notices)
    return ModelFiles(folder, config, model_class, _read_index(folder), trust_remote_code, tuple(notices))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        EfxError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise EfxError(f"{path} cannot be read ({one_line(error)}): copy it anew") from error
    if not isinstance(content, dict):
        raise EfxError(f"{path} holds no JSON object: copy it anew")
    return content


def inner_folders(folder: Path, file: str) -> list[Path]:
    """Direct subfolders that hold a file of this name, checkpoints of a Trainer in the order of their steps."""
    found = [path.parent for path in folder.glob(f"*/{file}")]
    return sorted(
        found, key=lambda path: (int(path.name.rpartition("-")[2]) if path.name[-1].isdigit() else 0, path.name)
    )


def _refuse_other_folders(folder: Path) -> None:
    """A folder that holds an adapter, checkpoints of a Trainer, or weights of another kind."""
    if (folder / ADAPTER_CONFIG).is_file() and not has_weights(folder):
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE_MODEL"
        raise UsageError(f"{folder} is an adapter, not a model: run efx prune {base} OUTPUT --adapter {folder} ...")
    if not (folder / "config.json").is_file():
        if inner := inner_folders(folder, "config.json") or inner_folders(folder, ADAPTER_CONFIG):
            raise UsageError(f"{folder} holds no model itself, but {inner[-1].name} inside does: pass {inner[-1]}")
        if list(folder.glob("*.gguf")):
            raise EfxError(f"{folder} holds a GGUF file, which is quantized: pass the original model in safetensors")
        raise UsageError(f"{folder} has no config.json: pass the directory of a model")
    if not has_weights(folder):
        for pattern in _OTHER_WEIGHTS:
            if found := sorted(folder.glob(pattern)):
                raise EfxError(
                    f"{folder} has its weights in {found[0].name}, not in safetensors: load it with transformers and "
                    "store it with save_pretrained, then pass that directory"
                )
        raise EfxError(f"{folder} has neither model.safetensors nor model.safetensors.index.json: download it again")


def _refuse_quantized(folder: Path, raw: Mapping[str, Any]) -> None:
    for config in (raw, raw.get("text_config") or {}):
        quantization = config.get("quantization_config") or config.get("compression_config")
        if not quantization:
            continue
        method = quantization.get("quant_method", "an unknown method")
        groups = quantization.get("config_groups")
        sparsity = sparsity_in(quantization)
        if method == "compressed-tensors" and not groups:
            if sparsity is None:
                continue
            raise EfxError(
                f"{folder} is stored sparsely already ({sparsity['format']}): run efx export {folder} DENSE "
                "--structure dense and pass DENSE"
            )
        if method == "bitsandbytes":
            method += ", " + ("4 bits" if quantization.get("load_in_4bit") else "8 bits")
        raise EfxError(
            f"the weights of {folder} are quantized ({method}) and cannot be pruned: pass the original model in "
            "bfloat16, and quantize in the recipe"
        )


def _read_index(folder: Path) -> Mapping[str, safetensors_file.StoredTensor]:
    index = safetensors_file.read_index(folder)
    for name, stored in index.items():
        if name.endswith(".weight") and not (stored.dtype.is_floating_point and stored.dtype.itemsize > 1):
            raise EfxError(
                f"{name} in {folder} is stored as {str(stored.dtype).removeprefix('torch.')}, so the model is "
                "quantized: pass the original model in bfloat16"
            )
    return index


def _is_known(raw: Mapping[str, Any]) -> bool:
    """Whether transformers has the model's class itself, so that the folder's own code is not needed."""
    names = raw.get("architectures") or [None]
    return isinstance(names[0], str) and hasattr(transformers, names[0])


def _needs_more_than_text(cls: type[PreTrainedModel]) -> bool:
    """Whether a forward pass takes other arguments than tokens."""
    return any(
        parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        for name, parameter in signature(cls.forward).parameters.items()
        if name not in ("self", "input_ids")
    )


def _model_class(
    folder: Path, config: PretrainedConfig, raw: Mapping[str, Any], trust_remote_code: bool, notices: list[str]
) -> type[PreTrainedModel]:
    language_models = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = config.architectures[0] if config.architectures else language_models.get(config.model_type)
    if name is None:
        raise EfxError(
            f"config.json of {folder} names no architecture, and transformers {transformers.__version__} knows no "
            f"language model of type {config.model_type!r}: add `architectures`"
        )
    if not config.architectures:
        notices.append(f"{folder / 'config.json'} names no architecture, so the model is taken for a {name}")
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if cls is None and trust_remote_code:
        reference = next((ref for ref in raw.get("auto_map", {}).values() if str(ref).endswith("." + name)), None)
        if reference is not None:
            return get_class_from_dynamic_module(reference, folder)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise EfxError(
            f"config.json of {folder} names the architecture {name!r}, which transformers "
            f"{transformers.__version__} lacks: correct `architectures`, or update transformers"
        )
    if config.is_encoder_decoder:
        raise EfxError(
            f"{folder} holds a {name}, an encoder-decoder: only decoders can be pruned, such as Llama or Qwen"
        )
    if getattr(config.get_text_config(), "cross_attention_layers", None) or _needs_more_than_text(cls):
        raise EfxError(
            f"{folder} holds a {name}, which text alone does not run through, so it cannot be calibrated: only models "
            "whose whole decoder reads text can be pruned, such as LLaVA, Gemma 3 or Qwen-VL"
        )
    decoder = config.model_type in language_models
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise EfxError(f"{folder} holds a {name}, an encoder: only decoders can be pruned, such as Llama or Qwen")
    if name in _LANGUAGE_MODELS | _VISION_LANGUAGE_MODELS or (decoder and name.endswith(tuple(CLASSIFIERS.values()))):
        return cls
    raise EfxError(
        f"{folder} holds a {name}, which is no language model and no classifier with a decoder: such a model cannot be "
        "pruned here"
    )
