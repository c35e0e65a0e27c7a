"""A small model of Qwen2 type that was never quantized: trained here from scratch, in float32, on general text.

SmolLM2 and Gemma come out of files with few bits a value, which may flatter pipelines that quantize. This one checks.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from integration.assets import splits_with_validation, token_blocks
from integration.packages import ASSETS, make_once

CORPORA = ("wordnet", "sotu")
VOCABULARY = 8192
WINDOW = 256  # tokens
BATCH = 8  # windows of a step
TOKENS = 1_500_000  # seen in training, once over a part of the text: under an hour on two cores
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
    """A model that has seen so many tokens; the learning rate rises over a twentieth of the steps and falls to zero."""
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
    model = Qwen2ForCausalLM(config)
    print(f"training {model.num_parameters() / 1e6:.1f}M parameters on {tokens:,} tokens, once", file=sys.stderr)
    windows = _windows(tokenizer, texts, tokens)
    with tempfile.TemporaryDirectory() as unused:  # the Trainer insists on an output directory
        arguments = TrainingArguments(
            output_dir=unused,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=len(windows) // BATCH // 20,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": window, "labels": window} for window in windows],
            data_collator=default_data_collator,
        )
        started = time.monotonic()
        trainer.train()
    print(f"{windows.numel() / (time.monotonic() - started):.0f} tokens/s", file=sys.stderr)
    return model.cpu().eval()


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
