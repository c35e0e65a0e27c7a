"""The benchmark of pruning measures what it says, on tiny models; their times mean nothing here."""

import json
import subprocess
import sys

import pytest
import torch

from efx_plugin.errors import EfxError
from integration.benchmarks import prune
from tests.support.tiny_llama import save_tiny_llama, tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

MEGABYTES = 10**6


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def blocks():
    return torch.randint(3, 128, (12, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def in_this_process(monkeypatch):
    """Fresh processes need seconds to start."""
    monkeypatch.setattr(prune, "in_fresh_process", lambda function, *args, log: function(*args))


def test_every_part_ends_in_the_report_and_the_table(directory, blocks, tmp_path, capsys, in_this_process):
    fields = prune.LLAMA_1B | {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    prune.make_llama(fields, tiny_tokenizer(), tmp_path / "random")
    subjects = {
        "tiny": prune.Subject(directory, prune.CONFIGURATIONS, 2),
        "random": prune.Subject(tmp_path / "random", ("wanda", "sparsegpt", "none", "weights", *prune.OWN_RECIPES), 1),
    }
    output = tmp_path / "prune.json"
    report = prune.bench(subjects, blocks, blocks, output, rounds=2, repair_layer=(64, 96), repair_rounds=2)
    assert json.loads(output.read_text()) == report

    for figure, targets in prune.TARGETS.items():
        assert report[figure].keys() == targets.keys()
        assert report["random"][figure].keys() == targets.keys() - {"adapter"}
        assert all(0.01 < value < 100 for value in report[figure].values())
    made_of = report["pruning"]
    assert made_of["seconds"].keys() == made_of["memory"].keys() == set(prune.CONFIGURATIONS)
    for name in prune.CONFIGURATIONS:
        assert 0 < made_of["seconds"][name] < 60
        assert made_of["memory"][name] >= made_of["memory_before"][name] > 50 * MEGABYTES
    assert made_of["spread"]["seconds_vs_sparsegpt"].keys() == prune.TARGETS["seconds_vs_sparsegpt"].keys()
    assert report["repair_vs_reference_loop"] == report["repair"]["kappa 1.0"]["ratio"] > 0.01
    assert report["training"]["tokens"] == blocks.numel()
    assert 0.01 < report["training_overhead"] < 100
    assert {"torch", "llmcompressor", "efx-plugin"} < report["versions"].keys()

    printed = capsys.readouterr().out
    for line in ("seconds over wanda, none", "memory over sparsegpt, expert_50_best", "kappa 0.5", "over plain LoRA"):
        assert line in printed
    assert "what it costs, random" in printed


def test_a_selection_has_that_part_alone(directory, blocks, tmp_path):
    subjects = {"tiny": prune.Subject(directory, prune.CONFIGURATIONS, 1)}
    report = prune.bench(
        subjects, blocks, blocks, tmp_path / "part.json", parts=("repair",), repair_layer=(64, 96), repair_rounds=1
    )
    assert report.keys() == {"repair_vs_reference_loop", "repair", "calibration", "threads", "versions"}


def test_a_run_in_a_process_of_its_own(directory, blocks, tmp_path):
    run = prune.in_fresh_process(prune.prune, str(directory), blocks.tolist(), "expert_50", log=tmp_path / "log")
    assert run.keys() == {"seconds", "memory", "memory_before"}
    assert run["memory"] >= run["memory_before"] > 50 * MEGABYTES
    assert "EfficientXpertModifier pruned 14 layers" in (tmp_path / "log").read_text()


def test_a_run_that_fails_is_told_with_its_log(tmp_path):
    with pytest.raises(EfxError, match=r"a run ended with exit code 1.*here\.log"):
        prune.in_fresh_process(prune.prune, str(tmp_path / "nothing"), [[3, 4]], "wanda", log=tmp_path / "here.log")
    assert "nothing" in (tmp_path / "here.log").read_text()


def test_memory_is_the_peak_of_the_call_and_not_of_what_went_before():
    """In a process of its own, as the runs have: one with holes in its heap would fill them first."""
    code = (
        "import json, torch\n"
        "from integration.benchmarks.prune import measured\n"
        "torch.ones(100 * 10**6)\n"
        "print(json.dumps(measured(lambda: torch.ones(50 * 10**6))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=prune.ROOT, capture_output=True, text=True, check=True)
    run = json.loads(done.stdout.splitlines()[-1])
    assert 195 * MEGABYTES < run["memory"] - run["memory_before"] < 300 * MEGABYTES


def test_a_model_that_was_not_pruned_is_not_measured():
    with pytest.raises(EfxError, match=r"wanda ended with sparsity 0\.000 instead of 0\.5"):
        prune.require_sparsity(tiny_llama(), 0.5, "wanda")


def test_repairs_that_differ_are_not_compared(monkeypatch):
    monkeypatch.setattr(prune, "paper_update", lambda *args, **kwargs: 1.001 * prune.update_by_row(*args, **kwargs))
    with pytest.raises(EfxError, match=r"off by 1\.0e-03 of the loop's at kappa 0\.5"):
        prune.measure_repair(8, 24, 1, print)
