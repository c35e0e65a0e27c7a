"""Mixtures of experts through the engine: experts count the tokens they get, and starved ones fall back."""

from contextlib import nullcontext

import pytest
import torch
from llmcompressor.modeling.moe.context import moe_calibration_context
from loguru import logger

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.block_pruner import BlockPruner
from efx_plugin.engine.blocks import PlannedBlock
from efx_plugin.model.adapters import linear_layers
from tests.support.tiny_models import tiny_model

BLOCK = "model.layers.0"

COMBINATIONS = {
    "default": {},
    "block": {"saliency": "wanda", "propagation": "block", "comparison_group": "block", "allocation": "uniform"},
    "activation": {"propagation": "activation"},
    "weight": {"propagation": "weight", "allocation": "uniform"},
    "magnitude": {"saliency": "magnitude", "propagation": "none", "allocation": "uniform", "repair": "none"},
    "row": {"comparison_group": "row", "allocation": "uniform"},
    "2:4": {"mask_structure": "2:4"},
}


def prune(model, everyone=False, **arguments):
    """Weights and results of a block, and the warnings about experts."""
    layers = [layer for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")]
    pruner = BlockPruner(model, PlannedBlock(BLOCK, model.model.layers[0], layers, []), PruningArguments(**arguments))
    pruner.attach(lambda module, hook, kind, **kwargs: getattr(module, f"register_{kind}_hook")(hook, **kwargs))
    lines = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    tokens = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), moe_calibration_context() if everyone else nullcontext():
        model(tokens, use_cache=False)
    results = pruner.prune()
    logger.remove(sink)
    weights = {layer.name: layer.base.weight for layer in layers}
    return weights, results, [str(line) for line in lines if "experts of" in line]


def sparsity(results):
    return sum(result.zeros for result in results) / sum(result.size for result in results)


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_calibrating_all_experts_on_all_tokens_prunes_the_same(architecture, name):
    own, results, warnings = prune(tiny_model(architecture), **COMBINATIONS[name])
    assert not warnings
    assert abs(sparsity(results) - 0.5) < 2e-3
    everyone, _, _ = prune(tiny_model(architecture), everyone=True, **COMBINATIONS[name])
    for layer, weight in own.items():  # up to sums in another order
        assert ((weight == 0) == (everyone[layer] == 0)).float().mean() > 0.995, layer


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("everyone", [False, True])
def test_starved_experts_are_pruned_by_their_weights_with_a_warning(name, everyone):
    model = tiny_model("Mixtral", num_experts_per_tok=1)
    sparse = model.model.layers[0]
    # The router sees the sign of one channel: a positive one goes to expert 0, a negative one to expert 3.
    sparse.post_attention_layernorm.weight.data[1:] = 0
    sparse.mlp.gate.weight.data[:, 0] = torch.tensor([1.0, 0.0, 0.0, -1.0])
    before = {layer.name: layer.base.weight.clone() for layer in linear_layers(model)}
    weights, results, warnings = prune(model, everyone, **COMBINATIONS[name])
    assert len(warnings) == 1 and "fewer than 32 calibration tokens reach 2 of the 4 experts" in warnings[0]
    assert abs(sparsity(results) - 0.5) < 2e-3
    starved = [result for result in results if ".experts.1." in result.name or ".experts.2." in result.name]
    assert len(starved) == 6
    for result in starved:
        weight = weights[result.name]
        assert abs(result.sparsity - 0.5) < 0.01 and result.relative_error is None
        assert torch.equal(weight, before[result.name] * (weight != 0))  # masked, not repaired
