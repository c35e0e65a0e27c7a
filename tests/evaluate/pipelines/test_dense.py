"""The dense models are what the user has stored, without and with the adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from efx_plugin.evaluate.pipelines.protocol import PipelineTask
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from tests.support.tiny_llama import save_tiny_llama, tiny_llama


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    model = save_tiny_llama(folder / "model")
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    tokens = torch.randint(3, 128, (2, 16))
    return PipelineTask(model, folder / "adapter", tokens, tokens, tokens, 0.0, "0:0", 0, folder / "output")


def test_base_is_the_stored_model(task):
    result = PIPELINES["base"].run(task)
    stored = tiny_llama().state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in result.model.state_dict().items())
    assert (result.sparsity, result.bits_per_weight_stored) == (0.0, 32.0)


def test_lora_is_the_model_with_its_adapter(task):
    base, lora = (PIPELINES[name].run(task).model for name in ("base", "lora"))
    changed = {name for name, value in lora.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


def test_pipelines_are_found_by_their_names():
    assert all(name == pipeline.name for name, pipeline in PIPELINES.items())
    assert all(pipeline.family == "trained" for pipeline in PIPELINES.values() if pipeline.needs_training)
