"""`make compare`: the domain benchmark, every pipeline on real models and real text of two domains.

Legal text is licences, health text definitions of phenotypes; what an expert keeps and forgets shows on ICD-10-CM,
glosses of WordNet and presidential addresses, and whether the domains need other weights in their masks side by side.
Each model gets a dense adapter for each domain, whose learning rate is chosen on validation text. Quick mode is one
model, half of the weights pruned, one seed. Full mode takes many sittings: what is done lies in build/compare/cache and
is not done again.
"""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

from efx_plugin.checkpoint.storage.hashes import directory_hash, file_hash
from efx_plugin.compress.calibration import sequences, start_of_text, tokens_of
from efx_plugin.compress.documents import Document
from efx_plugin.evaluate.cell import Cell, Data
from efx_plugin.evaluate.data import Corpus, write_atomically, write_data
from efx_plugin.evaluate.domains import Domain, DomainCell
from efx_plugin.evaluate.grid import run_grid
from efx_plugin.evaluate.html import write_html
from efx_plugin.evaluate.pipelines.protocol import TRAINING_FAMILIES
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from efx_plugin.evaluate.report import Report
from efx_plugin.evaluate.request import MASKS_BY, CompareRequest, parse_sparsity
from efx_plugin.evaluate.table import show
from integration.assets import smollm2, splits_with_validation
from integration.domain_tasks import task_files
from integration.expert import load, perplexity, train_lora
from integration.gemma import gemma3
from integration.packages import make_once
from integration.scratch_model import scratch_model

OUTPUT = Path(__file__).resolve().parents[1] / "build" / "compare"
VALIDATION_SEQUENCES = 16

