"""`efx` as a user types it: what it prints, its exit code, and what it leaves behind."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from efx_plugin.checkpoint import load_sparse
from efx_plugin.cli import main
from integration.assets import save_tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "domain.jsonl"
    ids = torch.randint(3, 128, (60, 40), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [json.dumps({"text": " ".join(f"t{i}" for i in row)}) for row in ids]
    path.write_text("\n".join(lines))
    return path


def efx_process(*arguments):
    command = [str(Path(sys.executable).parent / "efx"), *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def efx(*arguments):
    """The same command line in this process, which has imported the stack already."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["efx", *(str(argument) for argument in arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as exit,
    ):
        main()
    code = exit.value.code or 0
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def prune_arguments(model, output, text, recipe):
    return ["prune", model, output, "--recipe", recipe, "--dataset", text, "--samples", 8, "--length", 48]


def efx_prune(model, output, text, recipe, *options):
    return efx(*prune_arguments(model, output, text, recipe), *options)


def assert_refused(result, output, *words):
    """One sentence on stderr's last line, exit code 1, nothing half-written."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1, result.stderr
    assert last.startswith("efx: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in result.stderr
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))


@pytest.mark.parametrize(("recipe", "layout"), [("expert_50", "sparse-bitmask"), ("expert_2of4", "sparse-24-bitmask")])
def test_prune_writes_a_sparse_expert_with_its_adapter_merged(model, text, tmp_path, recipe, layout):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "expert"
    arguments = prune_arguments(model, output, text, RECIPES / f"{recipe}.yaml")
    result = efx_process(*arguments, "--adapter", tmp_path / "adapter", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["linear_bytes_sparse"] < 0.75 * report["linear_bytes_dense"]
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["sparsity_config"]["format"] == layout
    assert {"README.md", "recipe.yaml", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    expert = load_sparse(output)
    projections = [p for name, p in expert.named_parameters() if "_proj" in name]
    zeros = sum(int((p == 0).sum()) for p in projections) / sum(p.numel() for p in projections)
    assert abs(zeros - 0.5) < 0.002


@pytest.mark.parametrize("recipe", ["wanda_50", "sparsegpt_50"])
def test_the_baseline_recipes_run_as_they_are(model, text, tmp_path, recipe):
    result = efx_prune(model, tmp_path / "pruned", text, RECIPES / f"{recipe}.yaml", "--json")
    assert result.returncode == 0, result.stderr
    assert load_sparse(tmp_path / "pruned").config.num_hidden_layers == 2


def test_export_converts_a_pruned_directory(model, tmp_path):
    pruned = AutoModelForCausalLM.from_pretrained(model)
    for name, parameter in pruned.named_parameters():
        if "_proj" in name:
            parameter.data[:, ::2] = 0
    pruned.save_pretrained(tmp_path / "pruned")
    result = efx("export", tmp_path / "pruned", tmp_path / "sparse", "--json")
    assert result.returncode == 0, result.stderr
    sizes = json.loads(result.stdout)
    assert sizes["sparse"] < sizes["dense"]
    loaded = load_sparse(tmp_path / "sparse").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in pruned.state_dict().items())


BROKEN_RECIPES = {
    "misspelt argument": ("sparsity: 0.5", "sparsty: 0.5", ["'sparsty'", "did you mean 'sparsity'"]),
    "wrong type": ("sparsity: 0.5", "sparsity: half", ["sparsity"]),
    "targets that match nothing": ('targets: ["Linear"]', 'targets: ["re:.*attn.nothing"]', ["match no linear layer"]),
    "unknown modifier": ("EfficientXpertModifier", "EficientXpertModifier", ["EficientXpertModifier"]),
    "stage that would be ignored": ("prune_stage", "prune", ["'prune'", "would be ignored"]),
    "group that would be ignored": ("pruning_modifiers", "pruning", ["'pruning'", "would be ignored"]),
}


@pytest.mark.parametrize("flaw", BROKEN_RECIPES)
def test_a_recipe_with_a_flaw_is_refused(model, text, tmp_path, flaw):
    right, wrong, words = BROKEN_RECIPES[flaw]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / "expert_50.yaml").read_text().replace(right, wrong))
    output = tmp_path / "expert"
    assert_refused(efx_prune(model, output, text, recipe), output, *words)


def test_a_refusal_reaches_the_shell_as_one_sentence_and_exit_code(model, text, tmp_path):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "expert"
    recipe.write_text((RECIPES / "expert_50.yaml").read_text().replace("sparsity", "sparsty"))
    assert_refused(efx_process(*prune_arguments(model, output, text, recipe)), output, "'sparsty'")


def test_a_modifier_without_arguments_is_refused(model, text, tmp_path):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "expert"
    recipe.write_text("prune_stage:\n  pruning_modifiers:\n    EfficientXpertModifier:\n")
    assert_refused(efx_prune(model, output, text, recipe), output, "EfficientXpertModifier: {}")


def test_an_unknown_architecture_is_refused(text, tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=128, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    output = tmp_path / "expert"
    result = efx_prune(tmp_path / "gpt2", output, text, RECIPES / "expert_50.yaml")
    assert_refused(result, output, "GPT2LMHeadModel", "match no linear layer")


def test_nan_weights_are_refused(model, text, tmp_path):
    damaged = AutoModelForCausalLM.from_pretrained(model)
    damaged.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    shutil.copytree(model, tmp_path / "damaged")
    damaged.save_pretrained(tmp_path / "damaged")
    output = tmp_path / "expert"
    result = efx_prune(tmp_path / "damaged", output, text, RECIPES / "expert_50.yaml")
    assert_refused(result, output, "model.layers.1.mlp.up_proj", "NaN")


def test_calibration_text_that_cannot_serve_is_refused(model, tmp_path):
    output = tmp_path / "expert"
    for name, content, words in [
        ("missing.jsonl", None, ["no calibration file"]),
        ("notes.docx", "x", ["notes.docx", ".jsonl"]),
        ("wrong.jsonl", '{"content": "t5 t6"}', ["no field `text`", "content"]),
        ("short.txt", "t5 t6 t7", ["only", "tokens"]),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        assert_refused(efx_prune(model, output, tmp_path / name, RECIPES / "expert_50.yaml"), output, *words)


def test_an_existing_directory_is_never_touched(model, text, tmp_path):
    output = tmp_path / "expert"
    output.mkdir()
    (output / "precious").write_text("x")
    for result in (efx_prune(model, output, text, RECIPES / "expert_50.yaml"), efx("export", model, output)):
        assert result.returncode == 1
        assert str(output) in result.stderr and "exists already" in result.stderr
        assert [path.name for path in output.iterdir()] == ["precious"]


def test_wrong_usage_exits_with_2(model, tmp_path):
    assert efx("prune", model, tmp_path / "x").returncode == 2
    assert efx("export", tmp_path / "nowhere").returncode == 2
    assert efx("conjure").returncode == 2


def test_help_shows_an_example_and_imports_no_torch():
    for command in ("prune", "export"):
        result = efx(command, "--help")
        assert result.returncode == 0 and f"Example: efx {command}" in result.stdout
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import efx_plugin.cli"], capture_output=True, text=True, check=True
    ).stderr
    loaded = {line.rsplit("|", 1)[-1].strip() for line in listing.splitlines()}
    assert not loaded & {"torch", "transformers", "llmcompressor", "vllm"}
