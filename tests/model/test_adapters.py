import copy
import math

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import (
    LinearLayer,
    add_to_adapter,
    effective_weight,
    linear_layers,
    merge_adapters,
    stacked_adapter,
)
from tests.support.tiny_llama import tiny_llama


def adapted(dtype=torch.float32, **options):
    """A tiny Llama with a random LoRA adapter on all seven projections."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(tiny_llama().to(dtype), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return model.eval()


def layer_of(model, name) -> LinearLayer:
    return next(layer for layer in linear_layers(model) if layer.name == name)


def random_masks(model):
    generator = torch.Generator().manual_seed(1)
    shapes = {layer.name: layer.base.weight.shape for layer in linear_layers(model) if layer.name != "lm_head"}
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def test_adapters_do_not_count_as_layers_of_their_own():
    plain = [layer.name for layer in linear_layers(tiny_llama())]
    model = adapted()
    assert [layer.name for layer in linear_layers(model)] == plain
    assert [layer.name for layer in linear_layers(model.base_model.model)] == plain


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_effective_weight_entry_by_entry(rslora, scaling):
    layer = layer_of(adapted(use_rslora=rslora), "model.layers.1.self_attn.k_proj")
    a, b = layer.module.lora_A["default"].weight.detach(), layer.module.lora_B["default"].weight.detach()
    effective = effective_weight(layer)
    for o in range(0, effective.shape[0], 7):
        for i in range(0, effective.shape[1], 5):
            expected = float(layer.base.weight.detach()[o, i]) + scaling * sum(
                float(b[o, k] * a[k, i]) for k in range(4)
            )
            assert math.isclose(float(effective[o, i]), expected, rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.parametrize(
    "trained",
    [{}, {"target_modules": ["embed_tokens", "q_proj"]}, {"trainable_token_indices": [5, 6]}],
    ids=["linear", "embeddings", "tokens"],
)
def test_merging_leaves_a_plain_model_that_computes_the_same(trained):
    model = adapted(**trained)
    for name, parameter in model.named_parameters():
        if "embedding" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
        merged = merge_adapters(model)
        torch.testing.assert_close(merged(tokens).logits, before, rtol=1e-4, atol=1e-5)
    assert type(merged) is type(tiny_llama())
    assert merged.state_dict().keys() == tiny_llama().state_dict().keys()


def test_the_zeros_of_the_masks_survive_the_merge_and_nothing_else_is_pruned():
    model = adapted()
    masks = random_masks(model)
    expected = {name: effective_weight(layer_of(model, name)) * mask for name, mask in masks.items()}
    weights = merge_adapters(model, masks).state_dict()
    for name, weight in expected.items():
        assert torch.equal(weights[f"{name}.weight"], weight)


def test_masking_the_base_layer_alone_is_undone_by_the_stock_merge():
    """Why masks are applied to the effective weight; should PEFT ever keep the zeros, the README must say so."""
    model = adapted()
    for name, mask in random_masks(model).items():
        layer_of(model, name).base.weight.data *= mask
    merged = model.merge_and_unload()
    assert all((p == 0).float().mean() < 0.01 for name, p in merged.named_parameters() if "proj" in name)


def test_updates_below_the_precision_of_bfloat16_are_rounded_once():
    model = adapted(torch.bfloat16, r=8)
    layer = layer_of(model, "model.layers.0.mlp.up_proj")
    exact = effective_weight(layer)
    merged = merge_adapters(model).state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())


def test_several_adapters_add_up_and_an_inactive_one_does_not_count():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    name = "model.layers.0.self_attn.q_proj"
    layer_of(model, name).module.lora_B["second"].weight.data.normal_()
    alone = effective_weight(layer_of(model, name))
    model.base_model.set_adapter(["default", "second"])
    both = effective_weight(layer_of(model, name))
    module = layer_of(model, name).module
    second = module.lora_B["second"].weight @ module.lora_A["second"].weight
    torch.testing.assert_close(both, alone + second.detach())


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(EfxError, match=r"q_proj is not plain LoRA"):
        linear_layers(adapted(use_dora=True))
    with pytest.raises(EfxError, match="no PeftModel"):
        merge_adapters(tiny_llama())
    with pytest.raises(EfxError, match=r"mask 'model\.nothing'"):
        merge_adapters(adapted(), {"model.nothing": torch.ones(2, 2)})


def test_an_update_of_two_adapters_moves_the_effective_weight_by_its_product_with_both():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    layer = layer_of(model, "model.layers.0.mlp.up_proj")
    stacked, before = stacked_adapter(layer), effective_weight(layer)
    assert stacked.shape == (4 + 3, 64)
    update = torch.randn(96, 7, generator=torch.Generator().manual_seed(2))
    add_to_adapter(layer, update)
    torch.testing.assert_close(effective_weight(layer), before + update @ stacked)
    assert stacked_adapter(layer_of(tiny_llama(), "model.layers.0.mlp.up_proj")) is None


def test_modules_that_are_trained_whole_are_no_layers_to_prune():
    model = adapted(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    names = [layer.name for layer in linear_layers(model)]
    assert names == [layer.name for layer in linear_layers(tiny_llama()) if layer.name != "lm_head"]


def test_a_quantized_base_weight_is_refused():
    model = tiny_llama()
    up = model.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(torch.zeros(up.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(EfxError, match=r"layers\.1\.mlp\.up_proj is quantized \(torch\.uint8, as in QLoRA\): load"):
        linear_layers(model)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["lm_head", "embed_tokens"]])
def test_merging_into_one_end_of_a_tied_model_leaves_the_other_alone(targets):
    tied = tiny_llama(tie_word_embeddings=True)
    model = get_peft_model(tied, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
        merged = merge_adapters(model)
        torch.testing.assert_close(merged(tokens).logits, before, rtol=1e-4, atol=1e-4)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert not merged.config.tie_word_embeddings


@pytest.mark.parametrize("options", [{"use_dora": True}, {"trainable_token_indices": [5, 6]}], ids=["DoRA", "tokens"])
def test_masks_hold_after_merging_what_is_no_plain_lora(options):
    model = adapted(**options)
    masks = random_masks(tiny_llama())
    with torch.no_grad():
        plain = merge_adapters(copy.deepcopy(model)).state_dict()
    merged = merge_adapters(model, masks).state_dict()
    for name, mask in masks.items():
        torch.testing.assert_close(merged[f"{name}.weight"], plain[f"{name}.weight"] * mask)


def test_adapters_that_weights_cannot_take_in_are_not_merged():
    for config, name in (
        (AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]), "ADALORA"),
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "prompt tuning"),
        (LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    ):
        with pytest.raises(EfxError, match=name):
            merge_adapters(get_peft_model(tiny_llama(), config))
