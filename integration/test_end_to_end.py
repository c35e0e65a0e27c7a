"""The whole way on the real model and real text, in small: LoRA, recipe, merge, sparse checkpoint, vLLM."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from efx_plugin.checkpoint import linear_bytes, load_sparse, save_sparse
from efx_plugin.model.adapters import merge_adapters
from integration.assets import smollm2, splits, token_blocks
from integration.demo import block_sparsities, calibration_set, load, prune, serve
from integration.expert import perplexity, round_to_stored, train_lora
from integration.served import difference
from integration.serving_models import kernel

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def text(tokenizer):
    """Blocks of 128 tokens: a little for training, calibration and evaluation."""
    sizes = {"train": 4096, "calibration": 2048, "heldout": 4096}
    return {part: token_blocks(tokenizer, splits("legal")[part], 128, size) for part, size in sizes.items()}


@pytest.fixture(scope="module")
def adapter(tokenizer, text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    train_lora(load(smollm2()), tokenizer, text["train"]).save_pretrained(directory)
    return directory


def adapted(adapter):
    return PeftModel.from_pretrained(load(smollm2()), adapter)


@pytest.fixture(scope="module")
def expert(tokenizer, text, adapter):
    model = adapted(adapter)
    prune(model.base_model.model, tokenizer, calibration_set(text["calibration"]), "expert_50.yaml")
    return round_to_stored(merge_adapters(model))


def test_every_block_is_half_zeros_after_the_merge(expert):
    sparsities = block_sparsities(expert)
    assert len(sparsities) == 30
    assert all(abs(sparsity - 0.5) < 0.002 for sparsity in sparsities.values())


def test_the_expert_is_clearly_better_than_wanda_on_heldout_text(expert, tokenizer, text, adapter):
    dense = merge_adapters(adapted(adapter))
    dense.config._name_or_path = str(smollm2())
    wanda = prune(dense, tokenizer, calibration_set(text["calibration"]), "wanda_50.yaml")
    round_to_stored(wanda)
    assert perplexity(expert, text["heldout"]) < 0.9 * perplexity(wanda, text["heldout"])


def test_vllm_serves_it_as_the_dense_checkpoint(expert, tokenizer, text, tmp_path):
    expert.save_pretrained(tmp_path / "dense")
    save_sparse(expert, tmp_path / "sparse", tokenizer=tokenizer, progress=False)
    size = linear_bytes(tmp_path / "sparse")
    assert size["sparse"] <= 0.57 * size["dense"]
    loaded = load_sparse(tmp_path / "sparse").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expert.state_dict().items())

    prompts = text["heldout"][:4, :24].tolist()
    dense, sparse = (serve(tmp_path / kind, prompts, 24) for kind in ("dense", "sparse"))
    assert difference(dense, sparse) is None
    assert (dense["operator"], sparse["operator"]) == ("dense", kernel())
