"""The domain benchmark on a tiny model: what it asks for, what it writes, and that nothing is done twice."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from integration import compare
from integration.assets import families
from integration.compare import QUICK, Budget
from tests.support.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.integration

TINY = Budget(("tiny",), (".5",), 1, (1e-3,), 4, 32, 256, 128, 4)
PIPELINES = ["base", "lora", "lora+magnitude", "lora+expert"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    directory = save_tiny_llama(folder / "tiny")
    compare.MODELS["tiny"] = lambda: directory
    yield folder / "out"
    del compare.MODELS["tiny"]


@pytest.fixture(scope="module")
def report(output):
    return compare.compare(TINY, ["legal", "health"], PIPELINES, output)


def test_the_report_holds_every_pipeline_in_both_domains(report, output):
    assert not report.failures
    rows = json.loads((output / "report.json").read_text())["rows"]
    assert {(row["data"], row["pipeline"]) for row in rows} == {
        (domain, name) for domain in ("legal", "health") for name in PIPELINES
    }
    (masks,) = json.loads((output / "report.json").read_text())["summary"]["domains"]
    assert masks["domains"] == ["legal", "health"] and masks["sparsity"] == "50 %" and len(masks["cross"]) == 8
    keys = {"model", "pipeline", "sparsity", "corpus", "seed", "perplexity", "recovery", "accuracy"}
    assert all(row.keys() >= keys | {"bits_per_weight", "seconds", "peak_mb"} for row in rows)
    for domain, (corpora, _) in compare.DOMAINS.items():
        assert {row["corpus"] for row in rows if row["data"] == domain} == set(corpora)


@pytest.mark.parametrize("domain", compare.DOMAINS)
def test_no_family_of_documents_is_in_two_parts(output, domain):
    data = compare.domain_data(TINY, domain, output)
    assert data.validation is not None
    files = (data.calibration, data.training, data.validation, data.heldout[0].path)
    parts = [[json.loads(line)["text"] for line in file.open()] for file in files]
    part_of = [number for number, texts in enumerate(parts) for _ in texts]
    found = families([text for texts in parts for text in texts])
    assert len(found) > 100 and all(parts)
    assert all(len({part_of[document] for document in family}) == 1 for family in found)


def test_accuracy_stands_beside_chance(report):
    for line in report.lines:
        assert set(line.tasks) == set(compare.DOMAINS[line.data][1])
        assert all(task["chance"] == 0.25 for task in line.tasks.values())


def test_the_page_is_one_file(report, output):
    assert (output / "report.html").read_text().startswith("<!doctype html>")


def test_what_is_done_is_not_done_again(report, output, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("done again")

    monkeypatch.setattr(compare, "train_lora", refuse)
    monkeypatch.setattr("efx_plugin.evaluate.grid.CellServer", refuse)
    again = compare.compare(TINY, ["legal", "health"], PIPELINES, output)
    assert again.rows == report.rows and again.domains == report.domains


def test_the_adapter_has_the_learning_rate_that_validates_best(output, report):
    folders = sorted((output / "adapters").glob("tiny-*"))
    assert [folder.name.split("-")[1] for folder in folders] == ["health", "legal"]
    for folder in folders:
        assert list(json.loads((folder / "learning_rates.json").read_text())) == ["0.001"]


def test_another_model_of_the_same_name_gets_an_adapter_of_its_own(tmp_path):
    data = compare.domain_data(TINY, "legal", tmp_path)
    one = save_tiny_llama(tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    here, there = (compare.domain_adapter(TINY, "tiny", model, "legal", data, tmp_path) for model in (one, other))
    assert here != there and here.is_dir() and there.is_dir()


def test_quick_mode_asks_every_pipeline_in_both_domains(output):
    quick = compare.Budget(**{**vars(QUICK), "models": ("tiny",), "training_tokens": 512})
    for domain in compare.DOMAINS:
        asked = list(compare.cells(quick, "tiny", domain, list(compare.PIPELINES), output))
        assert [cell.pipeline for cell in asked] == list(compare.PIPELINES)
        assert {cell.sparsity for cell in asked} == {0.0, 0.5}
        trained = [cell for cell in asked if compare.PIPELINES[cell.pipeline].needs_training]
        assert {cell.arguments for cell in trained} == {(("learning_rates", QUICK.learning_rates),)}


def test_the_model_from_scratch_is_not_trained_further(output, monkeypatch):
    monkeypatch.setitem(compare.MODELS, "scratch", compare.MODELS["tiny"])
    asked = list(compare.cells(TINY, "scratch", "legal", list(compare.PIPELINES), output))
    assert not {"expert", "lora+expert+heal"} & {cell.pipeline for cell in asked}
    assert {"lora", "lora+w4a16", "lora+expert"} <= {cell.pipeline for cell in asked}
