"""The propagation maps against the models themselves, and the refusal of what has no map or does not fit it."""

import pytest
import torch
from torch import nn

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import linear_layers
from efx_plugin.model.architectures import PROPAGATION_MAPS, PropagationMap, block_map
from efx_plugin.model.propagation import BlockPropagation, WeightPropagation
from tests.support.tiny_models import ARCHITECTURES, tiny_model

EVERY = sorted(ARCHITECTURES)
NORMED = {"Qwen3", "Gemma3", "Olmo2", "Olmo3", "Olmoe", "Qwen3Moe"}
EXPERTS = {"Mixtral", "Olmoe", "Qwen3Moe"}


def register(module, hook, hook_type, **kwargs):
    return getattr(module, f"register_{hook_type}_hook")(hook, **kwargs)


def block_layers(model, block="model.layers.0"):
    return [layer for layer in linear_layers(model) if layer.name.startswith(block + ".")]


def resolve(model, block="model.layers.0"):
    return block_map(model, block, block_layers(model, block))


@pytest.mark.parametrize("architecture", EVERY)
def test_the_map_of_every_architecture_gives_each_output_one_role(architecture):
    model = tiny_model(architecture)
    assert f"{architecture}ForCausalLM" in PROPAGATION_MAPS
    found = resolve(model)
    attention, config = found.attention, model.config
    width = getattr(config, "head_dim", None) or 8
    assert len(found.mlps) == (4 if architecture in EXPERTS else 1)
    assert found.mlps_per_token == (2 if architecture in EXPERTS else 1)
    assert (attention.heads, attention.kv_heads) == (4, 2)
    assert attention.rotary_dim == (4 if architecture == "Phi3" else width)
    assert (attention.query_norm is not None) == (attention.key_norm is not None) == (architecture in NORMED)
    sizes = [rows.stop - rows.start for rows in (attention.query, attention.key, attention.value, attention.output)]
    assert sizes == [4 * width, 2 * width, 2 * width, 32]

    roles = [attention.query, attention.key, attention.value, attention.output]
    roles += [rows for mlp in found.mlps for rows in (mlp.gate, mlp.up, mlp.down)]
    outputs = {layer.name: torch.zeros(layer.base.out_features) for layer in block_layers(model)}
    for rows in roles:
        rows.of(outputs[rows.layer.name]).add_(1)
    assert all((count == 1).all() for count in outputs.values())
    for part in ("gate", "up", "down"):
        assert all(part in getattr(mlp, part).layer.name for mlp in found.mlps)


