"""`make bench-serve`: tokens per second of a sparse model in vLLM, over those of the same weights stored dense.

The model is a random Llama of 1.1B parameters, its linear layers 50 % sparse by magnitude. Two engines of the same
vLLM, dense and sparse, each in a process of its own, work in turn, compiled unless --eager. Figures are medians of the
rounds, ratios medians of the ratios within each round, larger than 1 where sparse is faster. Decoding is timed from
the first token of all requests on, prefill until then. The time of loading is taken in fresh processes, in turn too,
with the files in memory; there a ratio larger than 1 says that sparse is slower.

Writes build/bench/serve.json (serve-eager.json).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from efx_plugin.checkpoint import save_sparse
from efx_plugin.errors import EfxError
from efx_plugin.machine import cpu_name
from integration.benchmarks.progress import progress_on
from integration.benchmarks.timing import OUTPUT, interleave, process, ratio, ratios, spread, timed, write_json
from integration.packages import make_once

MODEL = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 32
NEW_TOKENS = 48
PREFILL_TOKENS = 1024
ROUNDS = 5
LOADS = 3
# An engine that waits may take this share of one core, and these seconds to end what it did before: it slows the other.
IDLE = 0.05
IDLE_SECONDS = 0.1

# What an engine takes beside its products, to load and to start, as seen on two cores.
LOAD_SECONDS = 20
START_SECONDS = {"eager": 20, "compiled": 100}

KINDS = ("dense", "sparse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    try:
        bench(OUTPUT / "llama-1b", MODEL, OUTPUT / f"serve{'-eager' * args.eager}.json", eager=args.eager)
    except (EfxError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def bench(
    directory: Path,
    model: dict[str, Any],
    output: Path,
    *,
    eager: bool,
    batches: tuple[int, ...] = BATCHES,
    prefill_tokens: int = PREFILL_TOKENS,
    rounds: int = ROUNDS,
    loads: int = LOADS,
) -> dict[str, Any]:
    """Make the model in `directory` unless it is there, measure, print, and write the report to `output`.

    Args:
        model: fields of a LlamaConfig.
        batches: numbers of requests that decode together.
        prefill_tokens: tokens of the one prompt whose prefill is timed.
        rounds, loads: how often everything is measured.

    Returns:
        The report.

    Raises:
        EfxError: an engine took time from the other one while it should have waited.
        RuntimeError: an engine stopped.
    """
    console = Console()
    make_once(directory, partial(make_model, model))
    longest = max(prefill_tokens, PROMPT_TOKENS * max(batches), PROMPT_TOKENS + NEW_TOKENS) + 1
    options = {
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_batched_tokens": longest,  # prompts that come together are prefilled together
        "max_num_seqs": max(batches),
    }
    workloads = {str(batch): make_workload(model, batch, PROMPT_TOKENS, NEW_TOKENS) for batch in batches}
    workloads["prefill"] = make_workload(model, 1, prefill_tokens, 1)
    console.print(
        f"about {expected_minutes(model, workloads, rounds, loads, eager):.0f} minutes on this machine ({cpu_name()})"
    )
    with progress_on(console) as progress:
        load_seconds = time_loading(directory, options, loads, progress)
        task = progress.add_task("starting the engines", total=len(KINDS))
        with engine("dense", directory, options, output) as dense:
            progress.advance(task)
            with engine("sparse", directory, options, output) as sparse:
                progress.advance(task)
                facts = sparse.ask({})
                seconds = time_generation({"dense": dense, "sparse": sparse}, workloads, rounds, progress)
    report = summarize(seconds, load_seconds, facts, workloads, model)
    print_report(report, console)
    write_json(output, report)
    console.print(f"{output}: {facts['threads']} threads, {'eager' if eager else 'compiled'}")
    return report


def make_model(fields: dict[str, Any], directory: Path) -> None:
    """Save a random Llama as `dense` and `sparse` below `directory`: the same weights, half of the linear ones zero."""
    config = LlamaConfig(**fields, dtype="bfloat16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    linears = [
        module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not model.lm_head
    ]
    for module in track(linears, "pruning a random model"):
        size = module.weight.data.abs()
        module.weight.data[size < size.median()] = 0
    model.save_pretrained(directory / "dense")
    save_sparse(model, directory / "sparse")


def make_workload(model: dict[str, Any], batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Random prompts, as `engine.generate` takes them."""
    generator = random.Random(0)
    prompts = [[generator.randrange(model["vocab_size"]) for _ in range(prompt_tokens)] for _ in range(batch)]
    return {"prompts": prompts, "new_tokens": new_tokens}


