"""The model from scratch, on little text: it learns, it fits the benchmark, and it comes back from its files."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration import scratch_model
from integration.assets import splits_with_validation
from integration.expert import perplexity

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def texts():
    return splits_with_validation("wordnet")["train"][:3000]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return scratch_model.train_tokenizer(texts)


def test_the_tokenizer_gives_text_back(tokenizer):
    text = "Fellow-Citizens,\n\n  1,234 naïve dollars — 東京"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) <= scratch_model.VOCABULARY


def test_it_learns_in_float32_with_columns_that_quantize(texts, tokenizer, tmp_path):
    model = scratch_model.train(tokenizer, texts, 12 * scratch_model.WINDOW)
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert 10e6 < model.num_parameters() < 20e6
    assert all(linear.in_features % 128 == 0 for linear in linears)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    blocks = scratch_model._windows(tokenizer, texts, 2 * scratch_model.WINDOW)
    before = scratch_model.VOCABULARY
    assert math.isfinite(after := perplexity(model, blocks)) and after < before
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("a kind of animal", return_tensors="pt").input_ids
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("times", [0.4, 1, 2.3])
def test_the_text_is_seen_as_often_as_the_tokens_say(texts, tokenizer, times):
    some = texts[:300]
    available = sum(len(ids) + 1 for ids in tokenizer(some).input_ids) - 1
    tokens = int(times * available)
    windows = scratch_model._windows(tokenizer, some, tokens)
    assert tokens - (int(times) + 1) * scratch_model.WINDOW < windows.numel() <= tokens
