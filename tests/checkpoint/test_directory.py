"""Whole checkpoint directories: saved from memory, exported from disk, loaded again."""

import builtins
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import efx_plugin
from efx_plugin.checkpoint import expand, export_checkpoint, linear_bytes, load_sparse, read_index, save_sparse
from efx_plugin.checkpoint.summary import summarize
from efx_plugin.errors import EfxError, SparseCheckpointError


def make_model(tied=False, structure="unstructured", dtype=torch.bfloat16) -> LlamaForCausalLM:
    """Grouped queries, widths that are no multiple of 8 (unless 2:4), half of every projection zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=54 if structure == "unstructured" else 48,
        intermediate_size=102 if structure == "unstructured" else 100,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            if structure == "unstructured":
                weight.data[torch.rand(weight.shape) < 0.5] = 0
            else:
                fours = weight.data.view(-1, 4)
                fours.scatter_(1, fours.abs().topk(2, dim=1, largest=False).indices, 0)
        elif name.endswith(".bias"):
            weight.data.normal_()
    return model


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert weight.dtype == found[name].dtype
        assert torch.equal(weight, found[name]), name


def quantization_config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and its sparse checkpoint in one shard; not to be changed."""
    model = make_model()
    directory = tmp_path_factory.mktemp("saved") / "sparse"
    save_sparse(model, directory)
    return model, directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model and its dense directory, as transformers saves it; not to be changed."""
    model = make_model()
    directory = tmp_path_factory.mktemp("dense") / "dense"
    model.save_pretrained(directory, max_shard_size="30KB")
    return model, directory


@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_saved_and_loaded_is_the_same_model(tmp_path, tied, structure, max_shard_size, dtype):
    model = make_model(tied, structure, dtype)
    save_sparse(model, tmp_path / "sparse", max_shard_size=max_shard_size)
    loaded = load_sparse(tmp_path / "sparse")
    assert_same(model, loaded)
    assert type(loaded) is LlamaForCausalLM
    assert not loaded.training
    assert getattr(loaded.config, "quantization_config", None) is None
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert sorted(os.listdir(tmp_path)) == ["sparse"]
    shards = sorted(path.name for path in (tmp_path / "sparse").glob("*.safetensors"))
    assert (tmp_path / "sparse" / "model.safetensors.index.json").exists() == (max_shard_size == 20_000)
    assert (len(shards) > 1) == (max_shard_size == 20_000)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("cls", "config", "compressed"),
    [
        (Qwen2ForCausalLM, Qwen2Config(**SIZES), 7),
        (Phi3ForCausalLM, Phi3Config(**SIZES), 4),  # fused on disk
        (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=2), 4),  # experts have other names on disk
    ],
    ids=["qwen2", "phi3", "mixtral"],
)
def test_other_architectures_come_back_too(tmp_path, cls, config, compressed):
    model = cls(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[torch.rand(module.weight.shape) < 0.5] = 0
    save_sparse(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "dense")
    export_checkpoint(tmp_path / "dense", tmp_path / "exported")
    for name in ("saved", "exported"):
        assert_same(model, load_sparse(tmp_path / name))
        assert sum(tensor.endswith(".compressed") for tensor in read_index(tmp_path / name)) == compressed
    assert sorted(read_index(tmp_path / "saved")) == sorted(read_index(tmp_path / "exported"))


@pytest.mark.parametrize("tied", [False, True])
def test_exported_from_disk_is_what_is_saved_from_memory(tmp_path, tied):
    model = make_model(tied)
    save_sparse(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    export_checkpoint(tmp_path / "dense", tmp_path / "exported")
    saved, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "exported"))
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    assert (tmp_path / "saved" / "config.json").read_bytes() == (tmp_path / "exported" / "config.json").read_bytes()
    assert_same(model, load_sparse(tmp_path / "exported"))


def test_tied_embeddings_are_stored_once_even_if_the_source_has_both(tmp_path):
    model = make_model(tied=True)
    model.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    export_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert "lm_head.weight" not in read_index(tmp_path / "sparse")
    assert_same(model, load_sparse(tmp_path / "sparse"))


def test_a_loaded_model_can_be_saved_and_pruned_again(tmp_path, saved):
    model, directory = saved
    loaded = load_sparse(directory)
    loaded.save_pretrained(tmp_path / "dense")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    save_sparse(loaded, tmp_path / "sparse")
    assert_same(model, load_sparse(tmp_path / "sparse"))


def test_the_config_is_the_models_with_the_storage_described(saved):
    model, directory = saved
    config = json.loads((directory / "config.json").read_text())
    described = config.pop("quantization_config")
    assert config.pop("transformers_weights").startswith("\nThis checkpoint is not damaged: it is sparse")
    assert config == json.loads(model.config.to_json_string()) | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
    }
    sparsity = described.pop("sparsity_config")
    assert described == {
        "quant_method": "compressed-tensors",
        "version": "0.13.0",
        "config_groups": {},
        "format": "dense",
    }
    assert 0.48 < sparsity.pop("global_sparsity") < 0.52
    assert sparsity == {
        "format": "sparse-bitmask",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "sparsity_structure": "unstructured",
    }
    assert not hasattr(model.config, "quantization_config")


def test_only_linears_that_get_smaller_are_compressed_and_the_others_ignored(tmp_path):
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(1)  # no zeros at all
    model.lm_head.weight.data.zero_()  # output embeddings stay as they are
    model.model.embed_tokens.weight.data[5:].zero_()
    save_sparse(model, tmp_path / "sparse")
    assert quantization_config(tmp_path / "sparse")["sparsity_config"]["ignore"] == [
        "lm_head",
        "model.layers.1.mlp.down_proj",
    ]
    index = read_index(tmp_path / "sparse")
    compressed = {name.removesuffix(".compressed") for name in index if name.endswith(".compressed")}
    assert len(compressed) == 13
    assert all(name.endswith("_proj") for name in compressed)
    for name in ("lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp.down_proj"):
        assert f"{name}.weight" in index
    assert "model.layers.0.self_attn.q_proj.bias" in index
    assert_same(model, load_sparse(tmp_path / "sparse"))


def test_what_hosts_fuse_is_stored_alike(tmp_path):
    """vLLM fuses q, k and v and takes them all sparse or none, even when one of them lost nothing."""
    model = make_model()
    model.model.layers[0].self_attn.k_proj.weight.data.fill_(1)
    save_sparse(model, tmp_path / "sparse")
    assert quantization_config(tmp_path / "sparse")["sparsity_config"]["ignore"] == ["lm_head"]
    assert "model.layers.0.self_attn.k_proj.compressed" in read_index(tmp_path / "sparse")
    assert_same(model, load_sparse(tmp_path / "sparse"))


def test_auto_chooses_24_only_if_every_sparse_weight_is(tmp_path):
    model = make_model(structure="2:4")
    model.model.layers[0].mlp.down_proj.weight.data.fill_(1)  # dense, so it has no say
    save_sparse(model, tmp_path / "all")
    sparsity = quantization_config(tmp_path / "all")["sparsity_config"]
    assert (sparsity["format"], sparsity["sparsity_structure"]) == ("sparse-24-bitmask", "2:4")
    assert "model.layers.0.mlp.down_proj" in sparsity["ignore"]

    save_sparse(model, tmp_path / "asked", structure="sparse-bitmask")
    assert quantization_config(tmp_path / "asked")["sparsity_config"]["format"] == "sparse-bitmask"

    model.model.layers[0].mlp.gate_proj.weight.data[0] = torch.tensor([1, 1, 1, 0] * 12)
    save_sparse(model, tmp_path / "mixed")
    assert quantization_config(tmp_path / "mixed")["sparsity_config"]["format"] == "sparse-bitmask"
    with pytest.raises(EfxError, match=r"layers\.0\.mlp\.gate_proj\.weight is not 2:4 sparse .* structure=\"auto\""):
        save_sparse(model, tmp_path / "refused", structure="sparse-24-bitmask")
    assert not (tmp_path / "refused").exists()
    for name in ("all", "asked", "mixed"):
        compressed = load_sparse(tmp_path / name)
        assert compressed.model.layers[1].mlp.gate_proj.weight.count_nonzero() > 0


@pytest.mark.parametrize("zeros", ["none", "unstructured, too few to gain"])
def test_auto_never_chooses_a_format_that_parts_what_hosts_fuse(tmp_path, zeros):
    """vLLM fuses gate and up and takes both sparse or none; sparse-24-bitmask cannot store a dense weight."""
    model = make_model(structure="2:4")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1)
    if zeros != "none":
        model.model.layers[0].mlp.up_proj.weight.data[0, :5] = 0
    save_sparse(model, tmp_path / "sparse")
    sparsity = quantization_config(tmp_path / "sparse")["sparsity_config"]
    assert (sparsity["format"], sparsity["ignore"]) == ("sparse-bitmask", ["lm_head"])
    assert_same(model, load_sparse(tmp_path / "sparse"))


def test_negative_zeros_become_zeros(tmp_path):
    model = make_model()
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            weight.data[weight.data == 0] = -0.0
    save_sparse(model, tmp_path / "sparse")
    loaded = load_sparse(tmp_path / "sparse")
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight)
    assert not weight.signbit()[weight == 0].any()


def test_shards_stay_below_their_size_and_keep_the_parts_of_a_weight_together(tmp_path):
    save_sparse(make_model(), tmp_path / "sparse", max_shard_size="20KB")
    index = read_index(tmp_path / "sparse")
    files: dict[str, set[str]] = {}
    for name, stored in index.items():
        if name.rpartition(".")[2] in ("compressed", "bitmask", "row_offsets", "shape"):
            files.setdefault(name.rpartition(".")[0], set()).add(stored.file)
    assert all(len(found) == 1 for found in files.values())
    for file in {stored.file for stored in index.values()}:
        assert sum(stored.nbytes for stored in index.values() if stored.file == file) <= 20_000
    listed = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    assert listed["metadata"]["total_size"] == sum(stored.nbytes for stored in index.values())


def test_bytes_of_the_linears(saved):
    model, directory = saved
    index = read_index(directory)
    parts = ("compressed", "bitmask", "row_offsets", "shape")
    assert linear_bytes(directory) == {
        "dense": sum(w.nbytes for name, w in model.named_parameters() if name.endswith("_proj.weight")),
        "sparse": sum(stored.nbytes for name, stored in index.items() if name.rpartition(".")[2] in parts),
    }


# What comes along.


class Tokenizer:
    def save_pretrained(self, directory):
        (Path(directory) / "tokenizer.json").write_text("{}")


RECIPE = "prune_stage:\n  prune_modifiers:\n    EfficientXpertModifier: {sparsity: 0.5}\n"


def test_companions_of_a_saved_model(tmp_path):
    model = make_model()
    model.generation_config = GenerationConfig(max_new_tokens=7)
    metadata = {"base_model": "some/base", "calibration": "licence texts", "figures": {"perplexity": 26.1}}
    save_sparse(model, tmp_path / "sparse", tokenizer=Tokenizer(), recipe=RECIPE, metadata=metadata)
    assert (tmp_path / "sparse" / "tokenizer.json").exists()
    assert (tmp_path / "sparse" / "recipe.yaml").read_text() == RECIPE
    assert load_sparse(tmp_path / "sparse").generation_config.max_new_tokens == 7
    card = (tmp_path / "sparse" / "README.md").read_text()
    for expected in (
        "licence texts",
        "| perplexity | 26.1 |",
        "EfficientXpertModifier",
        "efx-plugin",
        "sparse-bitmask",
    ):
        assert expected in card
    assert "Sparsity support has been removed" in card
    assert re.search(r"\| down_proj \| 2 \| (49|50)\.\d% \|", card)

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    save_sparse(model, tmp_path / "again", recipe=tmp_path / "recipe.yaml")
    assert (tmp_path / "again" / "recipe.yaml").read_text() == RECIPE


def test_an_invalid_generation_config_does_not_cost_the_weights(tmp_path, caplog):
    model = make_model()
    model.generation_config = GenerationConfig(temperature=0.9, do_sample=False, max_new_tokens=7)
    save_sparse(model, tmp_path / "sparse")
    assert "correct generation_config.json" in caplog.text and "temperature" in caplog.text
    stored = json.loads((tmp_path / "sparse" / "generation_config.json").read_text())
    assert (stored["temperature"], stored["max_new_tokens"]) == (0.9, 7)
    assert_same(model, load_sparse(tmp_path / "sparse"))
    (tmp_path / "sparse" / "generation_config.json").write_text('{"temperature": ')
    with pytest.raises(SparseCheckpointError, match=r"generation_config\.json is not the JSON it should hold"):
        load_sparse(tmp_path / "sparse")


def test_a_tokenizer_that_cannot_be_stored_does_not_cost_the_weights(tmp_path, caplog):
    class Broken(Tokenizer):
        def save_pretrained(self, directory):
            super().save_pretrained(directory)
            raise TypeError("no template")

    model = make_model()
    save_sparse(model, tmp_path / "sparse", tokenizer=Broken())
    assert "cannot be stored (TypeError: no template): copy the base model's there" in caplog.text
    assert not (tmp_path / "sparse" / "tokenizer.json").exists()
    assert_same(model, load_sparse(tmp_path / "sparse"))


def test_companions_of_an_exported_directory(tmp_path, dense):
    source = tmp_path / "source"
    shutil.copytree(dense[1], source)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "recipe.yaml"):
        (source / name).write_text(f"the {name}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for name in ("pytorch_model.bin", "model.gguf", ".hidden"):
        (source / name).write_text("not this")
    (source / "README.md").write_text("the base model's card")
    (source / "logs").mkdir()
    export_checkpoint(source, tmp_path / "sparse")
    found = {str(path.relative_to(tmp_path / "sparse")) for path in (tmp_path / "sparse").rglob("*") if path.is_file()}
    assert found == {
        "README.md",
        "SHA256SUMS",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer.model",
    }
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "- Base model: source\n" in card
    assert str(tmp_path) not in card
    assert "the recipe.yaml" in card


# What it was made of, and what the hub is told.

MADE_OF = {
    "base_model": "some/base",
    "adapter": "legal-lora",
    "calibration": "128 sequences of licence texts",
    "figures": {"perplexity": 26.1},
    "license": "apache-2.0",
    "language": ["en", "de"],
}


def front_matter(directory: Path) -> dict:
    """As the hub reads it: YAML between the first two lines of dashes."""
    _, front, _ = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front)


def test_provenance_outlives_any_chain_of_exports(tmp_path):
    save_sparse(make_model(), tmp_path / "0", metadata=MADE_OF)
    for step, structure in enumerate(["dense", "sparse-bitmask", "dense", "auto"], start=1):
        export_checkpoint(tmp_path / str(step - 1), tmp_path / str(step), structure=structure)
    save_sparse(load_sparse(tmp_path / "4"), tmp_path / "5")
    for step in range(6):
        assert json.loads((tmp_path / str(step) / "provenance.json").read_text()) == MADE_OF
        card = (tmp_path / str(step) / "README.md").read_text()
        for words in ("- Base model: some/base", "- Adapter: legal-lora", "licence texts", "| perplexity | 26.1 |"):
            assert words in card
        front = front_matter(tmp_path / str(step))
        assert (front["base_model"], front["license"], front["language"]) == ("some/base", "apache-2.0", ["en", "de"])
    export_checkpoint(tmp_path / "1", tmp_path / "named", metadata={"base_model": "another/base"})
    known = json.loads((tmp_path / "named" / "provenance.json").read_text())
    assert known == MADE_OF | {"base_model": "another/base"}


def test_a_damaged_provenance_is_named_before_the_work(tmp_path, dense):
    shutil.copytree(dense[1], tmp_path / "dense")
    for content, message in (
        ("[]", "provenance.json"),
        ("{", "provenance.json"),
        ('{"figures": 3}', "made of: correct"),
    ):
        (tmp_path / "dense" / "provenance.json").write_text(content)
        refuse(message, tmp_path, export_checkpoint, tmp_path / "dense")


def test_the_card_is_what_the_hub_takes(tmp_path):
    hub = tmp_path / "models--some--base" / "snapshots" / "1234"
    model = make_model()
    model.save_pretrained(hub)
    (hub / "README.md").write_text(
        "---\nlicense: other\nlicense_name: 'x: y'\nlanguage: [en]\ntags: [a]\n---\n# Base\n"
    )
    for directory, write in {
        "saved": lambda to: save_sparse(AutoModelForCausalLM.from_pretrained(hub), to),
        "exported": lambda to: export_checkpoint(hub, to),
        "plain": lambda to: export_checkpoint(tmp_path / "saved", to, structure="dense"),
    }.items():
        write(tmp_path / directory)
        front = front_matter(tmp_path / directory)
        kind = ["pruned"] if directory == "plain" else ["sparse", "compressed-tensors"]
        assert front == {
            "base_model": "some/base",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "license": "other",
            "license_name": "x: y",
            "language": ["en"],
            "tags": [*kind, "efx-plugin", "arxiv:2511.19935"],
        }
        card = (tmp_path / directory / "README.md").read_text()
        assert f"efx-plugin {efx_plugin.__version__}" in card
        assert "https://arxiv.org/abs/2511.19935" in card
        assert "DIRECTORY" not in card
        if directory != "plain":
            assert f"efx serve ./{directory}\n" in card
            assert f"transformers.LlamaForCausalLM.from_pretrained('./{directory}')" in card


def test_front_matter_that_is_no_yaml_does_not_stop_an_export(tmp_path, dense, caplog):
    shutil.copytree(dense[1], tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: [\n---\n")
    export_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert "licence of the base model is not passed on" in caplog.text
    assert "license" not in front_matter(tmp_path / "sparse")


# Refusals: one sentence, and nothing is written.


def refuse(message: str, tmp_path: Path, call, *args, **kwargs) -> None:
    with pytest.raises(EfxError, match=message) as caught:
        call(*args, tmp_path / "refused", **kwargs)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "refused" in path.name]


def test_an_existing_destination_is_refused_before_any_work(tmp_path):
    (tmp_path / "there").mkdir()
    for call in (save_sparse, export_checkpoint):
        with pytest.raises(EfxError, match="there exists already and nothing is overwritten"):
            call(None, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_damaged_weights_are_named(tmp_path, name, value):
    model = make_model()
    model.get_parameter(name).data.view(-1)[3] = value
    refuse(f"{name} holds NaN or infinity", tmp_path, save_sparse, model)
    model.save_pretrained(tmp_path / "dense")
    refuse(f"{name} holds NaN or infinity", tmp_path, export_checkpoint, tmp_path / "dense")


def test_a_dense_model_is_refused(tmp_path):
    model = LlamaForCausalLM(make_model().config)
    refuse("no Linear weight has enough zeros .* prune the model", tmp_path, save_sparse, model)
    model.save_pretrained(tmp_path / "dense")
    refuse("no Linear weight has enough zeros", tmp_path, export_checkpoint, tmp_path / "dense")


def test_what_is_no_plain_model_is_refused(tmp_path, saved):
    model = make_model()
    model.model.layers[0].mlp.up_proj.base_layer = torch.nn.Linear(2, 2)  # as an adapter leaves it
    refuse(r"still carries an adapter: save what efx_plugin\.merge_adapters\(model\)", tmp_path, save_sparse, model)
    refuse("not Linear", tmp_path, save_sparse, torch.nn.Linear(2, 2))
    refuse("not str", tmp_path, save_sparse, "some/model")
    quantized = make_model()
    quantized.config.quantization_config = {"quant_method": "gptq"}
    refuse("the model is quantized", tmp_path, save_sparse, quantized)
    with torch.device("meta"):
        meta = LlamaForCausalLM(saved[0].config)
    refuse("is on the meta device", tmp_path, save_sparse, meta)


def test_arguments_that_are_wrong(tmp_path):
    model = make_model()
    refuse("structure is '2:4': it can be auto, sparse-24-bitmask", tmp_path, save_sparse, model, structure="2:4")
    for size in ("5 gigabytes", 0, "0GB", "-1GB"):
        refuse("max_shard_size must be", tmp_path, save_sparse, model, max_shard_size=size)
    refuse("metadata has the key 'licence'", tmp_path, save_sparse, model, metadata={"licence": "MIT"})
    refuse(r"the recipe nowhere\.yaml cannot be read", tmp_path, save_sparse, model, recipe="nowhere.yaml")
    refuse(r"torch\.float64 cannot be stored sparsely", tmp_path, save_sparse, model.double())


def test_sources_that_cannot_be_exported(tmp_path, saved, dense):
    source = tmp_path / "source"
    refuse("config.json does not exist", tmp_path, export_checkpoint, source)
    refuse("is stored sparsely already", tmp_path, export_checkpoint, saved[1])
    shutil.copytree(dense[1], source)
    config = json.loads((source / "config.json").read_text())

    def with_config(**changes) -> None:
        (source / "config.json").write_text(json.dumps(config | changes))

    with_config(quantization_config={"quant_method": "gptq"})
    refuse("source is quantized", tmp_path, export_checkpoint, source)
    with_config(model_type="unheard-of")
    refuse("transformers cannot use .*config.json", tmp_path, export_checkpoint, source)
    with_config(architectures=["UnheardOfForCausalLM"])
    refuse("names the architecture 'UnheardOfForCausalLM'", tmp_path, export_checkpoint, source)
    with_config(architectures=["AutoConfig"])
    refuse("names the architecture 'AutoConfig'", tmp_path, export_checkpoint, source)
    with_config()
    shard = max(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refuse(shard.name, tmp_path, export_checkpoint, source)
    shard.unlink()
    refuse(f"{shard.name}, which .* is missing", tmp_path, export_checkpoint, source)
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.safetensors").touch()
    refuse(r"source holds a model and an adapter beside it: if", tmp_path, export_checkpoint, source)
    (source / "model.safetensors.index.json").unlink()
    refuse(r"source is an adapter: merge it with efx_plugin\.merge_adapters", tmp_path, export_checkpoint, source)


def test_an_adapters_config_left_over_from_a_merge_is_not_exported(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "adapter_config.json").write_text("{}")
    export_checkpoint(tmp_path / "merged", tmp_path / "sparse", progress=False)
    assert not (tmp_path / "sparse" / "adapter_config.json").exists()
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"))


# Disks that fill up, and processes that die.


@pytest.mark.parametrize("room", [0, 100, 10_000, 40_000])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, room):
    """The write that would go beyond `room` bytes fails, as on a full disk."""
    written = 0
    real_open = builtins.open

    def open_on_small_disk(file, mode="r", *args, **kwargs):
        opened = real_open(file, mode, *args, **kwargs)
        if "x" not in mode or not str(file).endswith(".safetensors"):
            return opened

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                opened.close()

            def write(self, data):
                nonlocal written
                written += memoryview(data).nbytes
                if written > room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return opened.write(data)

        return Full()

    model = make_model()
    monkeypatch.setattr(builtins, "open", open_on_small_disk)
    refuse(r"needs [\d,]+ bytes and its disk has [\d,]+ left", tmp_path, save_sparse, model, max_shard_size="20KB")


LIMITED = """
import resource, sys
from efx_plugin.checkpoint import export_checkpoint
from efx_plugin.errors import EfxError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    export_checkpoint(sys.argv[1], sys.argv[2])
except EfxError as error:
    print(error)
    sys.exit(3)
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def test_a_file_that_the_system_does_not_let_grow_leaves_nothing(tmp_path, dense):
    result = run(LIMITED, dense[1], tmp_path / "sparse")
    assert result.returncode == 3, result.stderr
    assert re.search(r"sparse needs [\d,]+ bytes and its disk has [\d,]+ left", result.stdout)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import multiprocessing, pathlib, sys, time
