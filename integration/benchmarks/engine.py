"""A vLLM engine in a process of its own, for `serve.py` beside this file.

    python -m integration.benchmarks.engine OPTIONS            answers lines until its input ends
    python -m integration.benchmarks.engine OPTIONS --load     writes the seconds of loading the model, and ends

OPTIONS are a JSON object of vLLM's engine arguments. The lines are JSON: {} asks for facts (see `facts`), and
{"prompts": [[1, 2], ...], "new_tokens": 48} for the seconds of a generation (see `generate`). vLLM runs within this
process, whose threads sleep while it waits for a line; what it prints goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from integration.serve_once import set_environment


def generate(llm: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Generate greedily for all prompts at once.

    Returns:
        `first`, the seconds until every prompt has its first token, and `rest`, those of the other tokens.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    for index, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    begin = time.perf_counter()
    outputs = llm.llm_engine.step()
    first = time.perf_counter()
    if [len(output.outputs[0].token_ids) for output in outputs] != [1] * len(prompts):
        raise RuntimeError("vLLM did not take all prompts in one step: max_num_batched_tokens is too small")
    steps = 1
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        steps += 1
    end = time.perf_counter()
    if steps != new_tokens:
        raise RuntimeError(f"vLLM took {steps} steps for {new_tokens} tokens")
    return {"first": first - begin, "rest": end - first}


def facts(llm: Any) -> dict[str, Any]:
    """The kernels of the sparse layers, their resident bytes and those of the same layers stored dense; versions."""
    from vllm import __version__ as vllm_version

    from efx_plugin.serving.linear_method import kernels_in_use

    sizes = llm.apply_model(linear_bytes)[0]
    return {
        "operator": ", ".join(llm.apply_model(kernels_in_use)[0]) or "dense",
        "packed_bytes": sizes[0],
        "dense_bytes": sizes[1],
        "threads": torch.get_num_threads(),
        "versions": {"vllm": vllm_version, "torch": torch.__version__},
    }


def linear_bytes(model: torch.nn.Module) -> tuple[int, int]:
    weights = [module.packed_weight for module in model.modules() if hasattr(module, "packed_weight")]
    packed = sum(tensor.nbytes for weight in weights for tensor in weight.tensors)
    return packed, sum(weight.out_features * weight.in_features * weight.dtype.itemsize for weight in weights)


def load(options: dict[str, Any]) -> float:
    """Load the model as an engine does, and nothing else.

    Returns:
        The seconds in which vLLM builds the model, reads its weights and prepares them for its kernels.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    load_model = BaseModelLoader.load_model
    seconds = []

    def timed(*args: Any, **kwargs: Any) -> torch.nn.Module:
        begin = time.perf_counter()
        model = load_model(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return model

    with patch.object(BaseModelLoader, "load_model", timed):
        UniProcExecutor(EngineArgs(**options).create_engine_config())
    (figure,) = seconds
    return figure


def answer_lines(options: dict[str, Any], write: Callable[[str], object]) -> None:
    from vllm import LLM

    llm = LLM(**options)
    write("ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        write(json.dumps(generate(llm, **request) if request else facts(llm)) + "\n")


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints must not get in between
    set_environment(tp=1)
    options = json.loads(sys.argv[1])
    if sys.argv[2:] == ["--load"]:
        answers.write(f"{load(options)}\n")
    else:
        answer_lines(options, answers.write)


if __name__ == "__main__":
    main()
