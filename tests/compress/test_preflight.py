"""What the recipe cannot do to the model is refused before a weight is loaded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from loguru import logger
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from efx_plugin.compress.preflight import preflight
from efx_plugin.compress.recipe import find_recipe
from efx_plugin.compress.request import PruneRequest
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.model.loading import Sources
from efx_plugin.recipe_files import builtin_recipes
from tests.support.tiny_llama import save_tiny_llama, tiny_llama, tiny_tokenizer
from tests.support.tiny_models import tiny_model

EXPERT = "EfficientXpertModifier: {{sparsity: 0.5, {}}}"
QUANTIZE = "QuantizationModifier: {{targets: [Linear], ignore: [lm_head], scheme: {}}}"


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    monkeypatch.setattr(Sources, "load", None)


def request(tmp_path: Path, recipe: str, model: Path | None = None, adapter: Path | None = None) -> PruneRequest:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": " ".join(f"t{i}" for i in range(3, 100))}))
    if ":" in recipe:
        (tmp_path / "recipe.yaml").write_text(f"a_stage:\n  x_modifiers:\n    {recipe}\n")
        recipe = str(tmp_path / "recipe.yaml")
    model = model or save_tiny_llama(tmp_path / "model")
    return PruneRequest(model, tmp_path / "out", find_recipe(recipe), str(text), adapter, samples=1, length=16)


def adapter_on(tmp_path: Path, targets: str | list[str], **options) -> Path:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=targets, **options)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (EXPERT.format("targets: ['re:.*nothing']"), "match no linear layer of LlamaForCausalLM"),
        (EXPERT.format("ignore: []"), "lm_head is targeted but lies outside the decoder blocks"),
        (EXPERT.format("mask_structure: '48:96'"), "'48:96' does not divide the 64 inputs of model.layers.0.self_attn"),
        (EXPERT.format("mask_structure: '2:4', allocation: layer"), "allocation 'layer' has nothing to spread"),
        ("EfficientXpertModifier: {sparsity: {'re:.*q_proj': 0.5}}", "no key of sparsity .* matches .*k_proj"),
        ("published_50", "repair 'paper' moves a LoRA adapter and model.layers.0.self_attn.q_proj has none"),
        (
            "WandaPruningModifier: {sparsity: 0.5, targets: [Nothing]}",
            r"\['Nothing'\] of WandaPruningModifier .* match",
        ),
        ("SparseGPTModifier: {sparsity: 1.5, targets: [Linear]}", "SparseGPTModifier in the recipe has sparsity 1.5"),
        (
            QUANTIZE.format("W8A16"),
            "groups of 128 weights, which do not divide the 64 inputs of .*layers.0.self_attn.q",
        ),
        (QUANTIZE.format("W4A16"), "groups of 128 weights, which do not divide the 64 inputs"),
        (QUANTIZE.format("W4A16_ASYM"), "the model that this recipe makes is quantized asymmetrically"),
    ],
)
def test_a_recipe_that_does_not_suit_the_model_is_refused(tmp_path, recipe, said):
    with pytest.raises(EfxError, match=said):
        preflight(request(tmp_path, recipe))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["not on every layer", "DoRA, which is merged"])
def test_a_repair_of_the_adapter_needs_one_on_every_layer(tmp_path, options):
    adapter = adapter_on(tmp_path, ["q_proj"] if not options else "all-linear", **options)
    layer = "k_proj" if not options else "q_proj"
    with pytest.raises(EfxError, match=f"model.layers.0.self_attn.{layer} has none that is active and not merged"):
        preflight(request(tmp_path, "published_50", adapter=adapter))


def test_what_suits_the_model_passes(tmp_path):
    adapter = adapter_on(tmp_path, "all-linear")
    assert len(preflight(request(tmp_path, "published_50", adapter=adapter)).calibration) == 1
    for recipe in builtin_recipes().keys() - {"published_50"}:
        preflight(request(tmp_path, recipe))


@pytest.mark.parametrize(("architecture", "said"), [("JetMoe", 1), ("Mixtral", 0)])
def test_weights_that_are_no_linear_layers_are_said_to_stay(tmp_path, monkeypatch, architecture, said):
    warned = []
    monkeypatch.setattr(logger, "warning", warned.append)
    model = tiny_model(architecture, linearize=False, vocab_size=128)
    model.save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    preflight(request(tmp_path, "wanda_50", tmp_path / "moe"))
    assert len(warned) == said
    assert all("stay as they are, such as model.layers.0" in line for line in warned)


def test_a_classifier_has_no_loss_to_allocate_by_and_writes_no_text(tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(save_tiny_llama(tmp_path / "base"), num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    with pytest.raises(EfxError, match="no loss on calibration data without labels, so allocation 'layer' cannot"):
        preflight(request(tmp_path, EXPERT.format("allocation: layer"), tmp_path / "classifier"))
    writing = replace(request(tmp_path, "expert_50", tmp_path / "classifier"), generate=32)
    with pytest.raises(UsageError, match=r"--generate asks the model for text, which a .*Classification does not"):
        preflight(writing)
