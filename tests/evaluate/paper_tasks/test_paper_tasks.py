"""The paper's tasks on tiny files in the form of the originals, and their metrics against values known by hand."""

import random
from pathlib import Path

import pytest

import efx_plugin
from efx_plugin.errors import EfxError
from efx_plugin.evaluate.paper_tasks import metrics
from efx_plugin.evaluate.tasks import check, score
from tests.support.questions import tiny_text, write_jsonl
from tests.support.tiny_llama import tiny_llama, tiny_tokenizer

PICK = random.Random(0)
FOLDER = Path(efx_plugin.__file__).parent / "evaluate" / "paper_tasks"


def text(words=5):
    return tiny_text(PICK, words)


RECORDS = {
    "casehold": [{"context": text(), "endings": [text() for _ in range(5)], "label": label} for label in (0, 4, 2)],
    "contract_nli": [{"premise": text(), "hypothesis": text(), "label": label} for label in (0, 1, 2)],
    "mli_test_v1": [
        {"sentence1": text(), "sentence2": text(), "gold_label": label, "pairID": "x"}
        for label in ("entailment", "neutral", "contradiction")
    ],
    "pubmedqa": [
        {
            "pubid": 1,
            "question": text(),
            "context": {"contexts": [text(), text()], "labels": ["BACKGROUND", "RESULTS"], "meshes": []},
            "long_answer": text(),
            "final_decision": label,
        }
        for label in ("yes", "no", "maybe")
    ],
    "billsum": [{"text": text(30), "summary": text(), "title": text()} for _ in range(2)],
    "hqs": [{"File": "1.txt", "CHQ": text(20), "Summary": text()} for _ in range(2)],
}
CHANCE = {"efx_casehold": 1 / 5, "efx_contract_nli": 1 / 3, "efx_mednli": 1 / 3, "efx_pubmedqa": 1 / 3}
SUMMARIES = ["efx_billsum", "efx_hqs"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    for name, records in RECORDS.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def scores(data):
    return score(tiny_llama(), tiny_tokenizer(), [*CHANCE, *SUMMARIES], data=data)


def test_every_task_of_the_paper_is_here(scores):
    assert {path.stem for path in FOLDER.glob("efx_*.yaml")} == set(scores)


@pytest.mark.parametrize("task", CHANCE)
def test_multiple_choice_has_accuracy_macro_f1_and_chance(scores, task):
    found = scores[task]
    assert found.metric == "acc,none"
    assert set(found.metrics) == {"acc,none", "macro_f1,none"}
    assert found.chance == pytest.approx(CHANCE[task])
    assert found.documents == 3
    assert 0 <= found.accuracy <= 1


@pytest.mark.parametrize("task", SUMMARIES)
def test_summaries_have_rouge(scores, task):
    found = scores[task]
    assert found.metric == "rougeL,none"
    assert set(found.metrics) == {"rougeL,none", "rouge1,none", "rouge2,none"}
    assert found.chance is None


def test_labels_are_those_of_the_originals(data):
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=[FOLDER], include_defaults=False, metadata={"data": str(data)}).load(list(CHANCE))
    gold = {name: [row["gold"] for row in task.test_docs()] for name, task in tasks["tasks"].items()}
    assert gold == {
        "efx_casehold": [0, 4, 2],
        "efx_contract_nli": [0, 1, 2],
        "efx_mednli": [1, 2, 0],
        "efx_pubmedqa": [0, 1, 2],
    }


def test_macro_f1_is_the_mean_over_classes():
    # Class 0: precision 1/2, recall 1. Class 1: precision 1, recall 1/3. Class 2, which is chosen alone: 0.
    answers = [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert metrics.macro_f1(answers) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_rouge_is_the_overlap_of_words_and_of_their_order():
    found = metrics.rouge({"summary": "the bill raises taxes"}, ["taxes the bill raised"])
    assert found == pytest.approx({"rouge1": 1.0, "rouge2": 2 / 3, "rougeL": 3 / 4})


def test_the_answer_of_the_greatest_likelihood_is_chosen():
    found = metrics.choice({"gold": 1}, [(-2.0, False), (-1.0, True), (-3.0, False)])
    assert found == {"acc": 1.0, "macro_f1": (1, 1)}


def test_without_files_and_hub_the_remedy_is_named(tmp_path, monkeypatch):
    import datasets

    def refuse(*arguments, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(EfxError, match=r"coastalcph/lex_glue is not to be had .* \(no route.*\): put casehold"):
        check(["efx_casehold"], data=tmp_path)
    with pytest.raises(EfxError, match=r"MedNLI is given out by PhysioNet .*: put mli_test_v1.jsonl"):
        check(["efx_mednli"])
