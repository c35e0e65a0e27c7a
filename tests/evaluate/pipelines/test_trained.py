"""Trained pipelines: the same tokens and rates for all, as sparse as asked for, and better for their training."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.engine.decide import RunningScores
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate.pipelines import as_released, trained, training
from efx_plugin.evaluate.pipelines.draft import Draft
from efx_plugin.evaluate.pipelines.one_shot import wanda_modifier
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from efx_plugin.model.adapters import effective_weight
from tests.support.pipeline_task import run, tiny_task

NAMES = ["wanda+masked-lora", "sparsegpt+masked-lora", "published", "as-released", "expert"]
RATES = {"learning_rates": [1e-2], "batch_size": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny_task(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def results(task):
    return {name: run(task, name, arguments=RATES) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_reaches_its_sparsity_in_a_plain_model(results, name):
    result = results[name]
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    assert all(type(layer.module) is torch.nn.Linear for layer in linears_in_blocks(result.model))
    assert {value.dtype for value in result.model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_training_helps(task, results, name):
    base = training.validation_loss(run(task, "base").model, task.validation)
    assert training.validation_loss(results[name].model, task.validation) < base - 0.1


@pytest.mark.parametrize("name", ["wanda+masked-lora", "as-released", "expert"])
def test_a_structure_is_kept(task, name):
    result = run(task, name, mask_structure="2:4", arguments=RATES)
    for layer in linears_in_blocks(result.model):
        assert ((layer.base.weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_all_train_on_the_same_tokens_and_say_so(results, name):
    assert any("trained on 1,376 tokens" in note and "160 of other documents" in note for note in results[name].notes)


def test_lora_under_a_mask_keeps_every_zero_and_moves_the_rest(task, results):
    pruned = Draft.load(task, adapted=False)
    pruned.calibrate(wanda_modifier(pruned))
    learned = {layer.name: layer.base.weight for layer in linears_in_blocks(results["wanda+masked-lora"].model)}
    for layer in pruned.targets:
        assert torch.equal(learned[layer.name] != 0, layer.base.weight != 0)
        assert not torch.equal(learned[layer.name], layer.base.weight.bfloat16())


def test_the_rate_is_chosen_on_what_was_not_trained_on(task, results):
    result = run(task, "wanda+masked-lora", arguments=RATES | {"learning_rates": [1e-6, 1e-2, 10.0]})
    assert "with the learning rate 0.01" in result.notes[-1]
    states = [one.model.state_dict() for one in (result, results["wanda+masked-lora"])]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_rate_at_the_end_of_the_range_is_noted(task, tmp_path):
    def make(rate):
        draft = Draft.load(task, adapted=True)
        draft.merge()
        for layer in draft.targets:
            layer.base.weight.data[:, ::2] = 0
            layer.base.weight.data *= rate
        return draft

    result = training.best_of_rates(replace(task, output=tmp_path, arguments={"learning_rates": [1.0, 100.0]}), make)
    assert "an end of the range" in result.notes[-1]


def test_the_published_schedule_repairs_every_mask_but_the_last(task, monkeypatch):
    repairs = []
    original = trained.EfficientXpertCallback._prune

    def prune(self, *arguments, **options):
        repairs.append(self.arguments.repair)
        return original(self, *arguments, **options)

    monkeypatch.setattr(trained.EfficientXpertCallback, "_prune", prune)
    run(task, "published", arguments=RATES)
    assert repairs == ["paper", "paper", "none"]


def attention_adapter(task, folder):
    """An adapter that is on q and v alone, as many are."""
    model = PIPELINES["base"].run(task).model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_on_some_layers_alone_is_trained_and_all_are_pruned(task, tmp_path, name):
    result = run(task, name, adapter=attention_adapter(task, tmp_path / "adapter"), arguments=RATES)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    assert all(layer["sparsity"] > 0.1 for layer in result.layers)
    assert any("10 of the 14 layers have no adapter" in note for note in result.notes) == (name == "published")


def test_the_published_repair_moves_adapters_and_leaves_other_layers_alone(task, tmp_path, monkeypatch):
    repaired = {}
    original = trained.EfficientXpertCallback._store

    def store(self, optimizer, layer, decision):
        if self.arguments.repair == "paper":
            kept = effective_weight(layer) * decision.keep
            repaired.setdefault(layer.name.rpartition(".")[2], []).append(not torch.equal(decision.weight, kept))
        return original(self, optimizer, layer, decision)

    monkeypatch.setattr(trained.EfficientXpertCallback, "_store", store)
    run(task, "published", adapter=attention_adapter(task, tmp_path / "adapter"), arguments=RATES)
    assert all(len(moved) == 4 and set(moved) == {name in ("q_proj", "v_proj")} for name, moved in repaired.items())
    assert len(repaired) == 7


def test_the_released_factor_varies_along_a_row_of_q_k_gate_and_up(task):
    draft = Draft.load(task, adapted=False)
    scores = as_released._ReleasedScores(draft.network)
    weights = {layer.name: effective_weight(layer) for layer in draft.targets}
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    heads, kv_heads, size = 4, 2, 8
    for head in range(heads):
        keys = weights[f"{attention}.k_proj"].view(kv_heads, size, -1)[head // 2]
        found = scores._factor(f"{attention}.q_proj")[head * size : (head + 1) * size]
        torch.testing.assert_close(found, keys.norm(dim=0).expand(size, -1))
    queries = weights[f"{attention}.q_proj"].view(kv_heads, 2, size, -1)
    expected = queries.norm(dim=2).square().mean(dim=1).sqrt()
    torch.testing.assert_close(scores._factor(f"{attention}.k_proj")[::size], expected)
    for name in ("gate_proj", "up_proj"):
        torch.testing.assert_close(scores._factor(f"{mlp}.{name}")[0], weights[f"{mlp}.down_proj"].norm(dim=1))
    for name in (f"{attention}.v_proj", f"{attention}.o_proj", f"{mlp}.down_proj"):
        assert scores._factor(name) == 1
    with pytest.raises(EfxError, match="qkv_proj is none of them"):
        scores._factor(f"{attention}.qkv_proj")


def test_released_scores_are_roots_and_know_the_energies(task):
    draft = Draft.load(task, adapted=False)
    layer = draft.targets[3]
    scores = as_released._ReleasedScores(draft.network)
    energy = torch.rand(layer.base.in_features) + 0.1
    weight = effective_weight(layer)
    for factor in (1.0, 3.0):
        (found,) = scores.blend([layer.name], [weight.square() * energy * factor**2])
    torch.testing.assert_close(scores.energies[layer.name], energy * 9)
    torch.testing.assert_close(found, weight.abs() * energy.sqrt() * 2)  # the mean of 1 and 3
    assert isinstance(scores, RunningScores)


def test_bad_requests_are_named(task):
    with pytest.raises(UsageError, match="no argument 'rate': it takes learning_rates, batch_size"):
        run(task, "published", arguments={"rate": 1e-3})
    with pytest.raises(EfxError, match="no argument 'repairs'"):
        run(task, "expert", arguments={"repairs": "none"})
    with pytest.raises(EfxError, match="no validation text to choose the learning rate on: pass more documents"):
        run(replace(task, validation=task.validation[:0]), "expert")


def test_training_sees_the_training_sequences_alone(task, monkeypatch):
    seen = []
    original = training.Trainer.training_step

    def step(self, model, inputs, *arguments, **options):
        seen.extend(map(tuple, inputs["input_ids"].tolist()))
        return original(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(training.Trainer, "training_step", step)
    run(task, "expert", arguments=RATES)
    assert sorted(seen) == sorted(map(tuple, task.training.tolist()))
    assert not set(seen) & set(map(tuple, task.validation.tolist()))


def test_without_an_adapter_a_usual_one_is_trained(task):
    assert run(task, "expert", adapter=None, arguments=RATES).sparsity == pytest.approx(0.5, abs=0.02)


def test_arguments_of_the_paper_are_arguments_of_the_engine():
    schedule = ("warmup_fraction", "refreshes", "final_fraction")
    PruningArguments(**{name: value for name, value in trained.PUBLISHED.items() if name not in schedule})
