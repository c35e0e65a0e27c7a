"""A small model of Qwen2 type that was never quantized: trained here from scratch, in float32, on general text.

SmolLM2 and Gemma come out of files with few bits a value, which may flatter pipelines that quantize. This one checks.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_linear_schedule_with_warmup,
    set_seed,
)

from integration.assets import splits_with_validation, token_blocks
from integration.packages import ASSETS, make_once

CORPORA = ("wordnet", "sotu")
VOCABULARY = 8192
WINDOW = 256  # tokens
BATCH = 8  # windows of a step
TOKENS = 3_000_000  # seen in training, once over nearly all of the text: under an hour on two cores
END = "<|endoftext|>"


def scratch_model(tokens: int = TOKENS, root: Path = ASSETS) -> Path:
    """Hugging Face directory of the model, 12.6 million parameters in float32, trained if it is not there yet.

    6 layers, hidden 384, 6 query heads and 2 key-value heads, intermediate 1024, vocabulary 8,192, tied embeddings: the
    columns of every matrix divide by 128, the usual group of 4-bit weights.

    Args:
        tokens: to train on, once over windows that are spread over all of the text.

    Raises:
        EfxError: no network or no disk space.
    """

    def build(partial: Path) -> None:
        texts = [text for name in CORPORA for text in splits_with_validation(name)["train"]]
        tokenizer = train_tokenizer(texts)
        train(tokenizer, texts, tokens).save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    return make_once(root / f"scratch-{tokens}", build)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def train(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], tokens: int) -> Qwen2ForCausalLM:
    """A model that has seen so many tokens.

    Muon (https://kellerjordan.github.io/posts/muon) trains the matrices of the blocks: it learns more from little text
    than AdamW (40 steps end at a loss of 6.44, AdamW's at 7.11). AdamW trains embeddings and norms. Learning rates
    rise over a twentieth of the steps and fall to zero.
    """
    set_seed(0)
    end = tokenizer.eos_token_id
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = Qwen2ForCausalLM(config).train()
    windows = _windows(tokenizer, texts, tokens)
    batches = windows[torch.randperm(len(windows))].split(BATCH)
    matrices = [parameter for layer in model.model.layers for parameter in layer.parameters() if parameter.ndim == 2]
    ours = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ours]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)),
    ]
    steps = len(batches)
    schedules = [get_linear_schedule_with_warmup(optimizer, steps // 20, steps) for optimizer in optimizers]
    described = f"training {model.num_parameters() / 1e6:.1f}M parameters on {windows.numel():,} tokens"
    for batch in track(batches, described, console=Console(stderr=True)):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()
        model.zero_grad()
    return model.eval()


def _windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], tokens: int) -> torch.Tensor:
    """int64 [tokens // WINDOW, WINDOW]; the text again where there is not enough of it."""
    available = sum(len(ids) + 1 for ids in tokenizer(list(texts), verbose=False).input_ids) - 1
    whole, rest = divmod(tokens, available)
    parts = [token_blocks(tokenizer, texts, WINDOW, available)] * whole
    return torch.cat([*parts, token_blocks(tokenizer, texts, WINDOW, rest)] if rest >= WINDOW else parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m integration.scratch_model", description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--root", type=Path, default=ASSETS)
    given = parser.parse_args()
    print(scratch_model(given.tokens, given.root))
