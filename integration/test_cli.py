"""`efx` as a user types it: what it prints, its exit code, and what it leaves behind."""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from loguru import logger
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import efx_plugin
from efx_plugin.checkpoint import load_sparse, read_index, save_sparse
from efx_plugin.cli import main
from efx_plugin.compress.preflight import preflight
from efx_plugin.compress.recipe import find_recipe
from efx_plugin.compress.request import PruneRequest
from efx_plugin.errors import EfxError
from efx_plugin.model.loading import Sources
from tests.support.tiny_llama import save_tiny_llama, tiny_llama, tiny_tokenizer
from tests.support.tiny_models import tiny_model

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


def efx_process(*arguments, **variables):
    command = [str(Path(sys.executable).parent / "efx"), *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
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


def assert_refused(result, output, *words, code=1):
    """One sentence on stderr's last line, the exit code, nothing half-written."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == code, result.stderr
    assert last.startswith("efx: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in result.stderr
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))


def adapted_model(model):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return adapted


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("expert_50", "sparse-bitmask"),
        ("expert_2of4", "sparse-24-bitmask"),
        ("expert_50_w8a8", "sparse-bitmask"),
        ("published_50", "sparse-bitmask"),
    ],
)
def test_prune_writes_a_sparse_expert_with_its_adapter_merged(model, text, tmp_path, recipe, layout):
    adapted = adapted_model(model)
    adapted.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "expert"
    arguments = prune_arguments(model, output, text, RECIPES / f"{recipe}.yaml")
    result = efx_process(*arguments, "--adapter", tmp_path / "adapter", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("No accelerator available") == (not torch.accelerator.is_available())
    report = json.loads(result.stdout)
    assert report["linear_bytes_sparse"] < 0.85 * report["linear_bytes_dense"]
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["sparsity_config"]["format"] == layout
    assert {"README.md", "recipe.yaml", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    card = (output / "README.md").read_text()
    for words in (
        "efx-plugin",
        "- Base model: tiny",
        "adapter",
        "8 sequences of 48 tokens from domain.jsonl",
        "q_proj",
    ):
        assert words in card
    expert = load_sparse(output)
    projections = [p for name, p in expert.named_parameters() if "_proj" in name]
    zeros = sum(int((p == 0).sum()) for p in projections) / sum(p.numel() for p in projections)
    assert abs(zeros - 0.5) < 0.002


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("expert_50", [], "for bfloat16 with ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI"),
        ("expert_50_w8a8", [], "computing in float32 because"),
        ("expert_50", ["--compute-dtype", "checkpoint"], "computing in bfloat16, the model's dtype, as asked for"),
    ],
)
def test_without_bfloat16_instructions_the_expert_is_computed_in_float32_and_stored_in_its_dtype(
    text, tmp_path, recipe, options, said
):
    save_tiny_llama(tmp_path / "model")
    tiny_llama().bfloat16().save_pretrained(tmp_path / "model")
    output = tmp_path / "expert"
    arguments = prune_arguments(tmp_path / "model", output, text, RECIPES / f"{recipe}.yaml")
    result = efx_process(*arguments, *options, ONEDNN_MAX_CPU_ISA="AVX512_CORE_VNNI")
    assert result.returncode == 0, result.stderr
    assert said in result.stderr
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    expert = load_sparse(output)
    assert {p.dtype for p in expert.parameters()} == {torch.bfloat16}
    projections = [p for name, p in expert.named_parameters() if "_proj" in name]
    zeros = sum(int((p == 0).sum()) for p in projections) / sum(p.numel() for p in projections)
    assert abs(zeros - 0.5) < 0.002


def test_a_compute_dtype_that_does_not_exist_is_refused(model, text, tmp_path):
    result = efx_prune(model, tmp_path / "out", text, RECIPES / "wanda_50.yaml", "--compute-dtype", "half")
    assert_refused(result, tmp_path / "out", "'half'", "choose one of auto, float32, checkpoint")


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_a_mixture_of_experts_comes_back_with_the_zeros_of_its_experts(text, tmp_path, architecture):
    """llm-compressor takes experts apart to calibrate them; stored, they are whole again, and dense."""
    tiny_model(architecture, linearize=False, vocab_size=128).save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    result = efx_prune(tmp_path / "moe", tmp_path / "pruned", text, RECIPES / "expert_50.yaml")
    assert result.returncode == 0, result.stderr
    experts = [p for name, p in load_sparse(tmp_path / "pruned").named_parameters() if ".experts." in name]
    assert experts
    for weight in experts:
        assert (weight == 0).float().mean() > 0.3


def test_experts_taken_apart_are_not_stored_so(tmp_path):
    with pytest.raises(EfxError, match=r"experts are still taken apart.*repack_moe\(model\) first"):
        save_sparse(tiny_model("Mixtral"), tmp_path / "moe")


def test_prune_says_what_it_saves_and_how_long_it_takes(model, text, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "info", lambda message, *args, **kwargs: said.append(message))
    recipe = RECIPES / "expert_50.yaml"
    report = json.loads(efx_prune(model, tmp_path / "one", text, recipe, "--json").stdout)
    (estimate,) = [line for line in said if line.startswith("calibration: 8 sequences of 48 tokens, about ")]
    pruned = [line for line in said if "EfficientXpertModifier pruned" in line]
    assert said.index(estimate) < said.index(pruned[0])
    index = read_index(tmp_path / "one")
    assert report["bytes_on_disk"] == sum(stored.nbytes for stored in index.values()) < report["bytes_dense"]
    assert report["bytes_dense"] == sum(p.nbytes for p in load_sparse(tmp_path / "one").state_dict().values())
    assert report["sparsity"] == pytest.approx(0.5, abs=0.002) and report["seconds"] > 0
    assert len(report["layers"]) == 14
    assert sum(layer["zeros"] for layer in report["layers"]) / sum(layer["size"] for layer in report["layers"]) == (
        pytest.approx(report["sparsity"], abs=1e-6)
    )
    table = efx_prune(model, tmp_path / "two", text, recipe).stdout
    for words in ("sparsity of these linear layers", "bytes of all weights", f"{report['bytes_dense']:,}", "seconds"):
        assert words in table
    ratio = f"{report['bytes_on_disk'] / report['bytes_dense']:.3f}"
    assert ratio in table and "linear_bytes" not in table


def test_the_disk_and_the_format_are_checked_before_a_weight_is_loaded(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Sources, "load", lambda self: pytest.fail("weights were loaded"))
    recipe, output = RECIPES / "expert_50.yaml", tmp_path / "new" / "expert"
    contradicting = efx_prune(model, output, text, recipe, "--structure", "sparse-24-bitmask")
    assert_refused(contradicting, tmp_path / "new", "stores 2:4 sparsity and the recipe prunes unstructured", code=2)
    unknown = efx_prune(model, output, text, recipe, "--structure", "csr")
    assert_refused(unknown, tmp_path / "new", "--structure is 'csr': it can be auto, ", code=2)
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((0.7, True), (0.5, False)):
        left = int(free * (model / "model.safetensors").stat().st_size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, left=left: usage._replace(free=left))
        if fits:
            with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
                preflighted(model, output, text)
        else:
            assert_refused(efx_prune(model, output, text, recipe), tmp_path / "new", "make room or write elsewhere")


def preflighted(model, output, text):
    request = PruneRequest(model, output, find_recipe("expert_50"), str(text), samples=8, length=48)
    return preflight(request).sources.load()


def test_code_that_comes_with_a_model_runs_when_it_is_allowed_to(model, text, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["OwnForCausalLM"],
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    output = tmp_path / "expert"
    assert_refused(efx_prune(folder, output, text, "wanda_50"), output, "--trust-remote-code")
    result = efx_prune(folder, output, text, "wanda_50", "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert json.loads((output / "config.json").read_text())["architectures"] == ["OwnForCausalLM"]
    assert (output / "modeling_own.py").read_text() == (folder / "modeling_own.py").read_text()


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
    assert sizes["bytes_on_disk"] < sizes["bytes_dense"] and sizes["sparsity"] == 0.5
    assert sizes["linear_bytes_sparse"] < sizes["linear_bytes_dense"]
    loaded = load_sparse(tmp_path / "sparse").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in pruned.state_dict().items())
    back = efx("export", tmp_path / "sparse", tmp_path / "dense", "--structure", "dense", "--json")
    assert back.returncode == 0, back.stderr
    dense = json.loads(back.stdout)
    assert dense["linear_bytes_dense"] == sizes["linear_bytes_dense"]
    assert dense["bytes_on_disk"] == dense["bytes_dense"] == sizes["bytes_dense"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in pruned.state_dict().items())


@pytest.fixture(scope="module")
def sparse(model, tmp_path_factory):
    pruned = AutoModelForCausalLM.from_pretrained(model)
    for name, parameter in pruned.named_parameters():
        if "_proj" in name:
            parameter.data[:, ::2] = 0
    directory = tmp_path_factory.mktemp("sparse") / "sparse"
    save_sparse(pruned, directory, progress=False)
    return directory


def test_inspect_shows_a_table_with_bars_and_writes_a_picture(sparse, tmp_path):
    result = efx("inspect", sparse, "--verify", "--plot", tmp_path / "map.png")
    assert result.returncode == 0, result.stderr
    for words in ("sparse-24-bitmask", "verified", "match", "self_attn.q_proj", "████"):
        assert words in result.stdout
    assert (tmp_path / "map.png").stat().st_size > 1000
    summary = json.loads(efx("inspect", sparse, "--json").stdout)
    assert summary["sparsity"] == 0.5 and summary["two_of_four"] is True and summary["checksums"] == "not checked"


def test_inspect_without_matplotlib_shows_its_table_first(sparse, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "efx_plugin.plots", raising=False)
    result = efx("inspect", sparse, "--plot", tmp_path / "map.png")
    assert "self_attn.q_proj" in result.stdout
    assert_refused(result, tmp_path / "map.png", "--plot needs matplotlib: pip install 'efx-plugin[plot]'")


def test_the_version_is_shown():
    result = efx("--version")
    assert (result.returncode, result.stdout) == (0, f"efx-plugin {efx_plugin.__version__}\n")


def test_inspect_names_what_is_corrupt(sparse, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(sparse, damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-3] ^= 255
    (damaged / "model.safetensors").write_bytes(content)
    assert efx("inspect", damaged).returncode == 0
    result = efx("inspect", damaged, "--verify")
    assert result.returncode == 1
    assert result.stderr.startswith("efx: ") and "model.safetensors" in result.stderr


def test_optimum_cli_mounts_the_same_commands(sparse, tmp_path):
    optimum = str(Path(sys.executable).parent / "optimum-cli")
    result = subprocess.run([optimum, "efx", "inspect", str(sparse), "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(efx("inspect", sparse, "--json").stdout)
    failed = subprocess.run([optimum, "efx", "inspect", str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("efx: ")
    helped = subprocess.run([optimum, "efx", "prune", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "Example: efx prune" in helped.stdout


def test_prune_calibrates_on_what_the_expert_writes_too(model, text, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "info", lambda message, *args, **kwargs: said.append(message))
    adapted_model(model).save_pretrained(tmp_path / "adapter")
    options = ["--adapter", tmp_path / "adapter", "--json"]
    result = efx_prune(model, tmp_path / "more", text, "expert_50", *options, "--generate", 1000)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sparsity"] == pytest.approx(0.5, abs=0.002)
    assert any(line.startswith("calibration: 29 sequences of 48 tokens") for line in said)
    assert (
        f"8 sequences of 48 tokens from {text.name} and 21 that the dense model wrote"
        in (tmp_path / "more" / "README.md").read_text()
    )
    assert efx_prune(model, tmp_path / "own", text, "expert_50", *options).returncode == 0
    more, own = (load_sparse(tmp_path / name).state_dict() for name in ("more", "own"))
    assert any(not torch.equal(more[name], own[name]) for name in more)
    # A copy has written, so the model's own way to generate is as it was.
    kept = [tmp_path / name / "generation_config.json" for name in ("more", "own")]
    assert kept[0].read_text() == kept[1].read_text()


def test_quantizing_a_sparse_model_keeps_its_zeros(model, sparse, text, tmp_path, warnings):
    assert efx("export", sparse, tmp_path / "dense", "--structure", "dense").returncode == 0
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    _, quantization = (RECIPES / "expert_50_w8a8.yaml").read_text().split("  quantization_modifiers:\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a_stage:\n  quantization_modifiers:\n" + quantization)
    result = efx_prune(tmp_path / "dense", tmp_path / "quantized", text, recipe, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sparsity"] >= 0.5
    assert any("the recipe had filled" in line and "zero again" in line for line in warnings)
    assert_refused(efx_prune(model, tmp_path / "out", text, recipe), tmp_path / "out", "the model is dense")


def test_heal_learns_from_text_and_from_what_the_teacher_writes(model, sparse, tmp_path):
    expert = shutil.copytree(sparse, tmp_path / "expert")
    tiny_tokenizer().save_pretrained(expert)
    counting = tmp_path / "counting.txt"
    counting.write_text("\n".join(" ".join(f"t{3 + (row + step) % 125}" for step in range(40)) for row in range(60)))
    options = ["--dataset", counting, "--tokens", 960, "--generate", 320, "--length", 32, "--learning-rate", 3e-3]
    result = efx("heal", expert, tmp_path / "healed", *options, "--teacher", model, "--json")
    assert result.returncode == 0, result.stderr
    found, before = json.loads(result.stdout), json.loads(efx("inspect", expert, "--json").stdout)
    assert found["tokens"] == 1280 and found["after"] < 0.9 * found["before"]
    assert found["sparsity"] == pytest.approx(before["sparsity"])
    assert efx("inspect", tmp_path / "healed", "--verify").returncode == 0
    refused = efx("heal", expert, tmp_path / "other", *options)
    assert_refused(refused, tmp_path / "other", "--generate asks the teacher for text: pass --teacher", code=2)


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
def test_quantize_keeps_the_zeros_of_a_sparse_checkpoint(sparse, text, tmp_path, scheme):
    expert = shutil.copytree(sparse, tmp_path / "expert")
    tiny_tokenizer().save_pretrained(expert)
    options = ["--dataset", text, "--quantization", scheme, "--samples", 4, "--length", 32, "--json"]
    result = efx("quantize", expert, tmp_path / "small", *options)
    assert result.returncode == 0, result.stderr
    found, before = json.loads(result.stdout), json.loads(efx("inspect", expert, "--json").stdout)
    assert found["sparsity"] >= before["sparsity"] > 0.4
    assert len(found["layers"]) == 7 * AutoConfig.from_pretrained(expert).num_hidden_layers
    summary = json.loads(efx("inspect", tmp_path / "small", "--verify", "--json").stdout)
    assert summary["sparsity"] == pytest.approx(found["sparsity"])
    assert summary["dtype"] == f"int{scheme[1]}"
    healing = efx("heal", tmp_path / "small", tmp_path / "other", "--dataset", text)
    assert_refused(healing, tmp_path / "other", "is quantized, and integers cannot be trained")
    options[3] = "W2"
    assert_refused(efx("quantize", expert, tmp_path / "other", *options), tmp_path / "other", "W2 is none of", code=2)


def test_quiet_says_nothing_but_errors(model, text, tmp_path):
    arguments = prune_arguments(model, tmp_path / "expert", text, RECIPES / "expert_50.yaml")
    result = efx_process(*arguments, "--quiet", "--device", "cpu")
    assert result.returncode == 0 and result.stdout == ""
    assert not [line for line in result.stderr.splitlines() if "it/s" in line or "INFO" in line], result.stderr
    again = efx_process(*arguments, "--quiet")
    assert again.returncode == 1 and "exists already" in again.stderr


def test_a_device_that_is_not_there_is_refused(model, text, tmp_path):
    arguments = prune_arguments(model, tmp_path / "expert", text, RECIPES / "expert_50.yaml")
    assert efx(*arguments, "--device", "quantum").returncode == 2
    if not torch.cuda.is_available():
        assert_refused(efx(*arguments, "--device", "cuda"), tmp_path / "expert", "--device cuda")


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(sparse, tmp_path):
    """A limit on the size of files stands in for the disk: the system refuses the write in the middle of it."""
    dense, output = tmp_path / "dense", tmp_path / "sparse"
    assert efx("export", sparse, dense, "--structure", "dense").returncode == 0
    command = [str(Path(sys.executable).parent / "efx"), "export", str(dense), str(output)]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert_refused(result, output, str(output), "make room")


@pytest.mark.parametrize("options", [["--recipe", "expert_2of4"], ["--mask-structure", "2:4"]])
def test_a_recipe_is_taken_by_name_or_made_from_options(model, text, tmp_path, options):
    arguments = ["prune", model, tmp_path / "expert", "--dataset", text, "--samples", 8, "--length", 48]
    result = efx(*arguments, *options)
    assert result.returncode == 0, result.stderr
    recipe = (tmp_path / "expert" / "recipe.yaml").read_text()
    assert 'mask_structure: "2:4"' in recipe and "EfficientXpertModifier" in recipe
    assert load_sparse(tmp_path / "expert").config.num_hidden_layers == 2


@pytest.mark.parametrize("option", [["--sparsity", 0.6], ["--mask-structure", "2:4"]])
def test_options_of_the_default_recipe_contradict_another_recipe(model, text, tmp_path, option):
    result = efx_prune(model, tmp_path / "expert", text, "expert_50", *option)
    assert result.returncode == 2
    assert result.stderr.startswith(f"efx: {option[0]} is for the default recipe and expert_50 has its own")


def test_help_names_the_recipes():
    helped = " ".join(efx("prune", "--help").stdout.replace("│", " ").split())
    for path in RECIPES.glob("*.yaml"):
        assert path.stem in helped


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
    for name, content, code, words in [
        ("missing.jsonl", None, 2, ["there is no file"]),
        ("notes.docx", "x", 2, ["notes.docx", ".jsonl"]),
        ("wrong.jsonl", '{"content": "t5 t6"}', 1, ["no field `text`", "content"]),
        ("short.txt", "t5 t6 t7", 1, ["only", "tokens"]),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        assert_refused(efx_prune(model, output, tmp_path / name, RECIPES / "expert_50.yaml"), output, *words, code=code)


def test_conversations_and_a_field_of_another_name_calibrate(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    words = " ".join(f"t{i}" for i in range(3, 120))
    message = {"role": "user", "content": words}
    data = tmp_path / "chat.jsonl"
    data.write_text("\n".join(json.dumps({"messages": [message], "body": words}) for _ in range(6)))
    for name, option in (("chat", []), ("body", ["--text-field", "body"])):
        result = efx_prune(tmp_path / "model", tmp_path / name, data, RECIPES / "wanda_50.yaml", *option)
        assert result.returncode == 0, result.stderr
        assert "8 sequences of 48 tokens from chat.jsonl" in (tmp_path / name / "README.md").read_text()


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
    for command in ("prune", "heal", "quantize", "export", "inspect"):
        result = efx(command, "--help")
        assert result.returncode == 0 and f"Example: efx {command}" in result.stdout
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import efx_plugin.cli"], capture_output=True, text=True, check=True
    ).stderr
    loaded = {line.rsplit("|", 1)[-1].strip() for line in listing.splitlines()}
    assert not loaded & {"torch", "transformers", "llmcompressor", "vllm"}
