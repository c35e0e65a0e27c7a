"""Questions with four answers each, made of held-out documents: what the tasks of `efx_plugin.evaluate.tasks` ask.

Answers that are wrong are drawn at random from the other held-out documents. The right one stands anywhere.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from integration.assets import heldout_documents
from integration.corpora import Document, words
from integration.packages import ASSETS, make_once

ANSWERS = 4
# What the legal task tells apart, by the names that ScanCode gives; each is asked as often as the others.
CATEGORIES = {
    "Permissive": "permissive",
    "Copyleft": "copyleft",
    "Copyleft Limited": "limited copyleft",
    "Proprietary Free": "proprietary",
}
CLAUSE = range(40, 121)  # words
CLAUSES_PER_LICENCE = 3


def legal_clause(documents: Sequence[Document], pick: random.Random) -> Iterator[dict[str, Any]]:
    """A clause of a licence, and the categories that the licence may have."""
    clauses: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for document in documents:
        if document.label in clauses:
            paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", document.text)]
            fit = [paragraph for paragraph in paragraphs if len(words(paragraph)) in CLAUSE]
            clauses[document.label] += pick.sample(fit, min(CLAUSES_PER_LICENCE, len(fit)))
    names = list(CATEGORIES.values())
    for group in zip(*(pick.sample(texts, min(map(len, clauses.values()))) for texts in clauses.values()), strict=True):
        for gold, text in enumerate(group):
            yield {"text": text, "choices": names, "gold": gold}


def term(documents: Sequence[Document], pick: random.Random) -> Iterator[dict[str, Any]]:
    """A definition, and terms of which one is defined by it."""
    for document, others in _drawn(documents, pick):
        yield _question(_definition(document), document.label, [other.label for other in others], pick)


def definition(documents: Sequence[Document], pick: random.Random) -> Iterator[dict[str, Any]]:
    """A term, and definitions of which one is its own."""
    for document, others in _drawn(documents, pick):
        yield _question(document.label, _definition(document), [_definition(other) for other in others], pick)


def icd_chapter(documents: Sequence[Document], pick: random.Random) -> Iterator[dict[str, Any]]:
    """The title of a category of ICD-10-CM, and titles of chapters."""
    for document, others in _drawn(documents, pick):
        title = document.text.splitlines()[0].partition(" ")[2].partition("; ")[0]
        yield _question(title, document.label, [other.label for other in others], pick)


def _definition(document: Document) -> str:
    """The first statement, without the examples after it."""
    return document.text.partition("; ")[0]


def _drawn(documents: Sequence[Document], pick: random.Random) -> Iterator[tuple[Document, list[Document]]]:
    """Documents in any order, each with others of other labels."""
    for document in pick.sample(documents, len(documents)):
        others: dict[str, Document] = {}
        while len(others) < ANSWERS - 1:
            other = pick.choice(documents)
            if other.label != document.label:
                others[other.label] = other
        yield document, list(others.values())


def _question(text: str, right: str, wrong: list[str], pick: random.Random) -> dict[str, Any]:
    gold = pick.randrange(ANSWERS)
    return {"text": text, "choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold}


# The file of each task, the corpus that it is made of, and how.
TASKS: dict[str, tuple[str, Callable[[Sequence[Document], random.Random], Iterator[dict[str, Any]]]]] = {
    "legal_clause": ("legal", legal_clause),
    "health_term": ("clinical", term),
    "health_definition": ("clinical", definition),
    "icd_chapter": ("icd10cm", icd_chapter),
    "general_term": ("wordnet", term),
}


def task_files(count: int, seed: int = 0, root: Path = ASSETS) -> Path:
    """The folder with the questions of all tasks, a JSON record a line: `text`, `choices` and `gold`, a number.

    Args:
        count: questions of each task, at most; fewer where the held-out documents make no more.
        seed: of the split, of the wrong answers and of the choice of questions.

    Raises:
        EfxError: no network or no disk space.
    """

    def build(partial: Path) -> None:
        partial.mkdir()
        for name, (corpus, ask) in TASKS.items():
            pick = random.Random(seed)
            questions = list(ask(heldout_documents(corpus, seed, root), pick))
            chosen = pick.sample(questions, min(count, len(questions)))
            (partial / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in chosen))

    return make_once(root / f"tasks-{count}-seed{seed}", build)