# Of each domain the corpora, its own first, and the tasks.
DOMAINS = {
    "legal": (("legal", "wordnet", "sotu", "clinical"), ("efx_legal_clause", "efx_general_term")),
    "health": (("clinical", "icd10cm", "wordnet", "sotu", "legal"), ("efx_health_term", "efx_icd_chapter")),
}
MODELS: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "gemma3": gemma3, "scratch": scratch_model}


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        models: keys of `MODELS`.
        sparsities, seeds: see `CompareRequest`.
        learning_rates: that the adapter and every trained pipeline choose from.
        samples, length, training_tokens, heldout_tokens: see `Data`.
        questions: of each task.
    """

    models: tuple[str, ...]
    sparsities: tuple[str, ...]
    seeds: int
    learning_rates: tuple[float, ...]
    samples: int
    length: int
    training_tokens: int
    heldout_tokens: int
    questions: int


QUICK = Budget(("smollm2",), (".5",), 1, (3e-3, 6e-3), 32, 256, 15_000, 2_048, 16)
FULL = Budget(tuple(MODELS), (".4", ".5", ".6", ".7", "2:4"), 3, (1e-3, 3e-3, 6e-3), 128, 512, 100_000, 50_000, 400)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(prog="python -m integration.compare", description=__doc__)
    parser.add_argument("--full", action="store_true", help="full mode")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="these only")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="these only")
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES), help="these only")
    parser.add_argument("--sparsity", nargs="+", help="these only")
    parser.add_argument("--seeds", type=int, help="so many only")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, of up to 4 GB of memory each")
    given = parser.parse_args(arguments)
    budget = FULL if given.full else QUICK
    budget = replace(
        budget,
        models=tuple(given.models or budget.models),
        sparsities=tuple(given.sparsity or budget.sparsities),
        seeds=given.seeds or budget.seeds,
    )
    report = compare(budget, given.domains, given.pipelines, jobs=given.jobs)
    show(report)
    if report.failures:
        raise SystemExit(f"{len(report.failures)} cells failed, first {report.failures[0].label}")


def compare(
    budget: Budget, domains: Sequence[str], pipelines: Sequence[str], output: Path = OUTPUT, jobs: int = 1
) -> Report:
    """Run what is not in the cache, and write report.json and report.html.

    Args:
        domains, pipelines: keys of `DOMAINS` and `PIPELINES`.
        output: where everything goes.
        jobs: cells at a time.

    Raises:
        EfxError: a package cannot be fetched, or the disk is full.
    """
    made = [
        cell for name in budget.models for domain in domains for cell in cells(budget, name, domain, pipelines, output)
    ]
    made.sort(key=lambda cell: cell.seed)  # the first table is whole early
    masks = []
    if len(domains) > 1 and MASKS_BY in pipelines:
        masks = [mask_cell(budget, name, domains, output) for name in budget.models if name != "scratch"]
    report = run_grid(made, output / "cache", domains=masks, jobs=jobs)
    write_atomically(output / "report.json", (json.dumps(report.as_json(), indent=1) + "\n").encode())
    write_html(report, output / "report.html")
    Console(stderr=True).print(f"{output / 'report.json'} and report.html", highlight=False)
    return report


def cells(budget: Budget, model: str, domain: str, pipelines: Sequence[str], output: Path = OUTPUT) -> Iterator[Cell]:
    """All cells of a model and a domain, once data and adapter are there.

    The model that was trained from scratch is asked one thing: whether the others' quantized rows are flattered by
    their coming from few bits. It is not trained further.
    """
    directory = MODELS[model]()
    data = domain_data(budget, domain, output)
    adapter = domain_adapter(budget, model, directory, domain, data, output)
    chosen = [name for name in pipelines if model != "scratch" or PIPELINES[name].family not in TRAINING_FAMILIES]
    request = CompareRequest(
        directory,
        adapter,
        (),
        output / "cache",
        pipelines=tuple(chosen),
        sparsities=budget.sparsities,
        seeds=budget.seeds,
        tasks=DOMAINS[domain][1],
        task_data=task_files(budget.questions),
    )
    for cell in request.cells(data):
        trained = PIPELINES[cell.pipeline].needs_training
        yield replace(cell, arguments=(("learning_rates", budget.learning_rates),)) if trained else cell


def mask_cell(budget: Budget, model: str, domains: Sequence[str], output: Path = OUTPUT) -> DomainCell:
    """The comparison of the masks that our pipeline chooses for each domain, at 50 % where that is asked for."""
    directory, made = MODELS[model](), []
    for domain in domains:
        data = domain_data(budget, domain, output)
        made.append(Domain(domain_adapter(budget, model, directory, domain, data, output), data))
    sparsity = ".5" if ".5" in budget.sparsities else budget.sparsities[0]
    return DomainCell(directory, tuple(made), MASKS_BY, *parse_sparsity(sparsity))


def domain_data(budget: Budget, domain: str, output: Path = OUTPUT) -> Data:
    """The files of a domain: training, validation and calibration text of its own corpus, held-out text of several;
    in each part whole families of documents."""
    names, _ = DOMAINS[domain]
    parts = splits_with_validation(names[0])
    heldout = [Corpus(name, splits_with_validation(name)["heldout"]) for name in names]
    return write_data(
        output / "data",
        domain,
        parts["calibration"],
        parts["train"],
        heldout,
        parts["validation"],
        samples=budget.samples,
        length=budget.length,
        training_tokens=budget.training_tokens,
        heldout_tokens=budget.heldout_tokens,
    )


def domain_adapter(budget: Budget, name: str, model: Path, domain: str, data: Data, output: Path = OUTPUT) -> Path:
    """The dense adapter of a model for a domain, of the learning rate that predicts validation text best."""

    def build(partial: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        parts = splits_with_validation(DOMAINS[domain][0][0])
        count = budget.training_tokens // budget.length
        training = _sequences(parts["train"], tokenizer, count, budget.length)
        validation = _sequences(parts["validation"], tokenizer, VALIDATION_SEQUENCES, budget.length)
        found: dict[float, float] = {}
        for rate in budget.learning_rates:
            expert = train_lora(load(model), tokenizer, training, lr=rate)
            found[rate] = perplexity(expert, validation)
            if not math.isfinite(found[rate]) or found[rate] <= min(found.values()):
                shutil.rmtree(partial, ignore_errors=True)
                expert.save_pretrained(partial)
        (partial / "learning_rates.json").write_text(json.dumps({str(rate): ppl for rate, ppl in found.items()}))

    rates = "-".join(f"{rate:g}" for rate in budget.learning_rates)
    files = hashlib.sha256(json.dumps(directory_hash(model)).encode()).hexdigest()
    inputs = f"{file_hash(data.training)[:8]}-{files[:8]}"
    key = f"{name}-{domain}-{budget.training_tokens}x{budget.length}-{rates}-{inputs}"
    return make_once(output / "adapters" / key, build)


def _sequences(texts: Sequence[str], tokenizer, count: int, length: int) -> torch.Tensor:
    """Token ids [count, length], each beginning as the tokenizer has a text begin."""
    records = (Document("the benchmark", {"text": text}) for text in texts)
    return sequences(
        (tokens_of(record, tokenizer) for record in records),
        count,
        length,
        "the benchmark",
        start=start_of_text(tokenizer),
        purpose="training",
    )


if __name__ == "__main__":
    main()
