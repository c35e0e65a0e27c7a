"""What we assume of transformers' private parts."""

import pytest
import torch
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto
from transformers.models.llama import modeling_llama
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.generic import find_labels

from tests.support.tiny_llama import tiny_llama
from tests.upstream.contract import holds, says, takes

HOST = "transformers"
HOOK, WEIGHTS, FIT = (f"efx_plugin.checkpoint.{name}" for name in ("transformers_hook", "model_weights", "fit"))
MAPS, FISHER, FILES = "efx_plugin.model.architectures", "efx_plugin.engine.fisher", "efx_plugin.model.model_files"


# The registry of quantizers.


@pytest.mark.parametrize("registry", ["AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"])
def test_compressed_tensors_is_an_entry_that_can_be_replaced(registry):
    mapping = getattr(auto, registry, {})
    holds("compressed-tensors" in mapping, HOST, f"quantizers.auto.{registry} has no compressed-tensors", HOOK)
    holds(type(mapping) is dict, HOST, f"quantizers.auto.{registry} is no dict", HOOK)


def test_the_config_is_changed_before_files_are_looked_for():
    says(auto.get_hf_quantizer, ["hf_quantizer.update_tp_plan(config)"], HOST, HOOK)
    says(PreTrainedModel.from_pretrained.__func__, ["get_hf_quantizer(", "_get_resolved_checkpoint_files("], HOST, HOOK)


def test_the_key_that_guards_sparse_checkpoints_is_read():
    says(modeling_utils._get_resolved_checkpoint_files, ["transformers_weights"], HOST, HOOK)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("update_tp_plan", ["config"]),
        ("get_weight_conversions", []),
        ("_process_model_before_weight_loading", ["model", "kwargs"]),
        ("_process_model_after_weight_loading", ["model", "kwargs"]),
    ],
)
def test_a_quantizer_has_these_hooks(name, parameters):
    holds(hasattr(HfQuantizer, name), HOST, f"HfQuantizer has no {name}", HOOK)
    takes(getattr(HfQuantizer, name), parameters, HOST, HOOK)


def test_a_quantizer_is_told_the_files():
    says(
        PreTrainedModel.from_pretrained.__func__,
        ["hf_quantizer.preprocess_model(", "checkpoint_files=checkpoint_files"],
        HOST,
        HOOK,
    )


# Conversions of weights.


def test_a_conversion_is_told_layer_and_model():
    takes(WeightConverter.__init__, ["source_patterns", "target_patterns", "operations"], HOST, HOOK)
    for argument in ("target_patterns=", "full_layer_name=", "model="):
        says(WeightConverter.convert, [argument], HOST, HOOK)


def test_a_loaded_model_keeps_its_conversions_which_run_backwards(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    holds(
        isinstance(getattr(loaded, "_weight_conversions", None), list),
        HOST,
        "a loaded model has no list _weight_conversions",
        HOOK,
    )
    weights = dict(loaded.named_parameters())
    stored = revert_weight_conversion(loaded, dict(weights))
    holds(
        stored.keys() == weights.keys() and all(stored[name] is weights[name] for name in stored),
        HOST,
        "revert_weight_conversion changes weights that are stored as they are",
        WEIGHTS,
    )


def test_what_may_be_missing_can_be_asked():
    takes(PreTrainedModel._adjust_missing_and_unexpected_keys, ["self", "loading_info"], HOST, FIT)
    says(PreTrainedModel._adjust_missing_and_unexpected_keys, ["loading_info.missing_keys"], HOST, FIT)


def test_conversions_are_where_they_are_imported_from():
    for name in ("ConversionOps", "WeightConverter", "revert_weight_conversion"):
        holds(hasattr(core_model_loading, name), HOST, f"core_model_loading has no {name}", HOOK)


# Models.


def test_rotation_mixes_the_halves_of_a_head():
    rotated = modeling_llama.rotate_half(torch.arange(4.0)).tolist()
    holds(rotated == [-2, -3, 0, 1], HOST, "rotate_half mixes other channels", MAPS)


def test_decoder_layers_checkpoint_gradients_by_a_class():
    layer = modeling_llama.LlamaDecoderLayer
    holds(issubclass(layer, GradientCheckpointingLayer), HOST, "decoder layers checkpoint gradients otherwise", FISHER)


def test_labels_are_found_in_the_signature():
    labels = find_labels(modeling_llama.LlamaForCausalLM)
    holds(labels == ["labels"], HOST, f"find_labels gives {labels} for a language model", FISHER)


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM"])
def test_architectures_are_told_apart_by_tables(kind):
    table = f"MODEL_FOR_{kind}_MAPPING_NAMES"
    holds(getattr(modeling_auto, table, None), HOST, f"models.auto.modeling_auto has no {table}", FILES)