def test_the_norms_of_a_map_are_those_between_a_layer_and_its_consumer():
    def norms(architecture):
        model = tiny_model(architecture)
        names = {module: name for name, module in model.model.layers[0].named_modules()}
        found = resolve(model)
        return [names.get(norm) for norm in (found.attention.output_norm, found.mlp_norm, found.down_norm)]

    assert norms("Llama") == [None, "post_attention_layernorm", None]
    assert norms("Olmo2") == ["post_attention_layernorm", None, "post_feedforward_layernorm"]
    for gemma in ("Gemma2", "Gemma3"):
        assert norms(gemma) == ["post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]


def zeroed(rows, *, columns=None, outputs=None):
    """Zero columns of a consumer, or outputs (with their bias) of a partner in the attention scores."""
    base = rows.layer.base
    if columns is not None:
        base.weight.data[rows.start : rows.stop, columns] = 0
        return
    for output in outputs:
        base.weight.data[rows.start + output] = 0
        if base.bias is not None:
            base.bias.data[rows.start + output] = 0


def zeros_of(model, propagation):
    propagation.attach(register)
    with torch.no_grad():
        model(torch.arange(48).reshape(2, 24), use_cache=False)
    return {(name, int(o)) for name, c in propagation.result().items() for o in (c == 0).nonzero()}


def outputs_of(rows, outputs):
    return {(rows.layer.name, rows.start + output) for output in outputs}


def severed(model, found):
    """Cut what consumes some outputs, and return those that no longer matter, as (layer, output)."""
    attention, (mlp, *_) = found.attention, found.mlps
    width = (attention.query.stop - attention.query.start) // 4
    zeroed(mlp.down, columns=[3, 17])
    cut = outputs_of(mlp.up, [3, 17]) | outputs_of(mlp.gate, [3, 17])
    # Channel 2 of the second kv head is read by query heads 2 and 3, channel 5 of the first by head 1 alone by now.
    zeroed(attention.output, columns=[2 * width + 2, 3 * width + 2, 5])
    cut |= outputs_of(attention.value, [width + 2])
    if attention.query_norm is None:
        # Of two channels that rotate into each other, in the first kv head: query heads 0 and 1 meet them.
        pair = [1, 1 + attention.rotary_dim // 2]
        zeroed(attention.key, outputs=pair)
        cut |= outputs_of(attention.query, [head * width + channel for head in (0, 1) for channel in pair])
        # The same of both query heads of the second group.
        pair = [0, attention.rotary_dim // 2]
        zeroed(attention.query, outputs=[head * width + channel for head in (2, 3) for channel in pair])
        cut |= outputs_of(attention.key, [width + channel for channel in pair])
    return cut


@pytest.mark.parametrize("architecture", EVERY)
def test_outputs_without_a_consumer_are_those_without_a_gradient(architecture):
    """The map's indices against the gradients of the model: the same outputs become worthless, and no others."""
    model = tiny_model(architecture)
    layers = block_layers(model)
    cut = severed(model, resolve(model))
    assert zeros_of(model, BlockPropagation(model.model.layers[0], layers)) == cut
    assert zeros_of(model, WeightPropagation(model, "model.layers.0", layers)) == cut


@pytest.mark.parametrize("architecture", sorted(NORMED))
def test_queries_and_keys_with_norms_meet_where_they_do_without(architecture):
    """A normalizer mixes all channels, so gradients do not vanish; the scores still lack what was cut."""
    model = tiny_model(architecture)
    attention, width = resolve(model).attention, resolve(model).attention.rotary_dim
    pair = [1, 1 + width // 2]
    zeroed(attention.key, outputs=pair)
    c = WeightPropagation(model, "model.layers.0", block_layers(model)).result()
    assert (c[attention.query.layer.name] == 0).nonzero().flatten().tolist() == [
        *pair,
        width + 1,
        width + 1 + width // 2,
    ]
    assert (c[attention.key.layer.name] > 0).all()


@pytest.mark.parametrize("architecture", EVERY)
def test_the_attention_output_is_consumed_through_gate_and_up(architecture):
    model = tiny_model(architecture)
    found = resolve(model)
    for mlp in found.mlps:
        zeroed(mlp.gate, columns=[7])
        zeroed(mlp.up, columns=[7])
    c = WeightPropagation(model, "model.layers.0", block_layers(model)).result()[found.attention.output.layer.name]
    assert (c == 0).nonzero().flatten().tolist() == [7]


def test_an_architecture_without_a_map_is_refused_until_it_is_given_one(monkeypatch):
    model = tiny_model("Llama")
    expected = resolve(model)
    monkeypatch.delitem(PROPAGATION_MAPS, "LlamaForCausalLM")
    message = (
        "no propagation map for LlamaForCausalLM: use propagation 'block' or 'fisher', which need none, or add one to "
        r"efx_plugin\.model\.architectures\.PROPAGATION_MAPS$"
    )
    with pytest.raises(EfxError, match=message):
        resolve(model)
    monkeypatch.setitem(PROPAGATION_MAPS, "LlamaForCausalLM", PropagationMap())
    assert resolve(model) == expected


def with_two_activations(block):
    block.mlp.gate_fn = nn.Sigmoid()


def with_one_more_layer(block):
    block.side = nn.Linear(32, 32)


def with_wider_queries(block):
    block.self_attn.q_proj = nn.Linear(32, 64)


def with_another_input(block):
    block.mlp.up_proj = nn.Linear(16, 28)


def without_a_gate(block):
    del block.mlp.gate_proj


def without_a_norm(block):
    del block.post_attention_layernorm


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_two_activations, "in whose mlp the activation function is not clear"),
        (with_one_more_layer, "where nothing is known of the consumers of side"),
        (with_wider_queries, r"whose self_attn\.q_proj has 64 outputs, not 32"),
        (with_another_input, r"whose mlp\.up_proj has 16 inputs, not 32"),
        (without_a_gate, r"which has no linear layer mlp\.gate_proj"),
        (without_a_norm, "which has no post_attention_layernorm"),
    ],
)
def test_a_model_that_does_not_fit_its_map_is_refused(change, reason):
    model = tiny_model("Llama")
    change(model.model.layers[0])
    message = rf"map of LlamaForCausalLM does not fit a model {reason} \(model\.layers\.0\): use propagation 'block' or"
    with pytest.raises(EfxError, match=message):
        resolve(model)


def test_fused_experts_are_refused_with_the_remedy():
    with pytest.raises(EfxError, match="experts are fused into one tensor, which llm-compressor's linearize_moe"):
        resolve(tiny_model("Mixtral", linearize=False))