from efx_plugin.checkpoint import export_checkpoint, expand

source, parent = sys.argv[1], pathlib.Path(sys.argv[2])
# Forked from a process that has imported what they need and runs no thread: a lock held by one would stay locked.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["efx_plugin.checkpoint.writer", "transformers.models.llama.modeling_llama"])

def start(name):
    arguments = {"max_shard_size": "300KB", "progress": False}
    child = context.Process(target=export_checkpoint, args=(source, parent / name), kwargs=arguments)
    child.start()
    return child

start("first").join()  # the server has imported by then
began = time.monotonic()
start("whole").join()
took = time.monotonic() - began
whole = {name: tensor for name, tensor in expand(parent / "whole")}

complete = 0
for moment in range(10):
    child = start("killed")
    time.sleep(took * (moment + 0.5) / 9)
    child.kill()
    child.join()
    if (parent / "killed").exists():
        found = dict(expand(parent / "killed"))
        assert found.keys() == whole.keys()
        assert all((found[name] == whole[name]).all() for name in whole)
        complete += 1
        (parent / "killed").rename(parent / f"complete{moment}")
start("killed").join()
assert (parent / "killed").is_dir()
print(complete, len(list(parent.glob(".*.incomplete"))))
"""


def test_killed_at_any_moment_it_is_there_complete_or_not_at_all(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=6))
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data[torch.rand(weight.shape) < 0.5] = 0
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    result = run(KILLED, tmp_path / "dense", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    complete, left_over = map(int, result.stdout.split()[-2:])
    assert complete < 10
    assert left_over == 0


def test_exporting_does_not_hold_the_model(tmp_path):
    """Peak memory of an export grows by a few weights, not by the model."""
    script = """
