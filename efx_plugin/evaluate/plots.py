"""Pictures of a report, as SVG."""

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, ScalarFormatter

from efx_plugin.evaluate.domains import halves_and_domains
from efx_plugin.evaluate.report import Line, Report

_MARKERS = {"dense": "s", "one-shot": "o", "healed": "v", "quantized": "D", "sparse and quantized": "P", "trained": "^"}
# Text stays text: it can be selected and searched, and the file is small.
_STYLE: Any = {"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "efx"}


def pictures(report: Report) -> dict[str, str]:
    """SVG elements by their captions, in the order to show them; what was not measured has no picture."""
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in report.lines:
        groups[line.model, line.data].append(line)
    found: dict[str, str] = {}
    with matplotlib.rc_context(_STYLE):
        for (model, data), lines in groups.items():
            where = f"{model}, {data}"
            corpus = next(iter(lines[0].corpora))
            found[f"{where}: quality over sparsity"] = _over_sparsity(lines, corpus)
            for name, bits in (("stored", lambda line: line.bits_stored), ("served", lambda line: line.bits_served)):
                found[f"{where}: quality over bits per weight as {name}, sparse and quantized together"] = _over_bits(
                    lines, corpus, bits, name
                )
            for quantity, label in (("damage", "relative error of the outputs"), ("sparsity", "sparsity")):
                if picture := _per_block(lines, report, quantity, label):
                    found[f"{where}: {label} by decoder block"] = picture
        if picture := _overlaps(report):
            found["mask overlap: kept weights that two lines share, of all that either keeps"] = picture
        for one in report.domains:
            names = " and ".join(one["domains"])
            found[
                f"{one['model']}: masks of {names} by {one['pipeline']} {one['sparsity']}, overlap by decoder block"
            ] = _domains(one)
    return found


def _over_sparsity(lines: Sequence[Line], corpus: str) -> str:
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for pipeline, points in _by_pipeline(line for line in lines if line.sparsity):
        points.sort(key=lambda line: line.achieved)
        axes.errorbar(
            [100 * line.achieved for line in points],
            [line.corpora[corpus].perplexity for line in points],
            yerr=[line.corpora[corpus].spread or 0 for line in points],
            marker=_MARKERS[points[0].family],
            linewidth=2 if points[0].ours else 1,
            capsize=2,
            label=pipeline,
        )
    for number, line in enumerate(line for line in lines if not line.sparsity):
        axes.axhline(
            line.corpora[corpus].perplexity, color=f"C{number}", linestyle=":", linewidth=1, label=line.pipeline
        )
    axes.set_xlabel("zeros in the target layers, %")
    _finish(axes, corpus)
    return _svg(figure)


def _over_bits(lines: Sequence[Line], corpus: str, bits: Callable[[Line], float], name: str) -> str:
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for pipeline, points in _by_pipeline(lines):
        points.sort(key=bits)
        axes.plot(
            [bits(line) for line in points],
            [line.corpora[corpus].perplexity for line in points],
            marker=_MARKERS[points[0].family],
            linewidth=2 if points[0].ours else 1,
            markersize=8 if points[0].ours else 5,
            label=pipeline,
        )
    axes.set_xlabel(f"bits per weight of the target layers, as {name}")
    _finish(axes, corpus)
    return _svg(figure)


def _per_block(lines: Sequence[Line], report: Report, quantity: str, label: str) -> str | None:
    """Means over the layers of a block, at the sparsity at which most pipelines were run."""
    measured: dict[str, dict[str, dict[int, float]]] = defaultdict(dict)
    for line in lines:
        values = _blocks(report.layers.get(line.name, []), quantity)
        if line.sparsity and values:
            measured[line.sparsity][line.label] = values
    if not measured:
        return None
    sparsity, pipelines = max(measured.items(), key=lambda item: len(item[1]))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for pipeline, values in pipelines.items():
        axes.plot(list(values), list(values.values()), marker=".", label=pipeline)
    axes.set_xlabel("decoder block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    axes.set_title(f"at {sparsity}", fontsize=9)
    if quantity == "damage":
        axes.set_yscale("log")
    axes.legend(fontsize=7)
    return _svg(figure)


def _blocks(layers: Iterable[dict[str, Any]], quantity: str) -> dict[int, float]:
    """Means over the weights of each block."""
    sums: dict[int, float] = defaultdict(float)
    weights: dict[int, int] = defaultdict(int)
    for layer in layers:
        found = re.search(r"\.(\d+)\.", layer["name"])
        value = layer[quantity]
        if found and value is not None:
            sums[int(found[1])] += value * layer["weights"]
            weights[int(found[1])] += layer["weights"]
    return {block: sums[block] / weights[block] for block in sorted(sums)}


def _overlaps(report: Report) -> str | None:
    names = list(dict.fromkeys(name for pair in report.overlaps for name in (pair["of"], pair["and"])))
    if not names:
        return None
    grid = [[math.nan] * len(names) for _ in names]
    for pair in report.overlaps:
        row, column = names.index(pair["of"]), names.index(pair["and"])
        grid[row][column] = grid[column][row] = pair["mean"]
    side = 2.5 + 0.45 * len(names)
    figure, axes = pyplot.subplots(figsize=(side + 1.5, side), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 16:
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    color = "black" if value > 0.6 else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image)
    return _svg(figure)


def _domains(found: dict[str, Any]) -> str:
    """Means over the pairs of masks, in each block."""
    within, across = halves_and_domains(found["overlaps"])
    everything = [pair for pairs in across.values() for pair in pairs]
    lines = [(f"{name}, on halves of its text", pairs, "iou") for name, pairs in within.items()]
    lines += [(" and ".join(names), pairs, "iou") for names, pairs in across.items()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, pairs, share in [*lines, ("by chance", everything, "chance")]:
        blocks = list(pairs[0]["by_block"])
        values = [mean(pair["by_block"][block][share] for pair in pairs) for block in blocks]
        style: Any = {"linestyle": ":", "color": "gray"} if share == "chance" else {"marker": "."}
        axes.plot([int(block) for block in blocks], values, label=name, **style)
    axes.set_xlabel("decoder block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("weights that both keep, of those that either keeps")
    axes.legend(fontsize=7)
    return _svg(figure)


def _by_pipeline(lines: Iterable[Line]) -> Iterable[tuple[str, list[Line]]]:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.label].append(line)
    return groups.items()


def _finish(axes: Axes, corpus: str) -> None:
    axes.set_ylabel(f"perplexity, {corpus}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _svg(figure: Figure) -> str:
    """The element alone, to stand inside of HTML."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]
