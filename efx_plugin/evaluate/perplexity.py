"""How well a model predicts held-out text: summed losses document by document."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.evaluate.cell import CorpusLosses

# Tokens of a forward pass, padding included: the logits of so many take 0.5 GB at a vocabulary of 128k in float16.
_BATCH_TOKENS = 2048
# So many documents at least make up a corpus, if it has them and a window of each is no more than its share.
_DOCUMENTS = 50


def first_tokens(documents: Iterable[list[int]], limit: int, length: int) -> list[list[int]]:
    """The first documents, `limit` tokens of them together; those with a single token are left out.

    An interval over a few long documents would say nothing, so of each no more than a fiftieth of `limit` is taken, its
    beginning, or one window of `length` where that is more.
    """
    most = max(length, limit // _DOCUMENTS)
    taken, room = [], limit
    for document in documents:
        if room < 2:
            break
        if len(document) > 1:
            taken.append(document[: min(room, most)])
            room -= len(taken[-1])
    return taken


@torch.inference_mode()
def corpus_losses(model: Any, documents: list[list[int]], length: int, start: int | None = None) -> CorpusLosses:
    """The negative log-likelihood of every document, cut into windows, of whose tokens all but the first are predicted.

    Args:
        model: a causal language model of transformers, in evaluation mode, in the dtype to compute in; the
            likelihood is computed in float32.
        documents: token ids.
        length: tokens of a window at most.
        start: the token that every window begins with, see `start_of_text`.

    Raises:
        EfxError: a likelihood is no number.
    """
    windows = [
        (number, window) for number, document in enumerate(documents) for window in _windows(document, length, start)
    ]
    losses, tokens = [0.0] * len(documents), [0] * len(documents)
    for batch in _batches(windows):
        ids, attention = _padded([window for _, window in batch])
        logits = model(
            input_ids=ids.to(model.device), attention_mask=attention.to(model.device), use_cache=False
        ).logits
        for (number, window), row in zip(batch, logits, strict=True):  # one at a time: float32 logits are large
            targets = torch.tensor(window[1:], device=row.device)
            loss = F.cross_entropy(row[: len(window) - 1].float(), targets, reduction="sum").item()
            if not math.isfinite(loss):
                raise EfxError("the model's logits are no numbers any more: its weights were damaged on the way")
            losses[number] += loss
            tokens[number] += len(window) - 1
    return CorpusLosses(losses, tokens)


def _windows(document: list[int], length: int, start: int | None) -> Iterator[list[int]]:
    head = [] if start is None else [start]
    body = document[1:] if document[:1] == head else document
    for begin in range(0, len(body), length - len(head)):
        window = head + body[begin : begin + length - len(head)]
        if len(window) > 1:
            yield window


def _batches(windows: list[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """Windows of about the same length together, no more than fit into `_BATCH_TOKENS`, but one at least."""
    batch: list[tuple[int, list[int]]] = []
    for window in sorted(windows, key=lambda window: len(window[1])):
        if batch and len(window[1]) * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _padded(windows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, padded behind, where no token sees it."""
    longest = max(map(len, windows))
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
        attention[row, : len(window)] = 1
    return ids, attention
