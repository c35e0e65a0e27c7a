"""Quantized pipelines: few values in a group, the bits of a real checkpoint, and pruned weights that stay zero."""

import pytest
import torch

from efx_plugin.checkpoint import load_sparse
from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.errors import EfxError
from tests.support.pipeline_task import run, tiny_task

# Bits of a weight, and its groups by the inputs of a layer; none for whole rows.
PRECISIONS = {
    "lora+w8a8": (8, {}),
    "lora+w8a16": (8, {}),
    "lora+w4a16": (4, {32: 32, 48: 16}),
    "lora+w3": (3, {32: 32, 48: 16}),
    "lora+expert+w8": (8, {}),
    "lora+expert+w4": (4, {32: 32, 64: 64}),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny_task(tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="module")
def even_task(tmp_path_factory):
    """Of a model whose layers have inputs that a group of the modifier divides."""
    return tiny_task(tmp_path_factory.mktemp("even"), intermediate_size=64)


@pytest.fixture(scope="module")
def results(task, even_task):
    return {name: run(even_task if "expert" in name else task, name) for name in PRECISIONS}


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_group_has_no_more_values_than_its_bits_spell(results, name):
    bits, groups = PRECISIONS[name]
    several = False
    for layer in linears_in_blocks(results[name].model):
        weight = layer.base.weight.detach()
        group = groups.get(weight.shape[1], weight.shape[1])
        values = [len(part.unique()) for part in weight.reshape(-1, group)]
        assert max(values) <= 2**bits
        several |= max(values) > 2 ** (bits - 1) or bits == 8
    assert several


@pytest.mark.parametrize("name", ["lora+w8a8", "lora+w8a16", "lora+w4a16", "lora+w3"])
def test_more_bits_do_less_damage_and_nothing_counts_as_pruned(results, name):
    result = results[name]
    finer = {"lora+w3": "lora+w4a16", "lora+w4a16": "lora+w8a16"}.get(name, name)
    damage = {one: sum(layer["damage"] for layer in results[one].layers) for one in (name, finer)}
    assert 0 < damage[finer] <= damage[name]
    assert result.sparsity == 0 and all(layer["sparsity"] == 0 for layer in result.layers)


@pytest.mark.parametrize("name", ["lora+w8a8", "lora+w8a16", "lora+w4a16", "lora+w3", "lora+expert+w4"])
def test_bits_are_those_of_values_and_scales(results, name):
    bits, groups = PRECISIONS[name]
    total = weights = 0
    for layer in linears_in_blocks(results[name].model):
        rows, columns = layer.base.weight.shape
        group = groups.get(columns, columns)
        # A packed row takes whole words, and its shape two numbers of eight bytes.
        packed = 32 * -(-columns * bits // 32) if name != "lora+w8a8" else 8 * columns
        total += rows * (packed + 16 * columns // group) + (0 if name == "lora+w8a8" else 128)
        weights += rows * columns
    assert results[name].bits_per_weight_stored == pytest.approx(total / weights)
    if name != "lora+expert+w4":  # the zeros of which are left out where it is served
        assert results[name].bits_per_weight_served == results[name].bits_per_weight_stored


def test_a_sparse_format_takes_eight_bits_and_none_takes_four(results, even_task):
    assert results["lora+expert+w4"].bits_per_weight_stored == run(even_task, "lora+w4a16").bits_per_weight_stored
    assert results["lora+expert+w8"].bits_per_weight_stored < run(even_task, "lora+w8a16").bits_per_weight_stored


@pytest.mark.parametrize("name", ["lora+expert+w8", "lora+expert+w4"])
def test_what_is_pruned_stays_zero(results, name):
    assert results[name].sparsity == pytest.approx(0.5, abs=0.01)
    weights = {layer.name: layer.base.weight for layer in linears_in_blocks(results[name].model)}
    for layer in results[name].layers:
        weight = weights[layer["name"]]
        assert int((weight == 0).sum()) / weight.numel() >= layer["sparsity"] > 0.1


def test_a_sparse_and_quantized_model_is_measured_as_it_is_stored(even_task, tmp_path):
    model = run(even_task, "lora+expert+w8", output=tmp_path).model
    stored = load_sparse(tmp_path / "checkpoint").state_dict()
    for layer in linears_in_blocks(model):
        assert torch.equal(layer.base.weight.bfloat16(), stored[f"{layer.name}.weight"])


def test_activations_are_rounded_where_the_name_says_so(task, results):
    rounded, exact = (results[name].model for name in ("lora+w8a8", "lora+w8a16"))
    tokens = task.calibration[:1]
    weights = exact.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in rounded.state_dict().items())
    error = (rounded(tokens).logits - exact(tokens).logits).norm() / exact(tokens).logits.norm()
    assert 1e-4 < error < 0.05
    assert any("activations" in note for note in results["lora+w8a8"].notes)


def test_a_group_that_fits_is_taken_as_it_is(task):
    result = run(task, "lora+w3", arguments={"group": 16})
    assert not any("divide" in note for note in result.notes) and "simulated" in result.notes[0]


def test_inputs_that_no_group_of_the_modifier_divides_end_in_a_sentence(task):
    with pytest.raises(EfxError, match=r"none divides the 48 inputs of .*down_proj: add it to ignore, or choose W8A16"):
        run(task, "lora+expert+w4")
