"""What a comparison found, as rows, as lines over seeds, and as tables. Nothing here imports torch.

Recovery is 100 * perplexity of `lora` / perplexity of the pipeline: 100 % keeps all that the dense expert has.

Each line is compared with the best rival on a corpus: of the pipelines that are not ours, of its own family and at the
same sparsity, the one with the lowest mean perplexity there. What is sparse and quantized is compared with the best
pipeline that is quantized alone and takes no more bits on disk.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from efx_plugin.evaluate.cell import Cell, CellResult, pipeline_name, sparsity_name
from efx_plugin.evaluate.domains import DomainFinding
from efx_plugin.evaluate.mask_samples import overlap
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from efx_plugin.evaluate.speed import Speed
from efx_plugin.evaluate.statistics import Interval, mean_and_spread, paired_bootstrap

_REFERENCE = "lora"
# Bits on disk that a quantized rival may have more than what is sparse and quantized, for masks and scales.
_AS_SMALL = 1.02
DEFINITIONS = {
    "perplexity": "exp of the mean loss over the tokens of held-out documents; mean and standard deviation over seeds",
    "recovery": "100 * perplexity of lora / perplexity of the pipeline, in percent",
    "best rival": "of the pipelines that are not ours, of the same family and at the same sparsity, the one with the "
    "lowest mean perplexity on the corpus; for what is sparse and quantized, of the quantized pipelines that take no "
    "more bits on disk",
    "difference": "log perplexity minus that of the best rival, with the 95 % interval of a paired bootstrap over "
    "documents (10,000 resamples, seeded, losses averaged over seeds)",
    "bits": "bits per weight of the linear layers in the decoder blocks, zeros counted, with masks and scales, in the "
    "checkpoint that the pipeline wrote, and as it is served; pruned weights of 4 bits are stored with their "
    "zeros, since no format leaves them out, and packed sparse where they are served",
    "seconds": "of the pipeline, loading included and evaluation not",
    "tokens/s": "generated in vLLM by so many requests at once, and how many times those of lora, measured in turn",
    "masks of domains": "of the kept weights of two masks those that both keep, over those that either keeps; masks of "
    "one domain, chosen on two halves of its calibration text, say how much of a difference between domains is chance, "
    "and by chance is what random masks would have; each dense expert is then pruned by each mask and repaired on its "
    "own text alike, and foreign over own is its perplexity under masks of other domains over that under its own",
    "MB": "largest resident memory of the process up to the end of the pipeline",
}


@dataclass(frozen=True)
class Finding:
    """A cell, its result, and the file with the sample of its masks."""

    cell: Cell
    result: CellResult
    masks: Path


@dataclass(frozen=True)
class Failure:
    """A cell that failed, why, and its log file."""

    label: str
    reason: str
    log: str


@dataclass(frozen=True)
class Rival:
    """The best rival of a line on a corpus.

    Attributes:
        name: its label, which is that of the line itself where nothing is better.
        family: of its pipeline.
        interval: the difference to it; None for itself, and where the documents are not the same.
    """

    name: str
    family: str
    interval: Interval | None


@dataclass(frozen=True)
class Figures:
    """A line on one corpus: perplexity with its standard deviation over seeds, recovery in percent, and the rival."""

    perplexity: float
    spread: float | None
    recovery: float | None
    rival: Rival | None


@dataclass(frozen=True)
class Line:
    """A pipeline at a sparsity on a model and a domain, over its seeds.

    Attributes:
        name: what pictures and `layers` call it: no two lines share one.
        label: the pipeline with its arguments.
        sparsity: as in the table: "50 %", "2:4"; empty for pipelines that do not prune.
        seeds: number of them.
        corpora: figures by held-out corpus.
        tasks: mean accuracy by task; `chance` beside it.
        achieved: sparsity over the target layers.
        bits_stored, bits_served: per weight, see `bits`.
        seconds, peak_mb: means.
        notes: each once, with its seeds where these are not all.
    """

    name: str
    model: str
    data: str
    pipeline: str
    label: str
    family: str
    ours: bool
    sparsity: str
    seeds: int
    corpora: dict[str, Figures]
    tasks: dict[str, dict[str, float | None]]
    achieved: float
    bits_stored: float
    bits_served: float
    seconds: float
    peak_mb: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything that a comparison found.

    Attributes:
        cells: number of cells that were found or run, comparisons of masks among them.
        rows: one for each cell and corpus, with the keys that `report.json` has.
        lines: over seeds.
        failures: the cells that failed.
        layers: of each line with its first seed, what became of every target layer.
        overlaps: of every two lines of one model with masks, by their names, the overlap by layer.
        conditions: what holds for all of it.
        speeds: by the name of a line and the number of requests, where they were measured.
        domains: comparisons of the masks of domains, see `DomainFinding.as_json`.
    """

    cells: int
    rows: list[dict[str, Any]]
    lines: list[Line]
    failures: list[Failure]
    layers: dict[str, list[dict[str, Any]]]
    overlaps: list[dict[str, Any]]
    conditions: dict[str, Any]
    speeds: Mapping[str, Mapping[int, Speed]] = field(default_factory=dict)
    domains: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """`rows` and `summary`, ready for `json.dumps`."""
        summary = {
            "lines": [asdict(line) for line in self.lines],
            "failures": [asdict(failure) for failure in self.failures],
            "layers": self.layers,
            "overlaps": self.overlaps,
            "conditions": self.conditions,
            "speeds": {name: {str(n): asdict(one) for n, one in line.items()} for name, line in self.speeds.items()},
            "domains": self.domains,
            "definitions": DEFINITIONS,
        }
        return {"rows": self.rows, "summary": summary}