import resource, sys
from efx_plugin.checkpoint import export_checkpoint
import transformers
export_checkpoint(sys.argv[1], sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_checkpoint(sys.argv[2], sys.argv[4])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    model = make_model()
    model.save_pretrained(tmp_path / "small")
    torch.manual_seed(0)
    large = LlamaForCausalLM(LlamaConfig(vocab_size=500, hidden_size=512, intermediate_size=1024, num_hidden_layers=24))
    for name, weight in large.named_parameters():
        if "_proj" in name:
            weight.data[:, ::2] = 0
    large.save_pretrained(tmp_path / "large")
    nbytes = sum(weight.nbytes for weight in large.parameters())
    result = run(script, *(tmp_path / name for name in ("small", "large", "a", "b")))
    assert result.returncode == 0, result.stderr
    assert nbytes > 200e6
    assert int(result.stdout.split()[-1]) < nbytes / 5


# Checkpoints from elsewhere.


def rename_to_old(directory: Path) -> None:
    """The names of releases up to 0.8.1."""
    tensors = load_file(directory / "model.safetensors")
    for name in list(tensors):
        prefix, _, part = name.rpartition(".")
        if part in ("compressed", "bitmask", "row_offsets", "shape"):
            tensors[f"{prefix}.weight.{part}"] = tensors.pop(name)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def copy_of(saved, tmp_path: Path) -> Path:
    shutil.copytree(saved[1], tmp_path / "copy")
    return tmp_path / "copy"


def test_names_of_old_releases_are_read(tmp_path, saved):
    directory = copy_of(saved, tmp_path)
    rename_to_old(directory)
    assert_same(saved[0], load_sparse(directory))
    assert linear_bytes(directory) == linear_bytes(saved[1])


UP = "model.layers.1.mlp.up_proj"


def twice_compressed(tensors):
    tensors[f"{UP}.weight.bitmask"] = tensors[f"{UP}.bitmask"].clone()


def twice_dense(tensors):
    tensors[f"{UP}.weight"] = torch.zeros(102, 54, dtype=torch.bfloat16)


def part_missing(tensors):
    del tensors[f"{UP}.bitmask"]


def weight_missing(tensors):
    for part in ("compressed", "bitmask", "row_offsets", "shape"):
        del tensors[f"{UP}.{part}"]


def norm_missing(tensors):
    del tensors["model.norm.weight"]


def head_missing(tensors):
    del tensors["lm_head.weight"]


def stranger(tensors):
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)


