"""From documents to calibration sequences: which text a record holds, how it is tokenized, and how it is cut."""

from typing import Any

import datasets
import torch
from loguru import logger
from transformers import PreTrainedTokenizerBase

from efx_plugin.compress.documents import Document, describe, read_documents
from efx_plugin.errors import EfxError, one_line


def calibration_set(
    named: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, text_field: str | None = None
) -> datasets.Dataset:
    """Calibration sequences: documents one after the other, cut to `length`.

    Each document is tokenized as the tokenizer does it by itself, so it begins with the beginning-of-sequence token
    where the tokenizer adds one: models that were trained with it put much of their attention there, and its
    activations belong in the statistics. Where the tokenizer has an end-of-sequence token, a document ends with one.

    Args:
        named: a file or a data set, see `read_documents`. Of each record the field `text` is taken; else `messages`,
            a conversation, through the tokenizer's chat template; else `prompt` and `completion`, both text, which
            are joined, or both messages.
        text_field: the field to take in place of those, text or messages.

    Returns:
        Dataset of `input_ids` and `attention_mask`, at most `samples` sequences of exactly `length` tokens. That they
        are fewer is logged.

    Raises:
        EfxError: naming file, line and cause: it cannot be read, a record has no such field or something else in it,
            or there is too little text.
    """
    tokens: list[int] = []
    for document in read_documents(named):
        tokens += _tokens(_content(document, text_field), document, tokenizer)
        if len(tokens) >= samples * length:
            break
    count = min(samples, len(tokens) // length)
    if count == 0:
        raise EfxError(
            f"{named} has only {len(tokens)} tokens and one calibration sequence takes {length}: pass more text, or a "
            "smaller --length"
        )
    if count < samples:
        logger.warning(f"{named} has {len(tokens):,} tokens, enough for {count} sequences of {length}, not {samples}")
    sequences = torch.tensor(tokens[: count * length]).reshape(count, length).tolist()
    return datasets.Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * length] * count})


def _content(document: Document, text_field: str | None) -> Any:
    """The text or the messages of a record."""
    fields = document.fields
    if text_field is not None:
        if text_field not in fields:
            raise EfxError(f"{document.place} has no field `{text_field}`, only {_names(fields)}: name one of these")
        return fields[text_field]
    if "text" in fields:
        return fields["text"]
    if "messages" in fields:
        return fields["messages"]
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if type(prompt) is not type(completion) or not isinstance(prompt, str | list):
            raise EfxError(
                f"prompt and completion in {document.place} are {describe(prompt)} and {describe(completion)}: "
                "make both of them text, or lists of messages"
            )
        return prompt + completion
    raise EfxError(
        f"{document.place} has no field `text`, `messages` or `prompt` and `completion`, only {_names(fields)}: name "
        "the one that holds the text with --text-field"
    )


def _tokens(content: Any, document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(content, list) and content and all(isinstance(one, dict) for one in content):
        return _conversation(content, document, tokenizer)
    if not isinstance(content, str):
        raise EfxError(f"the text in {document.place} is {describe(content)}: make it text, or leave the record out")
    ids = _ids(content, document, tokenizer, add_special_tokens=True)
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _conversation(messages: list[dict[str, Any]], document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    for message in messages:
        if not isinstance(message.get("role"), str) or not (
            isinstance(message.get("content"), str | list) or message.get("tool_calls")
        ):
            raise EfxError(
                f"a message in {document.place} has no role and content, only {_names(message)}: write it as "
                '{"role": "user", "content": "..."}'
            )
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


def _names(fields: dict[str, Any]) -> str:
    """The names of the fields that hold anything."""
    return ", ".join(str(name) for name, value in fields.items() if value is not None) or "none at all"
