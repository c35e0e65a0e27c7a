import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.block_pruner import BlockPruner, store_in_base
from efx_plugin.engine.blocks import plan_blocks
from efx_plugin.engine.sequential import Batch, prune_in_sequence
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import linear_layers
from tests.support.tiny_llama import tiny_llama
from tests.support.tiny_models import tiny_model

ARGUMENTS = PruningArguments(saliency="wanda", propagation="block", allocation="uniform", repair="weights")


def batch(seed=0, rows=3, length=32, vocabulary=128, used=None):
    """Random tokens, of which those from `used` on are padding."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[:, used:] = 0 if used is not None else 1
    return Batch({"input_ids": ids, "attention_mask": mask}, mask.bool())


def prune(model, batches, arguments=ARGUMENTS, store=store_in_base, **options):
    return prune_in_sequence(model, plan_blocks(model, arguments), arguments, batches, store=store, **options)


def weights(model):
    return {layer.name: layer.base.weight for layer in linear_layers(model)}


@torch.no_grad()
def prune_one_block_per_pass(model, batches, arguments):
    """What the sequence is: whole passes over the model, one for each block to prune."""
    for plan in plan_blocks(model, arguments):
        current = {}
        pruner = BlockPruner(
            model,
            plan,
            arguments,
            token_mask=lambda: current["mask"],  # noqa: B023
        )
        handles = []
        pruner.attach(lambda m, hook, kind, **kw: handles.append(getattr(m, f"register_{kind}_hook")(hook, **kw)))  # noqa: B023
        for one in batches:
            current["mask"] = one.mask
            model(**one.inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        pruner.prune()


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3", "Qwen3Moe"])
def test_it_equals_a_pass_over_the_whole_model_for_each_block(architecture):
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if architecture == "Gemma3" else {}
    model = tiny_model(architecture, num_hidden_layers=4, **kinds)
    twin = copy.deepcopy(model)
    batches = [batch(seed, vocabulary=64, used=28 if seed else None) for seed in range(3)]
    arguments = ARGUMENTS.model_copy(update={"ignore": ["lm_head", "re:.*layers[.]1[.].*"]})
    results = prune(model, batches, arguments)
    prune_one_block_per_pass(twin, batches, arguments)
    for name, weight in weights(twin).items():
        torch.testing.assert_close(weights(model)[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert {result.name for result in results} == {
        layer.name for plan in plan_blocks(twin, arguments) for layer in plan.layers
    }


def test_the_model_comes_back_as_it_was():
    model = get_peft_model(
        tiny_llama(attention_dropout=0.5), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    )
    model.train()
    model.base_model.model.model.layers[1].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    some = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    some.grad = torch.ones_like(some)

    def draws():
        return torch.rand(()).item(), random.random(), np.random.rand()

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    expected = draws()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    prune(model, [batch()], store=lambda layer, decision: (random.random(), np.random.rand(), torch.rand(())))
    assert draws() == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert torch.equal(some.grad, torch.ones_like(some))
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    assert not any(module._forward_hooks for name, module in model.named_modules() if "layers" in name)
    assert not any("forward" in vars(module) for module in model.modules())


def test_each_block_computes_twice_per_batch_and_logits_are_not_asked_for():
    model = tiny_llama(num_hidden_layers=3)
    calls = {"blocks": [0, 0, 0], "logits": 0}

    def count(index):
        calls["blocks"][index] += 1

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: count(index))
    model.lm_head.register_forward_hook(
        lambda _module, args, _output: calls.update(logits=calls["logits"] + args[0].shape[1])
    )
    prune(model, [batch(0), batch(1)], ARGUMENTS.model_copy(update={"propagation": "none"}))
    assert calls["blocks"] == [2 * 2 + 1, 2 * 2, 2]  # one to see what blocks return; none behind the last
    assert calls["logits"] == 2


def test_blocks_compute_in_the_precision_of_training():
    model = tiny_llama()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # as accelerate does
    dtypes = set()
    for name in ("q_proj", "o_proj"):
        getattr(model.model.layers[1].self_attn, name).register_forward_hook(
            lambda _module, _args, output: dtypes.add(output.dtype)
        )
    prune(model, [batch()])
    assert dtypes == {torch.bfloat16}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden_states, scale):
        return hidden_states + scale * self.linear(hidden_states), None


class TupleModel(nn.Module):
    """Blocks that return tuples and are called by keyword."""

    _no_split_modules = ("Block",)

    def __init__(self, between=0.0):
        super().__init__()
        self.embedding, self.between = nn.Embedding(128, 16), between
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids, use_cache=None):
        hidden = self.embedding(input_ids)
        for index, block in enumerate(self.layers):
            hidden = block(hidden_states=hidden + index * self.between, scale=0.5)[0]
        return hidden


def test_blocks_may_return_tuples_and_be_called_by_keyword():
    torch.manual_seed(0)
    model = TupleModel()
    inputs = []
    model.layers[1].linear.register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    one = batch(rows=4)
    one = Batch({"input_ids": one.inputs["input_ids"]}, one.mask)
    prune(model, [one], ARGUMENTS.model_copy(update={"propagation": "none"}))
    with torch.no_grad():
        expected = model.layers[0](model.embedding(one.inputs["input_ids"]), 0.5)[0]
    assert torch.equal(inputs[0], expected)
    assert (model.layers[1].linear.weight == 0).float().mean() == 0.5


def test_a_model_that_computes_between_its_blocks_is_refused():
    one = batch()
    with pytest.raises(EfxError, match=r"TupleModel changes the hidden states before layers\.1"):
        prune(TupleModel(between=1.0), [Batch({"input_ids": one.inputs["input_ids"]}, one.mask)])