def transposed(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].T.contiguous()


def slightly_too_wide(tensors):
    tensors[f"{UP}.shape"][1] = 56  # as many bytes of mask as 54


def bit_flipped(tensors):
    tensors[f"{UP}.bitmask"][3, 2] ^= 4


def too_wide(tensors):
    tensors[f"{UP}.shape"][1] = 57


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice_compressed, rf"model\.safetensors: {UP}.*bitmask and {UP}.*bitmask store the same weight"),
        (twice_dense, rf"model\.safetensors: {UP}\.\w+ and {UP}\.weight store the same weight"),
        (part_missing, rf"model\.safetensors: {UP}\.bitmask is missing"),
        (weight_missing, rf"has no {UP}\.weight"),
        (norm_missing, r"has no model\.norm\.weight"),
        (head_missing, r"has no lm_head\.weight, which a LlamaForCausalLM needs"),
        (stranger, r"holds model\.layers\.9\.mlp\.up_proj\.weight, which has no place in a LlamaForCausalLM"),
        (transposed, r"holds model\.embed_tokens\.weight as \[54, 97\], but its config\.json makes it \[97, 54\]"),
        (bit_flipped, rf"model\.safetensors: {UP}\.(compressed|row_offsets) has"),
        (slightly_too_wide, rf"holds {UP}\.weight as \[102, 56\], but its config\.json makes it \[102, 54\]"),
        (too_wide, rf"model\.safetensors: {UP}\.shape declares a weight \[102, 57\], but"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path, saved, change, message):
    directory = copy_of(saved, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparseCheckpointError, match=message):
        load_sparse(directory)


