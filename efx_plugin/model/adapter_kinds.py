"""Which kinds of adapters the weights of a model can take in."""

import dataclasses

from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from efx_plugin.errors import EfxError

# Types of adapters that leave the weights alone and add tokens or layers.
_NOT_IN_WEIGHTS = {
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "CPT": "context-aware prompt tuning",
    "CARTRIDGE": "cartridge",
    "ADAPTION_PROMPT": "an adaption prompt",
    "XLORA": "X-LoRA",
    "POLY": "Poly",
}
# What is not plain LoRA in a LoraConfig and why, by field.
_NOT_MERGEABLE = {
    "layer_replication": "repeats layers of the base model",
    "alora_invocation_tokens": "acts on some tokens alone (activated LoRA)",
    "arrow_config": "routes between adapters (Arrow)",
    "monteclora_config": "draws its weights at random (MonteCLoRA)",
    "megatron_config": "is for Megatron's own layers",
    "use_qalora": "is for quantized weights (QA-LoRA)",
}
# Fields of a LoraConfig that loading or merging takes care of.
_KNOWN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "use_dora", "qalora_group_size", "runtime_config", "lora_bias", "target_parameters", "ensure_weight_tying",
}  # fmt: skip


def refuse_type(peft_type: str | PeftType | None, what: str) -> None:
    """Refuse an adapter of another type than LoRA.

    Args:
        peft_type: as in adapter_config.json.
        what: the adapter, as the message names it.

    Raises:
        EfxError: it is no LoRA adapter.
    """
    name = str(getattr(peft_type, "value", peft_type))
    if name == PeftType.LORA.value:
        return
    if name in _NOT_IN_WEIGHTS:
        raise EfxError(
            f"{what} is {_NOT_IN_WEIGHTS[name]}, which no weight of the model can take in: train a LoRA adapter instead"
        )
    if name in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise EfxError(
            f"{what} is of type {name} and only LoRA is supported: train a LoRA adapter instead, or merge it with "
            "PEFT's merge_and_unload, save that model and prune it without an adapter"
        )
    raise EfxError(
        f"{what} is of type {name!r}, which this release of PEFT does not know: train a LoRA adapter instead"
    )


def refuse_config(config: LoraConfig, what: str) -> None:
    """Refuse LoRA of a kind that cannot be merged into weights.

    Raises:
        EfxError: the config asks for such a kind, or for something that is not known here.
    """
    default = LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        value = getattr(config, field.name)
        if field.name in _NOT_MERGEABLE and value:
            raise EfxError(
                f"{what} sets {field.name}: it {_NOT_MERGEABLE[field.name]}, train a plain LoRA adapter instead"
            )
        if field.name not in _KNOWN and value and value != getattr(default, field.name):
            raise EfxError(f"{what} sets {field.name}, which is not supported: train a plain LoRA adapter instead")
