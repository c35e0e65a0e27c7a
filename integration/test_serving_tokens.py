"""vLLM serves a sparse checkpoint with the tokens of the same weights stored dense."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.assets import tiny_tokenizer
from integration.serving_models import (
    ARCHITECTURES,
    engine,
    greedy,
    rewrite,
    save_tiny,
    serve,
    serve_once,
    use_old_names,
)

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_equal_those_of_the_dense_checkpoint(architecture, tmp_path):
    model = save_tiny(tmp_path, architecture)
    tokens, kernels = serve(model / "dense")
    assert kernels == []
    assert serve(model / "sparse-bitmask") == (tokens, ["reference"])
    old = rewrite(model / "sparse-24-bitmask", tmp_path / "old", use_old_names)
    assert serve(old) == (tokens, ["reference"])


def test_tokens_are_equal_when_compiled(llama):
    tokens, _ = serve(llama / "dense", enforce_eager=False)
    assert serve(llama / "sparse-bitmask", enforce_eager=False) == (tokens, ["reference"])


def test_adapters_run_on_sparse_layers(llama, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", llama / "dense")
    tokens = {}
    for kind in ("dense", "sparse-bitmask"):
        with engine(llama / kind, enable_lora=True, max_lora_rank=8) as llm:
            from vllm.lora.request import LoRARequest

            tokens[kind] = greedy(llm), greedy(llm, LoRARequest("adapter", 1, str(adapter)))
    assert tokens["sparse-bitmask"] == tokens["dense"]
    assert tokens["dense"][0] != tokens["dense"][1]


def test_tokens_are_equal_under_tensor_parallelism(tmp_path):
    # One key-value head for both ranks, and 38 of 76 intermediate columns each: bytes of the bitmask are split.
    model = save_tiny(tmp_path, "Llama", num_key_value_heads=1)
    served, log = {}, {}
    for kind in ("dense", "sparse-bitmask"):
        tiny_tokenizer(320).save_pretrained(model / kind)
        result, served[kind] = serve_once(model / kind, ["t5 t6 t7 t8", "t300"], "--tp", "2")
        assert result.returncode == 0, result.stderr[-3000:]
        log[kind] = result.stdout + result.stderr
    dense, sparse = served.values()
    assert sparse["outputs"] == dense["outputs"]
    for output in sparse["outputs"]:
        assert len(output["token_ids"]) == 8
        assert output["text"].split() == [f"t{token}" for token in output["token_ids"] if token > 2]
    assert (dense["operator"], sparse["operator"]) == ("dense", "reference")
    assert sparse["tokens_per_second"] > 0 and sparse["load_seconds"] > 0
    line = "sparse layers run on the reference kernel"
    assert (log["dense"].count(line), log["sparse-bitmask"].count(line)) == (0, 2)  # once per process


def save_adapter(directory, model):
    """A random LoRA adapter, as PEFT saves it, on every projection of a Llama."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            prefix = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 5
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    return directory
