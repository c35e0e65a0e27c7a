"""`make bench-prune`: what pruning costs, next to llm-compressor's Wanda and SparseGPT, and what it adds to training.

Everything is pruned to 50 % by `oneshot` on the same calibration text: SmolLM2-135M, whose figures are the headline,
and a random Llama with the shapes of a 1.2B model, of which two blocks are enough. Ours are a mask alone (`none`), the
same mask with the adapter repaired (`adapter`) or the weights (`weights`), and two recipes.

Every run has a fresh process, one at a time, and counts from the loaded model on: the seconds of the call of `oneshot`,
and the peak of the resident memory of the whole process, model and libraries included, as a user sees it (Linux alone
counts it). Rounds go through all configurations in turn; ratios are ours over the rival's, medians over the rounds.

Two more ratios: the published repair in a plain loop over the rows of a layer, as its authors wrote it, over our
batched one; and LoRA training that ends sparse, its pruning included, over plain LoRA training on the same tokens.

All of it takes about 25 minutes and writes build/bench/prune.json, a selection (--quick, --only) prune-part.json. What
the runs print is in the .log beside it.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llmcompressor import oneshot
from peft import LoraConfig, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from efx_plugin.errors import EfxError
from efx_plugin.method.repair import paper_update
from efx_plugin.model.adapters import linear_layers
from efx_plugin.modifier import EfficientXpertModifier
from efx_plugin.training import EfficientXpertCallback
from integration.assets import smollm2, splits, token_blocks
from integration.benchmarks.progress import progress_on
from integration.benchmarks.timing import OUTPUT, interleave, ratio, ratios, spread, timed, write_json
from integration.demo import (
    CALIBRATION_SEQUENCES,
    RIVALS,
    ROOT,
    SPARSITY,
    WINDOW,
    calibration_set,
    load,
    versions,
)
from integration.expert import PROJECTIONS, train_lora
from integration.packages import make_once

OWN_RECIPES = ("expert_50", "expert_50_best")
RECIPES = RIVALS | {name: f"{name}.yaml" for name in OWN_RECIPES}
# The configurations without a recipe differ in their repair, and are named after it.
REPAIRS = ("none", "adapter", "weights")
MASK = {"saliency": "wanda", "propagation": "block", "comparison_group": "block", "allocation": "uniform"}
CONFIGURATIONS = (*RIVALS, *REPAIRS, *OWN_RECIPES)

LLAMA_1B = {
    "vocab_size": 49_152,  # SmolLM2's, whose tokens it reads
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
RANK = 8  # of adapters

# What a configuration may cost at most, in terms of a rival; None is reported only.
TARGETS: dict[str, dict[str, float | None]] = {
    "seconds_vs_wanda": {"none": 1.8},
    "seconds_vs_sparsegpt": {"none": 0.7, "adapter": None, "weights": 1.4, "expert_50": 2.2, "expert_50_best": None},
    "memory_vs_wanda": {"none": 1.1},
    "memory_vs_sparsegpt": {"weights": 1.1, "expert_50": 1.1, "expert_50_best": None},
}
LEAST_REPAIR_SPEEDUP = 50
MOST_TRAINING_OVERHEAD = 1.25

PARTS = ("pruning", "repair", "training")
ROUNDS = 2  # of SmolLM2
ROUNDS_LLAMA = 1
REPAIR_ROUNDS = 5
TRAINING_ROUNDS, TRAINING_TOKENS = 1, 120_000
REPAIR_LAYER = (1536, 576)  # [out, in]: SmolLM2's gate_proj
# Below 1 each row has a system of its own. At 1, as published, all rows share one, which a plain loop makes no use of.
KAPPAS = OWN, SHARED = 0.5, 1.0
DAMPENING = 0.01
REPAIR_TOLERANCE = 1e-5

Run = dict[str, float]  # what `measured` returns
Done = Callable[[str], None]  # takes a line about a run that has ended


@dataclass(frozen=True)
class Subject:
    """A model to prune: its directory, the configurations it is pruned with, and how often."""

    directory: Path
    configurations: tuple[str, ...]
    rounds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, SmolLM2 only")
    parser.add_argument("--only", choices=PARTS, help="one part; pruning has both seconds and memory")
    args = parser.parse_args()
    parts = (args.only,) if args.only else PARTS
    try:
        directory = smollm2()
        tokenizer, texts = AutoTokenizer.from_pretrained(directory), splits("legal")
        rounds = 1 if args.quick else ROUNDS
        subjects = {"smollm2": Subject(directory, CONFIGURATIONS, rounds)}
        if not args.quick and "pruning" in parts:
            llama = make_once(OUTPUT / "llama-1b-two-blocks", partial(make_llama, LLAMA_1B, tokenizer))
            without_adapter = tuple(name for name in CONFIGURATIONS if name != "adapter")
            subjects["llama_1b"] = Subject(llama, without_adapter, ROUNDS_LLAMA)
        bench(
            subjects,
            token_blocks(tokenizer, texts["calibration"], WINDOW, CALIBRATION_SEQUENCES * WINDOW),
            token_blocks(tokenizer, texts["train"], WINDOW, TRAINING_TOKENS),
            OUTPUT / ("prune-part.json" if args.quick or args.only else "prune.json"),
            parts=parts,
            rounds=TRAINING_ROUNDS,
        )
    except EfxError as error:
        sys.exit(f"error: {error}")


def make_llama(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save a random Llama in bfloat16, with a tokenizer, without which llm-compressor does not prune."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def bench(
    subjects: dict[str, Subject],
    calibration: Tensor,
    training: Tensor,
    output: Path,
    *,
    parts: Iterable[str] = PARTS,
    rounds: int = ROUNDS,
    repair_layer: tuple[int, int] = REPAIR_LAYER,
    repair_rounds: int = REPAIR_ROUNDS,
) -> dict[str, Any]:
    """Measure, print, and write the report to `output`.

    Args:
        subjects: models by name. The first one's figures are the headline, and it is the one to train.
        calibration, training: token ids, int64 [windows, length].
        parts: what to measure, of `PARTS`.
        rounds: how often training is measured.
        repair_layer: shape [out, in] of the layer to repair.
        repair_rounds: how often that is measured.

    Returns:
        The report.

    Raises:
        EfxError: a run failed, or the two repairs differ.
    """
    console = Console()
    log = output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    headline, *others = subjects
    totals = {
        "pruning": sum(subject.rounds * len(subject.configurations) for subject in subjects.values()),
        "repair": 2 * len(KAPPAS) * repair_rounds,
        "training": 2 * rounds,
    }
    report: dict[str, Any] = {}
    with progress_on(console) as progress:
        tasks = {part: progress.add_task(part, total=totals[part], start=False) for part in parts}

        def begin(part: str) -> Done:
            progress.start_task(tasks[part])

            def done(line: str) -> None:
                console.print(line)
                progress.advance(tasks[part])

            return done

        if "pruning" in tasks:
            done = begin("pruning")
            report |= measure_pruning(headline, subjects[headline], calibration, log, done)
            report |= {name: measure_pruning(name, subjects[name], calibration, log, done) for name in others}
        if "repair" in tasks:
            report |= measure_repair(*repair_layer, repair_rounds, begin("repair"))
        if "training" in tasks:
            report |= measure_training(subjects[headline].directory, training, rounds, log, begin("training"))
    report |= {
        "calibration": {"sequences": len(calibration), "tokens": calibration.shape[1]},
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    console.print(table(report, headline))
    for name in others:
        if name in report:
            console.print(table(report[name], name))
    write_json(output, report)
    console.print(f"{output}: {report['threads']} threads")
    return report


# ------------------------------------------------------------------------------------------------- the runs


# Calls the function of this module that stdin names, and answers with what it returns.
FRESH_PROCESS = """
import json, os, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the run prints must not get in between
from integration.benchmarks import prune
function, arguments = json.load(sys.stdin)
json.dump(getattr(prune, function)(*arguments), answer)
"""


def in_fresh_process(function: Callable[..., Run], *arguments: Any, log: Path) -> Run:
    """Call a function of this module in a process of its own, which prints into the log.

    Raises:
        EfxError: it failed.
    """
    request = json.dumps([function.__name__, arguments])
    command = [sys.executable, "-c", FRESH_PROCESS]
    with open(log, "a") as stream:
        done = subprocess.run(command, cwd=ROOT, input=request, stdout=subprocess.PIPE, stderr=stream, text=True)
    if done.returncode:
        raise EfxError(f"a run ended with exit code {done.returncode}: what it printed is in {log}")
    return json.loads(done.stdout)


def prune(directory: str, blocks: list[list[int]], configuration: str) -> Run:
    """Prune the model with one of `CONFIGURATIONS` and what `blocks` of token ids calibrate.

    Raises:
        EfxError: the sparsity is missed.
    """
    model = load(directory)
    if configuration == "adapter":
        model = with_random_adapter(model)
    if configuration in RECIPES:
        recipe = str(ROOT / "recipes" / RECIPES[configuration])
    else:
        recipe = EfficientXpertModifier(sparsity=SPARSITY, repair=configuration, **MASK)
    call = partial(
        oneshot,
        model=model,
        processor=AutoTokenizer.from_pretrained(directory),
        recipe=recipe,
        dataset=calibration_set(torch.tensor(blocks)),
        num_calibration_samples=len(blocks),
        max_seq_length=len(blocks[0]),
        shuffle_calibration_samples=False,
    )
    run = measured(call)
    require_sparsity(model, SPARSITY, configuration)
    return run


def with_random_adapter(model: PreTrainedModel) -> nn.Module:
    """The model inside of a PeftModel with an adapter that adds something to each projection."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, adapter)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return adapted.base_model.model


