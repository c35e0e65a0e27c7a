"""The records of `make bench-kernels-gpu` as tables and as a picture."""

from collections.abc import Callable, Hashable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

Records = list[dict]

# Ways to multiply, by methods of `Loaded` in the kernel; the first is for few tokens.
PATHS = ("multiply_records", "multiply_many", "multiply_panels")


def last_run(records: Records) -> Records:
    return [record for record in records if record["run"] == records[-1]["run"]] if records else []


def line(record: dict) -> str:
    """A record in one line."""
    told = {key: value for key, value in record.items() if key != "what"}
    return f"{record['what']}: " + ", ".join(f"{key} {_number(value)}" for key, value in told.items())


def print_tables(records: Records) -> None:
    """What is right, the ratios by shape and number of tokens, the best way for each number of tokens, the model."""
    checked = [record for record in records if "right" in record]
    wrong = [record for record in checked if not record["right"]]
    print(f"\n{len(checked) - len(wrong)} of {len(checked)} results are right")
    for record in wrong:
        print("WRONG", line(record))
    copy = next((record["gb_per_s"] for record in records if record["what"] == "copy"), None)
    linears = [record for record in records if record["what"] == "linear" and record["path"] == "multiply"]
    if linears:
        tokens = sorted({record["m"] for record in linears})
        print("\ntime / time of cuBLAS")
        rows = [["weight", "shape", "bytes", *(f"M={m}" for m in tokens), "±", "of copy"]]
        for (name, n, k), here in _by(linears, lambda record: (label(record), record["n"], record["k"])):
            ratios = {record["m"]: f"{record['ratio']:.2f}" for record in here}
            first = min(here, key=lambda record: record["m"])
            share = f"{first['gb_per_s'] / copy:.2f}" if copy and first["m"] == 1 else ""
            spread = f"{median(record['spread'] for record in here):.2f}"
            shape, size = f"{n}x{k}", f"{first['bytes_ratio']:.3f}"
            rows.append([name, shape, size, *(ratios.get(m, "") for m in tokens), spread, share])
        _print_columns(rows)
        print("time, bytes: packed / dense in bfloat16. ±: interquartile range of the ratios, median over M.")
        print("of copy: packed bytes read per second at M=1 / bytes that a copy reads and writes.")
    _print_crossovers(records)
    _print_model([record for record in records if record["what"] == "model"])
    for record in records:
        if record["what"] in ("left out", "failed"):
            print(line(record))


def draw(records: Records, path: Path) -> None:
    """Ratio over M: a panel for each kind of weight, a line for each shape."""
    linears = [record for record in records if record["what"] == "linear" and record["path"] == "multiply"]
    if not linears or find_spec("matplotlib") is None:
        print(f"no picture: {'matplotlib is not installed' if linears else 'nothing was measured'}")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(_by(linears, label))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 4.5 * len(panels), 5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, here) in zip(axes[0], panels, strict=True):
        axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for (n, k), of_shape in _by(here, lambda record: (record["n"], record["k"])):
            points = sorted((record["m"], record["ratio"]) for record in of_shape)
            axis.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=f"{n}x{k}")
        axis.axhline(1, color="grey", linewidth=0.5)
        axis.axhline(median(record["bytes_ratio"] for record in here), color="k", linestyle="--", label="bytes")
        tokens = sorted({record["m"] for record in here})
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [str(m) for m in tokens], fontsize=7)
        axis.set_xlabel("M, tokens at once")
        axis.set_title(name, fontsize=9)
        axis.set_ylim(bottom=0)
    figure.supylabel("time / time of cuBLAS")
    figure.suptitle(f"{linears[0]['card']}, {linears[0]['run']}", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    partial.replace(path)


def label(record: dict) -> str:
    structure = "" if record["structure"] == "unstructured" else f" {record['structure']}"
    weights = "" if record["weights"] == "bfloat16" else f" {record['weights']}"
    return f"{record['sparsity']:.0%}{structure}{weights}"


class Crossovers(NamedTuple):
    """As in the kernel's variants.py."""

    decode: int
    gemm: int


def crossovers(records: Records) -> Crossovers:
    """Up to how many tokens the first way to multiply, and beyond these the second, is to be used; 0 is not at all.

    Each takes no longer than any way after it, in the median over the shapes.
    """
    first = second = 0
    for m, here in sorted(_by(records, lambda record: record["m"])):
        times = {
            path: {(record["n"], record["k"]): record["sparse_us"] for record in of_path}
            for path, of_path in _by(here, lambda record: record["path"])
        }
        few, many, panels = (times.get(path, {}) for path in PATHS)
        if _is_faster(few, many) and _is_faster(few, panels):
            first = m
        if _is_faster(many, panels):
            second = m
    return Crossovers(first, max(first, second))


def _is_faster(ones: dict, others: dict) -> bool:
    """Whether the first of two kinds of times by shape, of which both have some, are no longer, in the median."""
    shared = ones.keys() & others.keys()
    return bool(shared) and median(ones[shape] / others[shape] for shape in shared) <= 1


def _print_crossovers(records: Records) -> None:
    compared = [record for record in records if record["what"] == "linear" and record["path"] in PATHS]
    if not compared:
        return
    print("\nmicroseconds from the records, for few tokens / for many / by panels")
    tokens = sorted({record["m"] for record in compared})
    rows = [["shape", *(f"M={m}" for m in tokens)]]
    for (n, k), here in _by(compared, lambda record: (record["n"], record["k"])):
        times = {(record["path"], record["m"]): f"{record['sparse_us']:.1f}" for record in here}
        cells = [" / ".join(times.get((path, m), "") for path in PATHS) for m in tokens]
        rows.append([f"{n}x{k}", *cells])
    _print_columns(rows)
    capability = next((record["capability"] for record in records if record["what"] == "machine"), None)
    key = f"({', '.join(map(str, capability))})" if capability else "this device"
    print(f"MEASURED in variants.py: {key}: {crossovers(compared)}")


def _print_model(records: Records) -> None:
    if not records:
        return
    first = records[0]
    print(f"\nrandom Llama of {first['parameters'] / 1e9:.1f}B parameters, {first['layers']} layers, in transformers")
    rows = [["sequences", "dense, tokens/s", "sparse, tokens/s", "sparse / dense", "memory", "of linear layers"]]
    for sequences, here in _by(records, lambda record: record["sequences"]):
        forms = {record["form"]: record for record in here}
        if len(forms) == 2:
            dense, sparse = forms["dense"], forms["sparse"]
            speeds = dense["tokens_per_s"], sparse["tokens_per_s"]
            memory = [f"{sparse[key] / dense[key]:.3f}" for key in ("bytes", "linear_bytes")]
            rows.append([str(sequences), *(f"{one:.1f}" for one in speeds), f"{speeds[1] / speeds[0]:.2f}", *memory])
    _print_columns(rows)


def _by(records: Records, key: Callable[[dict], Hashable]) -> list[tuple]:
    """The records by a property, in the order in which its values come first."""
    groups: dict = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.items())


def _print_columns(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
