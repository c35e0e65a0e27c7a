"""Experts are taken apart only where llm-compressor gives the same weights back."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from efx_plugin.compress.experts import rehearse_experts
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import inner_model, linear_layers
from tests.support.tiny_models import tiny_model

FIELDS = {"hidden_size": 32, "intermediate_size": 28, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "vocab_size": 64}


def skeleton(architecture: str) -> torch.nn.Module:
    if architecture not in ("GptOss", "Llama4"):
        return tiny_model(architecture, linearize=False).to("meta")
    name = "GptOssConfig" if architecture == "GptOss" else "Llama4TextConfig"
    config = getattr(transformers, name)(**FIELDS, **EXPERTS)
    with torch.device("meta"):
        return getattr(transformers, f"{architecture}ForCausalLM")(config)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "with an adapter"])
@pytest.mark.parametrize("architecture", ["Llama", "Mixtral", "Qwen3Moe"])
def test_the_layers_are_those_that_oneshot_is_going_to_meet(architecture, adapted):
    expected = [(layer.name, layer.base.weight.shape) for layer in linear_layers(tiny_model(architecture))]
    model = skeleton(architecture)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    rehearse_experts(model)
    assert [(layer.name, layer.base.weight.shape) for layer in linear_layers(model)] == expected
    assert all(parameter.is_meta for parameter in inner_model(model).model.layers.parameters() if parameter.ndim == 2)


@pytest.mark.parametrize(("architecture", "reason"), [("GptOss", "other weights come back"), ("Llama4", "text_config")])
def test_experts_that_do_not_come_back_as_they_were_are_refused(architecture, reason):
    with pytest.raises(EfxError, match=rf"{architecture}\w*Experts apart and put them together again \(.*{reason}"):
        rehearse_experts(skeleton(architecture))