READERS = {
    "load_sparse": load_sparse,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "inspect --verify": lambda directory: summarize(directory, verify=True),
    "export": lambda directory: export_checkpoint(directory, directory.parent / "exported", structure="dense"),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_an_output_layer_that_it_would_have_to_make_up(tmp_path, reader):
    save_sparse(make_model(tied=True), tmp_path / "sparse")
    change_config(tmp_path / "sparse", lambda config: config.pop("tie_word_embeddings"))
    with pytest.raises(
        SparseCheckpointError, match=r"has no lm_head\.weight, .* set tie_word_embeddings to true in config\.json"
    ):
        READERS[reader](tmp_path / "sparse")
    assert os.listdir(tmp_path) == ["sparse"]
    change_config(tmp_path / "sparse", lambda config: config.update(tie_word_embeddings=True))
    READERS[reader](tmp_path / "sparse")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (norm_missing, r"has no model\.norm\.weight, which a LlamaForCausalLM needs"),
        (stranger, r"holds model\.layers\.9\.mlp\.up_proj\.weight, which has no place in a LlamaForCausalLM"),
        (transposed, r"holds model\.embed_tokens\.weight as \[54, 97\]"),
    ],
)
def test_every_reader_compares_names_and_shapes_with_the_model(tmp_path, saved, change, message, reader):
    directory = copy_of(saved, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "SHA256SUMS").unlink()
    with pytest.raises(SparseCheckpointError, match=message):
        READERS[reader](directory)


