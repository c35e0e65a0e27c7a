"""The real stand-in model and texts: conversion, splits without leakage, and that nothing is made twice."""

import random
import re
import time
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from efx_plugin.errors import EfxError
from integration import assets, packages
from integration.corpora import documents, words
from integration.expert import perplexity

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def directory():
    return assets.smollm2()


@pytest.fixture(scope="module")
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def legal():
    return assets.splits("legal")


def test_model_directory_is_stock_hugging_face_with_tied_embeddings_stored_once(directory, model):
    assert isinstance(model, LlamaForCausalLM)
    assert model.config._name_or_path == str(directory)
    assert directory.is_absolute()
    assert not hasattr(model.config, "quantization_config")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(directory / "model.safetensors", "pt") as stored:
        assert len(stored.keys()) == 2 + 30 * 9  # embedding, last norm; seven matrices and two norms a layer
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_reload_takes_less_than_two_seconds(directory):
    start = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(directory)
    assert time.perf_counter() - start < 2


def test_special_tokens_agree_between_model_generation_and_tokenizer(model, tokenizer):
    for role, token in (("bos", "<|im_start|>"), ("eos", "<|im_end|>"), ("pad", "<|im_end|>")):
        assert getattr(tokenizer, f"{role}_token") == token
        identity = tokenizer.convert_tokens_to_ids(token)
        assert getattr(tokenizer, f"{role}_token_id") == identity
        assert getattr(model.config, f"{role}_token_id") == identity
        assert getattr(model.generation_config, f"{role}_token_id") == identity


def test_tokenizer_splits_as_the_model_was_trained_and_is_lossless(tokenizer):
    text = "in 2004,  1995\n\n  1. The Licensor's “héllo” ▁ 3.0 (c)"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("in  2004") == ["in", "ĠĠ", "2", "0", "0", "4"]  # digits are cut off first
    assert tokenizer("Hello world").input_ids == [19556, 905]  # nothing is put in front


def test_greedy_answer_is_right_and_ends(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_perplexity_on_heldout_legal_text_is_that_of_a_trained_model(model, tokenizer, legal):
    blocks = assets.token_blocks(tokenizer, legal["heldout"], 256, 4096)
    assert 20 < perplexity(model, blocks) < 40


def ngram_set(text):
    """The definition, written again: hashes of the distinct word 8-grams of a text."""
    found = re.findall(r"\w+", text.lower())
    return {hash(tuple(found[i : i + 8])) for i in range(len(found) - 7)}


def overlap(a, b):
    return len(a & b) / min(len(a), len(b))


@pytest.mark.parametrize(("corpus", "seed", "sample"), [("legal", 0, 1000), ("legal", 1, 40), ("clinical", 0, 200)])
def test_no_near_duplicate_crosses_the_splits(corpus, seed, sample):
    """Held-out documents (all of them: legal, seed 0; else a sample) against every document of the others."""
    parts = {name: [ngram_set(text) for text in texts] for name, texts in assets.splits(corpus, seed).items()}
    assert all(all(part) for part in parts.values())
    pick = random.Random(0)
    heldout = pick.sample(parts["heldout"], min(sample, len(parts["heldout"])))
    calibration = pick.sample(parts["calibration"], 40)
    assert max(overlap(a, b) for a in heldout for b in parts["train"] + parts["calibration"]) <= 0.1
    assert max(overlap(a, b) for a in calibration for b in parts["train"]) <= 0.1


@pytest.mark.parametrize("corpus", ["legal", "clinical"])
def test_splits_deal_out_the_whole_corpus_in_the_intended_shares(corpus):
    parts = assets.splits(corpus)
    assert Counter(text for part in parts.values() for text in part) == Counter(
        document.text for document in documents(corpus)
    )
    size = {name: sum(len(words(text)) for text in part) for name, part in parts.items()}
    share = {name: count / sum(size.values()) for name, count in size.items()}
    assert share == pytest.approx({"train": 0.75, "calibration": 0.10, "heldout": 0.15}, abs=0.002)


def test_legal_texts_are_english_prose_without_their_headers(legal):
    texts = legal["train"] + legal["heldout"]
    assert not any(re.search(r"^(key|short_name|category|spdx_license_key):", text, re.M) for text in texts)
    assert sum(len(re.findall(r"\bthe\b", text.lower())) > 0 for text in texts) > 0.99 * len(texts)


def test_clinical_texts_are_plain_sentences():
    texts = [document.text for document in documents("clinical")]
    assert "Multicystic dysplasia of the kidney is characterized by" in " ".join(texts)
    assert not any("\\" in text or "\n" in text or text.startswith('"') for text in texts)


def test_nothing_is_fetched_or_made_a_second_time(directory, legal, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(packages.subprocess, "run", refuse)
    monkeypatch.setattr(assets, "save_gguf_as_safetensors", refuse)
    monkeypatch.setattr(assets, "split_families", refuse)
    assert assets.smollm2() == directory
    assert assets.splits("legal") == legal


def test_interrupted_conversion_leaves_no_directory(tmp_path, monkeypatch):
    def full(gguf, directory):
        assert gguf.stat().st_size == 98_362_432  # so half of a directory is there
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    source = assets.wheel(assets.MODEL_WHEEL)
    (tmp_path / source.name).symlink_to(source)
    monkeypatch.setattr(assets, "save_gguf_as_safetensors", full)
    with pytest.raises(EfxError, match=r"cannot make .*smollm2-135m-instruct .*No space left"):
        assets.smollm2(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == [source.name]
