"""Losses are those of each document by itself, whatever else is in its batch."""

import math

import pytest
import torch

from efx_plugin.errors import EfxError
from efx_plugin.evaluate import perplexity as module
from efx_plugin.evaluate.perplexity import corpus_losses, first_tokens
from tests.support.tiny_llama import tiny_llama


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (5, 40, 2, 17, 33, 16)]


def by_hand(model, document, length):
    loss = 0.0
    for begin in range(0, len(document), length):
        window = torch.tensor([document[begin : begin + length]])
        if window.shape[1] > 1:
            loss += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
    return loss


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_losses_are_those_of_each_document_by_itself(documents, monkeypatch, batch_tokens):
    monkeypatch.setattr(module, "_BATCH_TOKENS", batch_tokens)
    model = tiny_llama()
    losses = corpus_losses(model, documents, 16)
    assert losses.losses == pytest.approx([by_hand(model, document, 16) for document in documents], rel=1e-4)
    assert losses.tokens == [4, 37, 1, 15, 30, 15]
    assert losses.perplexity == pytest.approx(math.exp(sum(losses.losses) / 102))


def test_every_window_begins_with_the_start_of_text(documents):
    model = tiny_llama()
    losses = corpus_losses(model, [[1, *document] for document in documents], 16, start=1)
    windows = [[[1, *document[begin : begin + 15]] for begin in range(0, len(document), 15)] for document in documents]
    assert losses.tokens == [len(document) for document in documents]
    by_hands = [sum(by_hand(model, window, 16) for window in document) for document in windows]
    assert losses.losses == pytest.approx(by_hands, rel=1e-4)


def test_documents_are_taken_up_to_a_number_of_tokens():
    documents = [[1, 2, 3], [4], [5, 6, 7], [8, 9]]
    assert first_tokens(documents, 5, 8) == [[1, 2, 3], [5, 6]]
    assert first_tokens(documents, 100, 8) == [[1, 2, 3], [5, 6, 7], [8, 9]]
    assert first_tokens(documents, 4, 8) == [[1, 2, 3]]


@pytest.mark.parametrize(("limit", "length", "documents", "each"), [(5000, 10, 50, 100), (5000, 500, 10, 500)])
def test_a_long_document_does_not_stand_for_a_corpus(limit, length, documents, each):
    taken = first_tokens([[7] * 3000] * 200, limit, length)
    assert [len(document) for document in taken] == [each] * documents


def test_a_model_that_says_nothing_is_refused(documents):
    model = tiny_llama()
    model.lm_head.weight.data[5, 5] = math.nan
    with pytest.raises(EfxError, match="no numbers any more"):
        corpus_losses(model, documents, 16)
