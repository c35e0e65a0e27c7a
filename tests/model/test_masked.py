import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import effective_weight, linear_layers
from efx_plugin.model.masked import has_dropout, install_mask, mask_of, masked_linear, remove_mask
from tests.support.tiny_llama import tiny_llama


def draws(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 9),
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 12),
    rank=st.integers(0, 4),
    sparsity=st.floats(0, 1),
    biased=st.booleans(),
    trains_weight=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_dense_expression(
    seed, tokens, outputs, inputs, rank, sparsity, biased, trains_weight
):
    x, weight, a, b, bias, into = draws(
        seed, (2, tokens, inputs), (outputs, inputs), (rank, inputs), (outputs, rank), (outputs,), (2, tokens, outputs)
    )
    keep = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) >= sparsity
    leaves = {"x": x, "weight": weight} | ({"a": a, "b": b} if rank else {}) | ({"bias": bias} if biased else {})

    def fresh():
        return {n: v.clone().requires_grad_(n != "weight" or trains_weight) for n, v in leaves.items()}

    ours, dense = fresh(), fresh()
    y = masked_linear(ours["x"], ours["weight"], keep, ours.get("a"), ours.get("b"), ours.get("bias"))
    effective = dense["weight"] + dense["b"] @ dense["a"] if rank else dense["weight"]
    expected = nn.functional.linear(dense["x"], effective * keep, dense.get("bias"))
    torch.testing.assert_close(y, expected)
    y.backward(into)
    expected.backward(into)
    for name, leaf in dense.items():
        if leaf.grad is None:
            assert ours[name].grad is None
        else:
            torch.testing.assert_close(ours[name].grad, leaf.grad, msg=name)


def test_nothing_flows_through_pruned_weights():
    x, weight = (value.requires_grad_() for value in draws(0, (5, 6), (4, 6)))
    pruned = torch.arange(24).reshape(4, 6) % 2 == 0
    masked_linear(x, weight, ~pruned).square().sum().backward()
    assert (weight.grad[pruned] == 0).all()
    assert (weight.grad[~pruned] != 0).all()


def adapted(dtype=torch.float32, **options):
    """A tiny Llama with a random LoRA adapter, and every second weight of each layer masked."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(tiny_llama().to(dtype), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    layers = [layer for layer in linear_layers(model) if layer.name != "lm_head"]
    keep = {layer.name: torch.rand(layer.base.weight.shape, generator=generator) < 0.5 for layer in layers}
    return model.train(), layers, keep


def dense_twin(model, layers, keep):
    """The same parameters and gradients by autograd on the dense expression, one adapter or several."""

    def forward(layer):
        def run(x):
            effective = layer.base.weight
            for name in layer.module.active_adapters if layer.module is not layer.base else []:
                if name in layer.module.lora_A:
                    pair = layer.module.lora_B[name].weight @ layer.module.lora_A[name].weight
                    effective = effective + layer.module.scaling[name] * pair
            return nn.functional.linear(x, effective * keep[layer.name], layer.base.bias)

        return run

    for layer in layers:
        layer.module.forward = forward(layer)


TOKENS = torch.arange(60).reshape(2, 30) % 120 + 3


def gradients(model):
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize("several", [False, True])
def test_a_model_trains_as_the_dense_expression_says(options, several):
    model, layers, keep = adapted(**options)
    if several:
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["default", "second"])
    twin = copy.deepcopy(model)
    dense_twin(twin, [layer for layer in linear_layers(twin) if layer.name != "lm_head"], keep)
    for layer in layers:
        install_mask(layer, keep[layer.name])
    (loss, ours), (expected, dense) = gradients(model), gradients(twin)
    torch.testing.assert_close(loss, expected)
    assert ours.keys() == dense.keys()
    for name, gradient in dense.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, layers, keep = adapted()
    for layer in layers:
        install_mask(layer, keep[layer.name])
    plain = gradients(model)[1]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients(model)[1].items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_under_autocast_products_are_bfloat16_and_gradients_those_of_the_parameters():
    x, weight, a, b, into = (value.float() for value in draws(0, (64, 48), (32, 48), (4, 48), (32, 4), (64, 32)))
    pruned = torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    exact = [value.clone().requires_grad_() for value in (x, a, b)]
    nn.functional.linear(exact[0], (weight + exact[2] @ exact[1]).masked_fill(pruned, 0)).backward(into)
    ours = [value.clone().requires_grad_() for value in (x, a, b)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(ours[0], weight.bfloat16(), ~pruned, *ours[1:])
    assert y.dtype == torch.bfloat16
    y.backward(into.bfloat16())
    for leaf, expected in zip(ours, exact, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - expected.grad).norm() < 0.01 * expected.grad.norm()


def test_no_second_weight_is_saved_for_the_backward_pass():
    _model, layers, keep = adapted()
    layer = layers[0]
    install_mask(layer, keep[layer.name])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer.module(torch.randn(3, 64))
    sizes = {tensor.data_ptr() for tensor in saved if tensor.numel() == layer.base.weight.numel()}
    assert sizes == {layer.base.weight.data_ptr(), mask_of(layer).data_ptr()}


def test_installing_and_removing_leaves_no_trace():
    model, layers, keep = adapted()
    layer, before = layers[3], model(TOKENS).logits
    install_mask(layer, keep[layer.name])
    install_mask(layer, ~keep[layer.name])
    assert torch.equal(mask_of(layer), ~keep[layer.name])
    masked = nn.functional.linear(torch.eye(layer.base.in_features), effective_weight(layer) * ~keep[layer.name])
    torch.testing.assert_close(layer.module(torch.eye(layer.base.in_features)), masked)
    assert model.state_dict().keys() == adapted()[0].state_dict().keys()
    remove_mask(layer)
    remove_mask(layer)
    assert mask_of(layer) is None
    assert "forward" not in vars(layer.module)
    assert torch.equal(model(TOKENS).logits, before)

    wrapped = layer.module.forward
    layer.module.forward = lambda *args: wrapped(*args)  # as accelerate's hooks do
    own = layer.module.forward
    install_mask(layer, keep[layer.name])
    remove_mask(layer)
    assert layer.module.forward is own


def test_a_copy_of_a_masked_model_has_masks_and_weights_of_its_own():
    model, layers, keep = adapted()
    for layer in layers:
        install_mask(layer, keep[layer.name])
    before = model(TOKENS).logits
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(TOKENS).logits, before)


def test_switched_off_adapters_give_the_base_model():
    model, layers, keep = adapted()
    with model.disable_adapter():
        base = model(TOKENS).logits
    for layer in layers:
        install_mask(layer, keep[layer.name])
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base)
    with pytest.raises(EfxError, match=r"q_proj is masked and cannot mix adapters"):
        model.eval()(TOKENS, adapter_names=["default", "__base__"])


def test_dropout_is_noticed_and_does_not_reach_a_masked_layer():
    model, layers, keep = adapted(lora_dropout=0.5)
    assert has_dropout(layers[0])
    assert not has_dropout(adapted()[1][0])
    for layer in layers:
        install_mask(layer, keep[layer.name])
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def test_a_checkpointed_layer_alone():
    x, weight, a, b = draws(3, (5, 6), (4, 6), (2, 6), (4, 2))
    keep = ~torch.eye(4, 6).bool()
    results = []
    for run in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=False)):
        leaves = [value.clone().requires_grad_() for value in (x, a, b)]
        run(lambda x, a, b: masked_linear(x, weight, keep, a, b), *leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for one, other in zip(*results, strict=True):
        assert math.isclose(float((one - other).abs().max()), 0)
