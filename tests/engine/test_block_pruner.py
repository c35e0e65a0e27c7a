import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.block_pruner import BlockPruner
from efx_plugin.engine.blocks import PlannedBlock, plan_blocks
from efx_plugin.engine.decide import RunningScores
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import linear_layers
from efx_plugin.model.architectures import block_map
from efx_plugin.model.channels import free_channels
from tests.support.tiny_llama import tiny_llama

BLOCK = "model.layers.1"
SETTINGS = {
    "saliency": "wanda",
    "propagation": "block",
    "comparison_group": "block",
    "allocation": "uniform",
}


def make_pruner(model, token_mask=lambda: None, running=None, sensitivities=None, masks=None, channels=(), **changes):
    layers = [layer for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")]
    pruner = BlockPruner(
        model,
        PlannedBlock(BLOCK, model.get_submodule(BLOCK), layers, []),
        PruningArguments(**(SETTINGS | changes)),
        token_mask=token_mask,
        running=running,
        sensitivities=sensitivities,
        masks=masks,
        channels=channels,
    )
    pruner.attach(lambda module, hook, kind, **kwargs: getattr(module, f"register_{kind}_hook")(hook, **kwargs))
    return pruner


def tokens(seed=0, batch=4, length=32):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def adapted():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.get_base_model().eval()


@torch.no_grad()
def prune(model=None, inputs=None, **changes):
    model = model or tiny_llama()
    pruner = make_pruner(model, **changes)
    model(tokens() if inputs is None else inputs)
    return model, pruner.prune()


def weights(model):
    return {layer.name: layer.base.weight for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")}


FAMILY = [
    point
    for point in itertools.product(
        ["magnitude", "wanda", "obs"],
        ["none", "weight", "activation", "block"],
        ["row", "matrix", "block"],
        ["uniform", "matrix"],
    )
    if point[0] != "obs" or point[2] != "block"
]


@pytest.mark.parametrize(("saliency", "propagation", "group", "allocation"), FAMILY)
def test_every_mask_of_the_family_reaches_its_sparsity_to_a_weight(saliency, propagation, group, allocation):
    arguments = {"saliency": saliency, "propagation": propagation, "comparison_group": group, "allocation": allocation}
    model, results = prune(repair="none", **arguments)
    assert len(results) == 7
    pruned, size = sum(result.zeros for result in results), sum(result.size for result in results)
    rows = sum(len(weight) for weight in weights(model).values())
    assert abs(pruned - round(size / 2)) <= {"row": rows, "matrix": len(results), "block": 0}[group]
    for name, weight in weights(model).items():
        zeros = (weight == 0).float()
        if group == "row":
            assert len(zeros.sum(dim=1).unique()) == 1
        if group != "block" and allocation == "uniform":
            assert abs(int(zeros.sum()) - weight.numel() / 2) <= (1 if group == "matrix" else 0), name
        if saliency != "obs":
            assert (zeros.mean(dim=1) <= 1.4 * 1.4 * 0.5 + 1 / weight.shape[1]).all(), name
    untouched = tiny_llama().model.layers[0].state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in model.model.layers[0].state_dict().items())


@pytest.mark.parametrize("repair", ["paper", "adapter", "weights"])
@pytest.mark.parametrize("saliency", ["wanda", "obs"])
def test_repairs_keep_the_mask_and_report_what_they_gain(saliency, repair):
    changes = {"saliency": saliency, "comparison_group": "matrix"}
    masked, _ = prune(adapted(), repair="none", **changes)
    repaired, results = prune(adapted(), repair=repair, **changes)
    for name, weight in weights(masked).items():
        assert torch.equal(weight == 0, weights(repaired)[name] == 0)
    assert all(0 < result.relative_error < 1 for result in results if result.relative_error is not None)
    if repair != "paper":
        assert all(result.gain >= 0 for result in results)
        assert sum(result.gain for result in results) > 0.05
    assert all(result.gain is None for result in results) == (repair == "paper" and saliency == "wanda")


@pytest.mark.parametrize("changes", [{"comparison_group": "matrix"}, {"mask_structure": "2:4"}, {}])
def test_swaps_lower_the_errors_and_keep_the_counts(changes):
    options = {"repair": "weights"} | changes
    before, without = prune(**options)
    after, swapped = prune(swap_rounds=6, **options)
    for one, other in zip(without, swapped, strict=True):
        assert other.zeros == one.zeros and other.relative_error <= 1.02 * one.relative_error
        rows, others = (weights(model)[one.name] == 0 for model in (before, after))
        assert torch.equal(rows.sum(1), others.sum(1)) and not torch.equal(rows, others)
        if "mask_structure" in changes:
            assert (others.unflatten(1, (-1, 4)).sum(2) == 2).all()
    assert sum(one.relative_error for one in swapped) < 0.99 * sum(one.relative_error for one in without)


def test_masks_that_are_given_are_not_swapped():
    model = tiny_llama()
    masks = {layer.name: torch.rand(layer.base.weight.shape) < 0.5 for layer in linear_layers(model)}
    prune(model, masks=lambda layer: masks[layer.name], repair="weights", swap_rounds=4)
    for name, weight in weights(model).items():
        assert not weight[~masks[name]].any()


@pytest.mark.parametrize("on_meta", [False, True], ids=["with weights", "without"])
@pytest.mark.parametrize("repair", ["paper", "adapter"])
def test_a_repair_of_the_adapter_needs_one(repair, on_meta):
    model, arguments = tiny_llama().to("meta" if on_meta else "cpu"), PruningArguments(repair=repair)
    said = f"repair '{repair}' moves a LoRA adapter and model.layers.0.self_attn.{{}} has none"
    with pytest.raises(EfxError, match=said.format("q_proj")):
        plan_blocks(model, arguments)
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(EfxError, match=said.format("k_proj")):
        plan_blocks(adapter, arguments)
    assert plan_blocks(adapter, arguments.model_copy(update={"targets": "re:.*q_proj"}))


def test_a_mapping_gives_each_layer_its_sparsity():
    by_layer = {"re:.*down_proj": 0.75, "re:.*self_attn.*": 0.25, "Linear": 0.5}
    for allocation in ("uniform", "matrix"):
        model, _ = prune(sparsity=by_layer, comparison_group="matrix", allocation=allocation)
        for group, sparsity in (("down_proj", 0.75), ("self_attn", 0.25), ("gate_proj up_proj", 0.5)):
            some = [weight for name, weight in weights(model).items() if any(part in name for part in group.split())]
            zeros, size = sum(int((weight == 0).sum()) for weight in some), sum(weight.numel() for weight in some)
            assert abs(zeros - sparsity * size) <= len(some)
    with pytest.raises(EfxError, match=r"matches model\.layers\.1\.mlp\.gate_proj: add one"):
        prune(sparsity={"re:.*self_attn.*": 0.5}, comparison_group="matrix")


def test_new_scores_are_averaged_with_those_of_earlier_refreshes():
    """With an old score that speaks against one half of the inputs, that half is pruned first."""
    for changes in ({"comparison_group": "block"}, {"comparison_group": "matrix"}, {"saliency": "obs", **MATRIX}):
        running = RunningScores(0.5)
        model = tiny_llama()
        prune(model, running=running, repair="none", **changes)
        first = {name: weight == 0 for name, weight in weights(model).items()}
        shapes = {weight.shape for weight in weights(model).values()}
        assert {score.shape for score in running.averages.values()} == shapes
        for score in running.averages.values():
            score[:, : score.shape[1] // 2] *= 1e4
        model = tiny_llama()
        prune(model, running=running, repair="none", floor=2.0, **changes)
        for name, weight in weights(model).items():
            half = weight.shape[1] // 2
            assert (weight[:, :half] == 0).float().mean() < first[name][:, :half].float().mean(), name


MATRIX = {"comparison_group": "matrix"}


def test_sensitivities_measured_beforehand_choose_the_rows():
    model = tiny_llama()
    rows = {layer.name: layer.base.out_features for layer in linear_layers(model) if BLOCK in layer.name}
    known = {name: torch.tensor([1e6] * (count // 2) + [1.0] * (count - count // 2)) for name, count in rows.items()}
    prune(model, sensitivities=known, propagation="fisher", comparison_group="matrix", repair="none", floor=2.0)
    for name, weight in weights(model).items():
        assert (weight[: rows[name] // 2] != 0).float().mean() > 0.99
        assert (weight[rows[name] // 2 :] == 0).float().mean() > 0.99


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "obs"])
def test_rows_that_the_loss_does_not_feel_keep_what_the_floor_leaves_them(saliency):
    model = tiny_llama()
    rows = {layer.name: layer.base.out_features for layer in linear_layers(model) if BLOCK in layer.name}
    known = {name: torch.arange(count).ge(count // 4).float() for name, count in rows.items()}
    prune(model, sensitivities=known, propagation="fisher", saliency=saliency, repair="none", **MATRIX)
    for name, weight in weights(model).items():
        assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        assert (weight == 0).sum(dim=1).max() <= math.ceil(1.4 * 0.5 * weight.shape[1]), name


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_structure_in_every_matrix(n, m, saliency):
    model, _ = prune(mask_structure=f"{n}:{m}", sparsity=n / m, saliency=saliency, **MATRIX)
    for weight in weights(model).values():
        assert ((weight.reshape(-1, m) == 0).sum(dim=1) == n).all()


def test_row_masks_ignore_propagation_as_the_algebra_says():
    masks = [weights(prune(comparison_group="row", propagation=p, repair="none")[0]) for p in ("none", "block")]
    for name, weight in masks[0].items():
        assert torch.equal(weight, masks[1][name])


def test_layers_that_read_the_same_tensor_share_their_gram():
    model = tiny_llama()
    pruner = make_pruner(model)
    with torch.no_grad():
        model(tokens(0))
        model(tokens(1))
    evidence = pruner._calibration.finish()
    statistics = {name.rsplit(".", 1)[1]: found.statistics for name, found in evidence.items()}
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


@pytest.mark.parametrize("make", [tiny_llama, adapted], ids=["plain", "with LoRA"])
def test_an_order_of_channels_lowers_the_errors_of_what_reads_them(make):
    options = {"mask_structure": "2:4", "repair": "weights", "saliency": "obs", "comparison_group": "matrix"}

    def prune_in_order(reordered):
        model = make()
        layers = [layer for layer in linear_layers(model) if layer.name.startswith(BLOCK + ".")]
        channels = free_channels(block_map(model, BLOCK, layers)) if reordered else ()
        pruner = make_pruner(model, channels=channels, **options)
        with torch.no_grad():
            model(tokens())
            return model, pruner, {result.name: result for result in pruner.prune()}

    _, before, without = prune_in_order(False)
    model, pruner, ordered = prune_in_order(True)
    read = {f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.mlp.down_proj"}
    written = {f"{BLOCK}.self_attn.v_proj", f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"}
    assert before.reordered == {} and pruner.reordered.keys() == read | written
    for name, one in without.items():
        if name in read:
            assert ordered[name].relative_error < one.relative_error
        else:  # the order of rows changes nothing in the error of a layer
            assert ordered[name].relative_error == pytest.approx(one.relative_error, rel=1e-3)
        assert ordered[name].zeros == one.zeros
    for weight in weights(model).values():
        assert ((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all()
