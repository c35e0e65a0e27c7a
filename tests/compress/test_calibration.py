"""Calibration sequences hold the text that a record means, tokenized as the model knows it."""

import json

import pytest
from loguru import logger
from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing

from efx_plugin.compress.calibration import calibration_set
from efx_plugin.errors import EfxError
from tests.support.tiny_llama import tiny_tokenizer

BEGIN, END = 1, 2
TEMPLATE = "{% for m in messages %}{{ '<s> ' if loop.first }}t{{ m['role'] | length }} {{ m['content'] }} {% endfor %}"


def templated():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def with_beginning():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)]
    )
    return tokenizer


def without_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def sequences(tmp_path, records, tokenizer, *, samples=1, length=2, text_field=None, vocabulary=128):
    path = tmp_path / "domain.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    options = {"samples": samples, "length": length, "text_field": text_field, "vocabulary": vocabulary}
    return calibration_set(str(path), tokenizer, **options)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_tokenizer, [5, 6, END, 7, END]),
        (with_beginning, [BEGIN, 5, 6, END, BEGIN, 7, END]),
        (without_end, [5, 6, 7]),
    ],
)
def test_documents_have_the_special_tokens_of_the_tokenizer(tmp_path, make, expected):
    found = sequences(tmp_path, [{"text": "t5 t6"}, {"text": "t7"}], make(), length=len(expected))
    assert found["input_ids"] == [expected]
    assert found["attention_mask"] == [[1] * len(expected)]


def test_every_sequence_begins_with_the_beginning_of_text(tmp_path):
    """Models that were trained with that token are at a loss in the middle of a text without it."""
    records = [{"text": "t5 t6 t7 t8"}, {"text": "t9"}]
    found = sequences(tmp_path, records, with_beginning(), samples=3, length=3)
    assert found["input_ids"] == [[BEGIN, 5, 6], [BEGIN, 7, 8], [BEGIN, END, BEGIN]]


@pytest.mark.parametrize(
    ("make", "expected"),
    [(tiny_tokenizer, [[5, 6, 7], [8, 9, 10]]), (with_beginning, [[BEGIN, 5, 6], [BEGIN, 7, 8], [BEGIN, 9, 10]])],
)
def test_every_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path, make, expected):
    found = sequences(tmp_path, [{"text": "t5 t6 t7 t8 t9 t10"}], make(), samples=len(expected), length=3)
    assert found["input_ids"] == expected