def expected_minutes(
    model: dict[str, Any], workloads: dict[str, dict[str, Any]], rounds: int, loads: int, eager: bool
) -> float:
    """How long everything is going to take, from the time of one layer's dense product at each number of tokens."""
    width, inner, layers = model["hidden_size"], model["intermediate_size"], model["num_hidden_layers"]
    weight = torch.zeros(inner, width, dtype=torch.bfloat16)
    share = weight.numel() / (layers * (3 * inner * width + 3 * width * width) + model["vocab_size"] * width)

    def step(tokens: int) -> float:
        x = torch.zeros(tokens, width, dtype=torch.bfloat16)
        product = timed(lambda: torch.nn.functional.linear(x, weight))
        product()
        return min(product() for _ in range(3)) / share

    seconds = 0.0
    for workload in workloads.values():
        prompts = workload["prompts"]
        seconds += step(len(prompts) * len(prompts[0])) + (workload["new_tokens"] - 1) * step(len(prompts))
    start = START_SECONDS["eager" if eager else "compiled"]
    return len(KINDS) * ((1 + rounds) * seconds + loads * LOAD_SECONDS + start) / 60


@dataclass(frozen=True)
class Engine:
    """An engine that waits in its process: `ask` sends it one of the requests that engine.py describes."""

    ask: Callable[[dict[str, Any]], dict[str, Any]]
    pid: int

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system


@contextmanager
def engine(kind: str, directory: Path, options: dict[str, Any], output: Path) -> Iterator[Engine]:
    """Start the engine for the dense or the sparse model; its log goes beside the output."""
    with (
        open(output.with_name(f"{output.stem}-{kind}.log"), "w") as log,
        process(f"the {kind} engine", command(kind, directory, options), environment(), log) as (ask, pid),
    ):
        yield Engine(lambda request: json.loads(ask(json.dumps(request))), pid)


def command(kind: str, directory: Path, options: dict[str, Any]) -> list[str]:
    options = {"model": str(directory / kind)} | options
    return [sys.executable, "-m", "integration.benchmarks.engine", json.dumps(options)]


