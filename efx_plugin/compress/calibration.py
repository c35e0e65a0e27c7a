"""From documents to calibration sequences: how the text of a record is tokenized, and how it is cut."""

from collections.abc import Iterable
from typing import Any

import datasets
import torch
from loguru import logger
from transformers import PreTrainedTokenizerBase

from efx_plugin.compress.documents import Document, content_of, read_documents
from efx_plugin.errors import EfxError, one_line

# A text of which the tokenizer knows less says nothing about the domain.
_UNKNOWN = 0.5


def calibration_set(
    named: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    vocabulary: int,
    text_field: str | None = None,
) -> datasets.Dataset:
    """Calibration sequences: documents one after the other, cut to `length`; see `sequences`.

    Args:
        named: a file or a data set, see `read_documents`.
        vocabulary: tokens that the model embeds.
        text_field: the field to take of each record, see `content_of`.

    Returns:
        Dataset of `input_ids` and `attention_mask`, at most `samples` sequences of exactly `length` tokens. That they
        are fewer is logged.

    Raises:
        EfxError: naming file, line and cause: it cannot be read, a record has no such field or something else in it,
            or a token that the model does not embed; there is too little text, or the tokenizer knows hardly any of it.
    """

    def embedded(document: Document) -> list[int]:
        ids = tokens_of(document, tokenizer, text_field)
        if (largest := max(ids, default=0)) >= vocabulary:
            raise EfxError(
                f"{document.place} becomes the token {tokenizer.convert_ids_to_tokens(largest)!r}, number {largest}, "
                f"and the model embeds {vocabulary} tokens: pass the tokenizer that the model was trained with, or a "
                "model with resized embeddings"
            )
        return ids

    ids = sequences(map(embedded, read_documents(named)), samples, length, named, start=start_of_text(tokenizer))
    if (unknown := tokenizer.unk_token_id) not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
        share = float((ids == unknown).float().mean())
        if share > _UNKNOWN:
            raise EfxError(
                f"the tokenizer does not know {share:.0%} of the tokens in {named}: pass text in a language of the "
                "model"
            )
    return as_dataset(ids)


def as_dataset(ids: torch.Tensor) -> datasets.Dataset:
    """Token ids [samples, length] as `input_ids` and `attention_mask`, as llm-compressor takes them."""
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})


def sequences(
    documents: Iterable[list[int]],
    samples: int,
    length: int,
    named: str,
    *,
    start: int | None = None,
    purpose: str = "calibration",
) -> torch.Tensor:
    """Documents one after the other, cut to `length`.

    Args:
        documents: token ids, see `tokens_of`; no more are taken than it needs.
        samples: sequences at most; that they are fewer is logged.
        named: where the text comes from, for messages.
        start: the token that every sequence begins with, see `start_of_text`.
        purpose: what the sequences are for, for messages.

    Returns:
        int64 [sequences, length].

    Raises:
        EfxError: there is not enough text for one of them.
    """
    found: list[list[int]] = []
    tokens: list[int] = []
    seen = 0
    for document in documents:
        seen += len(document)
        tokens += document
        while len(found) < samples and len(tokens) >= length:
            head = [] if start is None or tokens[0] == start else [start]
            taken = length - len(head)
            found.append(head + tokens[:taken])
            del tokens[:taken]
        if len(found) == samples:
            break
    if not found:
        raise EfxError(
            f"{named} has only {seen} tokens and one {purpose} sequence takes {length}: pass more text, or a smaller "
            "--length"
        )
    if len(found) < samples:
        logger.warning(f"{named} has {seen:,} tokens, enough for {len(found)} sequences of {length}, not {samples}")
    return torch.tensor(found)


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text; None where it puts none.

    Models that were trained with it put much of their attention there and say little without it (Gemma 3: a perplexity
    in the thousands), so every sequence has to begin with it, those in the middle of a document too.
    """
    ids = tokenizer("")["input_ids"]
    return tokenizer.bos_token_id if ids[:1] == [tokenizer.bos_token_id] else None


def tokens_of(document: Document, tokenizer: PreTrainedTokenizerBase, text_field: str | None = None) -> list[int]:
    """The token ids of a record, see `content_of`.

    It is tokenized as the tokenizer does it by itself, so it begins with the beginning-of-sequence token where the
    tokenizer adds one: models that were trained with it put much of their attention there, and its activations belong
    in the statistics. Where the tokenizer has an end-of-sequence token, it ends with one. Messages go through the
    tokenizer's chat template. Blank text has no tokens.

    Raises:
        EfxError: the record holds no text, or the tokenizer cannot read it or makes no token of it.
    """
    content = content_of(document, text_field)
    if isinstance(content, list):
        return _conversation(content, document, tokenizer)
    if not content.strip():
        return []
    ids = _ids(content, document, tokenizer, add_special_tokens=True)
    end = tokenizer.eos_token_id
    if set(ids) <= {tokenizer.bos_token_id, end}:
        raise EfxError(
            f"the tokenizer makes no token of the text in {document.place}: pass the tokenizer that the model was "
            "trained with"
        )
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _conversation(messages: list[dict[str, Any]], document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        raise EfxError(
            f"{document.place} holds messages and the tokenizer has no chat template: pass an instruction-tuned model "
            "or an adapter with its tokenizer, or name a field of plain text with --text-field"
        )
    try:
        text = str(tokenizer.apply_chat_template(messages, tools=document.fields.get("tools"), tokenize=False))
    except Exception as error:  # templates raise what their authors chose
        raise EfxError(
            f"the tokenizer's chat template refuses the messages in {document.place}: {one_line(error)}"
        ) from error
    return _ids(text, document, tokenizer, add_special_tokens=False)  # the template wrote them


def _ids(text: str, document: Document, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    except Exception as error:  # such as half of a pair of surrogates, which JSON can hold
        raise EfxError(f"the tokenizer cannot read the text in {document.place}: {one_line(error)}") from error
    return ids
