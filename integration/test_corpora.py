"""What the packages' texts look like, and that none leaks from one part of the benchmark into another."""

import random
import re
from collections import Counter, defaultdict

import pytest

from integration.assets import heldout_documents, splits, splits_with_validation
from integration.corpora import CORPORA, documents

pytestmark = pytest.mark.integration


def grams(text):
    """The word 8-grams of a text."""
    found = re.findall(r"\w+", text.lower())
    return {hash(tuple(found[i : i + 8])) for i in range(len(found) - 7)}


@pytest.mark.parametrize("corpus", CORPORA)
def test_nothing_leaks_from_one_part_into_another(corpus):
    """Documents of every part (two hundred at most) against all documents of all other parts."""
    parts = splits_with_validation(corpus)
    assert list(parts) == ["train", "calibration", "heldout", "validation"]
    assert all(parts.values())
    whole = [(name, grams(text)) for name, texts in parts.items() for text in texts]
    holders = defaultdict(list)
    for number, (_, mine) in enumerate(whole):
        for gram in mine:
            holders[gram].append(number)
    pick, count = random.Random(0), Counter(name for name, _ in whole)
    for name, mine in whole:
        if name == "train" or pick.random() * count[name] > 200:  # each pair has a part that is not training
            continue
        shared = Counter(number for gram in mine for number in holders[gram])
        for number, common in shared.items():
            other, theirs = whole[number]
            assert other == name or common <= 0.1 * min(len(mine), len(theirs))


@pytest.mark.parametrize("corpus", CORPORA)
def test_validation_is_taken_from_the_training_text_alone(corpus):
    before, after = splits(corpus), splits_with_validation(corpus)
    assert Counter(after["train"] + after["validation"]) == Counter(before["train"])
    assert all(after[name] == before[name] for name in ("calibration", "heldout"))


@pytest.mark.parametrize(
    ("corpus", "label", "text"),
    [
        ("legal", "Permissive", r"Redistribution and use in source and binary forms"),
        ("clinical", "Scoliosis", r"lateral curvature of the spine"),
        (
            "icd10cm",
            "Certain infectious and parasitic diseases",
            r"^A00 Cholera\nA00\.0 Cholera due to Vibrio cholerae 01, biovar cholerae; includes Classical cholera\n",
        ),
        ("wordnet", "hiccup", r"^breathe spasmodically, and make a sound; \"When you have to hiccup"),
        ("sotu", "Washington", r"^Fellow-Citizens of the Senate and House of Representatives:"),
    ],
)
def test_a_document_of_each_corpus(corpus, label, text):
    assert any(document.label == label and re.search(text, document.text) for document in documents(corpus))


@pytest.mark.parametrize(("corpus", "labels"), [("legal", 11), ("icd10cm", 21), ("sotu", 30)])
def test_every_document_is_labelled(corpus, labels):
    found = {document.label for document in documents(corpus)}
    assert all(found)
    assert len(found) >= labels


@pytest.mark.parametrize("corpus", CORPORA)
def test_documents_of_the_heldout_part_keep_their_labels(corpus):
    known = set(documents(corpus))
    heldout = heldout_documents(corpus)
    assert [document.text for document in heldout] == splits(corpus)["heldout"]
    assert set(heldout) <= known
