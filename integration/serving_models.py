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
from efx_plugin.checkpoint.formats import PART_NAMES
from integration.serve_once import set_environment

SERVE_ONCE = Path(__file__).with_name("serve_once.py")

PROMPTS = [[5, 6, 7, 8, 9], list(range(20, 40)), [300]]

# vLLM's ways to load a fused layer: shard ids on the tensors (Llama; Qwen2, with biases), weights fused on disk
# (Phi-3), `stacked_params_mapping` (GraniteMoeHybrid).
ARCHITECTURES = ["Llama", "Qwen2", "Phi3", "GraniteMoeHybrid"]


def save_tiny(directory: Path, architecture: str, **overrides) -> Path:
    """Save a random model in bfloat16 whose linear weights are 2:4 sparse: `dense`, and each sparse format of it."""
    model = _tiny_model(architecture, **overrides)
    model.save_pretrained(directory / "dense")
    for structure in ("sparse-bitmask", "sparse-24-bitmask"):
        save_sparse(model, directory / structure, structure, progress=False)
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


def use_old_names(tensors: dict[str, torch.Tensor]) -> None:
    """Rename as compressed-tensors up to 0.8 did: `q_proj.compressed` was `q_proj.weight.compressed`."""
    for name in list(tensors):
        prefix, _, part = name.rpartition(".")
        if part in PART_NAMES:
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
    """16 greedy tokens after each of `PROMPTS`."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora_request)
    return [list(output.outputs[0].token_ids) for output in outputs]


def serve(directory: Path, **options) -> tuple[list[list[int]], list[str]]:
    """Tokens after each of `PROMPTS`, and the kernels that the sparse layers run on."""
    from efx_plugin.serving.method import kernels_in_use

    with engine(directory, **options) as llm:
        return greedy(llm), llm.apply_model(kernels_in_use)[0]


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
    if architecture == "GraniteMoeHybrid":  # attention and one dense MLP: no experts, no Mamba
        fields |= {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 76}
        fields |= {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"}
    config = getattr(transformers, f"{architecture}Config")(**(fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(torch.bfloat16)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                _zero_two_of_four(module.weight.data)
                if module.bias is not None:
                    torch.nn.init.normal_(module.bias)
    return model


def _zero_two_of_four(weight: torch.Tensor) -> None:
    fours = weight.view(-1, 4)
    fours.scatter_(1, fours.abs().float().topk(2, dim=1, largest=False).indices, 0)