def train(directory: str, blocks: list[list[int]], sparse: bool) -> Run:
    """Train an adapter for one pass over `blocks` of token ids, with the callback at its defaults or without it.

    Raises:
        EfxError: the sparsity is missed.
    """
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    callbacks = [EfficientXpertCallback()] if sparse else []
    run = measured(lambda: train_lora(model, tokenizer, torch.tensor(blocks), rank=RANK, callbacks=callbacks))
    require_sparsity(model, SPARSITY if sparse else 0, "training")
    return run


def measured(function: Callable[[], object]) -> Run:
    """Call the function.

    Returns:
        `seconds` of the call; `memory`, the peak of the process's resident bytes in it; `memory_before` the call.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, that of loading the model
    before = _resident("VmRSS")
    begin = time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    # The system counts pages in batches: the peak may fall short of what was there before by some.
    return {"seconds": seconds, "memory": max(_resident("VmHWM"), before), "memory_before": before}


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kibibytes) * 1024


def require_sparsity(model: nn.Module, wanted: float, what: str) -> None:
    weights = [layer.base.weight for layer in linear_layers(model) if layer.name != "lm_head"]
    found = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    if abs(found - wanted) > 0.01:
        raise EfxError(f"{what} ended with sparsity {found:.3f} instead of {wanted}: its cost means nothing")


# -------------------------------------------------------------------------------------------- what is compared


def measure_pruning(name: str, subject: Subject, calibration: Tensor, log: Path, done: Done) -> dict[str, Any]:
    """The ratios of `TARGETS` for which there are configurations, and under `pruning` what they are made of."""
    blocks = calibration.tolist()
    runs: dict[str, list[Run]] = {configuration: [] for configuration in subject.configurations}

    def seconds(configuration: str) -> float:
        run = in_fresh_process(prune, str(subject.directory), blocks, configuration, log=log)
        runs[configuration].append(run)
        done(f"{name}, {configuration}: {run['seconds']:.1f} s, {run['memory'] / 1e9:.2f} GB")
        return run["seconds"]

    interleave({configuration: partial(seconds, configuration) for configuration in runs}, subject.rounds)
    found: dict[str, dict[str, float]] = {}
    spreads: dict[str, dict[str, float]] = {}
    for figure, targets in TARGETS.items():
        quantity, rival = figure.split("_vs_")
        pairs = {ours: (_all(runs[rival], quantity), _all(runs[ours], quantity)) for ours in targets if ours in runs}
        found[figure] = {ours: ratio(*pair) for ours, pair in pairs.items()}
        spreads[figure] = {ours: spread(ratios(*pair)) for ours, pair in pairs.items()}
    medians = {
        quantity: {configuration: median(_all(of, quantity)) for configuration, of in runs.items()}
        for quantity in ("seconds", "memory", "memory_before")
    }
    return found | {"pruning": medians | {"spread": spreads, "rounds": subject.rounds}}


def measure_repair(rows: int, columns: int, rounds: int, done: Done) -> dict[str, Any]:
    """Seconds of the loop over those of `paper_update`, for a random layer [rows, columns].

    Raises:
        EfxError: their results differ.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    keep = torch.rand(rows, columns, generator=generator) >= SPARSITY
    energy = torch.randn(columns, generator=generator).exp()
    lora_a = torch.randn(RANK, columns, generator=generator)
    functions = {}
    for kappa in KAPPAS:
        arguments = weight, keep, energy, lora_a
        batched = partial(paper_update, *arguments, kappa=kappa, dampening_frac=DAMPENING)
        loop = partial(update_by_row, *arguments, kappa=kappa, dampening_frac=DAMPENING)
        expected = loop()
        error = float((batched() - expected).norm() / expected.norm())
        if not error < REPAIR_TOLERANCE:
            raise EfxError(f"the batched repair is off by {error:.1e} of the loop's at kappa {kappa}")
        functions |= {("loop", kappa): timed(loop), ("batched", kappa): timed(batched)}

    def seconds(name: tuple[str, float]) -> float:
        figure = functions[name]()
        done(f"repair, kappa {name[1]}, {name[0]}: {figure:.3f} s")
        return figure

    figures = interleave({name: partial(seconds, name) for name in functions}, rounds)
    pairs = {kappa: (figures["batched", kappa], figures["loop", kappa]) for kappa in KAPPAS}
    details = {
        f"kappa {kappa}": {
            "ratio": ratio(*pair),
            "spread": spread(ratios(*pair)),
            "seconds": {"batched": median(pair[0]), "loop": median(pair[1])},
        }
        for kappa, pair in pairs.items()
    }
    return {
        "repair_vs_reference_loop": ratio(*pairs[SHARED]),
        "repair": details | {"layer": [rows, columns], "rank": RANK, "rounds": rounds},
    }


