"""One-shot pipelines: as sparse as asked for, on the same calibration, and stored as they are measured."""

import pytest
import torch

from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate.pipelines import draft
from tests.support.pipeline_task import run, tiny_task

NAMES = ["lora+random", "lora+magnitude", "lora+wanda", "lora+sparsegpt", "lora+expert"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny_task(tmp_path_factory.mktemp("one-shot"))


@pytest.fixture(scope="module")
def dense(task):
    return run(task, "lora").model.state_dict()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_a_pipeline_reaches_its_sparsity_and_keeps_the_rest_of_the_model(task, dense, name, structure):
    result = run(task, name, mask_structure=structure)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    layers = {layer.name: layer.base.weight for layer in linears_in_blocks(result.model)}
    assert [layer["name"] for layer in result.layers] == list(layers)
    for layer in result.layers:
        assert layer["sparsity"] == pytest.approx(float((layers[layer["name"]] == 0).float().mean()))
        assert 0 < layer["damage"] < 1.5
    if structure == "2:4":
        assert all(((w.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all() for w in layers.values())
    for name, value in result.model.state_dict().items():
        assert value.dtype == torch.bfloat16
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(value, dense[name]), name
    # A bit for the mask and half of the values, and the offsets of rows that are short here.
    assert 8 < result.bits_per_weight_stored < 11


def test_random_prunes_the_same_number_of_every_row_and_by_the_seed(task):
    weights = [run(task, "lora+random", sparsity=0.25, seed=seed).model for seed in (0, 0, 1)]
    masks = [torch.cat([(layer.base.weight != 0).flatten() for layer in linears_in_blocks(one)]) for one in weights]
    for layer in linears_in_blocks(weights[0]):
        zeros = (layer.base.weight == 0).sum(dim=1)
        assert (zeros == round(0.25 * layer.base.in_features)).all()
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_what_is_kept_by_magnitude_and_wanda_is_the_dense_weight(task, dense):
    for name in ("lora+random", "lora+magnitude", "lora+wanda"):
        for layer in linears_in_blocks(run(task, name).model):
            weight = layer.base.weight
            assert torch.equal(weight, dense[f"{layer.name}.weight"] * (weight != 0))


def test_all_are_calibrated_on_the_same_tokens(task, monkeypatch):
    seen = []
    original = draft.oneshot

    def oneshot(**arguments):
        seen.append((arguments["dataset"]["input_ids"], arguments["max_seq_length"]))
        return original(**arguments)

    monkeypatch.setattr(draft, "oneshot", oneshot)
    for name in ("lora+wanda", "lora+sparsegpt", "lora+expert", "lora+w8a16"):
        run(task, name)
    assert all(one == (task.calibration.tolist(), 32) for one in seen) and len(seen) == 4


def test_the_expert_takes_the_modifiers_arguments_and_says_so_of_others(task):
    masked = run(task, "lora+expert", arguments={"repair": "none"})
    repaired = run(task, "lora+expert")
    assert sum(one["damage"] for one in repaired.layers) < sum(one["damage"] for one in masked.layers)
    with pytest.raises(EfxError, match="no argument 'repairs'"):
        run(task, "lora+expert", arguments={"repairs": "none"})
    with pytest.raises(UsageError, match="no argument 'rate'"):
        run(task, "lora+wanda", arguments={"rate": 1})


def test_damage_is_that_of_channels_in_the_same_order(task):
    options = {"mask_structure": "2:4", "seed": 0}
    before = run(task, "lora+expert", **options)
    ordered = run(task, "lora+expert", arguments={"channel_permutation": True}, **options)
    others = {layer["name"]: layer["damage"] for layer in before.layers}
    for layer in ordered.layers:  # against rows or columns in another order it would be above 1
        assert 0 < layer["damage"] < 2 * others[layer["name"]] < 1, layer["name"]


def test_a_missing_adapter_is_named(task):
    with pytest.raises(EfxError, match="there is none"):
        run(task, "lora+wanda", adapter=None)


def test_the_output_layer_is_no_target(task):
    assert draft.Draft.load(task, adapted=False).ignored() == [r"re:lm_head\.?$"]
