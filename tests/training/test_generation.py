"""Text that the teacher writes: begun with the user's, gone on with by the teacher's own distribution."""

import pytest
import torch
from transformers import LlamaForCausalLM

from efx_plugin.training.generation import PROMPT, write_sequences
from tests.support.tiny_llama import tiny_llama

TEXT = torch.arange(3, 103).view(2, 50)


def pieces(text, size):
    return {tuple(row[first : first + size].tolist()) for row in text for first in range(len(row) - size + 1)}


@pytest.mark.parametrize("length, piece", [(50, 12), (6, 1)])
def test_every_sequence_begins_with_a_piece_of_the_text(length, piece):
    text = TEXT[:, :length]
    written = write_sequences(tiny_llama(), text, 40, start=None, seed=0, progress=False)
    assert written.shape == (40, length) and written.dtype == torch.int64
    begins = {tuple(row[:piece].tolist()) for row in written}
    assert begins <= pieces(text, piece) and len(begins) > 1
    assert not {tuple(row.tolist()) for row in written} & {tuple(row.tolist()) for row in text}


def test_prompts_are_short_in_long_sequences():
    text = torch.arange(3, 123).view(1, 120)
    written = write_sequences(tiny_llama(), text, 3, start=None, seed=0, progress=False)
    assert {tuple(row[:PROMPT].tolist()) for row in written} <= pieces(text, PROMPT)


def test_the_token_that_every_text_begins_with_stays_first():
    text = torch.cat([torch.full((2, 1), 1), TEXT], dim=1)
    written = write_sequences(tiny_llama(), text, 8, start=1, seed=0, progress=False)
    assert (written[:, 0] == 1).all()
    assert {tuple(row[1:12].tolist()) for row in written} <= pieces(TEXT, 11)


def test_a_seed_gives_the_same_text_and_leaves_other_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (
        write_sequences(tiny_llama(), TEXT, 5, start=None, seed=seed, progress=False) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_tokens_come_as_often_as_the_model_says_and_the_end_of_a_text_ends_nothing():
    model = tiny_llama()
    model.generation_config.update(eos_token_id=7, top_k=1, temperature=0.1)
    model.config.eos_token_id = 7
    wanted = torch.full((model.config.vocab_size,), -torch.inf)
    wanted[torch.tensor([7, 8])] = torch.tensor([0.25, 0.75]).log()

    class Biased(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = wanted.expand_as(outputs.logits)
            return outputs

    model.__class__ = Biased
    written = write_sequences(model, TEXT, 50, start=None, seed=0, progress=False)[:, 12:]
    assert set(written.unique().tolist()) == {7, 8}
    assert 0.2 < float((written == 7).float().mean()) < 0.3