def update_by_row(
    weight: Tensor, keep: Tensor, energy: Tensor, lora_a: Tensor, *, kappa: float, dampening_frac: float
) -> Tensor:
    """What `paper_update` says, one row after the other, in float64 as it forms its systems."""
    lora_a, energy = lora_a.double(), energy.double()
    shared = (lora_a * energy) @ lora_a.T
    ridge = dampening_frac * shared.diagonal().mean() * torch.eye(len(lora_a), dtype=shared.dtype)
    update = torch.empty(len(weight), len(lora_a))
    for row in range(len(weight)):
        pruned = (~keep[row]).nonzero().squeeze(1)
        own = lora_a[:, pruned]
        weighted = own * energy[pruned]
        system = kappa * shared + (1 - kappa) * (weighted @ own.T) + ridge
        update[row] = -torch.linalg.solve(system, weighted @ weight[row, pruned].double())
    return update


def measure_training(directory: Path, training: Tensor, rounds: int, log: Path, done: Done) -> dict[str, Any]:
    """Seconds of training with the callback over those without it."""
    blocks = training.tolist()
    runs: dict[str, list[Run]] = {"lora": [], "sparse": []}

    def seconds(kind: str) -> float:
        run = in_fresh_process(train, str(directory), blocks, kind == "sparse", log=log)
        runs[kind].append(run)
        done(f"training, {kind}: {run['seconds']:.1f} s, {run['memory'] / 1e9:.2f} GB")
        return run["seconds"]

    figures = interleave({kind: partial(seconds, kind) for kind in runs}, rounds)
    pair = figures["lora"], figures["sparse"]
    return {
        "training_overhead": ratio(*pair),
        "training": {
            "spread": spread(ratios(*pair)),
            "seconds": {kind: median(figures[kind]) for kind in runs},
            "memory": {kind: median(_all(runs[kind], "memory")) for kind in runs},
            "tokens": training.numel(),
            "rounds": rounds,
        },
    }


