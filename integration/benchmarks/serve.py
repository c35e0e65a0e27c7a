"""`make bench-serve`: tokens per second of sparse models in vLLM, over those of dense ones.

The model is a random Llama of 1.1B parameters, in three widths: bfloat16, int8 with quantized activations (W8A8) and
int4 (W4A16). In each there is a dense model, as vLLM serves it, and a sparse one: half of the weights of its linear
layers are zero. Each engine has a process of its own. They work in turn, compiled unless --eager. Figures are medians
of the rounds, ratios medians of the ratios within each round, larger than 1 where sparse is faster. The ratio that
counts is over the fastest dense model of at least as many bits a weight. Decoding is timed from the first token of
all requests on, prefill until then. The time of loading is taken in fresh processes, in turn too, with the files in
memory.

Writes build/bench/serve.json (serve-eager.json).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from tests.support.quantized import W8A8, quantize, save_compressed, w4a16

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
GROUP = 64  # weights of four bits that share a scale
# An engine that waits may take this share of one core, and these seconds to end what it did before: it slows the other.
IDLE = 0.05
IDLE_SECONDS = 0.1

# What an engine takes beside its products, to load and to start, as seen on two cores.
LOAD_SECONDS = 20
START_SECONDS = {"eager": 20, "compiled": 100}


@dataclass(frozen=True)
class Kind:
    """A form of the model.

    Attributes:
        bits: of a weight of the linear layers, with mask and scales: what decides which dense kinds are rivals.
        width: a key of `SCHEMES`.
        sparse: whether half of the weights are zero, and left out.
    """

    bits: float
    width: str
    sparse: bool


SCHEMES: dict[str, dict[str, Any] | None] = {"bf16": None, "W8A8": W8A8, "W4A16": w4a16(GROUP)}
KINDS = {
    "dense bf16": Kind(16, "bf16", False),
    "sparse bf16": Kind(9, "bf16", True),
    "dense W8A8": Kind(8, "W8A8", False),
    "sparse W8A8": Kind(5, "W8A8", True),
    "dense W4A16": Kind(4 + 16 / GROUP, "W4A16", False),
    "sparse W4A16": Kind(3 + 16 / GROUP, "W4A16", True),
}
BASE = "dense bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--widths", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="these, and dense bf16")
    args = parser.parse_args()
    output = OUTPUT / f"serve{'-eager' * args.eager}.json"
    try:
        bench(OUTPUT / "llama-1b", MODEL, output, eager=args.eager, widths=args.widths)
    except (EfxError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def bench(
    directory: Path,
    model: dict[str, Any],
    output: Path,
    *,
    eager: bool,
    widths: Sequence[str] = tuple(SCHEMES),
    batches: tuple[int, ...] = BATCHES,
    prefill_tokens: int = PREFILL_TOKENS,
    rounds: int = ROUNDS,
    loads: int = LOADS,
) -> dict[str, Any]:
    """Make the models in `directory` that are not there, measure, print, and write the report to `output`.

    Args:
        model: fields of a LlamaConfig.
        widths: keys of `SCHEMES`; dense bfloat16 is always measured.
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
    kinds = [name for name, kind in KINDS.items() if name == BASE or kind.width in widths]
    for name in kinds:
        make_once(path_of(directory, name), partial(make_model, model, name))
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
    minutes = expected_minutes(model, workloads, len(kinds), rounds, loads, eager)
    console.print(f"about {minutes:.0f} minutes on this machine ({cpu_name()})")
    with progress_on(console) as progress:
        load_seconds = time_loading(directory, kinds, options, loads, progress)
        task = progress.add_task("starting the engines", total=len(kinds))
        with ExitStack() as stack:
            engines = {}
            for name in kinds:
                engines[name] = stack.enter_context(engine(name, directory, options, output))
                progress.advance(task)
            facts = {name: one.ask({}) for name, one in engines.items()}
            seconds = time_generation(engines, workloads, rounds, progress)
    report = summarize(seconds, load_seconds, facts, workloads, model)
    print_report(report, console)
    write_json(output, report)
    console.print(f"{output}: {report['threads']} threads, {'eager' if eager else 'compiled'}")
    return report


def path_of(directory: Path, name: str) -> Path:
    """Where the model of a kind lies."""
    return directory / name.replace(" ", "-")