def test_an_end_that_the_tokenizer_adds_itself_is_not_doubled(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    assert sequences(tmp_path, [{"text": "t5"}] * 2, tokenizer, length=4)["input_ids"] == [[5, END, 5, END]]


CHAT = [{"role": "user", "content": "t9"}, {"role": "assistant", "content": "t10"}]


@pytest.mark.parametrize(
    ("record", "text_field", "expected"),
    [
        ({"messages": CHAT}, None, [BEGIN, 4, 9, 9, 10]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, None, [BEGIN, 4, 9, 9, 10]),
        ({"dialogue": CHAT, "text": "t5"}, "dialogue", [BEGIN, 4, 9, 9, 10]),
        ({"prompt": "t5 ", "completion": "t6"}, None, [5, 6, END]),
        ({"content": "t5 t6", "text": "t9"}, "content", [5, 6, END]),
        ({"text": "t5 t6", "messages": CHAT}, None, [5, 6, END]),
    ],
)
def test_a_record_is_taken_as_what_it_is(tmp_path, record, text_field, expected):
    found = sequences(tmp_path, [record], templated(), length=len(expected), text_field=text_field)
    assert found["input_ids"] == [expected]


@pytest.mark.parametrize(
    ("record", "text_field", "words"),
    [
        ({"content": "t5"}, None, "has no field `text`, .* only content: name .* with --text-field"),
        ({"content": "t5", "body": "t6"}, "text", "no field `text`, only content, body"),
        ({"text": 5}, None, "is a number"),
        ({"text": ["t5"]}, None, "is a list"),
        ({"text": None}, None, r"is nothing \(null\)"),
        ({"text": {"a": 1}}, None, "is an object"),
        ({"text": "t5 \ud800"}, None, "the tokenizer cannot read the text"),
        ({"messages": []}, None, "is a list"),
        ({"messages": [{"from": "human", "value": "t5"}]}, None, "no role and content, only from, value"),
        ({"messages": [{"role": "user", "content": None}]}, None, "no role and content, only role"),
        ({"prompt": "t5", "completion": CHAT}, None, "prompt and completion in .* are text and a list"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path, record, text_field, words):
    first = {"text": "t5"} if text_field is None else {text_field: "t5"}
    with pytest.raises(EfxError, match=words) as refused:
        sequences(tmp_path, [first, record], templated(), length=50, text_field=text_field)
    assert "line 2 of" in str(refused.value) and "\n" not in str(refused.value)


def test_messages_need_a_template_that_takes_them(tmp_path):
    with pytest.raises(EfxError, match=r"line 1 of .* holds messages and the tokenizer has no chat template"):
        sequences(tmp_path, [{"messages": CHAT}], tiny_tokenizer())
    strict = templated()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(EfxError, match=r"chat template refuses the messages in line 1 of .*: roles must alternate"):
        sequences(tmp_path, [{"messages": CHAT}], strict)


def test_too_little_text_is_said_or_refused(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    assert len(sequences(tmp_path, [{"text": "t5"}] * 4, tiny_tokenizer(), samples=3, length=3)) == 2
    assert len(said) == 1 and "8 tokens, enough for 2 sequences of 3, not 3" in said[0]
    with pytest.raises(EfxError, match="has only 2 tokens and one calibration sequence takes 3"):
        sequences(tmp_path, [{"text": "t5"}], tiny_tokenizer(), length=3)


@pytest.mark.parametrize(("text", "token"), [("t5 <new> t6", "'<new>', number 128"), ("t5 t6", "'<end>', number 129")])
def test_a_token_that_the_model_does_not_embed_is_named_with_its_line(tmp_path, text, token):
    tokenizer = tiny_tokenizer(128)
    tokenizer.add_tokens(["<new>"])
    if "<new>" not in text:
        tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(EfxError, match=rf"line 1 of .* becomes the token {token}, and the model embeds 128 tokens"):
        sequences(tmp_path, [{"text": text}], tokenizer)
    assert len(sequences(tmp_path, [{"text": text}], tokenizer, vocabulary=130)) == 1


def test_blank_texts_have_no_tokens_and_other_texts_have_some(tmp_path):
    found = sequences(
        tmp_path, [{"text": "t5"}, {"text": ""}, {"text": " \n"}, {"text": "t6"}], tiny_tokenizer(), length=4
    )
    assert found["input_ids"] == [[5, END, 6, END]]
    with pytest.raises(EfxError, match="has only 0 tokens"):
        sequences(tmp_path, [{"text": " "}] * 50, tiny_tokenizer())
    mute = tiny_tokenizer()
    mute.backend_tokenizer.normalizer = normalizers.Replace(Regex("t[0-9]+"), "")
    with pytest.raises(
        EfxError, match=r"makes no token of the text in line 1 of .*: pass the tokenizer that the model"
    ):
        sequences(tmp_path, [{"text": "t5 t6"}], mute)


def test_text_that_the_tokenizer_does_not_know_is_refused(tmp_path):
    assert len(sequences(tmp_path, [{"text": "t5 t6 ?"}], tiny_tokenizer(), length=4)) == 1
    with pytest.raises(EfxError, match=r"does not know 75% of the tokens in .*domain\.jsonl"):
        sequences(tmp_path, [{"text": "one two three t6"}], tiny_tokenizer(), length=4)