def environment() -> dict[str, str]:
    """Our variables, but for the settings of vLLM, which engine.py makes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return inherited | {"VLLM_NO_USAGE_STATS": "1"}


def time_loading(directory: Path, options: dict[str, Any], loads: int, progress: Progress) -> dict[str, list[float]]:
    """Seconds of loading each model in fresh processes."""
    for file in directory.glob("*/*.safetensors"):
        with open(file, "rb") as stream:  # so that it is in memory from the first time on
            while stream.read(2**24):
                pass
    task = progress.add_task("loading", total=loads * len(KINDS))

    def seconds(kind: str) -> float:
        result = subprocess.run(
            [*command(kind, directory, options), "--load"], env=environment(), capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"vLLM could not load {directory / kind}: {result.stderr[-2000:]}")
        progress.advance(task)
        return float(result.stdout)

    return interleave({kind: partial(seconds, kind) for kind in KINDS}, loads)


def time_generation(
    engines: dict[str, Engine], workloads: dict[str, dict[str, Any]], rounds: int, progress: Progress
) -> dict[tuple[str, str], list[float]]:
    """Seconds of the part of each workload that counts, by (kind, workload), after one round that does not count.

    Raises:
        EfxError: an engine was not idle while it waited.
    """
    task = progress.add_task("generating", total=(1 + rounds) * len(workloads) * len(engines))
    waited = {kind: 0.0 for kind in engines}
    busy = {kind: 0.0 for kind in engines}

    def seconds(kind: str, name: str) -> float:
        waiting = [other for other in engines if other != kind]
        before = [engines[other].cpu_seconds() for other in waiting]
        begin = time.perf_counter()
        answer = engines[kind].ask(workloads[name])
        for other, cpu_seconds in zip(waiting, before, strict=True):
            waited[other] += time.perf_counter() - begin
            busy[other] += engines[other].cpu_seconds() - cpu_seconds
        progress.advance(task)
        return answer["first" if name == "prefill" else "rest"]

    functions = {(kind, name): partial(seconds, kind, name) for name in workloads for kind in engines}
    interleave(functions, 1)
    figures = interleave(functions, rounds)
    for kind in engines:
        if busy[kind] > IDLE * waited[kind] + IDLE_SECONDS:
            raise EfxError(
                f"the {kind} engine took {busy[kind] / waited[kind]:.0%} of a core while it waited, which slows the "
                "other one down: unset OMP_WAIT_POLICY and GOMP_SPINCOUNT"
            )
    return figures


def summarize(
    seconds: dict[tuple[str, str], list[float]],
    load_seconds: dict[str, list[float]],
    facts: dict[str, Any],
    workloads: dict[str, dict[str, Any]],
    model: dict[str, Any],
) -> dict[str, Any]:
    """The report; `ratio_by_bytes` is that of the bytes that are read for a token, the output layer's included."""
    head = model["vocab_size"] * model["hidden_size"] * torch.bfloat16.itemsize
    by_workload = {name: (seconds["sparse", name], seconds["dense", name]) for name in workloads}
    found = {name: ratio(*pair) for name, pair in by_workload.items()}
    spreads = {name: spread(ratios(*pair)) for name, pair in by_workload.items()}

    def tokens_per_second(kind: str, name: str) -> float:
        prompts, new_tokens = workloads[name]["prompts"], workloads[name]["new_tokens"]
        tokens = len(prompts[0]) if name == "prefill" else len(prompts) * (new_tokens - 1)
        return tokens / median(seconds[kind, name])

    return {
        "decode": {name: found[name] for name in workloads if name != "prefill"},
        "prefill": found["prefill"],
        "weight_bytes": facts["packed_bytes"] / facts["dense_bytes"],
        "load_time": ratio(load_seconds["dense"], load_seconds["sparse"]),
        "operator": facts["operator"],
        "ratio_by_bytes": (facts["dense_bytes"] + head) / (facts["packed_bytes"] + head),
        "tokens_per_second": {kind: {name: tokens_per_second(kind, name) for name in workloads} for kind in KINDS},
        "load_seconds": {kind: median(load_seconds[kind]) for kind in KINDS},
        "spread": spreads | {"load_time": spread(ratios(load_seconds["dense"], load_seconds["sparse"]))},
        "threads": facts["threads"],
        "versions": {"efx-plugin": version("efx-plugin")} | facts["versions"],
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"tokens per second, sparse on {report['operator']}", box=box.SIMPLE_HEAD)
    for column in ("", "dense", "sparse", "ratio", "±"):
        table.add_column(column, justify="right" if column else "left")
    for name, spread_found in report["spread"].items():
        if name == "load_time":
            continue
        prefill = name == "prefill"
        table.add_row(
            "prefill" if prefill else f"decode, batch {name}",
            *(f"{report['tokens_per_second'][kind][name]:.1f}" for kind in KINDS),
            f"{report['prefill'] if prefill else report['decode'][name]:.3f}",
            f"{spread_found:.3f}",
        )
    console.print(table)
    limit = report["ratio_by_bytes"]
    reached = ", ".join(f"{figure / limit:.0%} at batch {batch}" for batch, figure in report["decode"].items())
    console.print(f"The bytes read per token, output layer included, allow a ratio of {limit:.3f}: reached {reached}")
    console.print(f"Sparse over dense: resident linear weights {report['weight_bytes']:.3f} of the bytes")
    console.print(
        f"Sparse over dense: loading {report['load_time']:.2f} of the time (± {report['spread']['load_time']:.2f})"
    )


if __name__ == "__main__":
    main()
