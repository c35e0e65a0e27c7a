import dataclasses

import pytest
import torch

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import linear_layers
from efx_plugin.model.pruner import BlockPruner, PruningSettings
from integration.assets import tiny_llama

BLOCK = "model.layers.1"
SETTINGS = PruningSettings(
    sparsity=0.5,
    n_of_m=None,
    saliency="wanda",
    propagation="block",
    comparison_group="block",
    floor=1.4,
    repair="weights",
    repair_steps=10,
    dampening_frac=0.01,
    propagation_tokens=4096,
    seed=0,
)


def make_pruner(model, token_mask=lambda: None, **changes):
    layers = [layer for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")]
    settings = dataclasses.replace(SETTINGS, **changes)
    pruner = BlockPruner(model, BLOCK, model.model.layers[1], layers, [], settings, token_mask)
    pruner.attach(lambda module, hook, kind, **kwargs: getattr(module, f"register_{kind}_hook")(hook, **kwargs))
    return pruner


def tokens(seed=0, batch=4, length=32):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def prune(model=None, inputs=None, **changes):
    model = model or tiny_llama()
    pruner = make_pruner(model, **changes)
    model(tokens() if inputs is None else inputs)
    return model, pruner.prune()


def weights(model):
    return {layer.name: layer.base.weight for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")}


@pytest.mark.parametrize("saliency", ["magnitude", "wanda"])
@pytest.mark.parametrize("propagation", ["none", "activation", "block"])
@pytest.mark.parametrize("group", ["row", "matrix", "block"])
@pytest.mark.parametrize("repair", ["none", "weights"])
def test_every_point_of_the_family_reaches_its_sparsity(saliency, propagation, group, repair):
    model, results = prune(saliency=saliency, propagation=propagation, comparison_group=group, repair=repair)
    assert len(results) == 7
    total = sum(result.size for result in results)
    assert abs(sum(result.zeros for result in results) / total - 0.5) < 1e-3
    for name, weight in weights(model).items():
        zeros = (weight == 0).float()
        if group == "row":
            assert (zeros.sum(dim=1) == round(0.5 * weight.shape[1])).all()
        if group == "matrix":
            assert abs(zeros.mean() - 0.5) < 1e-3
        assert (zeros.mean(dim=1) <= 1.4 * 0.5 + 1 / weight.shape[1]).all(), name
    untouched = tiny_llama().model.layers[0].state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in model.model.layers[0].state_dict().items())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_structure_in_every_matrix(n, m):
    model, _ = prune(n_of_m=(n, m), sparsity=n / m)
    for weight in weights(model).values():
        assert ((weight.reshape(-1, m) == 0).sum(dim=1) == n).all()


def test_row_masks_ignore_propagation_as_the_algebra_says():
    masks = [weights(prune(comparison_group="row", propagation=p, repair="none")[0]) for p in ("none", "block")]
    for name, weight in masks[0].items():
        assert torch.equal(weight, masks[1][name])


def test_repair_lowers_the_reported_error_and_keeps_the_mask():
    masked, _ = prune(repair="none")
    repaired, results = prune(repair="weights")
    for name, weight in weights(masked).items():
        assert torch.equal(weight == 0, weights(repaired)[name] == 0)
    assert all(0 < result.relative_error < 1 for result in results)


def test_layers_that_read_the_same_tensor_share_their_gram():
    model = tiny_llama()
    pruner = make_pruner(model)
    with torch.no_grad():
        model(tokens(0))
        model(tokens(1))
    statistics = {name.rsplit(".", 1)[1]: value for name, value in pruner._statistics.items()}
    assert statistics["q_proj"] is statistics["k_proj"] is statistics["v_proj"]
    assert statistics["gate_proj"] is statistics["up_proj"]
    assert len({id(value) for value in statistics.values()}) == 4
    assert all(value.count == 2 * 4 * 32 for value in statistics.values())


@pytest.mark.parametrize("propagation", ["none", "activation"])
def test_a_token_mask_calibrates_on_those_tokens_only(propagation):
    """Causal attention: tokens after the mask cannot reach the ones before, so cutting them is the same."""
    inputs = tokens()
    mask = torch.zeros_like(inputs, dtype=torch.bool)
    mask[:, :20] = True
    changes = {"propagation": propagation, "comparison_group": "matrix"}
    cut, _ = prune(inputs=inputs[:, :20], **changes)
    masked, _ = prune(inputs=inputs, token_mask=lambda: mask, **changes)
    for name, weight in weights(cut).items():
        assert ((weights(masked)[name] == 0) == (weight == 0)).float().mean() > 0.998


def test_the_same_seed_prunes_the_same():
    first, second = prune()[0], prune()[0]
    assert all(torch.equal(weight, weights(second)[name]) for name, weight in weights(first).items())


def test_a_layer_without_data_or_with_nan_inputs_is_refused_before_anything_changes():
    model = tiny_llama()
    with pytest.raises(EfxError, match=r"layers\.1\.self_attn\.q_proj saw no calibration data"):
        make_pruner(model).prune()
    model.model.layers[0].mlp.down_proj.weight.data[3, 4] = float("nan")
    before = {name: weight.clone() for name, weight in weights(model).items()}
    with pytest.raises(EfxError, match=r"layers\.1\.self_attn\.q_proj contain NaN"):
        prune(model, repair="none", propagation="none")
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