def unmerged(tensors):
    q = "model.layers.0.self_attn.q_proj"
    tensors[f"{q}.base_layer.weight"] = tensors.pop(f"{q}.weight")
    tensors[f"{q}.lora_A.default.weight"] = torch.zeros(2, 54)


def misshapen(tensors):
    tensors["model.norm.weight"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unmerged, r"stored with its adapter unmerged .*: store what efx_plugin\.merge_adapters\(model\) returns"),
        (norm_missing, r"has no model\.norm\.weight, .*: download or export it again"),
        (stranger, r"holds model\.layers\.9\.mlp\.up_proj\.weight, which has no place .*: correct `architectures`"),
        (misshapen, r"holds model\.norm\.weight as \[7\], but its config\.json makes it \[54\]"),
    ],
)
def test_what_is_exported_is_compared_with_the_model_first(tmp_path, change, message):
    make_model().save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    refuse(message, tmp_path, export_checkpoint, tmp_path / "dense")


VESTIGIAL = [{"format": "dense", "targets": ["Linear"], "ignore": ["lm_head"]}, {"format": None}, {}, None]


@pytest.mark.parametrize("sparsity", VESTIGIAL)
def test_a_sparsity_config_that_says_dense_is_dense_everywhere(tmp_path, sparsity):
    model = make_model()
    model.save_pretrained(tmp_path / "dense")
    described = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    change_config(tmp_path / "dense", lambda config: config.update(quantization_config=described))

    export_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert_same(model, load_sparse(tmp_path / "sparse"))
    refuse("dense is dense already: copy it", tmp_path, export_checkpoint, tmp_path / "dense", structure="dense")
    with pytest.raises(SparseCheckpointError, match="load this dense checkpoint with transformers"):
        load_sparse(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same(model, loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())

    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    misshapen(tensors)
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparseCheckpointError, match=r"holds model\.norm\.weight as \[7\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


def test_a_new_head_on_a_pruned_body_is_legitimate(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved[1], num_labels=3)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, saved[0].model.layers[0].mlp.up_proj.weight)
    assert model.score.weight.shape == (3, 54)


