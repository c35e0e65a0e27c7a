"""Serve a model once with vLLM's offline engine on CPU, greedily, and write what it said and how fast.

    .venv-serve/bin/python -m integration.serve_once --model DIR --prompts FILE.json --max-tokens 64 --output OUT.json

The prompts are a JSON list of texts, or of lists of token ids. The output:

    {"outputs": [...],             per prompt, see `served.ask`
     "relative_error": 0.03,       see `served`
     "tokens_per_second": 12.3,    generated tokens of all prompts together, median of three runs after a warm-up
     "dtype": "bfloat16",          of activations: float32 on a CPU that cannot multiply in bfloat16
     "operator": "reference",      the kernel that the sparse layers run on; "dense" where nothing is sparse
     "load_seconds": 4.5,
     "versions": {"vllm": "0.32.0"}}
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from efx_plugin.errors import EfxError
from efx_plugin.serving.launch import thread_binding
from integration.served import ask

REPEATS = 3


def serve(
    model: Path, prompts: list[str] | list[list[int]], max_tokens: int, *, eager: bool, tp: int
) -> dict[str, Any]:
    """Generate for all prompts in one batch; see the module's description for the result."""
    set_environment(tp)
    import torch
    from vllm import LLM, SamplingParams
    from vllm import __version__ as vllm_version

    from efx_plugin.machine import cpu_multiplies_in
    from efx_plugin.serving.linear_method import kernels_in_use

    has_tokenizer = any((model / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    dtype = "bfloat16" if cpu_multiplies_in(torch.bfloat16) else "float32"
    start = time.perf_counter()
    llm = LLM(
        str(model),
        dtype=dtype,
        enforce_eager=eager,
        tensor_parallel_size=tp,
        skip_tokenizer_init=not has_tokenizer,
        enable_prefix_caching=False,
        max_model_len=-1,  # as long as the cache allows
    )
    load_seconds = time.perf_counter() - start

    inputs = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=has_tokenizer)
    speeds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        outputs = [request.outputs[0] for request in llm.generate(inputs, sampling, use_tqdm=False)]
        speeds.append(sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - start))

    kernels = sorted({kernel for worker in llm.apply_model(kernels_in_use) for kernel in worker})
    return {
        # Apart from what is timed: log-probabilities take time.
        **ask(llm, json.loads((model / "config.json").read_text()), prompts, max_tokens),
        "tokens_per_second": statistics.median(speeds[1:]),
        "dtype": dtype,
        "operator": ", ".join(kernels) or "dense",
        "load_seconds": load_seconds,
        "versions": {"vllm": vllm_version},
    }


def set_environment(tp: int) -> None:
    """Set vLLM up for all cores of this machine. To be called before vLLM is imported; what is set already stays."""
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = thread_binding(tp)
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # The engine in this process starts sooner; tensor parallelism brings processes of its own.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # `apply_model` sends a function to those processes.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON file with a list of prompts")
    parser.add_argument("--max-tokens", type=int, required=True, help="tokens to generate per prompt")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallelism (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    try:
        served = serve(args.model, json.loads(args.prompts.read_text()), args.max_tokens, eager=args.eager, tp=args.tp)
    except EfxError as error:
        sys.exit(f"error: {error}")
    partial = args.output.with_suffix(".partial")
    partial.write_text(json.dumps(served, indent=2))
    partial.replace(args.output)


if __name__ == "__main__":
    main()
