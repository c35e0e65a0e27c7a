"""A report as tables of text: for the terminal, and for HTML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from efx_plugin.evaluate.domains import halves_and_domains
from efx_plugin.evaluate.report import Figures, Line, Report

_WIDTHS = 80, 1000  # of what is printed, at least and at most
_NAMED = 3  # lines before a note


@dataclass(frozen=True)
class TextTable:
    """One table.

    Attributes:
        title: model and domain.
        header: names of the columns; "/" stands for a break.
        rows: texts of the cells, a row for each line.
        ours: of each row, whether its pipeline is ours.
        notes: sentences.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ours: tuple[bool, ...]
    notes: tuple[str, ...]


def tables(report: Report, *, every_corpus: bool) -> list[TextTable]:
    """A table for each model and domain.

    Args:
        every_corpus: recovery and rival on every corpus; else on the domain's own, and of the others perplexity alone.
    """
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in report.lines:
        groups.setdefault((line.model, line.data), []).append(line)
    return [_table(model, data, lines, report, every_corpus) for (model, data), lines in groups.items()]


def domain_tables(report: Report) -> list[TextTable]:
    """Of each comparison of the masks of domains: how far they agree, and what a foreign one costs."""
    return [table for found in report.domains for table in (_overlap_table(found), _cross_table(found))]


def _overlap_table(found: dict[str, Any]) -> TextTable:
    projections = list(found["overlaps"][0]["by_projection"])

    def row(name: str, pairs: list[dict[str, Any]], share: str) -> tuple[str, ...]:
        parts = [pairs, *([pair["by_projection"][projection] for pair in pairs] for projection in projections)]
        return name, str(len(pairs)), *(f"{mean(one[share] for one in part):.3f}" for part in parts)

    within, across = halves_and_domains(found["overlaps"])
    rows = [row(f"{name}, on halves of its text", pairs, "iou") for name, pairs in within.items()]
    rows += [row(f"{' and '.join(names)}", pairs, "iou") for names, pairs in across.items()]
    rows.append(row("by chance", [pair for pairs in across.values() for pair in pairs], "chance"))
    return TextTable(
        f"{found['model']}, masks of {found['pipeline']} {found['sparsity']}: weights that both keep of those that "
        "either keeps",
        ("masks", "pairs", "all layers", *(projection.replace(".", "/") for projection in projections)),
        tuple(rows),
        (False,) * len(rows),
        tuple(found["notes"]),
    )


def _cross_table(found: dict[str, Any]) -> TextTable:
    masks = list(dict.fromkeys(tuple(row["mask"]) for row in found["cross"]))
    perplexities = {(row["expert"], *row["mask"]): row["perplexity"] for row in found["cross"]}
    rows = tuple(
        (
            f"{expert} expert",
            corpus,
            *(_number(perplexities[expert, *mask]) for mask in masks),
            f"{found['foreign_over_own'][expert]:.3f}",
        )
        for expert, corpus in zip(found["domains"], found["corpora"], strict=True)
    )
    return TextTable(
        f"{found['model']}, {found['pipeline']} {found['sparsity']}: perplexity of each expert under each mask, "
        "repaired on its own text",
        ("expert", "corpus", *(f"mask of/{name}, half {half}" for name, half in masks), "foreign/over own"),
        rows,
        (False,) * len(rows),
        (),
    )


