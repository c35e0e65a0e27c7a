"""A recipe that only quantizes keeps the zeros of a sparse model, or is refused."""

import pytest
import torch
from llmcompressor.recipe import Recipe
from loguru import logger
from peft import LoraConfig, get_peft_model

from efx_plugin.compress.zeros import Zeros, check_order
from efx_plugin.errors import EfxError
from tests.support.tiny_llama import tiny_llama

PRUNERS = {
    "EfficientXpertModifier": {"sparsity": 0.5},
    "SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "0:0", "targets": ["Linear"]},
    "WandaPruningModifier": {"sparsity": 0.5, "mask_structure": "0:0", "targets": ["Linear"]},
}
QUANTIZERS = {
    "GPTQModifier": {"scheme": "W8A8", "targets": ["Linear"]},
    "QuantizationModifier": {"scheme": "W8A8", "targets": ["Linear"]},
    "SpinQuantModifier": {"rotations": ["R1"]},
    "QuIPModifier": {"rotations": ["v"]},
}


def recipe(*names):
    import efx_plugin.modifier  # noqa: F401  (registers it)

    modifiers = {name: (PRUNERS | QUANTIZERS)[name] for name in names}
    return Recipe.from_dict({"a_stage": {f"{name}_modifiers": {name: given} for name, given in modifiers.items()}})


def sparse_llama(share=0.5):
    model = tiny_llama()
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < share] = 0
    return model


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_would_fill_pruned_weights_is_refused_unless_they_are_restored(pruner, quantizer):
    fills = quantizer in ("SpinQuantModifier", "QuIPModifier") or (
        quantizer == "GPTQModifier" and pruner != "EfficientXpertModifier"
    )
    if fills:
        with pytest.raises(EfxError, match=f"{quantizer} in the recipe would fill the weights that {pruner} has"):
            check_order(recipe(pruner, quantizer))
    else:
        check_order(recipe(pruner, quantizer))
    check_order(recipe(quantizer, pruner))


def test_zeros_are_restored_and_what_was_filled_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    model = sparse_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    zeros = Zeros(model, recipe("GPTQModifier"))
    zeros.restore(model)
    assert said == []
    weight = model.model.layers[1].mlp.up_proj.weight
    filled = int((weight.data[:3] == 0).sum())
    weight.data[:3] += 1.0
    zeros.restore(model)
    assert len(said) == 1 and f"had filled {filled:,} of the model's" in said[0]
    for name, old in before.items():
        if "_proj" in name:
            assert torch.equal(model.state_dict()[name] == 0, old == 0), name
    assert torch.equal(weight[:3], torch.where(before["model.layers.1.mlp.up_proj.weight"][:3] == 0, 0, weight[:3]))


def test_what_would_lose_the_zeros_for_good_is_refused():
    with pytest.raises(EfxError, match=r"GPTQModifier in the recipe prune nothing and the model is dense"):
        Zeros(sparse_llama(0.01), recipe("GPTQModifier"))
    with pytest.raises(EfxError, match=r"SpinQuantModifier in the recipe would fill the zeros of this sparse model"):
        Zeros(sparse_llama(), recipe("SpinQuantModifier"))
    adapted = get_peft_model(sparse_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(EfxError, match=r"the adapter would fill the zeros of model\.layers\.0\.self_attn\.q_proj"):
        Zeros(adapted, recipe("GPTQModifier"))
