"""Layers quantized as they are pruned: their schemes, what is stored of them, and what is refused."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from efx_plugin.checkpoint import load_sparse, save_sparse
from efx_plugin.checkpoint.reader import sizes
from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.block_pruner import BlockPruner
from efx_plugin.engine.blocks import plan_blocks
from efx_plugin.engine.quantization import describe_layers, plan_grids, refuse_other_quantization
from efx_plugin.errors import EfxError
from tests.support.tiny_llama import tiny_llama
from tests.support.tiny_models import tiny_model

ARGUMENTS = PruningArguments(saliency="wanda", propagation="none", allocation="uniform")
RANGES = {"W8A8": (-128, 127), "W8A16": (-128, 127), "W4A16": (-8, 7)}


@torch.no_grad()
def prune(quantization, dtype=torch.bfloat16, **config):
    """A tiny model, pruned and quantized; and by layer what was decided."""
    torch.manual_seed(0)
    model = tiny_llama(**config).to(dtype).eval()
    plans = plan_blocks(model, ARGUMENTS)
    grids = plan_grids(plans, quantization)
    layers = {layer.name: layer for plan in plans for layer in plan.layers}
    describe_layers(layers, grids, quantization)
    inputs = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    for plan in plans:
        pruner = BlockPruner(model, plan, ARGUMENTS, grids=grids)
        hooks = []
        pruner.attach(
            lambda module, hook, kind, hooks=hooks, **kwargs: hooks.append(
                getattr(module, f"register_{kind}_hook")(hook, **kwargs)
            )
        )
        model(inputs)
        for hook in hooks:
            hook.remove()
        pruner.prune()
    return model, layers, grids


@pytest.mark.parametrize("quantization", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_its_scale_times_an_integer_and_half_of_them_are_zero(quantization, dtype):
    model, layers, grids = prune(quantization, dtype)
    lowest, highest = RANGES[quantization]
    for name, layer in layers.items():
        weight, scale = layer.base.weight, layer.base.weight_scale
        assert weight.dtype == scale.dtype == dtype and layer.base.quantization_status == QuantizationStatus.FROZEN
        spread = scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
        integers = (weight.float() / spread).round()
        assert lowest <= integers.min() and integers.max() <= highest
        assert torch.equal((integers * spread).to(dtype), weight)
        assert (weight == 0).float().mean() > 0.499, name
        assert scale.shape[1] == weight.shape[1] // (grids[name].group or weight.shape[1])
    assert not hasattr(model.lm_head, "quantization_scheme")


@pytest.mark.parametrize("quantization", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_checkpoint_opens_with_the_same_weights_bit_for_bit(tmp_path, quantization, dtype):
    model, layers, _ = prune(quantization, dtype)
    save_sparse(model, tmp_path / "expert", progress=False)
    if quantization == "W4A16":  # an ordinary checkpoint of compressed-tensors
        options = CompressedTensorsConfig(dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "expert", quantization_config=options)
    else:
        loaded = load_sparse(tmp_path / "expert")
    for name, layer in layers.items():
        found = loaded.get_submodule(name).weight
        assert found.dtype == dtype and torch.equal(found, layer.base.weight), name
    found = sizes(tmp_path / "expert")
    zeros = sum(int((layer.base.weight == 0).sum()) for layer in layers.values())
    assert found["sparsity"] == pytest.approx(
        zeros / sum(layer.base.weight.numel() for layer in layers.values()), abs=1e-6
    )
    every = sum(layer.base.weight.numel() for layer in layers.values())
    assert found["linear_bytes_dense"] == every / (2 if quantization == "W4A16" else 1)


def test_groups_are_the_largest_that_divide_the_inputs_and_each_size_has_a_scheme_of_its_own(tmp_path):
    model, layers, grids = prune("W4A16", hidden_size=96, intermediate_size=256)
    assert {name: grid.group for name, grid in grids.items()} == {
        name: 128 if name.endswith("down_proj") else 32 for name in layers
    }
    save_sparse(model, tmp_path / "expert", progress=False)
    options = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "expert", quantization_config=options)
    for name, layer in layers.items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.base.weight), name


def test_activations_are_quantized_once_their_layer_is():
    _, layers, _ = prune("W8A8", torch.float32)
    inputs = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    base = layers["model.layers.0.self_attn.q_proj"].base
    step = inputs.abs().amax(dim=-1, keepdim=True) / 127.5
    rounded = (inputs / step).round().clamp(-128, 127) * step
    assert torch.allclose(base(inputs), rounded @ base.weight.T, atol=1e-5)
    assert not torch.allclose(base(inputs), inputs @ base.weight.T, atol=1e-5)


def test_inputs_that_no_group_divides_are_refused():
    model = tiny_llama(hidden_size=48, intermediate_size=96, num_attention_heads=6, num_key_value_heads=2)
    with pytest.raises(EfxError, match=r"groups of 128, 64, 32 weights and none divides the 48 inputs of .*q_proj"):
        plan_grids(plan_blocks(model, ARGUMENTS), "W4A16")


def test_experts_are_refused():
    model = tiny_model("Mixtral")
    with pytest.raises(EfxError, match=r"cannot be had for model\.layers\.0\..*experts"):
        plan_grids(plan_blocks(model, ARGUMENTS), "W8A8")


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_is_quantized_by_one_modifier_only(first):
    model = tiny_llama()
    plans = plan_blocks(model, ARGUMENTS)
    layers = {layer.name: layer for plan in plans for layer in plan.layers}
    other = QuantizationConfig(config_groups={"W8A8": ["Linear"]}, ignore=["lm_head"])

    def describe():
        describe_layers(layers, plan_grids(plans, "W8A16"), "W8A16")

    with pytest.raises(EfxError, match="by EfficientXpertModifier and by another modifier of the recipe: leave one"):
        if first:
            apply_quantization_config(model, other)
            describe()
        else:
            describe()
            refuse_other_quantization(layers.values())
            apply_quantization_config(model, other)
            refuse_other_quantization(layers.values())