def build(findings: Sequence[Finding], failures: Sequence[Failure], domains: Sequence[DomainFinding] = ()) -> Report:
    """The report on what cells have found."""
    order = {name: number for number, name in enumerate(PIPELINES)}
    findings = sorted(findings, key=lambda one: (str(one.cell.model), one.cell.data.name, one.cell.seed))
    groups: dict[tuple[Any, ...], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[_group(finding.cell)].append(finding)
    ordered = sorted(groups.values(), key=lambda group: _position(group[0].cell, order))
    lines = [_line(group, ordered) for group in ordered]
    first = {line.name: group[0] for line, group in zip(lines, ordered, strict=True)}
    return Report(
        cells=len(findings) + len(domains),
        rows=[row for finding in findings for row in _rows(finding, findings)],
        lines=lines,
        failures=list(failures),
        layers={name: finding.result.layers for name, finding in first.items() if finding.result.layers},
        overlaps=_overlaps(first),
        conditions=_conditions(findings),
        domains=[finding.as_json() for finding in domains],
    )


def _label(cell: Cell) -> str:
    return pipeline_name(cell.pipeline, cell.arguments)


def _name(cell: Cell, others: Sequence[Cell]) -> str:
    """Model and domain are named where there are more than one."""
    parts = [_label(cell), _sparsity(cell)]
    if len({other.data.name for other in others}) > 1:
        parts.insert(0, cell.data.name)
    if len({other.model for other in others}) > 1:
        parts.insert(0, cell.model.name)
    return " ".join(part for part in parts if part)


def _group(cell: Cell) -> tuple[Any, ...]:
    arguments = repr(cell.arguments)
    return str(cell.model), cell.data.name, cell.pipeline, cell.mask_structure, cell.sparsity, arguments


def _position(cell: Cell, order: dict[str, int]) -> tuple[Any, ...]:
    """Dense and quantized lines first, then by sparsity, then in the order of the registry, large groups first."""
    return (
        str(cell.model),
        cell.data.name,
        cell.mask_structure,
        cell.sparsity,
        order[cell.pipeline],
        -dict(cell.arguments).get("group", 0),
        repr(cell.arguments),
    )


def _sparsity(cell: Cell) -> str:
    return sparsity_name(cell.sparsity, cell.mask_structure) if cell.sparsity else ""


def _rows(finding: Finding, findings: Iterable[Finding]) -> list[dict[str, Any]]:
    cell, result = finding.cell, finding.result
    accuracies = [task["accuracy"] for task in result.tasks.values() if task["accuracy"] is not None]
    rows = []
    for corpus, losses in result.corpora.items():
        dense = _reference(cell, findings)
        recovery = None if dense is None or corpus not in dense else 100 * dense[corpus] / losses.perplexity
        row = {
            "model": cell.model.name,
            "adapter": None if cell.adapter is None else cell.adapter.name,
            "data": cell.data.name,
            "pipeline": cell.pipeline,
            "family": PIPELINES[cell.pipeline].family,
            "sparsity": cell.sparsity,
            "mask_structure": cell.mask_structure,
            "corpus": corpus,
            "seed": cell.seed,
            "arguments": dict(cell.arguments),
            "perplexity": losses.perplexity,
            "tokens": sum(losses.tokens),
            "documents": len(losses.tokens),
            "recovery": recovery,
            "accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
            "tasks": result.tasks,
            "sparsity_achieved": result.sparsity,
            "bits_per_weight": result.bits_per_weight_stored,
            "bits_per_weight_served": result.bits_per_weight_served,
            "seconds": result.seconds,
            "peak_mb": result.peak_mb,
            "peak_accelerator_mb": result.peak_accelerator_mb,
            "notes": result.notes,
        }
        rows.append(row)
    return rows


def _reference(cell: Cell, findings: Iterable[Finding]) -> dict[str, float] | None:
    """Perplexities of the dense expert of the same model, adapter and domain; the same seed's where there are more."""
    same = [
        one
        for one in findings
        if one.cell.pipeline == _REFERENCE
        and (one.cell.model, one.cell.adapter, one.cell.data.name) == (cell.model, cell.adapter, cell.data.name)
    ]
    chosen = next((one for one in same if one.cell.seed == cell.seed), same[0] if same else None)
    return None if chosen is None else {name: one.perplexity for name, one in chosen.result.corpora.items()}


def _line(group: list[Finding], groups: list[list[Finding]]) -> Line:
    cell, results = group[0].cell, [one.result for one in group]
    pipeline = PIPELINES[cell.pipeline]
    everything = [finding for other in groups for finding in other]
    corpora = {}
    for corpus in results[0].corpora:
        values = [result.corpora[corpus].perplexity for result in results if corpus in result.corpora]
        recoveries = [
            100 * dense[corpus] / one.result.corpora[corpus].perplexity
            for one in group
            if (dense := _reference(one.cell, everything)) and corpus in dense and corpus in one.result.corpora
        ]
        mean, spread = mean_and_spread(values)
        recovery = sum(recoveries) / len(recoveries) if recoveries else None
        corpora[corpus] = Figures(mean, spread, recovery, _rival(group, groups, corpus))
    return Line(
        name=_name(cell, [other[0].cell for other in groups]),
        model=cell.model.name,
        data=cell.data.name,
        pipeline=cell.pipeline,
        label=_label(cell),
        family=pipeline.family,
        ours=pipeline.ours,
        sparsity=_sparsity(cell),
        seeds=len(group),
        corpora=corpora,
        tasks={task: _task([result.tasks[task] for result in results]) for task in results[0].tasks},
        achieved=_mean(result.sparsity for result in results),
        bits_stored=_mean(result.bits_per_weight_stored for result in results),
        bits_served=_mean(result.bits_per_weight_served for result in results),
        seconds=_mean(result.seconds for result in results),
        peak_mb=_mean(result.peak_mb for result in results),
        notes=_notes(group),
    )


def _notes(group: list[Finding]) -> tuple[str, ...]:
    """Each note once, after the seeds that it holds for where these are not all."""
    seeds: dict[str, list[str]] = defaultdict(list)
    for one in group:
        for note in one.result.notes:
            seeds[note].append(str(one.cell.seed))
    return tuple(
        note if len(numbers) == len(group) else f"seed {', '.join(numbers)}: {note}" for note, numbers in seeds.items()
    )


def _mean(values: Iterable[float]) -> float:
    return mean_and_spread(list(values))[0]


def _task(scores: list[dict[str, Any]]) -> dict[str, float | None]:
    """Of scores by seed; a task without an accuracy has none here either."""
    accuracies = [score["accuracy"] for score in scores if score["accuracy"] is not None]
    mean, spread = mean_and_spread(accuracies) if accuracies else (None, None)
    return {"accuracy": mean, "spread": spread, "chance": scores[0].get("chance")}


def _rival(group: list[Finding], groups: list[list[Finding]], corpus: str) -> Rival | None:
    """The best rival of a group on a corpus; None where there is none."""
    rivals = [other for other in groups if _are_rivals(group, other)]
    rivals = [other for other in rivals if all(corpus in one.result.corpora for one in other)]
    if not rivals:
        return None
    best = min(rivals, key=lambda other: _mean(one.result.corpora[corpus].perplexity for one in other))
    name, family = _label(best[0].cell), PIPELINES[best[0].cell.pipeline].family
    if best is group:
        return Rival(name, family, None)
    ours, theirs = _document_losses(group, corpus), _document_losses(best, corpus)
    same = ours is not None and theirs is not None and ours[1] == theirs[1]
    interval = paired_bootstrap(ours[0], theirs[0], ours[1]) if same and ours and theirs else None
    return Rival(name, family, interval)


def _are_rivals(group: list[Finding], other: list[Finding]) -> bool:
    one, two = group[0].cell, other[0].cell
    mine, theirs = PIPELINES[one.pipeline], PIPELINES[two.pipeline]
    if theirs.ours or (one.model, one.data.name) != (two.model, two.data.name):
        return False
    if mine.family == "sparse and quantized":
        bits = [_mean(finding.result.bits_per_weight_stored for finding in findings) for findings in (group, other)]
        return theirs.family == "quantized" and bits[1] <= _AS_SMALL * bits[0]
    return (
        mine.family in ("one-shot", "healed", "trained")
        and theirs.family == mine.family
        and (one.mask_structure, one.sparsity) == (two.mask_structure, two.sparsity)
    )


def _document_losses(group: list[Finding], corpus: str) -> tuple[list[float], list[int]] | None:
    """Loss of every document, averaged over seeds, and its tokens; None where the seeds have other documents."""
    found = [one.result.corpora[corpus] for one in group]
    if any(one.tokens != found[0].tokens for one in found):
        return None
    return np.mean([one.losses for one in found], axis=0).tolist(), found[0].tokens


def _overlaps(first: dict[str, Finding]) -> list[dict[str, Any]]:
    """Of every two lines of the same model at the same sparsity."""
    masks = {}
    for name, finding in first.items():
        if finding.cell.sparsity and finding.masks.is_file():
            with np.load(finding.masks) as file:
                masks[name] = dict(file)
    names = list(masks)
    found = []
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            cells = first[one].cell, first[other].cell
            if len({(cell.model, cell.sparsity, cell.mask_structure) for cell in cells}) == 1:
                layers = overlap(masks[one], masks[other])
                found.append({"of": one, "and": other, "mean": _mean(layers.values()), "layers": layers})
    return found


def _conditions(findings: Sequence[Finding]) -> dict[str, Any]:
    """Every value that the cells were run under, once; more than one of a kind says that they are not all alike."""
    results = [one.result for one in findings]
    datas = [one.cell.data for one in findings]
    return {
        "machine": sorted({result.machine for result in results}),
        "compute_dtype": sorted({result.compute_dtype for result in results}),
        "threads": sorted({result.threads for result in results}),
        "versions": sorted({f"{name} {one}" for result in results for name, one in result.versions.items()}),
        "calibration": sorted({f"{data.samples} sequences of {data.length} tokens" for data in datas}),
        "training_tokens": sorted({data.training_tokens for data in datas}),
        "heldout_tokens": sorted({data.heldout_tokens for data in datas}),
    }