def _all(runs: list[Run], quantity: str) -> list[float]:
    return [run[quantity] for run in runs]


# -------------------------------------------------------------------------------------------------- the table


def table(report: dict[str, Any], name: str) -> Table:
    """The ratios of a report, red where they miss their target."""
    result = Table(title=f"what it costs, {name}", box=box.SIMPLE_HEAD)
    for column in ("", "ratio", "±", "rounds", "target"):
        result.add_column(column, justify="right" if column else "left")

    def row(what: str, figure: float, details: tuple[float, int], target: str, met: bool) -> None:
        width, rounds = details
        shown = f"{figure:.2f}" if met else f"[red]{figure:.2f}[/red]"
        result.add_row(what, shown, f"{width:.2f}" if rounds > 1 else "", str(rounds), target)

    for figure, targets in TARGETS.items():
        for ours, value in report.get(figure, {}).items():
            details = report["pruning"]["spread"][figure][ours], report["pruning"]["rounds"]
            most = targets[ours]
            what = f"{figure.replace('_', ' ').replace('vs', 'over')}, {ours}"
            row(what, value, details, "" if most is None else f"≤ {most}", most is None or value <= most)
    if repair := report.get("repair"):
        for kappa in KAPPAS:
            of = repair[f"kappa {kappa}"]
            what, required = f"loop over batched repair, kappa {kappa}", kappa == SHARED
            target, met = f"≥ {LEAST_REPAIR_SPEEDUP}", of["ratio"] >= LEAST_REPAIR_SPEEDUP
            row(what, of["ratio"], (of["spread"], repair["rounds"]), target * required, met or not required)
    if of := report.get("training"):
        value = report["training_overhead"]
        what = f"training over plain LoRA, {of['tokens']:,} tokens"
        met = value <= MOST_TRAINING_OVERHEAD
        row(what, value, (of["spread"], of["rounds"]), f"≤ {MOST_TRAINING_OVERHEAD}", met)
    return result


if __name__ == "__main__":
    main()
