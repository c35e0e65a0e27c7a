"""The questions of the domain benchmark: of held-out documents alone, one right answer each, no answer favoured."""

import json
from collections import Counter

import pytest

from efx_plugin.evaluate.tasks import check
from integration.assets import heldout_documents
from integration.domain_tasks import CATEGORIES, TASKS, task_files

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder():
    return task_files(60)


def questions(folder, task):
    return [json.loads(line) for line in (folder / f"{task}.jsonl").open()]


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_made_of_heldout_documents(folder, task):
    corpus, _ = TASKS[task]
    whole = " ".join(" ".join(document.text.split()) + " " + document.label for document in heldout_documents(corpus))
    asked = questions(folder, task)
    assert len(asked) == 60
    for question in asked:
        assert question["text"] in whole
        assert task == "legal_clause" or all(" ".join(answer.split()) in whole for answer in question["choices"])


@pytest.mark.parametrize("task", TASKS)
def test_a_guess_is_right_once_in_four(folder, task):
    asked = questions(folder, task)
    assert all(len(set(question["choices"])) == 4 for question in asked)
    assert max(Counter(question["gold"] for question in asked).values()) <= 27  # of 60; 15 on average


def test_the_right_answer_is_the_documents_own(folder):
    labels = {document.text.partition("; ")[0]: document.label for document in heldout_documents("clinical")}
    asked = questions(folder, "health_term")
    assert all(labels[question["text"]] == question["choices"][question["gold"]] for question in asked)


def test_every_category_of_licence_is_asked(folder):
    asked = questions(folder, "legal_clause")
    assert {question["choices"][question["gold"]] for question in asked} == set(CATEGORIES.values())


def test_the_tasks_take_the_files(folder):
    check([f"efx_{task}" for task in TASKS], data=folder)
