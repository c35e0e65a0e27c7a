"""`efx prune` on what users bring beside a causal language model: classifiers, vision-language models, companions."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from efx_plugin import load_sparse
from efx_plugin.cli import main
from tests.support.tiny_llama import save_tiny_llama, tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

RECIPES = Path(__file__).parent.parent / "recipes"
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN_VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2}
QWEN_TOKENS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
VISION_LANGUAGE = {
    "Llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 120,
    },
    "Gemma3": {"text_config": TEXT, "vision_config": VISION, "image_token_index": 120, "mm_tokens_per_image": 4},
    "Qwen2VL": {
        "text_config": TEXT | SECTIONS,
        "vision_config": QWEN_VISION | {"embed_dim": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "Qwen2_5_VL": {
        "text_config": TEXT | SECTIONS,
        "vision_config": QWEN_VISION | {"out_hidden_size": 64, "intermediate_size": 48},
        **QWEN_TOKENS,
    },
    "PaliGemma": {
        "text_config": {"model_type": "gemma", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "image_token_index": 120,
        "projection_dim": 64,
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "domain.txt"
    ids = torch.randint(3, 120, (60, 40), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n".join(" ".join(f"t{i}" for i in row) for row in ids))
    return path


def efx_prune(model: Path, text: Path, recipe: str = "expert_50", adapter: Path | None = None) -> str:
    """What `efx prune` says last where it fails, else nothing; the expert lies beside the model."""
    arguments = ["prune", model, model.parent / "expert", "--recipe", RECIPES / f"{recipe}.yaml", "--dataset", text]
    arguments += ["--samples", 8, "--length", 48, *(("--adapter", adapter) if adapter else ()), "--json"]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return stderr.getvalue().strip().splitlines()[-1] if exit.value.code else ""


def pruned(*arguments) -> transformers.PreTrainedModel:
    assert efx_prune(*arguments) == ""
    return load_sparse(arguments[0].parent / "expert").eval()


def stored(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(128).save_pretrained(folder)
    return folder


def zeros(model: torch.nn.Module, inside: str) -> list[float]:
    return [
        float((weight == 0).float().mean())
        for name, weight in model.named_parameters()
        if inside in name and name.endswith("_proj.weight")
    ]


@pytest.mark.parametrize("recipe", ["expert_50", "sparsegpt_50", "expert_50_w8a8"])
@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_classifier_is_pruned_as_such_and_its_head_stays(tmp_path, text, warnings, kind, recipe):
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels = 2 if kind == "QuestionAnswering" else 3
    model = getattr(transformers, f"LlamaFor{kind}")(config)
    expert = pruned(stored(model, tmp_path / "model"), text, recipe)
    assert type(expert) is type(model)
    head = "qa_outputs.weight" if kind == "QuestionAnswering" else "score.weight"
    assert torch.equal(expert.state_dict()[head], model.state_dict()[head])
    assert sum(zeros(expert, "layers.")) / 14 == pytest.approx(0.5, abs=0.05)
    if recipe == "expert_50":
        assert any("no loss on calibration data without" in warning and "'block'" in warning for warning in warnings)


@pytest.mark.parametrize("family", VISION_LANGUAGE)
@pytest.mark.parametrize("recipe", ["expert_50", "wanda_50"])
def test_of_a_vision_language_model_the_language_model_is_pruned(tmp_path, text, family, recipe):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    model = kind(kind.config_class(**VISION_LANGUAGE[family])).float()
    folder = stored(model, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    adapted = get_peft_model(
        kind.from_pretrained(folder),
        LoraConfig(r=4, target_modules=r".*language_model.*\.(q|up)_proj", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    expert = pruned(folder, text, recipe, tmp_path / "adapter")
    assert type(expert) is kind
    assert sum(zeros(expert, "language_model.")) / 14 == pytest.approx(0.5, abs=0.05)
    for name, weight in model.state_dict().items():
        if "language_model" not in name:
            torch.testing.assert_close(expert.state_dict()[name], weight, rtol=0, atol=0, msg=name)
    assert (tmp_path / "expert" / "preprocessor_config.json").read_text() == (
        folder / "preprocessor_config.json"
    ).read_text()


def test_companions_arrive_as_they_are_even_where_transformers_would_refuse_them(tmp_path, text):
    folder = save_tiny_llama(tmp_path / "model")
    odd = '{"temperature": 0.9, "top_p": 0.6, "do_sample": false, "eos_token_id": 2}'
    (folder / "generation_config.json").write_text(odd)
    adapter = tmp_path / "adapter"
    get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(adapter)
    tokenizer = tiny_tokenizer(127)
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    pruned(folder, text, "expert_50", adapter)
    expert = tmp_path / "expert"
    assert (expert / "generation_config.json").read_text() == odd
    assert transformers.AutoTokenizer.from_pretrained(expert).get_vocab() == tokenizer.get_vocab()
    assert transformers.AutoTokenizer.from_pretrained(expert).chat_template == tokenizer.chat_template
    assert not (expert / "adapter_config.json").exists()


@pytest.mark.parametrize("recipe", ["expert_50", "wanda_50"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_end_of_a_tied_model_leaves_the_other_alone(tmp_path, text, target, recipe):
    folder = save_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, target_modules=["q_proj", target], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    expert = pruned(folder, text, recipe, tmp_path / "adapter")
    assert json.loads((tmp_path / "expert" / "config.json").read_text())["tie_word_embeddings"] is False
    ends = {"lm_head": expert.lm_head.weight, "embed_tokens": expert.model.embed_tokens.weight}
    original = tiny_llama(tie_word_embeddings=True).lm_head.weight
    for name, weight in ends.items():
        assert torch.equal(weight, original) is (name != target)


def test_a_model_without_linear_layers_in_its_blocks_is_refused_before_its_weights_are_loaded(
    tmp_path, text, monkeypatch
):
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)
    folder = stored(transformers.GPT2LMHeadModel(config), tmp_path / "model")
    monkeypatch.setattr("efx_plugin.model.loading.Sources.load", None)
    assert "GPT2LMHeadModel has no torch.nn.Linear in its decoder blocks" in efx_prune(folder, text)