def change_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("quantization_config"), "has no sparsity_config"),
        (lambda config: config.update(quantization_config=[]), "has no sparsity_config"),
        (lambda config: config["quantization_config"].update(sparsity_config={}), "has no sparsity_config"),
        (lambda config: config["quantization_config"].update(sparsity_config="x"), "has no sparsity_config"),
        (lambda config: config["quantization_config"]["sparsity_config"].update(format="zip"), "the format 'zip'"),
        (lambda config: config["quantization_config"]["sparsity_config"].update(format=[]), r"the format \[\]"),
        (lambda config: config["quantization_config"]["sparsity_config"].pop("format"), "has no sparsity_config"),
        (
            lambda config: config["quantization_config"]["sparsity_config"].update(format="sparse-24-bitmask"),
            r"row_offsets does not belong",
        ),
        (lambda config: config.update(intermediate_size=96), r"gate_proj\.weight as \[102, 54\]"),
        (lambda config: config.update(hidden_size=55), "transformers cannot (use|make)"),
        (lambda config: config.update(hidden_size="x"), "transformers cannot (use|make)"),
        (lambda config: config.update(model_type="x"), "transformers cannot use"),
        (lambda config: config.update(architectures=None), "names the architecture None"),
        (lambda config: config["quantization_config"].update(config_groups={"a": {}}), "is sparse and quantized"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, saved, change, message):
    directory = copy_of(saved, tmp_path)
    change_config(directory, change)
    with pytest.raises(EfxError, match=message):
        load_sparse(directory)


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_config_that_is_none_is_refused(tmp_path, saved, content):
    directory = copy_of(saved, tmp_path)
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)
    with pytest.raises(SparseCheckpointError, match=r"config\.json"):
        load_sparse(directory)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_bit_flipped_anywhere(data, saved, tmp_path):
    """Without checksums a changed value goes unnoticed, as in any format, but a place does not, and nothing crashes."""
    directory = tmp_path / "copy"
    if not directory.exists():
        shutil.copytree(saved[1], directory)
    index = read_index(saved[1])
    placing = [stored for name, stored in index.items() if name.endswith((".bitmask", ".row_offsets", ".shape"))]
    content = bytearray((saved[1] / "model.safetensors").read_bytes())
    stored = data.draw(st.sampled_from(placing))
    anywhere = st.integers(0, len(content) - 1)
    position = data.draw(anywhere | st.integers(stored.begin, stored.begin + stored.nbytes - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (directory / "model.safetensors").write_bytes(content)
    try:
        found = {name: tuple(tensor.shape) for name, tensor in expand(directory)}
    except SparseCheckpointError as error:
        assert "model.safetensors" in str(error)
    else:
        is_placing = any(one.begin <= position < one.begin + one.nbytes for one in placing)
        expected = {name: tuple(tensor.shape) for name, tensor in saved[0].state_dict().items()}
        assert not is_placing or found != expected  # a shape a little wider than the layer, which loading refuses
