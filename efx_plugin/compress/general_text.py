"""Text on anything, which an expert is healed on so that it does not forget what its base model knew.

Healed on its domain alone a pruned model forgets more of all else than the dense expert did. Where that is a model with
an adapter, the model without it knows what there was.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from efx_plugin.compress.calibration import start_of_text
from efx_plugin.engine.memory import return_freed_memory
from efx_plugin.model.loading import Sources, vocabulary_size
from efx_plugin.training.generation import go_on


def write_general(
    sources: Sources,
    text: Tensor,
    count: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: bool = True,
) -> Tensor:
    """Sequences that a model writes by itself, without its adapter; it is gone from memory afterwards.

    Args:
        sources: the model; the adapter is left aside.
        text: int64 [n, length] of token ids, for as long sequences.
        count: of the sequences.
        tokenizer: that of the text.
        seed: of what is written.
        progress: show a progress bar.

    Returns:
        int64 [count, length] of token ids, on the CPU.
    """
    prompts = _beginning(tokenizer, text).expand(count, 1)
    model = sources.load_base()
    if sources.vocabulary is not None and sources.vocabulary < vocabulary_size(model):
        model.resize_token_embeddings(sources.vocabulary)  # the expert embeds no others
    written = go_on(model, prompts, text.shape[1], seed=seed, progress=progress)
    del model
    return_freed_memory()
    return written


def _beginning(tokenizer: PreTrainedTokenizerBase, text: Tensor) -> Tensor:
    """The token behind which a text begins: that of its start, else of the end of another; where a tokenizer has
    neither, the first of the user's text."""
    start = start_of_text(tokenizer)
    if start is None:
        start = tokenizer.eos_token_id
    return text[0, :1] if start is None else torch.tensor([start])
