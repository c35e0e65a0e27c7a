"""Our tasks in lm-eval's harness: scores against log-likelihoods reckoned here, chance, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import efx_plugin
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate.tasks import check, score
from tests.support.questions import tiny_questions, write_jsonl
from tests.support.tiny_llama import tiny_llama, tiny_tokenizer

FOLDER = Path(efx_plugin.__file__).parent / "evaluate" / "tasks"
FILES = sorted(FOLDER.glob("efx_*.yaml"))


@pytest.fixture
def data(tmp_path):
    """A folder with the questions of every task."""
    for path in FILES:
        name = yaml.load(path.read_text(), yaml.SafeLoader)["dataset_kwargs"]["file"]
        write_jsonl(tmp_path / name, tiny_questions(12))
    return tmp_path


def log_likelihood(model, tokenizer, context, answer):
    before = tokenizer(context).input_ids
    ids = torch.tensor([before + tokenizer(answer).input_ids])
    losses = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(losses[len(before) - 1 :].sum())


@torch.inference_mode()
def test_the_likeliest_answer_is_the_one_that_counts(data):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    found = score(model, tokenizer, ["efx_general_term"], data=data)["efx_general_term"]
    right = right_by_byte = 0
    for question in tiny_questions(12):
        context = f"{question['text']}\n\nThe term for this is:"
        values = [log_likelihood(model, tokenizer, context, f" {answer}") for answer in question["choices"]]
        by_byte = [value / len(answer) for value, answer in zip(values, question["choices"], strict=True)]
        right += values.index(max(values)) == question["gold"]
        right_by_byte += by_byte.index(max(by_byte)) == question["gold"]
    assert found.metrics == pytest.approx({"acc,none": right / 12, "acc_norm,none": right_by_byte / 12})
    assert (found.metric, found.accuracy) == ("acc_norm,none", pytest.approx(right_by_byte / 12))
    assert found.documents == 12
    assert found.standard_error > 0


@pytest.mark.parametrize("answers", [2, 5])
def test_chance_is_that_of_a_guess(tmp_path, answers):
    write_jsonl(tmp_path / "general_term.jsonl", tiny_questions(6, answers))
    found = score(tiny_llama(), tiny_tokenizer(), ["efx_general_term"], data=tmp_path, limit=4)["efx_general_term"]
    assert found.chance == pytest.approx(1 / answers)
    assert found.documents == 4


def test_the_model_is_as_before(data):
    model = tiny_llama().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score(model, tiny_tokenizer(), ["efx_icd_chapter"], data=data, limit=2)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_every_task_file_loads_with_its_questions(data):
    check([path.stem for path in FILES], data=data)


def test_a_task_file_of_the_user_is_found(data, tmp_path):
    own = (FOLDER / "efx_general_term.yaml").read_text().replace("efx_general_term", "my_task")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "my_task.yaml").write_text(own.replace("_choice.yaml", str(FOLDER / "_choice.yaml")))
    found = score(tiny_llama(), tiny_tokenizer(), ["my_task"], data=data, include=[folder], limit=2)
    assert list(found) == ["my_task"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no task was named: pass --tasks"),
        (["efx_legal_clauses"], "lm-eval knows no task efx_legal_clauses; near it are efx_legal_clause"),
    ],
)
def test_a_task_that_is_not_there_is_refused(data, tasks, message):
    with pytest.raises(UsageError, match=message):
        check(tasks, data=data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "t3", "choices": ["t4", "t5"], "gold": 2}',
            "line 2: gold is 2, and the 2 choices are numbered from",
        ),
        ('{"text": "t3", "gold": 0}', "line 2: a question is a JSON object with text, choices and gold"),
        ("{", "line 2: a question is a JSON object with text, choices and gold"),
    ],
)
def test_a_record_that_is_no_question_is_named(tmp_path, line, message):
    (tmp_path / "general_term.jsonl").write_text(f"{json.dumps(tiny_questions(1)[0])}\n{line}\n")
    with pytest.raises(EfxError, match=message):
        check(["efx_general_term"], data=tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(EfxError, match=r"there is no .*/general_term\.jsonl, which the task asks questions of"):
        check(["efx_general_term"], data=tmp_path)
    with pytest.raises(EfxError, match=r"asks questions of general_term\.jsonl: say where it lies, with --task-data"):
        check(["efx_general_term"])


def test_without_lm_eval_the_extra_is_named():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from efx_plugin.evaluate.tasks import check\n"
        "try: check(['arc_easy'])\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert done.stdout == "tasks are scored by lm-eval: pip install 'efx-plugin[eval]'\n"
