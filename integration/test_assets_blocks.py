"""Windows of tokens cut from documents, with the tiny tokenizer whose words are their own ids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.errors import EfxError
from integration.assets import token_blocks
from tests.support.tiny_llama import save_tiny_llama, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
DOCUMENTS = st.lists(st.lists(st.integers(3, 127), min_size=1, max_size=40), min_size=1, max_size=8)


def written(documents):
    return [" ".join(f"t{i}" for i in ids) for ids in documents]


def stream_of(documents):
    return [i for ids in documents for i in [*ids, TOKENIZER.eos_token_id]][:-1]


@given(DOCUMENTS, st.integers(1, 12), st.data())
def test_blocks_are_distinct_windows_of_the_joined_documents_in_order(documents, length, data):
    stream = stream_of(documents)
    if len(stream) < length:
        length = len(stream)
    limit = data.draw(st.integers(length, len(stream)))
    blocks = token_blocks(TOKENIZER, written(documents), length, limit)
    assert blocks.shape == (limit // length, length)
    assert blocks.dtype == torch.int64
    windows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    position = -1
    for block in blocks.tolist():
        position = windows.index(block, position + 1)  # raises if it is no later window


@given(DOCUMENTS)
def test_blocks_of_one_token_are_the_whole_stream(documents):
    stream = stream_of(documents)
    assert token_blocks(TOKENIZER, written(documents), 1, len(stream)).flatten().tolist() == stream


def test_blocks_are_spread_over_all_documents():
    documents = [[i] * 10 for i in range(3, 23)]
    blocks = token_blocks(TOKENIZER, written(documents), 5, 50)
    assert len(set(blocks[:, 1].tolist())) == 10
    assert blocks.max() >= 20


@pytest.mark.parametrize("limit", [0, 4, 100])
def test_windows_that_the_texts_cannot_fill_are_refused(limit):
    with pytest.raises(EfxError, match=f"cannot cut {limit} tokens into windows of 5: the texts have 7"):
        token_blocks(TOKENIZER, written([[3, 4, 5], [6, 7, 8]]), 5, limit)


def test_tiny_llama_is_the_same_at_every_call_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    one, other = tiny_llama(), tiny_llama()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert {p.dtype for p in one.parameters()} == {torch.float32}


def test_saved_tiny_llama_is_reloaded_with_its_tokenizer(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = save_tiny_llama(tmp_path / "tiny", num_hidden_layers=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("t5 t127 t3", return_tensors="pt").input_ids
    assert ids.tolist() == [[5, 127, 3]]
    torch.testing.assert_close(model(ids).logits, tiny_llama(num_hidden_layers=1)(ids).logits)
    assert model.config._name_or_path == str(path)
    assert tokenizer.eos_token_id == model.config.eos_token_id
