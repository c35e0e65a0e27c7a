"""The sensitivities of a block against Jacobians, finite differences and sums over tokens."""

import functools

import pytest
import torch
from llmcompressor.modeling.moe.context import moe_calibration_context
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import linear_layers
from efx_plugin.model.experts import CountedRows, expert_weight_sensitivity
from efx_plugin.model.propagation import ActivationPropagation, BlockPropagation, NoPropagation, WeightPropagation
from tests.support.tiny_llama import tiny_llama
from tests.support.tiny_models import ARCHITECTURES, tiny_model

BLOCK = "model.layers.0"


def register(module, hook, hook_type, **kwargs):
    return getattr(module, f"register_{hook_type}_hook")(hook, **kwargs)


def block_layers(model):
    return [layer for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")]


def some_tokens(vocabulary=64, batch=4, length=24, seed=0):
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def measure(model, tokens, *propagations):
    for propagation in propagations:
        propagation.attach(register)
    model(tokens, use_cache=False)
    return [propagation.result() for propagation in propagations]


# ---------------------------------------------------------------------------------------------------- block


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


def test_block_sensitivity_is_that_of_a_layers_output_even_where_the_block_clips_it_in_place():
    """Clipped to nearly nothing, queries cannot matter, and the values that are clipped all the time cannot either."""
    model = tiny_model("Olmo", clip_qkv=1e-6)
    (c,) = measure(model, some_tokens(), BlockPropagation(model.model.layers[0], block_layers(model)))
    assert all((c[f"{BLOCK}.self_attn.{name}_proj"] == 0).all() for name in "qkv")
    assert (c[f"{BLOCK}.self_attn.o_proj"] > 0).all()


def ranks(values):
    return values.argsort().argsort().double()


def rank_correlation(first, second):
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


@pytest.mark.parametrize("make_model", [tiny_llama, functools.partial(tiny_model, "Mixtral")], ids=["Llama", "Mixtral"])
def test_block_sensitivity_ranks_the_true_damage_of_pruning_a_row_better_than_wanda(make_model):
    """Finite differences: the lower half of a row is pruned, and the block's output moves by so much."""
    model = make_model().double()
    block, layers = model.model.layers[0], block_layers(model)
    tokens = some_tokens(batch=4, length=24)
    captured, inputs = {}, {}
    handles = [block.register_forward_hook(lambda _m, a, k, o: captured.update(a=a, k=k, o=o), with_kwargs=True)]
    for layer in layers:
        handles.append(
            layer.module.register_forward_hook(
                lambda _m, a, _o, name=layer.name: inputs.update({name: a[0].flatten(0, -2)})
            )
        )
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    (c,) = measure(model, tokens.repeat(16, 1), BlockPropagation(block, layers, tokens=10**6))

    def damage(weight, row, pruned):
        kept = weight[row].clone()
        weight[row, pruned] = 0
        with torch.no_grad():
            output = block(*captured["a"], **captured["k"])
        weight[row] = kept
        return (output - captured["o"]).square().sum(dim=-1).mean()

    generator = torch.Generator().manual_seed(0)
    table = {}
    for layer in layers:
        weight = layer.base.weight.data
        energies = weight.square() * inputs[layer.name].square().mean(dim=0)
        rows = torch.randperm(len(weight), generator=generator)[:32]
        lowest = energies[rows].topk(weight.shape[1] // 2, largest=False).indices
        wanda = torch.stack([energies[row, pruned].sum() for row, pruned in zip(rows, lowest, strict=True)])
        true = torch.stack([damage(weight, row, pruned) for row, pruned in zip(rows, lowest, strict=True)])
        table[layer.name.removeprefix(BLOCK + ".")] = torch.stack([wanda, wanda * c[layer.name][rows], true])
    wanda, ours, true = torch.cat(list(table.values()), dim=1)
    assert rank_correlation(ours, true) > 0.85
    assert rank_correlation(wanda, true) < 0.5
    # Within one matrix too, where a gate or the scores and their softmax stand behind it.
    for name, (wanda, ours, true) in table.items():
        if name.rpartition(".")[2] in ("q_proj", "gate_proj", "up_proj"):
            assert rank_correlation(ours, true) > rank_correlation(wanda, true), name


# ------------------------------------------------------------------------------------------------- no data


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_weight_and_activation_give_every_layer_a_positive_sensitivity(architecture):
    model = tiny_model(architecture)
    layers = block_layers(model)
    for c in measure(
        model, some_tokens(), WeightPropagation(model, BLOCK, layers), ActivationPropagation(model, BLOCK, layers)
    ):
        assert list(c) and set(c) == {layer.name for layer in layers}
        for layer in layers:
            value = c[layer.name]
            assert value.shape == (layer.base.out_features,) and value.dtype == torch.float32, layer.name
            assert value.isfinite().all() and (value > 0).all(), layer.name


def test_a_process_without_data_adds_nothing_to_the_others():
    model = tiny_model("Mixtral")
    layers = block_layers(model)
    for propagation in (BlockPropagation(model.model.layers[0], layers), ActivationPropagation(model, BLOCK, layers)):
        c = propagation.result()
        assert set(c) == {layer.name for layer in layers}
        assert all(len(c[layer.name]) == layer.base.out_features and not c[layer.name].any() for layer in layers)


def test_sensitivities_of_a_model_with_an_adapter_are_those_of_the_merged_model():
    model = tiny_model("Qwen3")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    inner = adapted.get_base_model()
    with_adapter = measure(
        inner,
        some_tokens(),
        *(kind(inner, BLOCK, block_layers(inner)) for kind in (WeightPropagation, ActivationPropagation)),
    )
    merged = adapted.merge_and_unload()
    plain = measure(
        merged,
        some_tokens(),
        *(kind(merged, BLOCK, block_layers(merged)) for kind in (WeightPropagation, ActivationPropagation)),
    )
    for one, other in zip(with_adapter, plain, strict=True):
        assert len(one) == 7
        for name, c in one.items():
            torch.testing.assert_close(c, other[name], rtol=1e-3, atol=1e-5)


def test_weight_sensitivity_of_a_llama_by_hand():
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=2)
    layers = block_layers(model)
    model.model.layers[0].post_attention_layernorm.weight.data.uniform_(0.5, 2)
    weights = {layer.name.removeprefix(BLOCK + "."): layer.base.weight.double() for layer in layers}
    (c,) = measure(model, some_tokens(), WeightPropagation(model, BLOCK, layers))
    c = {name.removeprefix(BLOCK + "."): value.double() for name, value in c.items()}

    def check(name, o, expected):
        torch.testing.assert_close(c[name][o], expected, rtol=1e-5, atol=0)

    for o in (0, 5, 95):
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            check(name, o, weights["mlp.down_proj"][:, o].square().sum())
    gain = model.model.layers[0].post_attention_layernorm.weight.double()
    for o in (0, 31):
        consumers = torch.cat([weights["mlp.gate_proj"], weights["mlp.up_proj"]])
        check("self_attn.o_proj", o, (gain[o] * consumers[:, o]).square().sum())
        check("mlp.down_proj", o, torch.ones((), dtype=torch.double))
    d = 16
    rows = {name: weights[f"self_attn.{name}_proj"].square().sum(dim=1) for name in "qk"}
    for j in (0, 3, 11):
        pair = [j, (j + d // 2) % d]
        check("self_attn.q_proj", 3 * d + j, sum(rows["k"][d + p] for p in pair) / 2)
        check("self_attn.k_proj", d + j, sum(rows["q"][h * d + p] for h in (2, 3) for p in pair) / 2)
        output = weights["self_attn.o_proj"]
        check("self_attn.v_proj", d + j, sum(output[:, h * d + j].square().sum() for h in (2, 3)))


def test_a_norm_behind_a_sublayer_weighs_its_outputs():
    model = tiny_model("Gemma2")
    block = model.model.layers[0]
    (c,) = measure(model, some_tokens(), WeightPropagation(model, BLOCK, block_layers(model)))
    gain = 1 + block.post_feedforward_layernorm.weight
    torch.testing.assert_close(c[f"{BLOCK}.mlp.down_proj"], gain.square())
    expected = (gain.unsqueeze(1) * block.mlp.down_proj.weight).square().sum(dim=0)
    torch.testing.assert_close(c[f"{BLOCK}.mlp.up_proj"], expected)
    gain = 1 + block.post_attention_layernorm.weight
    columns = (gain.unsqueeze(1) * block.self_attn.o_proj.weight).square().sum(dim=0)
    torch.testing.assert_close(c[f"{BLOCK}.self_attn.v_proj"], columns.reshape(2, 2, 12).sum(dim=1).flatten())


# ---------------------------------------------------------------------------------------------- activations


def recorded(model, *names):
    """Outputs of modules of block 0 by their names, filled by the next forward pass."""
    outputs = {}
    for name in names:
        model.model.layers[0].get_submodule(name).register_forward_hook(
            lambda _m, _a, output, name=name: outputs.__setitem__(name, output.detach())
        )
    return outputs


def test_activation_sensitivity_sees_every_consumer_of_a_grouped_query_block():
    model = tiny_llama()
    outputs = recorded(model, "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj")
    (c,) = measure(model, some_tokens(128), ActivationPropagation(model, BLOCK, block_layers(model)))
    c = {name.removeprefix(BLOCK + "."): value for name, value in c.items()}
    assert all((c[name] == 1).all() for name in ("self_attn.o_proj", "mlp.down_proj"))
    columns = model.model.layers[0].mlp.down_proj.weight.square().sum(dim=0)
    gate = outputs["mlp.gate_proj"]
    torch.testing.assert_close(c["mlp.up_proj"], functional.silu(gate).square().mean(dim=(0, 1)) * columns)
    slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
    torch.testing.assert_close(c["mlp.gate_proj"], (outputs["mlp.up_proj"] * slope).square().mean(dim=(0, 1)) * columns)
    d = model.config.head_dim
    keys = outputs["self_attn.k_proj"].square().mean(dim=(0, 1))
    for head in range(4):
        expected = (keys[head // 2 * d + 1] + keys[head // 2 * d + 1 + d // 2]) / 2
        torch.testing.assert_close(c["self_attn.q_proj"][head * d + 1], expected)


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe", "Gemma3", "Olmo2"])
def test_queries_and_keys_are_seen_through_their_norms(architecture):
    """Against what the model's own norms give, and their Jacobian without the part along the output itself."""
    model = tiny_model(architecture)
    attention = model.model.layers[0].self_attn
    outputs = recorded(model, "self_attn.q_norm", "self_attn.k_norm", "self_attn.q_proj")
    (c,) = measure(model, some_tokens(), ActivationPropagation(model, BLOCK, block_layers(model)))
    d = attention.head_dim
    keys = outputs["self_attn.k_norm"]
    if keys.shape[1] == 2:  # Gemma 3 normalizes [batch, heads, tokens, d]
        keys = keys.transpose(1, 2)
    energy = keys.reshape(4, 24, 2, d).square().mean(dim=(0, 1))
    energy = (energy[:, : d // 2] + energy[:, d // 2 :]).repeat(1, 2) / 2
    weight = attention.q_norm.weight
    gain = 1 + weight if architecture == "Gemma3" else weight
    queries = outputs["self_attn.q_proj"].reshape(4, 24, -1, len(weight))
    slopes = (gain.square() / queries.square().mean(dim=-1, keepdim=True)).mean(dim=(0, 1)).reshape(4, d)
    expected = slopes * energy.repeat_interleave(2, dim=0)
    torch.testing.assert_close(c[f"{BLOCK}.self_attn.q_proj"], expected.flatten(), rtol=1e-4, atol=0)


def test_the_gate_of_gemma_is_gelu_and_its_mlp_is_seen_through_the_norm_behind_it():
    model = tiny_model("Gemma2")
    outputs = recorded(model, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    (c,) = measure(model, some_tokens(), ActivationPropagation(model, BLOCK, block_layers(model)))
    down = outputs["mlp.down_proj"]
    gain = 1 + model.model.layers[0].post_feedforward_layernorm.weight
    into_stream = gain.square() * (1 / down.square().mean(dim=-1)).mean()
    torch.testing.assert_close(c[f"{BLOCK}.mlp.down_proj"], into_stream, rtol=1e-4, atol=0)
    columns = into_stream @ model.model.layers[0].mlp.down_proj.weight.square()
    gelu = functional.gelu(outputs["mlp.gate_proj"], approximate="tanh")
    torch.testing.assert_close(c[f"{BLOCK}.mlp.up_proj"], gelu.square().mean(dim=(0, 1)) * columns, rtol=1e-4, atol=0)


def test_fused_rows_get_the_sensitivity_of_their_role():
    """Phi-3 is a Llama whose matrices are stacked: the same weights give the same sensitivities."""
    fused = tiny_model("Phi3", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-6)
    apart = tiny_model("Llama")
    attention, mlp = fused.model.layers[0].self_attn, fused.model.layers[0].mlp
    state = fused.state_dict()
    for index in (0, 1):
        prefix = f"model.layers.{index}"
        qkv = state.pop(f"{prefix}.self_attn.qkv_proj.weight").split([32, 16, 16])
        gate_up = state.pop(f"{prefix}.mlp.gate_up_proj.weight").chunk(2)
        state |= {f"{prefix}.self_attn.{name}_proj.weight": part for name, part in zip("qkv", qkv, strict=True)}
        state |= {f"{prefix}.mlp.{name}_proj.weight": part for name, part in zip(("gate", "up"), gate_up, strict=True)}
    apart.load_state_dict(state)
    assert (attention.qkv_proj.out_features, mlp.gate_up_proj.out_features) == (64, 56)
    for propagation in (WeightPropagation, ActivationPropagation):
        (one,) = measure(fused, some_tokens(), propagation(fused, BLOCK, block_layers(fused)))
        (several,) = measure(apart, some_tokens(), propagation(apart, BLOCK, block_layers(apart)))
        for name, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            module = name.partition(".")[0]
            stacked = torch.cat([several[f"{BLOCK}.{module}.{part}_proj"] for part in parts])
            torch.testing.assert_close(one[f"{BLOCK}.{name}"], stacked, rtol=1e-4, atol=1e-6)


def test_activation_refuses_clipped_queries():
    model = tiny_model("Olmo", clip_qkv=8.0)
    with pytest.raises(EfxError, match="clip_qkv of OlmoForCausalLM cuts off: use propagation 'block' or 'fisher'"):
        ActivationPropagation(model, BLOCK, block_layers(model))


# -------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_an_expert_counts_its_tokens_by_the_weights_of_the_router(architecture):
    model = tiny_model(architecture)
    experts = model.model.layers[0].mlp.experts
    captured = {}
    experts.register_forward_pre_hook(lambda _m, args: captured.update(args=args))
    propagation = ActivationPropagation(model, BLOCK, block_layers(model))
    (c,) = measure(model, some_tokens(), propagation)
    hidden, chosen, weights = captured["args"]
    for index in range(4):
        expert, name = experts[index], f"{BLOCK}.mlp.experts.{index}"
        moment, share, tokens = torch.zeros(expert.up_proj.out_features), 0.0, 0
        for token, (row, row_weights) in enumerate(zip(chosen, weights, strict=True)):
            for place, weight in zip(row, row_weights, strict=True):
                if place == index:
                    moment += (weight * functional.silu(expert.gate_proj(hidden[token]))).square().detach()
                    share, tokens = share + float(weight) ** 2, tokens + 1
        columns = expert.down_proj.weight.square().sum(dim=0)
        torch.testing.assert_close(c[f"{name}.up_proj"], moment / len(hidden) * columns, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(c[f"{name}.down_proj"], torch.full((32,), share / len(hidden)), rtol=1e-4, atol=0)
        assert propagation.reached()[f"{name}.gate_proj"] == tokens


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_calibrating_all_experts_on_all_tokens_changes_nothing(architecture, top_k, masked):
    """llm-compressor's default passes every token to every expert; only those of the router are counted."""
    tokens = some_tokens()
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    found = []
    for everyone in (False, True):
        model = tiny_model(architecture, num_experts_per_tok=top_k)
        layers = block_layers(model)
        rows, grams = CountedRows(model.model.layers[0], layers, lambda: mask), {}
        rows.attach(register)

        def see(_module, args, _output, name, rows=rows, grams=grams):
            inputs = rows.of(name, args[0])
            grams[name] = (len(inputs), inputs.T @ inputs)

        for layer in layers:
            layer.module.register_forward_hook(functools.partial(see, name=layer.name))
        activation = ActivationPropagation(model, BLOCK, layers, lambda: mask)
        context = moe_calibration_context() if everyone else torch.no_grad()
        with context:
            (c,) = measure(model, tokens, activation)
        found.append((grams, c, activation.reached()))
    (own, own_c, own_reached), (all_of_them, all_c, all_reached) = found
    assert own_reached == all_reached
    routed = 0
    for name, (count, gram) in own.items():
        assert all_of_them[name][0] == count
        torch.testing.assert_close(all_of_them[name][1], gram, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(all_c[name], own_c[name], rtol=1e-4, atol=1e-6)
        routed += count if "experts" in name and "up_proj" in name else 0
    assert routed == top_k * (tokens.numel() if mask is None else int(mask.sum()))


def test_block_sensitivity_of_experts_does_not_depend_on_who_computes_what_for_nothing():
    results = []
    for context in (torch.no_grad(), moe_calibration_context()):
        model = tiny_model("Mixtral")
        propagation = BlockPropagation(model.model.layers[0], block_layers(model))
        with context:
            results.append((*measure(model, some_tokens(), propagation), propagation.reached()))
    (own, own_reached), (everyone, everyone_reached) = results
    assert own_reached == everyone_reached
    for name, c in own.items():
        torch.testing.assert_close(everyone[name], c, rtol=1e-4, atol=1e-7)


def test_an_expert_that_no_token_reaches_is_said_to_be_so():
    model = tiny_model("Mixtral", num_experts_per_tok=1)
    sparse = model.model.layers[0]
    # The router sees the sign of one channel: a positive one goes to expert 0, a negative one to expert 3.
    sparse.post_attention_layernorm.weight.data[1:] = 0
    sparse.mlp.gate.weight.data[:, 0] = torch.tensor([1.0, 0.0, 0.0, -1.0])
    layers = block_layers(model)
    block, activation = BlockPropagation(model.model.layers[0], layers), ActivationPropagation(model, BLOCK, layers)
    for propagation in (block, activation):
        (c,) = measure(model, some_tokens(), propagation)
        reached = propagation.reached()
        assert set(reached) == {layer.name for layer in layers if "experts" in layer.name}
        starved = {name for name, tokens in reached.items() if tokens == 0}
        assert {name.split(".")[5] for name in starved} == {"1", "2"} and len(starved) == 6
        assert all((c[name] == 0).all() for name in starved)
    assert NoPropagation().reached() == WeightPropagation(model, BLOCK, layers).reached() == {}


def test_an_expert_without_tokens_takes_its_sensitivity_from_its_weights():
    model = tiny_model("Qwen3Moe")
    layers = block_layers(model)
    by_weight = WeightPropagation(model, BLOCK, layers).result()
    experts = [layer for layer in layers if "experts" in layer.name]
    assert len(experts) == 12
    for layer in experts:
        torch.testing.assert_close(expert_weight_sensitivity(layer, layers), by_weight[layer.name])
    without_down = [layer for layer in layers if "down_proj" not in layer.name]
    with pytest.raises(EfxError, match=r"experts\.0, and nothing tells what consumes .*experts\.0\.up_proj"):
        expert_weight_sensitivity(experts[0], without_down)


def test_a_batch_without_a_token_that_counts_changes_nothing():
    model, tokens = tiny_model("Qwen3Moe"), some_tokens()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    layers = block_layers(model)
    propagation = ActivationPropagation(model, BLOCK, layers, lambda: mask)
    (before,) = measure(model, tokens, propagation)
    mask = ~mask
    with torch.no_grad():
        model(tokens, use_cache=False)
    after = propagation.result()
    assert all(torch.equal(after[name], c) for name, c in before.items())


def test_rows_that_no_mask_fits_are_refused():
    model = tiny_model("Mixtral")
    rows = CountedRows(model.model.layers[0], block_layers(model), lambda: torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(EfxError, match="reads 7 rows of 10 calibration tokens"):
        rows.of(f"{BLOCK}.mlp.experts.0.up_proj", torch.ones(7, 32))


def test_gains_of_norms_are_read_where_fsdp_shards_them(tmp_path):
    """Outside of forward passes the parameters of a module under FSDP2 are pieces, with which it cannot compute."""
    model = tiny_model("Gemma3")
    layers = block_layers(model)
    expected = WeightPropagation(model, BLOCK, layers).result()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        fully_shard(model.model.layers[0])
        sharded = WeightPropagation(model, BLOCK, block_layers(model)).result()
    finally:
        dist.destroy_process_group()
    for name, c in expected.items():
        torch.testing.assert_close(sharded[name], c)
