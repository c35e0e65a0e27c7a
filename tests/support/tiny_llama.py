"""A tiny random Llama with its tokenizer, in memory and on disk."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_llama(**overrides):
    """A random Llama for unit tests: float32, in evaluation mode, the same at every call.

    2 layers, hidden 64, 4 query and 2 key-value heads, intermediate 96, vocabulary 128; `overrides` are
    fields of `LlamaConfig`. Weights are drawn wide enough (0.1) that attention is not uniform and the gates
    are not linear, as they would be at the usual 0.02.
    """
    fields = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(fields | overrides))).eval()


def tiny_tokenizer(vocab_size: int = 128):
    """A tokenizer for `tiny_llama` whose words are "t3", "t4", ... (number = id), separated by blanks."""
    names = ["<unk>", "<s>", "</s>"] + [f"t{i}" for i in range(3, vocab_size)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_tiny_llama(directory: Path, **overrides) -> Path:
    """Save `tiny_llama(**overrides)` and its tokenizer: a model directory as llm-compressor wants it."""
    model = tiny_llama(**overrides)
    model.save_pretrained(directory)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(directory)
    return Path(directory)
