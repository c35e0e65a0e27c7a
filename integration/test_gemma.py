"""Gemma 3 270M out of its packages: the weights predict, and the tokenizer is the model's own."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

from integration.assets import splits
from integration.gemma import gemma3

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def directory():
    return gemma3()


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_words_are_the_tokens_that_the_model_was_trained_on(tokenizer):
    assert tokenizer("The quick brown fox").input_ids == [2, 818, 3823, 8864, 37423]
    assert len(tokenizer) == 262_144
    assert tokenizer.special_tokens_map == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }


@pytest.mark.parametrize(
    "text",
    [
        "  two blanks,   three,\ttab\n\n\nand 1,234 lines: naïve café — 東京 🙂 \u0001",
        "<h1>tags</h1> and _underscores_ ▁ [multimodal]",
    ],
)
def test_text_comes_back_as_it_was(tokenizer, text):
    back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert back == text.replace("▁", " ")  # which stands for a blank


def test_runs_of_blanks_and_lines_are_one_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("a   b\n\n\nc").input_ids) == [
        "<bos>",
        "a",
        "▁▁▁",
        "b",
        "\n\n\n",
        "c",
    ]


def test_the_model_predicts_text_that_it_has_not_seen(directory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert isinstance(model, Gemma3ForCausalLM)
    text = splits("sotu")["heldout"][0][:1500]
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert math.exp(model(ids, labels=ids).loss) < 30


def test_the_terms_of_use_lie_beside_the_weights(directory):
    assert "Gemma Terms of Use" in (directory / "GEMMA_TERMS.html").read_text()
