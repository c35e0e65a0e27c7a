"""Healing: what was pruned stays zero, nothing but kept weights changes, and a run that was killed ends the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from efx_plugin.checkpoint import load_sparse, read_sparsity_config, save_sparse
from efx_plugin.checkpoint.reader import sizes
from efx_plugin.compress import heal as heal_module
from efx_plugin.compress.heal import heal_to_checkpoint
from efx_plugin.compress.request import HealRequest
from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.errors import EfxError, SparseCheckpointError, UsageError
from efx_plugin.modifier import EfficientXpertModifier
from efx_plugin.training import healing
from efx_plugin.training.healing import Healed
from tests.support.tiny_llama import save_tiny_llama, tiny_llama, tiny_tokenizer

STRUCTURES = {"sparse-bitmask": (32, 16), "sparse-24-bitmask": (4, 2)}  # of so many weights so many are kept


def save_expert(directory, structure="sparse-bitmask", model=None):
    """A tiny model, without one a Llama that knows nothing, pruned by magnitude but for its first layer."""
    model = (model or tiny_llama()).to(torch.bfloat16)
    window, kept = STRUCTURES[structure]
    for layer in linears_in_blocks(model)[1:]:
        windows = layer.base.weight.data.view(-1, window)
        windows.scatter_(1, windows.abs().topk(window - kept, largest=False).indices, 0)
    save_sparse(model, directory, structure=structure, tokenizer=tiny_tokenizer(), progress=False)
    return directory


class Interrupted(healing.UnderMasks):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 11:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def request_to_heal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heal")
    save_expert(folder / "expert")
    counting = [" ".join(f"t{3 + (first + step) % 125}" for step in range(40)) for first in range(60)]
    (folder / "domain.txt").write_text("\n".join(counting))
    return HealRequest(
        folder / "expert",
        folder / "healed",
        str(folder / "domain.txt"),
        tokens=1280,
        length=32,
        learning_rate=3e-3,
        progress=False,
    )


@pytest.fixture(scope="module")
def report(request_to_heal):
    return heal_to_checkpoint(request_to_heal)


def test_zeros_stay_and_nothing_else_but_kept_weights_changes(request_to_heal, report):
    before, after = (load_sparse(path).state_dict() for path in (request_to_heal.model, request_to_heal.output))
    sparse = {name for name, weight in before.items() if "proj" in name and (weight == 0).any()}
    assert len(sparse) == 13 and before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        if name in sparse:
            assert not after[name][weight == 0].any() and not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)


def test_the_text_held_out_is_predicted_better_and_the_report_says_so(request_to_heal, report):
    assert report["after"] < 0.9 * report["before"] and report["tokens"] == 1280
    assert report["sparsity"] == sizes(request_to_heal.model)["sparsity"] > 0.4
    assert not request_to_heal.output.with_name("healed.healing").exists()
    assert (request_to_heal.output / "tokenizer.json").is_file()
    provenance = json.loads((request_to_heal.output / "provenance.json").read_text())
    assert provenance["healing"] == "1,280 tokens from domain.txt"
    assert "Trained on its kept weights: 1,280 tokens" in (request_to_heal.output / "README.md").read_text()


def test_a_run_that_was_interrupted_ends_with_the_same_weights(request_to_heal, report, monkeypatch):
    again = replace(request_to_heal, output=request_to_heal.output.with_name("again"))
    with monkeypatch.context() as patch:
        patch.setattr(healing, "UnderMasks", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            heal_to_checkpoint(again)
    assert not again.output.exists() and list(again.output.with_name("again.healing").glob("checkpoint-*"))
    with pytest.raises(EfxError, match=r"again.healing is of an interrupted run on other inputs: remove it, or run"):
        heal_to_checkpoint(replace(again, tokens=640))
    resumed = heal_to_checkpoint(again)
    assert (resumed["before"], resumed["after"]) == (report["before"], report["after"])
    weights, expected = (load_sparse(path).state_dict() for path in (again.output, request_to_heal.output))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(request_to_heal, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "free_memory", lambda: 10)
    failing = replace(request_to_heal, output=tmp_path / "healed")
    with pytest.raises(EfxError, match=r"takes .* GB are free: heal on a larger machine"):
        heal_to_checkpoint(failing)
    assert not list(tmp_path.iterdir())


def test_a_model_is_healed_as_oneshot_leaves_it(request_to_heal, tmp_path):
    model = LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "model"))
    ids = torch.tensor([[3 + (first + step) % 125 for step in range(32)] for first in range(0, 120, 3)])
    oneshot(
        model=model,
        processor=tiny_tokenizer(),
        recipe=[EfficientXpertModifier(sparsity=0.5, ignore=["lm_head"])],
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        num_calibration_samples=len(ids),
        max_seq_length=32,
    )
    pruned = {layer.name: layer.base.weight == 0 for layer in linears_in_blocks(model)}
    saving = model.save_pretrained
    folder = tmp_path / "healing"
    healed = healing.heal(model, ids[:-4], ids[-4:], learning_rate=3e-3, batch_size=2, folder=folder)
    assert healed.after < 0.9 * healed.before
    assert all(not layer.base.weight[pruned[layer.name]].any() for layer in linears_in_blocks(model))
    assert model.save_pretrained == saving


def test_a_teacher_draws_the_model_to_what_it_predicts(request_to_heal, report, tmp_path):
    teacher = tiny_llama()
    with torch.no_grad():
        for weight in teacher.parameters():
            weight *= 1.5
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    taught = replace(request_to_heal, output=tmp_path / "taught", teacher=tmp_path / "teacher")
    heal_to_checkpoint(taught)
    ids = torch.arange(3, 67).view(2, 32)

    def distance(path):
        with torch.no_grad():
            ours, wanted = (model(ids).logits.float().log_softmax(-1) for model in (load_sparse(path), teacher))
        return float(torch.nn.functional.kl_div(ours, wanted, log_target=True, reduction="batchmean"))

    assert distance(taught.output) < 0.9 * distance(request_to_heal.output)


@pytest.fixture(scope="module")
def teacher(request_to_heal, tmp_path_factory):
    """One that knows the domain: the expert healed on it, stored dense."""
    folder = tmp_path_factory.mktemp("teacher")
    request = replace(request_to_heal, output=folder / "healed", tokens=1600, batch_size=1, learning_rate=1e-2)
    heal_to_checkpoint(request)
    load_sparse(request.output).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    return folder / "dense"


def test_what_the_teacher_writes_helps_where_text_is_scarce(request_to_heal, teacher, tmp_path):
    scarce = replace(request_to_heal, tokens=96, teacher=teacher)
    alone = heal_to_checkpoint(replace(scarce, output=tmp_path / "alone"))
    helped = heal_to_checkpoint(replace(scarce, output=tmp_path / "helped", generate=1270))
    assert helped["tokens"] == 96 + 1280 and helped["before"] == alone["before"]
    assert helped["after"] < 0.9 * alone["after"]
    provenance = json.loads((tmp_path / "helped" / "provenance.json").read_text())
    assert provenance["healing"] == "96 tokens from domain.txt and 1,280 that the dense expert wrote"
    before, after = (load_sparse(path).state_dict() for path in (request_to_heal.model, tmp_path / "helped"))
    assert not any(after[name][weight == 0].any() for name, weight in before.items() if "proj" in name)


def test_a_run_that_goes_on_learns_from_the_text_that_was_written(request_to_heal, teacher, tmp_path, monkeypatch):
    request = replace(request_to_heal, output=tmp_path / "healed", teacher=teacher, tokens=640, generate=640)
    with monkeypatch.context() as patch:
        patch.setattr(healing, "UnderMasks", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            heal_to_checkpoint(request)
    with monkeypatch.context() as patch:
        patch.setattr(heal_module, "write_sequences", None)  # it is not written a second time
        resumed = heal_to_checkpoint(request)
    assert resumed == heal_to_checkpoint(replace(request, output=tmp_path / "again")) | {"output": str(request.output)}


def test_with_an_adapter_half_is_written_without_it(request_to_heal, teacher, tmp_path, monkeypatch):
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(teacher), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    seen = []
    monkeypatch.setattr(heal_module, "heal", lambda *args, **options: seen.append(options) or Healed(0, 2.0, 1.0))
    request = replace(request_to_heal, output=tmp_path / "healed", teacher=teacher, adapter=tmp_path / "adapter")
    heal_to_checkpoint(replace(request, generate=32 * 5))
    starts = seen[0]["written"][:, 0].tolist()
    assert len(starts) == 5 and [first == 2 for first in starts] == [False] * 3 + [True] * 2  # </s> begins a text
    provenance = json.loads((tmp_path / "healed" / "provenance.json").read_text())
    assert provenance["healing"].endswith("and 160 that the dense expert wrote, half of them without its adapter")
    heal_to_checkpoint(replace(request, output=tmp_path / "one", generate=32))
    assert seen[1]["written"][0, 0] != 2  # one sequence has no half
    provenance = json.loads((tmp_path / "one" / "provenance.json").read_text())
    assert provenance["healing"].endswith("and 32 that the dense expert wrote")


def test_of_what_the_teacher_wrote_only_its_predictions_count(request_to_heal, tmp_path):
    """A model that predicts as the teacher does learns nothing from a text as the teacher's, and much from the same as
    text of the domain."""
    ids = torch.tensor([[3 + (first + step) % 125 for step in range(32)] for first in range(0, 120, 3)])
    options = {"learning_rate": 3e-3, "batch_size": 2, "teacher": load_sparse(request_to_heal.model)}
    expert = load_sparse(request_to_heal.model)
    healed = healing.heal(expert, ids[:0], ids[-4:], written=ids[:-4], folder=tmp_path / "written", **options)
    assert healed.after == pytest.approx(healed.before, rel=0.05)
    healed = healing.heal(expert, ids[:-4], ids[-4:], folder=tmp_path / "text", **options)
    assert healed.after < 0.8 * healed.before
    with pytest.raises(EfxError, match="only the teacher's predictions are learned: pass the teacher too"):
        healing.heal(expert, ids, ids, written=ids, folder=tmp_path / "untaught", **options | {"teacher": None})


def test_a_teacher_with_another_vocabulary_is_refused(request_to_heal, tmp_path):
    save_tiny_llama(tmp_path / "teacher", vocab_size=140)
    with pytest.raises(EfxError, match="has 140 tokens and the sparse model 128: pass the dense expert that it was"):
        heal_to_checkpoint(replace(request_to_heal, output=tmp_path / "taught", teacher=tmp_path / "teacher"))
    with pytest.raises(UsageError, match="--adapter makes an expert of the teacher: pass --teacher"):
        heal_to_checkpoint(replace(request_to_heal, output=tmp_path / "taught", adapter=tmp_path / "teacher"))
    with pytest.raises(UsageError, match="--generate asks the teacher for text: pass --teacher, the dense expert, too"):
        heal_to_checkpoint(replace(request_to_heal, output=tmp_path / "taught", generate=64))
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    with pytest.raises(EfxError, match="is a LlamaForSequenceClassification, which predicts no text"):
        heal_to_checkpoint(replace(request_to_heal, output=tmp_path / "taught", teacher=tmp_path / "classifier"))


def test_the_structure_stays(request_to_heal, tmp_path):
    expert = save_expert(tmp_path / "expert", "sparse-24-bitmask")
    heal_to_checkpoint(replace(request_to_heal, model=expert, output=tmp_path / "healed"))
    assert read_sparsity_config(tmp_path / "healed")["format"] == "sparse-24-bitmask"


def test_what_does_not_help_is_not_written(request_to_heal, tmp_path):
    output = tmp_path / "healed"
    with pytest.raises(EfxError, match="nothing is written; lower --learning-rate, or pass more text"):
        heal_to_checkpoint(replace(request_to_heal, output=output, learning_rate=0.0))
    assert not output.exists()


def test_what_cannot_be_healed_ends_in_a_sentence(request_to_heal, tmp_path):
    request = replace(request_to_heal, output=tmp_path / "healed")
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(SparseCheckpointError, match="dense"):
        heal_to_checkpoint(replace(request, model=tmp_path / "dense"))
    with pytest.raises(UsageError, match="there is no directory none: pass the directory of a sparse model"):
        heal_to_checkpoint(replace(request, model=Path("none")))
    classifier = LlamaForSequenceClassification(tiny_llama().config)
    save_expert(tmp_path / "classifier", model=classifier)
    with pytest.raises(EfxError, match="holds a LlamaForSequenceClassification, and healing trains language models"):
        heal_to_checkpoint(replace(request, model=tmp_path / "classifier"))
    (tmp_path / "line.txt").write_text("t3 t4 t5 " * 12)
    with pytest.raises(EfxError, match="text for one sequence of 32 tokens, and healing keeps one to check itself"):
        heal_to_checkpoint(replace(request, dataset=str(tmp_path / "line.txt")))
    assert not request.output.exists()


def test_a_model_without_zeros_is_refused(tmp_path):
    ids = torch.arange(3, 67).view(2, 32)
    with pytest.raises(EfxError, match="no linear layer of the decoder blocks has zeros: prune the model first"):
        healing.heal(tiny_llama(), ids, ids, learning_rate=1e-3, batch_size=1, folder=tmp_path)
