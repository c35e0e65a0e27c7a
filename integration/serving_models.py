"""Tiny random models for the serving tests, dense and sparse, and vLLM's offline engine on them in this process."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from efx_plugin.checkpoint import save_sparse
from efx_plugin.checkpoint.formats.registry import part_names
from integration.serve_once import set_environment

SERVE_ONCE = Path(__file__).with_name("serve_once.py")

PROMPTS = [[5, 6, 7, 8, 9], list(range(20, 40)), [300]]

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
    },
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 76},
}

# For each of the tokens of `greedy` the best logit of these random models leads the second by at least four units in
# the last place of bfloat16: kernels that add up in another order find the same tokens.
SEEDS = {
    "Llama": 1111,
    "Mistral": 75,
    "Qwen2": 436,
    "Qwen3": 218,
    "Gemma2": 101,
    "Gemma3": 474,
    "Phi3": 139,
    "GraniteMoeHybrid": 261,
    "Mixtral": 349,
    "Qwen3Moe": 294,
}

INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
SCHEMES = {
    "W8A8": {"weights": INT8, "input_activations": INT8 | {"strategy": "token", "dynamic": True}},
    "W8A16": {"weights": INT8},
}


def save_tiny(directory: Path, architecture: str, *, seed: int | None = None, **overrides) -> Path:
    """Save a random model in bfloat16 whose linear weights are 2:4 sparse: `dense`, and each sparse format of it."""
    model = _tiny_model(architecture, SEEDS[architecture] if seed is None else seed, **overrides)
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
    quantize_activations = scheme == "W8A8"
    packed = pack(weight.char(), scales=torch.ones(64), dtype=weight.dtype, quantize_activations=quantize_activations)
    return packed.kernel


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


def greedy(llm: Any, lora_request: Any = None) -> list[list[int]]:
    """8 greedy tokens after each of `PROMPTS`."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora_request)
    return [list(output.outputs[0].token_ids) for output in outputs]


def serve(directory: Path, **options) -> tuple[list[list[int]], list[str]]:
    """Tokens after each of `PROMPTS`, and the kernels that the sparse layers run on."""
    from efx_plugin.serving.linear_method import kernels_in_use

    with engine(directory, **options) as llm:
        return greedy(llm), llm.apply_model(kernels_in_use)[0]


def assert_varied(tokens: list[list[int]]) -> None:
    """Other than those of a model that repeats its prompt, whatever its matrices are."""
    assert min(len(set(one)) for one in tokens) > 3, tokens


def dense_tokens(directory: Path) -> list[list[int]]:
    """Tokens after each of `PROMPTS`, of a checkpoint in which nothing is sparse."""
    tokens, kernels = serve(directory)
    assert kernels == []
    assert_varied(tokens)
    return tokens


def serve_once(
    directory: Path, prompts: list, *options: str, **environment: str
) -> tuple[subprocess.CompletedProcess, dict | None]:
    """Run serve_once.py, eagerly, for 8 tokens: the finished process, and what it wrote, if anything."""
    requests, output = directory / "prompts.json", directory / "served.json"
    requests.write_text(json.dumps(prompts))
    command = [sys.executable, SERVE_ONCE, "--model", directory, "--prompts", requests, "--max-tokens", "8", "--eager"]
    # The settings of the engine in this process, such as the cores it is bound to, are not for the other one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    result = subprocess.run(
        [str(part) for part in [*command, "--output", output, *options]],
        capture_output=True,
        text=True,
        env=inherited | environment,
    )
    return result, json.loads(output.read_text()) if output.exists() else None


def _tiny_model(architecture: str, seed: int, **overrides):
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
        torch.manual_seed(seed)
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
