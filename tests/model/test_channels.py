"""Channels that may stand in any order: the model computes the same in every one, adapters included."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from efx_plugin.model.adapters import effective_weight, inner_model, linear_layers
from efx_plugin.model.architectures import block_map
from efx_plugin.model.channels import free_channels, reorder
from tests.support.tiny_models import ARCHITECTURES, tiny_model

BLOCK = "model.layers.0"


def channels_of(model):
    layers = [layer for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")]
    return free_channels(block_map(inner_model(model), BLOCK, layers)), layers


def shuffled(channels, generator):
    return torch.stack([torch.randperm(channels.width, generator=generator) for _ in range(channels.heads)])


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "with LoRA"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_any_order_computes_the_same(architecture, adapted):
    model = tiny_model(architecture).eval()
    generator = torch.Generator().manual_seed(0)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    before = logits(model)
    channels, layers = channels_of(model)
    weights = {layer.name: effective_weight(layer) for layer in layers}
    moved = {name: one for some in channels for name, one in reorder(some, shuffled(some, generator)).items()}
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    assert not any(name.rpartition(".")[2] in ("q_proj", "k_proj") for name in moved)
    for layer in layers:
        now = effective_weight(layer)
        assert torch.equal(now, weights[layer.name]) == (layer.name not in moved), layer.name
        if layer.name in moved:
            assert torch.allclose(now, moved[layer.name].of(weights[layer.name]), atol=1e-6)


def test_what_is_known_of_inputs_by_head():
    channels, _ = channels_of(tiny_model("Llama"))
    attention = channels[0]
    assert (attention.heads, attention.copies, attention.width) == (2, 2, 8)
    inputs = torch.arange(32.0).repeat(3, 1) + torch.tensor([[0.0], [100.0], [200.0]])
    by_head = attention.by_head(inputs)
    assert by_head.shape == (2, 6, 8)
    for head in range(2):
        expected = {(row, copy): inputs[row, (2 * head + copy) * 8 :][:8] for row in range(3) for copy in range(2)}
        found = {tuple(row.tolist()) for row in by_head[head]}
        assert found == {tuple(row.tolist()) for row in expected.values()}
