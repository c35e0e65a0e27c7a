"""What a user brings arrives: the loaded model computes what the model in training computed, or one sentence says why
not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import merge_adapters
from efx_plugin.model.loading import inspect_sources
from tests.support.tiny_llama import save_tiny_llama, tiny_tokenizer
from tests.support.tiny_models import tiny_model

IDS = torch.arange(3, 23).unsqueeze(0)


def trained(model: torch.nn.Module, folder: Path, **options) -> torch.Tensor:
    """Save an adapter in which everything that can be trained has moved; returns the logits of the trained model."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    output = model.eval()(input_ids=IDS)
    return output.logits if "logits" in output else output.start_logits + 2 * output.end_logits


ENDS = {"embed_tokens", "lm_head"}
EMBEDDINGS = {
    "LoRA": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA of the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA of both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "not trained": {},
}


@pytest.mark.parametrize("vocabulary", [None, 144, 120], ids=["as it was", "larger", "smaller"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("options", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_trained_embeddings_arrive(tmp_path, options, tied, vocabulary):
    base, adapter = save_tiny_llama(tmp_path / "base", tie_word_embeddings=tied), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    expected = trained(model, adapter, **options)
    tiny_tokenizer(vocabulary or 128).save_pretrained(adapter)
    if vocabulary == 144 and not tied and len(ENDS & set(options.get("target_modules", ()))) == 1:
        with pytest.raises(EfxError, match=r"vocabulary of 144 tokens, the model has 128, and the added rows of"):
            inspect_sources(base, adapter)
        return
    sources = inspect_sources(base, adapter)
    loaded = sources.load_merged()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "stored")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    torch.testing.assert_close(logits(stored), expected, rtol=1e-4, atol=1e-4)
    assert any("vocabulary" in notice for notice in sources.notices) is (vocabulary is not None)


KINDS = {
    "plain": {},
    "every linear layer": {"target_modules": "all-linear"},
    "rsLoRA": {"use_rslora": True},
    "ranks and alphas by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "DoRA": {"use_dora": True},
    "LoRA's own bias": {"lora_bias": True},
    "biases": {"bias": "all"},
    "biases of LoRA": {"bias": "lora_only"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "a layer whole": {"modules_to_save": ["up_proj", "norm"]},
    "tied adapters": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_adapters_of_every_mergeable_kind_arrive(tmp_path, options):
    fields = {"attention_bias": True, "tie_word_embeddings": "ensure_weight_tying" in options}
    base, adapter = save_tiny_llama(tmp_path / "base", **fields), tmp_path / "adapter"
    expected = trained(AutoModelForCausalLM.from_pretrained(base), adapter, **options)
    torch.testing.assert_close(logits(inspect_sources(base, adapter).load_merged()), expected, rtol=1e-4, atol=1e-4)


CLASSIFIERS = [
    ("SEQ_CLS", AutoModelForSequenceClassification),
    ("TOKEN_CLS", AutoModelForTokenClassification),
    ("QUESTION_ANS", AutoModelForQuestionAnswering),
]


@pytest.mark.parametrize(("task", "kind"), CLASSIFIERS, ids=[task for task, _ in CLASSIFIERS])
def test_classifiers_keep_their_class_and_their_trained_head(tmp_path, base, task, kind):
    kind.from_pretrained(base, **({"num_labels": 3} if task != "QUESTION_ANS" else {})).save_pretrained(
        tmp_path / "head"
    )
    tiny_tokenizer(128).save_pretrained(tmp_path / "head")
    model = kind.from_pretrained(tmp_path / "head")
    expected = trained(model, tmp_path / "adapter", task_type=task)
    sources = inspect_sources(tmp_path / "head", tmp_path / "adapter")
    assert sources.model_class is type(model)
    loaded = sources.load_merged()
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert f"was trained for the task {task}, but the model is a LlamaForCausalLM" in refused(
        base, tmp_path / "adapter"
    )


def test_adapters_of_fused_experts_arrive(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = tiny_model("Mixtral", linearize=False, vocab_size=128)
    model.save_pretrained(base)
    tiny_tokenizer(128).save_pretrained(base)
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    expected = trained(AutoModelForCausalLM.from_pretrained(base), adapter, target_parameters=fused)
    loaded = inspect_sources(base, adapter).load()
    assert isinstance(loaded, PeftModel)  # attention keeps its adapters
    torch.testing.assert_close(logits(merge_adapters(loaded)), expected, rtol=1e-4, atol=1e-4)


def edit(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; a value of None takes the field away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture
def base(tmp_path):
    return save_tiny_llama(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    trained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(base: Path, adapter: Path | None = None) -> str:
    """The one sentence that says why, which names the culprit and a remedy."""
    with pytest.raises(EfxError) as caught:
        inspect_sources(base, adapter)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500, sentence
    return sentence


def rename(path: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({change(name): tensor for name, tensor in tensors.items() if change(name)}, path, {"format": "pt"})


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind is not PeftType.LORA] + ["NEWLORA"])
def test_another_kind_of_adapter_is_refused_by_its_name(base, adapter, kind):
    edit(adapter / "adapter_config.json", peft_type=kind)
    assert "train a LoRA adapter instead" in refused(base, adapter)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [5]),
        ("megatron_config", {"hidden_size": 64}),
        ("use_qalora", True),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("use_new_variant", True),
    ],
)
def test_a_kind_of_lora_that_cannot_be_merged_is_refused_by_its_name(base, adapter, field, value):
    edit(adapter / "adapter_config.json", **{field: value})
    sentence = refused(base, adapter)
    assert (value if field == "init_lora_weights" else field) in sentence


ADAPTERS = {
    "another prefix": (
        lambda a: rename(
            a / "adapter_model.safetensors", lambda name: name.replace(".layers.", ".language_model.layers.")
        ),
        "holds base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight, which has no place",
    ),
    "no prefix": (
        lambda a: rename(a / "adapter_model.safetensors", lambda name: name.removeprefix("base_model.model.")),
        "holds model.layers.0.self_attn.q_proj.lora_A",
    ),
    "one layer too many": (
        lambda a: rename(a / "adapter_model.safetensors", lambda name: name.replace("layers.1.", "layers.7.")),
        "model.layers.7.self_attn.q_proj.lora_A",
    ),
    "one tensor lost": (
        lambda a: rename(
            a / "adapter_model.safetensors", lambda name: "layers.1.self_attn.q_proj.lora_B" not in name and name
        ),
        "has no base_model.model.model.layers.1.self_attn.q_proj.lora_B",
    ),
    "cut off": (
        lambda a: (a / "adapter_model.safetensors").write_bytes((a / "adapter_model.safetensors").read_bytes()[:-7]),
        "adapter_model.safetensors",
    ),
    "empty": (lambda a: (a / "adapter_model.safetensors").write_bytes(b""), "adapter_model.safetensors"),
    "pickled and cut off": (
        lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
        "adapter_model.bin cannot be read",
    ),
    "without weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "config cut off": (
        lambda a: (a / "adapter_config.json").write_text('{"r": 4,'),
        "adapter_config.json cannot be read",
    ),
    "config of another kind": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds no JSON object"),
    "config without rank": (lambda a: edit(a / "adapter_config.json", r=0), "adapter"),
    "no module of that name": (lambda a: edit(a / "adapter_config.json", target_modules=["wq"]), "wq"),
    "task": (
        lambda a: edit(a / "adapter_config.json", task_type="SEQ_CLS"),
        "for the task SEQ_CLS, but the model is a Llama",
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_a_damaged_or_unfit_adapter_is_refused_in_one_sentence(base, adapter, spoil, expected):
    spoil(adapter)
    assert expected in refused(base, adapter)


def test_an_adapter_of_another_width_is_refused_with_both_shapes(tmp_path, adapter):
    sentence = refused(save_tiny_llama(tmp_path / "wide", hidden_size=96), adapter)
    assert "q_proj.lora_A.default.weight has the shape [4, 64] and would need [4, 96]" in sentence


def test_a_path_that_is_no_adapter_is_refused_with_the_one_that_is_meant(tmp_path, base, adapter):
    assert "there is no directory" in refused(base, tmp_path / "nowhere")
    assert "there is no directory" in refused(base, adapter / "adapter_config.json")
    assert "is a whole model, not an adapter" in refused(base, base)
    (output := tmp_path / "output").mkdir()
    assert "has no adapter_config.json" in refused(base, output)
    for step in (5, 10):
        shutil.copytree(adapter, output / f"checkpoint-{step}")
    assert refused(base, output).endswith(f"pass {output / 'checkpoint-10'}")


def test_a_pickled_adapter_arrives(base, adapter):
    expected = logits(inspect_sources(base, adapter).load_merged())
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(logits(inspect_sources(base, adapter).load_merged()), expected)


def test_an_adapter_for_fewer_layers_is_refused_with_the_first_that_it_lacks(tmp_path, adapter):
    deeper = save_tiny_llama(tmp_path / "deeper", num_hidden_layers=3)
    sentence = refused(deeper, adapter)
    assert "has no base_model.model.model.layers.2" in sentence and "pass the model that it was trained on" in sentence


def test_an_adapter_for_another_base_is_said(base, adapter):
    assert not inspect_sources(base, adapter).notices
    edit(adapter / "adapter_config.json", base_model_name_or_path="meta/Llama-0")
    assert "trained on meta/Llama-0" in " ".join(inspect_sources(base, adapter).describe())


def quantized(**config):
    return lambda m: edit(m / "config.json", quantization_config=config)


def to_shards(m: Path) -> None:
    AutoModelForCausalLM.from_pretrained(m).save_pretrained(m, max_shard_size="100KB")
    (m / "model.safetensors").unlink()


def without_a_shard(m: Path) -> None:
    to_shards(m)
    sorted(m.glob("model-*.safetensors"))[1].unlink()


def with_a_name_too_many(m: Path) -> None:
    to_shards(m)
    index = json.loads((m / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = "model-00009-of-00009.safetensors"
    (m / "model.safetensors.index.json").write_text(json.dumps(index))


def in_fp8(m: Path) -> None:
    path = m / "model.safetensors"
    tensors = {name: t.to(torch.float8_e4m3fn) if "_proj" in name else t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def stored_as(make):
    def replace(m: Path) -> None:
        shutil.rmtree(m)
        make().save_pretrained(m)

    return replace


def encoder():
    return BertForMaskedLM(BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


def encoder_decoder():
    return T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, num_layers=1, num_heads=2))


MODELS = {
    "bitsandbytes": (quantized(quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes, 4 bits"),
    "GPTQ": (quantized(quant_method="gptq", bits=4), "gptq"),
    "AWQ": (quantized(quant_method="awq", bits=4), "awq"),
    "FP8": (quantized(quant_method="fp8"), "fp8"),
    "MXFP4": (quantized(quant_method="mxfp4"), "mxfp4"),
    "compressed-tensors": (quantized(quant_method="compressed-tensors", config_groups={"g": {}}), "compressed-tensors"),
    "sparse": (
        quantized(quant_method="compressed-tensors", sparsity_config={"format": "sparse-bitmask"}),
        "--structure dense",
    ),
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "config cut off": (lambda m: (m / "config.json").write_text('{"model_type": '), "config.json cannot be read"),
    "unknown model_type": (
        lambda m: edit(m / "config.json", model_type="llama9", architectures=["Llama9ForCausalLM"]),
        "llama9",
    ),
    "unknown architecture": (
        lambda m: edit(m / "config.json", architectures=["Llama9ForCausalLM"]),
        "'Llama9ForCausalLM'",
    ),
    "no architecture": (
        lambda m: edit(m / "config.json", architectures=None, model_type="t5"),
        "names no architecture, and transformers",
    ),
    "code of its own": (
        lambda m: edit(
            m / "config.json",
            model_type="own",
            architectures=["OwnForCausalLM"],
            auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        ),
        "--trust-remote-code",
    ),
    "no head": (lambda m: edit(m / "config.json", architectures=["LlamaModel"]), "holds a LlamaModel, which is no"),
    "another head": (
        lambda m: edit(m / "config.json", architectures=["LlamaForSequenceClassification"]),
        "has no score.weight, which a LlamaForSequenceClassification needs",
    ),
    "tied by mistake": (
        lambda m: rename(m / "model.safetensors", lambda name: name != "lm_head.weight" and name),
        "set tie_word_embeddings to true",
    ),
    "a tensor lost": (
        lambda m: rename(m / "model.safetensors", lambda name: "layers.1.mlp.up_proj" not in name and name),
        "has no model.layers.1.mlp.up_proj.weight",
    ),
    "another width": (lambda m: edit(m / "config.json", intermediate_size=64), "mlp"),
    "adapter unmerged": (
        lambda m: rename(m / "model.safetensors", lambda name: name.replace("q_proj.", "q_proj.base_layer.")),
        "stored with its adapter unmerged",
    ),
    "cut off": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-7]),
        "model.safetensors",
    ),
    "FP8 without a config": (in_fp8, "stored as float8_e4m3fn, so the model is quantized"),
    "generation config cut off": (
        lambda m: (m / "generation_config.json").write_text('{"temperature": '),
        "generation_config.json cannot be read",
    ),
    "tokenizer with code": (
        lambda m: edit(
            m / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}
        ),
        "has code of its own",
    ),
    "a shard missing": (without_a_shard, "model-00002"),
    "a name too many in the index": (with_a_name_too_many, "model-00009"),
    "without weights": (lambda m: (m / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "pickled": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "pytorch_model.bin"),
    "GGUF": (lambda m: [(m / "config.json").unlink(), (m / "model.Q4_K.gguf").touch()], "GGUF"),
    "encoder": (stored_as(encoder), "BertForMaskedLM, an encoder"),
    "encoder-decoder": (stored_as(encoder_decoder), "T5ForConditionalGeneration, an encoder-decoder"),
    "without tokenizer": (
        lambda m: [path.unlink() for path in m.glob("tokenizer*")],
        "has no tokenizer: copy tokenizer.json",
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), MODELS.values(), ids=MODELS.keys())
def test_a_model_that_cannot_be_pruned_is_refused_in_one_sentence(base, spoil, expected):
    spoil(base)
    assert expected in refused(base)


@pytest.mark.parametrize("of_adapter", [True, False], ids=["adapter", "model"])
def test_weights_that_are_no_numbers_are_named_once_they_are_read(base, adapter, of_adapter):
    path = adapter / "adapter_model.safetensors" if of_adapter else base / "model.safetensors"
    tensors = load_file(path)
    name = max(tensors)
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    sources = inspect_sources(base, adapter)
    with pytest.raises(EfxError, match=rf"{path.parent} contains NaN or infinity"):
        sources.load()


def test_an_adapter_as_model_is_answered_with_the_right_command(base, adapter):
    assert f"efx prune {base} OUTPUT --adapter {adapter}" in refused(adapter)


def test_a_config_left_over_from_a_merge_is_ignored(base, adapter):
    expected = logits(inspect_sources(base, None).load())
    shutil.copy(adapter / "adapter_config.json", base)
    sources = inspect_sources(base, None)
    loaded = sources.load()
    assert torch.equal(logits(loaded), expected)
    assert loaded.config._name_or_path == str(base)
    assert "adapter_config.json" not in sources.companions


def test_an_adapter_beside_a_model_is_merged_once_or_not_at_all(base, adapter):
    expected = logits(inspect_sources(base, adapter).load_merged())
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, base)
    assert f"if the adapter is merged already, remove its files, else pass --adapter {base} too" in refused(base)
    assert "holds a model and an adapter beside it" in refused(base, adapter)
    torch.testing.assert_close(logits(inspect_sources(base, base).load_merged()), expected)


def test_a_trainers_output_as_model_is_answered_with_its_last_checkpoint(tmp_path, base):
    (output := tmp_path / "output").mkdir()
    for step in (5, 10):
        shutil.copytree(base, output / f"checkpoint-{step}")
    assert refused(output).endswith(f"pass {output / 'checkpoint-10'}")


def test_dense_remains_of_a_sparse_config_are_no_quantization(base):
    quantized(quant_method="compressed-tensors", sparsity_config={"format": "dense"})(base)
    assert logits(inspect_sources(base, None).load()).shape == (1, 20, 128)


def test_tensors_that_belong_to_no_part_of_the_model_are_said(base):
    tensors = load_file(base / "model.safetensors") | {"mtp.weight": torch.ones(2, 2)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert "1 tensors of" in " ".join(inspect_sources(base, None).describe())


@pytest.mark.parametrize("of_adapter", [True, False], ids=["of the adapter", "of the model"])
def test_the_tokenizer_is_the_adapters_where_it_has_one(base, adapter, of_adapter):
    if of_adapter:
        tokenizer = tiny_tokenizer(128)
        tokenizer.chat_template = "{{ messages[0].content }}"
        tokenizer.save_pretrained(adapter)
    (base / "generation_config.json").write_text("{}")
    (base / "preprocessor_config.json").write_text("{}")
    (adapter / "preprocessor_config.json").write_text("{}")
    (adapter / "training_args.bin").touch()
    sources = inspect_sources(base, adapter)
    expected = adapter if of_adapter else base
    assert f"tokenizer: from {expected}" in sources.describe()
    assert (sources.tokenizer().chat_template is not None) is of_adapter
    assert sources.companions["tokenizer.json"] == expected / "tokenizer.json"
    assert ("chat_template.jinja" in sources.companions) is of_adapter
    assert sources.companions["generation_config.json"].parent == base
    assert sources.companions["preprocessor_config.json"].parent == adapter
    assert f"preprocessor_config.json: from {adapter}" in sources.describe()
    assert not {"training_args.bin", "adapter_config.json", "adapter_model.safetensors"} & sources.companions.keys()


def test_tokens_without_embeddings_are_refused(base, adapter):
    tiny_tokenizer(130).save_pretrained(adapter)
    assert "trained on a vocabulary of 130 tokens, the model has 128" in refused(base, adapter)
    tiny_tokenizer(130).save_pretrained(base)  # some models come with such a tokenizer
    assert "has 130 tokens and the model 128" in " ".join(inspect_sources(base, None).notices)
