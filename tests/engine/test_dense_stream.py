import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from efx_plugin.engine import block_pruner
from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.block_pruner import store_in_base
from efx_plugin.engine.blocks import decoder_blocks, plan_blocks
from efx_plugin.engine.dense_stream import DenseStream, obstacle_to_dense_stream
from efx_plugin.engine.sequential import Batch, prune_in_sequence
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import inner_model, linear_layers
from efx_plugin.model.experts import expert_places
from tests.support.tiny_llama import tiny_llama
from tests.support.tiny_models import tiny_model

ARGUMENTS = PruningArguments(
    saliency="wanda", propagation="block", allocation="uniform", repair="weights", dense_targets=1.0
)


def batch(seed, used=None):
    """Random tokens, of which those from `used` on are padding."""
    ids = torch.randint(3, 64, (3, 32), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[:, used:] = 0 if used is not None else 1
    return Batch({"input_ids": ids, "attention_mask": mask}, mask.bool())


BATCHES = [batch(0), batch(1, used=28), batch(2)]


@pytest.fixture
def found(monkeypatch):
    """Statistics, weights, masks and repaired weights of every layer that has been decided on, by name."""
    kept = {}

    def spy(arguments, name, weight, keep, evidence, *others):
        decision = decide(arguments, name, weight, keep, evidence, *others)
        kept[name] = (copy.deepcopy(evidence.statistics), weight, keep, decision.weight)
        return decision

    decide = block_pruner.decide
    monkeypatch.setattr(block_pruner, "decide", spy)
    return kept


def prune(model, arguments=ARGUMENTS, batches=BATCHES):
    return prune_in_sequence(model, plan_blocks(model, arguments), arguments, batches, store=store_in_base)


@torch.no_grad()
def inputs_of(model, batches=BATCHES):
    """What every linear layer reads of the tokens that count, float64 [tokens, in] by name."""
    rows, mask, handles = {}, None, []
    for layer in linear_layers(model):

        def see(_module, args, _output, name=layer.name):
            if args[0].shape[:2] == mask.shape:
                rows.setdefault(name, []).append(args[0][mask].double())

        handles.append(layer.module.register_forward_hook(see))
    for one in batches:
        mask = one.mask
        model(**one.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def adapted():
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_llama(num_hidden_layers=4), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.eval()


MODELS = {
    "Llama": lambda: tiny_model("Llama", num_hidden_layers=4),
    "Gemma3": lambda: tiny_model(
        "Gemma3", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "Qwen3Moe": lambda: tiny_model("Qwen3Moe", num_hidden_layers=4),
    "with adapters": adapted,
}


@pytest.mark.parametrize("left_alone", [[], ["re:.*layers[.]1[.].*"], ["re:.*layers[.]0[.].*"]], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_drifts_are_those_between_the_residual_streams_of_the_dense_model_and_of_the_pruned_one(
    make, left_alone, found
):
    arguments = ARGUMENTS.model_copy(update={"ignore": ["lm_head", *left_alone]})
    model = make()
    dense = inputs_of(copy.deepcopy(model))
    plans = plan_blocks(model, arguments)
    others = {name for plan in plans for name in expert_places(plan.block, plan.layers)}
    others |= {layer.name for plan in plans for layer in plan.layers if layer.name.endswith(("o_proj", "down_proj"))}
    pruned_before = copy.deepcopy(model)  # pruned block by block below, as far as the engine had come
    prune(model, arguments)
    final = {layer.name: layer.base.weight for layer in linear_layers(model)}
    for index, plan in enumerate(plans):
        sparse = inputs_of(pruned_before)
        for layer in plan.layers:
            drift = found[layer.name][0].drift if found[layer.name][0] is not None else None
            if index == 0 or layer.name in others:
                assert drift is None, layer.name
                continue
            x, other = sparse[layer.name], dense[layer.name]
            expected = (other - x).T @ x / len(x)
            scale = float(expected.abs().max())
            assert scale > 0
            torch.testing.assert_close(drift.double(), expected, rtol=1e-3, atol=1e-4 * scale, msg=layer.name)
        for layer in linear_layers(pruned_before):
            if layer.name.startswith(plan.name + "."):
                layer.base.weight.data.copy_(final[layer.name])
                for name in getattr(layer.module, "lora_B", {}):
                    layer.module.lora_B[name].weight.data.zero_()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_repair_comes_nearer_to_the_outputs_of_the_dense_model(share, found):
    model = tiny_llama(num_hidden_layers=3)
    dense = inputs_of(copy.deepcopy(model))
    before = copy.deepcopy(model)
    prune(model, ARGUMENTS.model_copy(update={"dense_targets": share}))
    sparse = [inputs_of(before)]
    for block in range(2):
        for layer in linear_layers(before):
            if layer.name.startswith(f"model.layers.{block}."):
                layer.base.weight.data.copy_(found[layer.name][3])
        sparse.append(inputs_of(before))
    errors = {"masked": 0.0, "repaired": 0.0}
    for name, (_, weight, keep, repaired) in found.items():
        x = sparse[int(name.split(".")[2])][name]
        drifts = not name.endswith(("o_proj", "down_proj"))
        target = (x + drifts * share * (dense[name] - x)) @ weight.double().T
        masked_error = (target - x @ (weight * keep).double().T).square().mean(dim=0)
        error = (target - x @ repaired.double().T).square().mean(dim=0)
        assert (repaired[~keep] == 0).all()
        assert (error <= masked_error * (1 + 1e-5) + 1e-9).all(), name
        errors["masked"] += float(masked_error.sum())
        errors["repaired"] += float(error.sum())
    assert errors["repaired"] < 0.9 * errors["masked"]


@pytest.mark.parametrize(("share", "passes"), [(0.0, [2, 2, 1]), (0.5, [2, 3, 2])])
def test_the_dense_model_computes_once_per_batch_and_only_behind_a_pruned_block(share, passes):
    model = tiny_llama(num_hidden_layers=3)
    calls = [0, 0, 0]

    def count(index, *_):
        calls[index] += 1

    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(partial(count, index))
    prune(model, ARGUMENTS.model_copy(update={"dense_targets": share, "propagation": "none"}))
    looked = [1, 0, 0]  # at what blocks return
    assert calls == [one * len(BATCHES) + look for one, look in zip(passes, looked, strict=True)]


def test_nothing_of_it_stays_on_the_model():
    model = tiny_llama(num_hidden_layers=3)
    prune(model, ARGUMENTS.model_copy(update={"ignore": ["lm_head", "re:.*layers[.]1[.].*"]}))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_of_others_stand_still_while_the_dense_model_computes():
    model, silenced, passes = tiny_llama(num_hidden_layers=2), [], []

    @contextmanager
    def silence():
        silenced.append(True)
        yield
        silenced.pop()

    stream = DenseStream(decoder_blocks(model), ["model.layers.0", "model.layers.1"], silence)
    for name, block in decoder_blocks(model).items():
        block.mlp.register_forward_hook(lambda *_, name=name: passes.append((name, stream.running, bool(silenced))))
        block.register_forward_hook(partial(stream.advance, name), with_kwargs=True)
    with torch.no_grad():
        model(**BATCHES[0].inputs, use_cache=False)
        assert passes == [(name, False, False) for name in decoder_blocks(model)]
        stream.parted = True
        model(**BATCHES[0].inputs, use_cache=False)
    assert passes[2:] == [(name, dense, dense) for name in decoder_blocks(model) for dense in (False, True)]


def test_batches_that_come_otherwise_than_to_the_block_before_are_refused():
    model = tiny_llama(num_hidden_layers=2)
    names = list(decoder_blocks(model))
    stream = DenseStream(decoder_blocks(model), names)
    block, hidden = decoder_blocks(model)[names[1]], torch.randn(1, 4, 64)
    with pytest.raises(EfxError, match=r"layers\.1 gets other calibration batches than the decoder block before it"):
        stream.advance(names[1], block, (hidden,), {}, hidden)
    stream.advance(names[0], block, (hidden,), {}, hidden)
    with pytest.raises(EfxError, match="set dense_targets to 0"):
        stream.advance(names[1], block, (hidden[:, :3],), {}, hidden)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_of_transformers_pass_hidden_states_from_block_to_block(make):
    model = inner_model(make())
    assert obstacle_to_dense_stream(model, decoder_blocks(model), BATCHES[0].inputs) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Stack(torch.nn.Module):
    """Two blocks, with a number added in between, called in an order."""

    def __init__(self, between=0.0, order=(0, 1)):
        super().__init__()
        self.embedding, self.between, self.order = torch.nn.Embedding(64, 8), between, order
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])

    def forward(self, input_ids, use_cache):
        hidden = self.embedding(input_ids)
        for index in self.order:
            hidden = self.layers[index](hidden) + self.between
        return hidden


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Stack(), None),
        (Stack(between=1.0), "Stack changes the hidden states before layers.1"),
        (Stack(order=(1, 0)), "Stack does not call its decoder blocks once each and in order"),
        (Stack(order=(0, 1, 1)), "Stack does not call its decoder blocks once each and in order"),
        (Stack(order=(0,)), "Stack does not call its decoder blocks once each and in order"),
    ],
)
def test_models_whose_hidden_states_cannot_be_followed_are_told_apart(model, sentence):
    blocks = {f"layers.{index}": block for index, block in enumerate(model.layers)}
    assert obstacle_to_dense_stream(model, blocks, BATCHES[0].inputs) == sentence
