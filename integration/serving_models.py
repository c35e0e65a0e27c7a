"""Tiny random models for the serving tests, dense and sparse, and vLLM's offline engine on them in this process."""

import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from efx_plugin.checkpoint import save_sparse
from efx_plugin.checkpoint.formats.registry import find_format, part_names
from integration.serve_once import set_environment
from integration.served import ask, difference
from tests.support.quantized import W8A8, W8A16, quantize, w4a16

ROOT = Path(__file__).resolve().parent.parent

SEED = 0
# Token ids, and so the continuations whose log-probabilities are compared.
_random = random.Random(SEED)
PROMPTS = [[_random.randrange(3, 320) for _ in range(24)] for _ in range(8)]

_GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}

# What is special about an architecture, and the fields of its config that make a tiny model of it.
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},  # biases
    "Qwen3": {"head_dim": 32},  # norms of queries and keys
    "Gemma2": _GEMMA,  # capped logits, norms behind each sublayer
    "Gemma3": _GEMMA,  # norms of queries and keys too, and two rotary embeddings
    "Phi3": {},  # fused on disk
    # Loaded by `stacked_params_mapping`. Attention and one dense MLP: no experts, no Mamba.
    "GraniteMoeHybrid": {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 76,
        "layer_types": ["attention"] * 2,
        "position_embedding_type": "rope",
        "attention_multiplier": 32**-0.5,
    },
    # All experts for every token: where a router chooses between two that are nearly equal, rounding decides.
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "Qwen3Moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 76},
}

SCHEMES = {"W8A8": W8A8, "W8A16": W8A16, "W4A16": w4a16(32)}


def save_tiny(directory: Path, architecture: str, **overrides) -> Path:
    """Save a random model in bfloat16 whose linear weights are 2:4 sparse: `dense`, and each sparse format of it."""
    model = _tiny_model(architecture, **overrides)
    model.save_pretrained(directory / "dense")
    for structure in ("sparse-bitmask", "sparse-24-bitmask"):
        save_sparse(model, directory / structure, structure, progress=False)
    return directory


def kernel(scheme: str | None = None) -> str:
    """The name of the kernel that bfloat16 weights get on this machine, or those quantized by one of `SCHEMES`."""
    from efx_plugin.kernels import pack

    weight = torch.eye(64, dtype=torch.bfloat16)
    if scheme is None:
        return pack(weight).kernel
    scales = torch.ones(64, 2) if scheme == "W4A16" else torch.ones(64)
    return pack(weight.char(), scales=scales, dtype=weight.dtype, quantize_activations=scheme == "W8A8").kernel


def quantized_model(directory: Path, scheme: dict, architecture: str, **overrides):
    """A tiny sparse model, quantized by `quantize`."""
    from transformers import AutoModelForCausalLM

    dense = save_tiny(directory, architecture, **overrides) / "dense"
    return quantize(AutoModelForCausalLM.from_pretrained(dense, dtype="auto"), scheme)


def save_adapter(directory: Path, model: Path) -> Path:
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


def rewrite(directory: Path, copy: Path, change) -> Path:
    """Copy a checkpoint, with `change` applied to its dictionary of tensors (in place)."""
    copy.mkdir(parents=True)
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def plant(fault: Callable[[torch.Tensor], None], sparse: Path, copy: Path) -> Path:
    """Copy a sparse checkpoint with one projection of its first layer changed, in place, by `fault`."""
    name = "model.layers.0.self_attn.o_proj"
    config = json.loads((sparse / "config.json").read_text())
    structure = find_format(config["quantization_config"]["sparsity_config"]["format"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = structure.decompress(
            {part: tensors.pop(f"{name}.{part}") for part in part_names() if f"{name}.{part}" in tensors}
        )
        fault(weight)
        tensors.update({f"{name}.{part}": tensor for part, tensor in structure.compress(weight).items()})

    return rewrite(sparse, copy, change)


def swap_rows(weight: torch.Tensor) -> None:
    """Swap the first two rows [out, in]."""
    weight[[0, 1]] = weight[[1, 0]]


def negate_one(weight: torch.Tensor) -> None:
    """Change the sign of one weight, the largest."""
    weight.view(-1)[weight.abs().float().argmax()] *= -1


def use_old_names(tensors: dict[str, torch.Tensor]) -> None:
    """Rename as compressed-tensors up to 0.8 did: `q_proj.compressed` was `q_proj.weight.compressed`."""
    for name in list(tensors):
        prefix, _, part = name.rpartition(".")
        if part in part_names():
            tensors[f"{prefix}.weight.{part}"] = tensors.pop(name)


@contextmanager
def engine(directory: Path, **options) -> Iterator[Any]:
    """vLLM's `LLM` on a checkpoint without a tokenizer, in this process and eager unless `options` say otherwise."""
    set_environment(tp=1)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "bfloat16", "enforce_eager": True, "enable_prefix_caching": False, "skip_tokenizer_init": True}
    llm = None
    try:
        llm = LLM(str(directory), **(defaults | options))
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm: Any, directory: Path, **options) -> dict[str, Any]:
    """What the engine on a checkpoint says after each of `PROMPTS`, see `served.ask`, and the `operator` of its sparse
    layers, "dense" where there are none.
    """
    from efx_plugin.serving.linear_method import kernels_in_use

    config = json.loads((directory / "config.json").read_text())
    operator = ", ".join(llm.apply_model(kernels_in_use)[0]) or "dense"
    return ask(llm, config, PROMPTS, 8, **options) | {"operator": operator}


def serve(directory: Path, **options) -> dict[str, Any]:
    """`answers` of an engine with these options."""
    with engine(directory, **options) as llm:
        return answers(llm, directory)


def assert_same(dense: dict[str, Any], served: dict[str, Any], operator: str) -> None:
    """Two `answers` agree up to rounding; the first come from dense layers, the second from that operator."""
    assert difference(dense, served) is None
    assert (dense["operator"], served["operator"]) == ("dense", operator)


def serve_once(
    directory: Path, prompts: list, *options: str, **environment: str
) -> tuple[subprocess.CompletedProcess, dict | None]:
    """Run `integration.serve_once`, eagerly, for 8 tokens: the finished process, and what it wrote, if anything."""
    requests, output = directory / "prompts.json", directory / "served.json"
    requests.write_text(json.dumps(prompts))
    command = [sys.executable, "-m", "integration.serve_once", "--model", directory, "--max-tokens", "8", "--eager"]
    # The settings of the engine in this process, such as the cores it is bound to, are not for the other one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    result = subprocess.run(
        [str(part) for part in [*command, "--prompts", requests, "--output", output, *options]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=inherited | environment,
    )
    return result, json.loads(output.read_text()) if output.exists() else None


def _tiny_model(architecture: str, **overrides):
    import transformers

    fields = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 76,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # wide enough that tokens depend on every matrix
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model_class = getattr(transformers, f"{architecture}ForCausalLM")
    config = model_class.config_class(**(fields | ARCHITECTURES[architecture] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = model_class(config).to(torch.bfloat16)
        if architecture.startswith("Gemma"):
            # It multiplies embeddings by the root of the width, beside which its normalized layers would not matter.
            model.get_input_embeddings().weight.data /= 10
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                _zero_two_of_four(module.weight.data)
                if module.bias is not None:
                    torch.nn.init.normal_(module.bias)
    return model


def _zero_two_of_four(weight: torch.Tensor) -> None:
    fours = weight.view(-1, 4)
    fours.scatter_(1, fours.abs().float().topk(2, dim=1, largest=False).indices, 0)