def make_model(fields: dict[str, Any], name: str, directory: Path) -> None:
    """Save a random Llama as one of `KINDS`: the same weights in all of them, but for half of those of sparse ones."""
    kind, config = KINDS[name], LlamaConfig(**fields, dtype="bfloat16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if kind.sparse:
        linears = (module for module in model.model.modules() if isinstance(module, torch.nn.Linear))
        for module in track(list(linears), "pruning a random model"):
            size = module.weight.data.abs()
            module.weight.data[size < size.median()] = 0
    if (scheme := SCHEMES[kind.width]) is not None:
        quantize(model, scheme)
    if kind.sparse:
        save_sparse(model, directory)
    elif scheme is None:
        model.save_pretrained(directory)
    else:
        save_compressed(model, directory)


def make_workload(model: dict[str, Any], batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Random prompts, as `engine.generate` takes them."""
    generator = random.Random(0)
    prompts = [[generator.randrange(model["vocab_size"]) for _ in range(prompt_tokens)] for _ in range(batch)]
    return {"prompts": prompts, "new_tokens": new_tokens}


def expected_minutes(
    model: dict[str, Any], workloads: dict[str, dict[str, Any]], kinds: int, rounds: int, loads: int, eager: bool
) -> float:
    """How long everything is going to take, from the time of one layer's dense product at each number of tokens, as if
    all kinds took it."""
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
    return kinds * ((1 + rounds) * seconds + loads * LOAD_SECONDS + start) / 60


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
    """Start the engine for one of `KINDS`; its log goes beside the output."""
    with (
        open(output.with_name(f"{output.stem}-{kind.replace(' ', '-')}.log"), "w") as log,
        process(f"the {kind} engine", command(kind, directory, options), environment(), log) as (ask, pid),
    ):
        yield Engine(lambda request: json.loads(ask(json.dumps(request))), pid)


def command(kind: str, directory: Path, options: dict[str, Any]) -> list[str]:
    options = {"model": str(path_of(directory, kind))} | options
    return [sys.executable, "-m", "integration.benchmarks.engine", json.dumps(options)]


def environment() -> dict[str, str]:
    """Our variables, but for the settings of vLLM, which engine.py makes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return inherited | {"VLLM_NO_USAGE_STATS": "1"}


def time_loading(
    directory: Path, kinds: Sequence[str], options: dict[str, Any], loads: int, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of loading each model in fresh processes."""
    for file in directory.glob("*/*.safetensors"):
        with open(file, "rb") as stream:  # so that it is in memory from the first time on
            while stream.read(2**24):
                pass
    task = progress.add_task("loading", total=loads * len(kinds))

    def seconds(kind: str) -> float:
        result = subprocess.run(
            [*command(kind, directory, options), "--load"], env=environment(), capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"vLLM could not load {path_of(directory, kind)}: {result.stderr[-2000:]}")
        progress.advance(task)
        return float(result.stdout)

    return interleave({kind: partial(seconds, kind) for kind in kinds}, loads)


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
    facts: dict[str, dict[str, Any]],
    workloads: dict[str, dict[str, Any]],
    model: dict[str, Any],
) -> dict[str, Any]:
    """The report. Of each sparse kind `weight_bytes` is the memory of its linear layers over that in bfloat16, and
    `over` each dense kind the `ratio` of every workload, with its `spread` and whether that kind is its `rival`: the
    fastest one with as many bits. `by_bytes` is the ratio of the bytes that are read for a token, the output layer's
    included."""
    head = model["vocab_size"] * model["hidden_size"] * torch.bfloat16.itemsize
    dense = [name for name in facts if not KINDS[name].sparse]

    def tokens_per_second(kind: str, name: str) -> float:
        prompts, new_tokens = workloads[name]["prompts"], workloads[name]["new_tokens"]
        tokens = len(prompts[0]) if name == "prefill" else len(prompts) * (new_tokens - 1)
        return tokens / median(seconds[kind, name])

    speeds = {kind: {name: tokens_per_second(kind, name) for name in workloads} for kind in facts}
    sparse = {}
    for kind in (name for name in facts if KINDS[name].sparse):
        packed, of_bf16 = facts[kind]["packed_bytes"], facts[kind]["dense_bytes"]
        rivals = [rival for rival in dense if KINDS[rival].bits >= KINDS[kind].bits]
        over: dict[str, Any] = {}
        for rival in rivals:
            by_bytes = (of_bf16 * KINDS[rival].bits / KINDS[BASE].bits + head) / (packed + head)
            over[rival] = {"by_bytes": by_bytes, "workloads": {}}
            for name in workloads:
                pair = seconds[kind, name], seconds[rival, name]
                over[rival]["workloads"][name] = {
                    "ratio": ratio(*pair),
                    "spread": spread(ratios(*pair)),
                    "rival": rival == max(rivals, key=lambda other: speeds[other][name]),
                }
        sparse[kind] = {"operator": facts[kind]["operator"], "weight_bytes": packed / of_bf16, "over": over}
    loading = {
        kind: {
            "seconds": median(load_seconds[kind]),
            "ratio": ratio(load_seconds[BASE], load_seconds[kind]),
            "spread": spread(ratios(load_seconds[BASE], load_seconds[kind])),
        }
        for kind in facts
    }
    return {
        "tokens_per_second": speeds,
        "sparse": sparse,
        "loading": loading,
        "threads": facts[BASE]["threads"],
        "versions": {"efx-plugin": version("efx-plugin")} | facts[BASE]["versions"],
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    speeds = report["tokens_per_second"]
    table = Table(title="tokens per second", box=box.SIMPLE_HEAD)
    for column in ("", *speeds):
        table.add_column(column, justify="right" if column else "left")
    for name in speeds[BASE]:
        table.add_row(_title(name), *(f"{speeds[kind][name]:.1f}" for kind in speeds))
    seconds = (f"{one['seconds']:.1f}" for one in report["loading"].values())
    table.add_row("loading, seconds", *seconds)
    console.print(table)
    table = Table(title="sparse over dense, larger than 1 where sparse is faster", box=box.SIMPLE_HEAD)
    for column in ("", "", *(_title(name) for name in speeds[BASE]), "bytes allow"):
        table.add_column(column, justify="right" if column else "left")
    for kind, found in report["sparse"].items():
        for rival, over in found["over"].items():
            cells = over["workloads"].values()
            table.add_row(
                kind,
                f"over {rival}",
                *(f"{'*' * cell['rival']}{cell['ratio']:.3f} ± {cell['spread']:.3f}" for cell in cells),
                f"{over['by_bytes']:.3f}",
            )
    console.print(table)
    console.print("* over the fastest dense model of as many bits; bytes: read for a token, output layer included")
    for kind, found in report["sparse"].items():
        loading = report["loading"][kind]
        console.print(
            f"{kind}, on {found['operator']}: linear weights {found['weight_bytes']:.3f} of the bytes of {BASE}, "
            f"loading {loading['ratio']:.2f} of its time (± {loading['spread']:.2f})"
        )


def _title(workload: str) -> str:
    return workload if workload == "prefill" else f"decode, batch {workload}"


if __name__ == "__main__":
    main()
