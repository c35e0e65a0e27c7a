"""Text that a model writes by itself, to calibrate on or to learn from: of the domain where text of it is scarce, and
of all sorts to keep what the model knew before.

Sampled from the model's own distribution, at temperature 1 and from the whole vocabulary, it is where the model knows
best what comes next, it is never the same twice, and it costs the user no document. (Text that a model writes is used
for calibration in arXiv 2410.17170, to train a quantized model in LLM-QAT, arXiv 2305.17888.)
"""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from efx_plugin.engine.compute_dtype import choose_for, computed_in
from efx_plugin.machine import to_accelerator

PROMPT = 16  # tokens of the user's text that a sequence begins with, a quarter of it at most
_TOGETHER = 32  # sequences


def write_sequences(
    model: PreTrainedModel, text: Tensor, count: int, *, start: int | None, seed: int, progress: bool = True
) -> Tensor:
    """Sequences that begin with a random piece of a text and go on as the model does.

    Args:
        model: see `go_on`.
        text: int64 [n, length] of token ids.
        count: of the sequences.
        start: the token that every sequence of `text` begins with, see `start_of_text`; None where there is none.
        seed: of the pieces and of what follows.
        progress: show a progress bar.

    Returns:
        int64 [count, length] of token ids, on the CPU.
    """
    length = text.shape[1]
    head = 0 if start is None else 1
    piece = max(1, min(PROMPT, length // 4) - head)
    lots = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(text), (count, 1), generator=lots)
    first = torch.randint(head, length - piece + 1, (count, 1), generator=lots)
    prompts = torch.cat([text[rows, :head].flatten(1), text[rows, first + torch.arange(piece)]], dim=1)
    return go_on(model, prompts, length, seed=seed, progress=progress)


@torch.no_grad()
def go_on(model: PreTrainedModel, prompts: Tensor, length: int, *, seed: int, progress: bool = True) -> Tensor:
    """Sequences that begin with prompts and go on as the model does.

    Args:
        model: a plain causal language model; its generation configuration is replaced, and it moves to the accelerator
            where there is one.
        prompts: int64 [count, tokens].
        length: of the sequences, prompts included.
        seed: of what follows.
        progress: show a progress bar.

    Returns:
        int64 [count, length] of token ids, on the CPU.
    """
    to_accelerator(model)
    model.eval()
    # An end of text is a token like any other: the next document follows.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_length=length)
    written = []
    with (
        computed_in(model, choose_for(model).dtype),
        torch.random.fork_rng(),
        tqdm(total=len(prompts) * length, desc="text that the model writes", unit="token", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for some in prompts.to(model.device).split(_TOGETHER):
            generate: Any = model.generate  # a Tensor or a Module to mypy
            written.append(generate(some, attention_mask=torch.ones_like(some)).cpu())
            bar.update(written[-1].numel())
    return torch.cat(written)
