"""Families of near-duplicates and the splits made of them, against a brute-force reading of the definition."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.assets import OVERLAP, SHARES, families, ngrams, split_families
from integration.corpora import NGRAM, words

FEW_WORDS = st.lists(st.sampled_from("abc"), max_size=30).map(" ".join)
# Passages of eight or more words that recur in many documents, whole or in part, and in any order.
PASSAGES = [" ".join(f"{name}{i}" for i in range(12)) for name in "pqrstuvw"]
DOCUMENT = st.lists(st.sampled_from(PASSAGES), min_size=1, max_size=6).flatmap(
    lambda parts: st.integers(0, 11).map(lambda cut: " ".join(parts)[3 * cut :])
)
CORPUS = st.lists(st.one_of(DOCUMENT, FEW_WORDS), max_size=25)


def gram_set(text):
    ws = words(text)
    return {tuple(ws[i : i + NGRAM]) for i in range(len(ws) - NGRAM + 1)}


def near_duplicates(a, b):
    a, b = gram_set(a), gram_set(b)
    return len(a & b) > OVERLAP * min(len(a), len(b))


@given(CORPUS)
def test_ngram_numbers_are_the_ngrams(texts):
    document, gram = ngrams(texts)
    expected = [gram_set(text) for text in texts]
    assert [int((document == i).sum()) for i in range(len(texts))] == [len(s) for s in expected]
    for (i, a), (j, b) in combinations(enumerate(expected), 2):
        shared = np.intersect1d(gram[document == i], gram[document == j])
        assert len(shared) == len(a & b)


@given(CORPUS)
def test_families_are_the_connected_components_of_near_duplication(texts):
    found = families(texts)
    assert Counter(i for family in found for i in family) == Counter(range(len(texts)))
    of = {i: number for number, family in enumerate(found) for i in family}
    for i, j in combinations(range(len(texts)), 2):
        if near_duplicates(texts[i], texts[j]):
            assert of[i] == of[j]
    for family in found:  # every member is reached from the first through near-duplicates in the family
        reached, frontier = {family[0]}, [family[0]]
        while frontier:
            i = frontier.pop()
            new = {j for j in family if j not in reached and near_duplicates(texts[i], texts[j])}
            reached |= new
            frontier += new
        assert reached == set(family)


@given(CORPUS, st.integers(0, 3))
def test_splits_keep_every_document_and_no_near_duplicates_across(texts, seed):
    parts = split_families(texts, seed)
    assert Counter(text for part in parts.values() for text in part) == Counter(texts)
    for one, other in combinations(parts.values(), 2):
        assert not any(near_duplicates(a, b) for a in one for b in other)


@given(CORPUS, st.integers(0, 3))
def test_heldout_and_calibration_never_exceed_their_share(texts, seed):
    parts = split_families(texts, seed)
    size = {name: sum(len(words(text)) for text in part) for name, part in parts.items()}
    for name, share in SHARES.items():
        assert size[name] <= share * sum(size.values())


@pytest.fixture
def unrelated():
    return [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(100)]


def test_unrelated_documents_fill_the_shares(unrelated):
    parts = split_families(unrelated, seed=0)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 75,
        "calibration": 10,
        "heldout": 15,
    }


def test_a_seed_fixes_the_splits_and_another_changes_them(unrelated):
    assert split_families(unrelated, seed=1) == split_families(unrelated, seed=1)
    assert set(split_families(unrelated, seed=1)["heldout"]) != set(split_families(unrelated, seed=2)["heldout"])