def show(report: Report) -> None:
    """Print the tables to stdout, as wide as they need to be: a figure that is cut off says nothing."""
    console = Console()
    least, most = _WIDTHS
    console.width = max(console.width, least)
    for table in [*tables(report, every_corpus=False), *domain_tables(report)]:
        shown = Table(title=table.title, box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(table.header):
            shown.add_column(name.replace("/", "\n"), justify="left" if number < 2 else "right", no_wrap=number == 0)
        for row, ours in zip(table.rows, table.ours, strict=True):
            shown.add_row(*row, style="bold" if ours else None)
        needed = Measurement.get(console, console.options.update(width=most), shown).maximum
        console.width = max(console.width, needed)
        console.print(shown)
        for note in table.notes:
            console.print(note, highlight=False, markup=False)
    console.print(
        "recovery: 100 * perplexity of lora / perplexity; best rival: the lowest perplexity of what is not ours, same "
        "family and sparsity; differences are of log perplexities, with 95 % intervals over documents",
        style="dim",
    )


def _table(model: str, data: str, lines: list[Line], report: Report, every_corpus: bool) -> TextTable:
    corpora = list(dict.fromkeys(corpus for line in lines for corpus in line.corpora))
    tasks = list(dict.fromkeys(task for line in lines for task in line.tasks))
    several = any(line.seeds > 1 for line in lines)
    columns: list[tuple[str, Callable[[Line], str]]] = [
        ("pipeline", lambda line: line.label),
        ("sparsity", lambda line: line.sparsity),
    ]
    for number, corpus in enumerate(corpora):
        named = f"{corpus}/" if len(corpora) > 1 else ""
        columns.append(
            (f"{named}perplexity", _on(corpus, lambda figures: _with_spread(figures.perplexity, figures.spread)))
        )
        if every_corpus or not number:
            columns.append((f"{named}recovery %", _on(corpus, lambda figures: _number(figures.recovery))))
            columns.append((f"{named}to best rival", _rival_on(corpus)))
    columns += [(f"{task}/accuracy", _accuracy(task)) for task in tasks]
    columns += [
        ("zeros/%", lambda line: f"{100 * line.achieved:.1f}" if line.sparsity else ""),
        ("bits/stored", lambda line: f"{line.bits_stored:.2f}"),
        ("bits/served", lambda line: f"{line.bits_served:.2f}"),
        ("s", lambda line: f"{line.seconds:.0f}"),
        ("MB", lambda line: f"{line.peak_mb:.0f}"),
    ]
    batches = sorted({batch for line in report.speeds.values() for batch in line})
    columns += [(f"tokens per s/at {batch}", _speed(report, batch)) for batch in batches]
    if several:
        columns.append(("seeds", lambda line: str(line.seeds)))
    return TextTable(
        f"{model}, {data}",
        tuple(name for name, _ in columns),
        tuple(tuple(text(line) for _, text in columns) for line in lines),
        tuple(line.ours for line in lines),
        tuple(_notes(lines)),
    )


def _on(corpus: str, text: Callable[[Figures], str]) -> Callable[[Line], str]:
    return lambda line: text(line.corpora[corpus]) if corpus in line.corpora else ""


def _with_spread(value: float, spread: float | None) -> str:
    return _number(value) if spread is None else f"{_number(value)} ± {spread:.2g}"


def _number(value: float | None) -> str:
    """Four digits, which is more than the documents can tell apart."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.4g}"


def _speed(report: Report, batch: int) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        speed = report.speeds.get(line.name, {}).get(batch)
        return "" if speed is None else f"{speed.tokens_per_second:.1f} ({speed.over_dense:.2f})"

    return text


def _rival_on(corpus: str) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        rival = line.corpora[corpus].rival if corpus in line.corpora else None
        if rival is None:
            return ""
        if rival.name == line.label:
            return "best rival"
        interval = rival.interval
        if interval is None:
            return f"{rival.name}: other documents"
        named = f" {rival.name}" if rival.family != line.family else ""
        return f"{interval.difference:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]{named}"

    return text


def _accuracy(task: str) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        score = line.tasks.get(task, {})
        accuracy, spread, chance = score.get("accuracy"), score.get("spread"), score.get("chance")
        if accuracy is None:
            return ""
        percent = f"{100 * accuracy:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")
        return percent if chance is None else f"{percent} (chance {100 * chance:.0f})"

    return text


def _notes(lines: Sequence[Line]) -> list[str]:
    """Each note once, after the lines that it holds for."""
    held: dict[str, list[str]] = {}
    for line in lines:
        for note in line.notes:
            held.setdefault(note, []).append(f"{line.label} {line.sparsity}".strip())
    return [f"{_enumerated(labels, len(lines))}: {note}" for note, labels in held.items()]


def _enumerated(labels: list[str], lines: int) -> str:
    if len(labels) == lines > 1:
        return "all"
    return (
        ", ".join(labels) if len(labels) <= _NAMED else f"{', '.join(labels[:_NAMED])} and {len(labels) - _NAMED} more"
    )
