import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import linear_layers
from efx_plugin.model.propagation import ActivationPropagation, BlockPropagation
from integration.assets import tiny_llama

BLOCK = "model.layers.0"


def register(module, hook, hook_type, **kwargs):
    return getattr(module, f"register_{hook_type}_hook")(hook, **kwargs)


def block_layers(model):
    return [layer for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")]


def test_block_sensitivity_is_the_diagonal_of_the_jacobian_product():
    """Against the whole Jacobian of the block's output in each layer's output, summed entry by entry."""
    model = tiny_llama().eval()
    block, layers = model.model.layers[0], block_layers(model)
    tokens = torch.arange(6).unsqueeze(0)

    captured = {}
    with torch.no_grad():
        handle = block.register_forward_hook(lambda _m, a, k, _o: captured.update(a=a, k=k), with_kwargs=True)
        model(tokens, use_cache=False)
        handle.remove()

    def output_after(layer, delta):
        handle = layer.module.register_forward_hook(lambda _m, _a, output: output + delta)
        try:
            return block(*captured["a"], **captured["k"])
        finally:
            handle.remove()

    propagation = BlockPropagation(block, layers)
    propagation.attach(register)
    with torch.no_grad():  # as many random directions as there are copies of the sequence
        model(tokens.repeat(4000, 1), use_cache=False)
    measured = propagation.result()

    for layer in layers:
        zero = torch.zeros(1, 6, layer.base.out_features)
        jacobian = torch.autograd.functional.jacobian(lambda d, layer=layer: output_after(layer, d), zero)
        exact = jacobian.square().sum(dim=(0, 1, 2, 3)).mean(dim=0)
        torch.testing.assert_close(measured[layer.name], exact, rtol=0.2, atol=1e-4)
        assert abs(measured[layer.name].sum() / exact.sum() - 1) < 0.05


def test_measuring_neither_changes_the_model_nor_its_cache():
    model = tiny_llama().eval()
    tokens = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
    results = []
    for use_cache in (False, True):
        propagation = BlockPropagation(model.model.layers[0], block_layers(model))
        handles = []
        propagation.attach(lambda *a, handles=handles, **k: handles.append(register(*a, **k)))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens, use_cache=use_cache).logits, before)
        for handle in handles:
            handle.remove()
        results.append(propagation.result())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, c in results[0].items():
        torch.testing.assert_close(results[1][name], c)


def test_block_sensitivity_counts_only_the_tokens_of_the_mask():
    """In causal attention the tokens after the mask cannot be felt before it, so cutting them off is the same."""
    model = tiny_llama().eval()
    tokens = torch.arange(10).unsqueeze(0).repeat(4000, 1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, :6] = True
    results = []
    for inputs, token_mask in ((tokens[:, :6], lambda: None), (tokens, lambda: mask)):
        propagation = BlockPropagation(model.model.layers[0], block_layers(model), token_mask=token_mask)
        propagation.attach(register)
        with torch.no_grad():
            model(inputs, use_cache=False)
        results.append(propagation.result())
    for name, c in results[0].items():
        torch.testing.assert_close(results[1][name], c, rtol=0.2, atol=1e-4)


def test_measuring_stops_at_its_budget():
    model = tiny_llama().eval()
    propagation = BlockPropagation(model.model.layers[0], block_layers(model), tokens=8)
    propagation.attach(register)
    with torch.no_grad():
        model(torch.arange(8).unsqueeze(0))
        first = propagation.result()
        model(torch.arange(50, 90).unsqueeze(0))
    assert all(torch.equal(first[name], c) for name, c in propagation.result().items())


def test_activation_sensitivity_sees_every_consumer_of_a_grouped_query_block():
    model = tiny_llama().eval()
    layers = block_layers(model)
    by_name = {layer.name.removeprefix(BLOCK + "."): layer for layer in layers}
    outputs = {}
    for name, layer in by_name.items():
        layer.module.register_forward_hook(lambda _m, _a, output, name=name: outputs.update({name: output}))
    propagation = ActivationPropagation(model, BLOCK, layers)
    propagation.attach(register)
    with torch.no_grad():
        model(torch.arange(30).unsqueeze(0))
    c = {name.removeprefix(BLOCK + "."): value for name, value in propagation.result().items()}
    assert set(c) == set(by_name) - {"self_attn.o_proj", "mlp.down_proj"}
    for name, value in c.items():
        assert value.shape == (by_name[name].base.out_features,)

    down = by_name["mlp.down_proj"].base.weight
    gate = torch.nn.functional.silu(outputs["mlp.gate_proj"]).square().mean(dim=(0, 1))
    torch.testing.assert_close(c["mlp.up_proj"], gate * down.square().sum(dim=0))
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    d = model.config.head_dim
    keys = outputs["self_attn.k_proj"].square().mean(dim=(0, 1))
    for head in range(heads):
        kv = head // (heads // kv_heads)
        expected = (keys[kv * d + 1] + keys[kv * d + 1 + d // 2]) / 2
        torch.testing.assert_close(c["self_attn.q_proj"][head * d + 1], expected)


def test_activation_refuses_an_architecture_it_does_not_know():
    config = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=32
    )
    with pytest.raises(EfxError, match="does not know the architecture GPTNeoXForCausalLM"):
        ActivationPropagation(GPTNeoXForCausalLM(config), "gpt_neox.layers.0", [])
