"""Text on anything: written by the model without its adapter, behind the token that begins a text."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from efx_plugin.compress.general_text import write_general
from efx_plugin.model.loading import inspect_sources
from efx_plugin.training.generation import go_on
from tests.support.tiny_llama import save_tiny_llama, tiny_llama, tiny_tokenizer

TEXT = torch.arange(3, 103).view(2, 50)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(1.0)
    adapted.save_pretrained(folder)
    return folder


def with_start(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def without_end(tokenizer):
    tokenizer.eos_token = None


@pytest.mark.parametrize(
    "change, first", [(with_start, 1), (lambda tokenizer: None, 2), (without_end, 3)], ids=["start", "end", "neither"]
)
def test_the_model_without_its_adapter_writes(adapter, tmp_path, change, first):
    model, tokenizer = save_tiny_llama(tmp_path / "model"), tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(model)
    sources = inspect_sources(model, adapter)
    written = write_general(sources, TEXT, 3, tokenizer=sources.tokenizer(), seed=4, progress=False)
    prompts = torch.full((3, 1), first)
    assert torch.equal(written, go_on(tiny_llama(), prompts, 50, seed=4, progress=False))
    assert written.shape == (3, 50) and written.dtype == torch.int64 and len(written.unique(dim=0)) == 3
    assert not torch.equal(written, go_on(sources.load_merged(), prompts, 50, seed=4, progress=False))


def test_no_token_is_written_that_the_expert_does_not_embed(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    tiny_tokenizer(100).save_pretrained(model)
    smaller = tiny_llama()
    smaller.resize_token_embeddings(100)
    get_peft_model(smaller, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    sources = inspect_sources(model, tmp_path / "adapter")
    assert sources.vocabulary == 100
    written = write_general(sources, TEXT, 8, tokenizer=sources.tokenizer(), seed=0, progress=False)
    assert int(written.max()) < 100
