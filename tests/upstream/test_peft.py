"""What we assume of PEFT's private parts."""

import dataclasses

import pytest
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import Linear, LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

from efx_plugin.model import adapter_kinds
from tests.support.tiny_llama import tiny_llama
from tests.upstream.contract import holds, takes

HOST = "peft"
ADAPTERS, KINDS, LOADING = (f"efx_plugin.model.{name}" for name in ("adapters", "adapter_kinds", "loading"))
CALLBACK = "efx_plugin.training.callback"

# Fields that are refused by their name alone.
REFUSED = {"kasa_config", "use_bdlora", "velora_config"}


def adapted(**fields):
    return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], **fields))


def lora_layer(model) -> LoraLayer:
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


@pytest.mark.parametrize(
    "name", ["lora_variant", "lora_bias", "lora_A", "lora_B", "scaling", "merged_adapters", "disable_adapters"]
)
def test_a_layer_has_these_attributes(name):
    layer = lora_layer(adapted())
    holds(isinstance(layer, Linear), HOST, "LoRA on a linear layer is no lora.Linear", ADAPTERS)
    holds(hasattr(layer, name), HOST, f"a LoRA layer has no {name}", ADAPTERS)


def test_plain_lora_is_told_from_its_variants():
    plain, dora, biased = (lora_layer(adapted(**fields)) for fields in ({}, {"use_dora": True}, {"lora_bias": True}))
    (name,) = plain.active_adapters
    holds(name not in plain.lora_variant, HOST, "plain LoRA has an entry in lora_variant", ADAPTERS)
    holds(name in dora.lora_variant, HOST, "DoRA has no entry in lora_variant", ADAPTERS)
    holds(not plain.lora_bias.get(name), HOST, "plain LoRA has a true entry in lora_bias", ADAPTERS)
    holds(biased.lora_bias.get(name), HOST, "LoRA with a bias has no true entry in lora_bias", ADAPTERS)


@pytest.mark.parametrize("wrapper", [ModulesToSaveWrapper, TrainableTokensWrapper])
def test_what_is_trained_whole_is_wrapped_and_can_be_unwrapped(wrapper):
    holds(issubclass(wrapper, AuxiliaryTrainingWrapper), HOST, f"{wrapper.__name__} wraps otherwise", ADAPTERS)
    unwrap = wrapper.unload_and_optionally_merge_module
    takes(unwrap, ["merge", "safe_merge", "adapter_names"], HOST, ADAPTERS)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, ".base_layer."),
        ({}, ".lora_A."),
        ({"modules_to_save": ["lm_head"]}, ".modules_to_save.default."),
        ({"modules_to_save": ["lm_head"]}, ".original_module."),
        ({"trainable_token_indices": [1]}, ".token_adapter."),
        ({"trainable_token_indices": [1]}, ".trainable_tokens_"),
    ],
)
def test_the_state_is_named_as_we_take_it_apart(fields, part):
    names = list(adapted(**fields).state_dict())
    holds(any(part in name for name in names), HOST, f"no name of the state of {fields} holds {part}", CALLBACK)
    holds(all(name.startswith("base_model.model.") for name in names), HOST, "names begin otherwise", CALLBACK)


def test_every_field_of_a_config_is_known():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    new = fields - adapter_kinds._KNOWN - adapter_kinds._NOT_MERGEABLE.keys() - REFUSED
    holds(not new, HOST, f"LoraConfig has the new fields {sorted(new)}, refused until they are looked at", KINDS)
    holds("LORA" in PEFT_TYPE_TO_CONFIG_MAPPING, HOST, "types of adapters are listed elsewhere", KINDS)


def test_an_adapter_is_read_by_these_functions():
    takes(load_peft_weights, ["model_id", "device"], HOST, LOADING)
    takes(set_peft_model_state_dict, ["model", "peft_model_state_dict", "adapter_name"], HOST, LOADING)
