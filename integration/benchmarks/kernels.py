"""`make bench-kernels`: sparse linear layers against dense ones as vLLM runs them, in the shapes of Llama's layers.

Every case has several weights of one shape, each in its own memory, so many that they do not fit into a cache. A round
times one pass over all of them with our kernel, with each rival, and a sum over as much memory as all weights take in
bfloat16 (torch's, in float32, which reads memory once and does little else): the speed that counts as the limit. A
ratio is ours / dense bfloat16. The rivals are the dense forms (dense.py) that have at least as many bits per weight as
ours before it is pruned; float32 is one of them where the processor has to emulate bfloat16. All layers are without
bias.

A run of all shapes writes build/bench/kernels.json and kernels.png, and one of a selection (--quick, --shape, --m,
--sparsity) kernels-part.json and kernels-part.png.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist, median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.kernels import PackedWeight, kernel_summary, pack, sparse_linear
from efx_plugin.machine import cpu_multiplies_in
from integration.benchmarks import dense
from integration.benchmarks.progress import progress_on
from integration.benchmarks.timing import OUTPUT, Timed, interleave, ratio, ratios, spread, timed, write_json

# The linear layers of Llama 3.2 1B and 3B and Llama 3.1 8B as vLLM fuses them, [out, in]: qkv, o, gate_up, down.
SHAPES = [
    *[(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    *[(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)],
    *[(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
]
QUICK = [(4096, 4096)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 256]
SPARSITIES = [0.4, 0.5, 0.6]

WORKING_SET = 200e6  # bytes of all dense weights together, at least, where reading them takes most of the time
WORKING_SET_COMPUTE = 64e6  # the same from `COMPUTE_BOUND` tokens on, where arithmetic does
COMPUTE_BOUND = 64
SECONDS = 1.0  # per measurement, within these rounds:
ROUNDS = 9, 60
BITS = {"bf16": 16, "w8a16": 8, "w8a8": 8, "w4a16": 4, "w4a8": 4}  # of a weight that is kept
# Relative errors of an output that is computed as it should be: bfloat16 rounds to 8 bits, and so do int8 weights and
# activations.
TOLERANCE = {"bf16": 0.01, "w8a16": 0.01, "w8a8": 0.03, "w4a16": 0.01, "w4a8": 0.03}
TOLERANCE |= {"dense fp32": 0.01, "dense int8": 0.03, "dense int4": 0.03}

LETTERS = {"bf16": "b", "fp32": "f", "int8": "8", "int4": "4"}  # of dense forms, in tables

PATTERNS_2_4 = torch.tensor([[a, b, c, d] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)])
PATTERNS_2_4 = PATTERNS_2_4[PATTERNS_2_4.sum(1) == 2].bool()


@dataclass(frozen=True)
class Case:
    """`dtype`: bf16, or int8 (w8) or int4 (w4) with activations of bfloat16 (a16) or of int8 (a8)."""

    n: int
    k: int
    sparsity: float
    structure: str
    dtype: str


def cases(shapes: list[tuple[int, int]], sparsities: list[float]) -> list[Case]:
    """2:4, int8 and int4 are 50 % sparse."""
    result = []
    for n, k in shapes:
        result += [Case(n, k, sparsity, "unstructured", "bf16") for sparsity in sparsities]
        if 0.5 in sparsities:
            result.append(Case(n, k, 0.5, "2:4", "bf16"))
            result += [Case(n, k, 0.5, "unstructured", dtype) for dtype in BITS if dtype != "bf16"]
    return result


def make_weight(case: Case) -> Tensor:
    """A normal weight [n, k] in bfloat16: its smallest values zero, or two in every four."""
    weight = torch.empty(case.n, case.k, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0))
    if case.structure == "2:4":
        chosen = torch.randint(len(PATTERNS_2_4), (weight.numel() // 4,), generator=torch.Generator().manual_seed(1))
        return weight.masked_fill_(~PATTERNS_2_4[chosen].view(weight.shape), 0)
    return weight.masked_fill_(weight.abs() < NormalDist().inv_cdf(0.5 + case.sparsity / 2), 0)


def pack_case(weight: Tensor, case: Case, count: int) -> tuple[list[PackedWeight], Tensor]:
    """The packed weights, all the same in memory of their own, and the dense weight that they stand for."""
    if case.dtype == "bf16":
        return [pack(weight) for _ in range(count)], weight
    bits = BITS[case.dtype]
    group = case.k if bits == 8 else dense.GROUP
    values, scales = dense.quantize(weight, bits, group)
    expanded = (values.float() * scales.repeat_interleave(group, 1)).bfloat16()
    options = {"scales": scales[:, 0] if bits == 8 else scales, "quantize_activations": case.dtype.endswith("a8")}
    return [pack(values, dtype=torch.bfloat16, **options) for _ in range(count)], expanded


def measure(case: Case, tokens: list[int]) -> Iterator[dict]:
    """A record for every number of tokens.

    Raises:
        EfxError: only the reference kernel serves the case, or a kernel computes something else than oneDNN.
    """
    weight = make_weight(case)
    packed, weight = pack_case(weight, case, copies(weight, WORKING_SET))
    if packed[0].kernel == "reference" and os.environ.get("EFX_KERNEL") != "reference":
        raise EfxError(
            f"there is nothing to measure: {case.dtype} runs on the reference kernel here "
            f"({kernel_summary(packed[0])}); set EFX_KERNEL=reference to measure that one"
        )
    packed_bytes = sum(tensor.nbytes for tensor in packed[0].tensors)
    rivals = Rivals(weight, rival_forms(BITS[case.dtype]))
    for m in tokens:
        x = activations(m, case)
        right = rivals.layers["bf16"](x, 1)[0]
        check(sparse_linear(x, packed[0]), right, case.dtype, case, m)
        for form, layers in rivals.layers.items():
            if form != "bf16":
                check(layers(x.to(layers.dtype), 1)[0], right, f"dense {form}", case, m)
        used = copies(weight, WORKING_SET if m < COMPUTE_BOUND else WORKING_SET_COMPUTE)
        ours = timed(lambda x=x, used=used: [sparse_linear(x, one) for one in packed[:used]])
        yield compare(case, packed[0].kernel, x, ours, rivals, used, packed_bytes)


def measure_csr() -> dict:
    """torch's own sparse format in float32, one token, half zeros, 4096 x 4096: for the record."""
    case = Case(4096, 4096, 0.5, "csr", "fp32")
    weight = make_weight(case)
    used = copies(weight, WORKING_SET)
    sparse = [weight.float().to_sparse_csr() for _ in range(used)]
    packed_bytes = sum(part.nbytes for part in (sparse[0].values(), sparse[0].col_indices(), sparse[0].crow_indices()))
    x = activations(1, case)
    column = x.float().t().contiguous()
    ours = timed(lambda: [one @ column for one in sparse])
    return compare(case, "torch", x, ours, Rivals(weight, ["bf16"]), used, packed_bytes)


def rival_forms(bits: int) -> list[str]:
    """The dense forms that a sparse weight of so many bits is measured against, bf16 among them."""
    forms = ["bf16"] if cpu_multiplies_in(torch.bfloat16) else ["bf16", "fp32"]
    return forms + [form for form in ("int8", "int4") if dense.BITS[form] >= bits]


class Rivals:
    """Dense layers of one weight [out, in], by form, and as much other memory as they take in bfloat16."""

    def __init__(self, weight: Tensor, forms: list[str]) -> None:
        count = copies(weight, WORKING_SET)
        self.nbytes = weight.nbytes
        self.layers = {form: dense.Layers(form, weight, count) for form in forms}
        self.same_memory = torch.ones(count * weight.nbytes // 4)


def compare(
    case: Case, isa: str, x: Tensor, ours: Callable[[], float], rivals: Rivals, used: int, packed_bytes: int
) -> dict:
    """The record of one measurement, of passes over `used` weights of `packed_bytes` each."""
    functions = {"ours": ours, "memory": timed(rivals.same_memory.sum)}
    for form, layers in rivals.layers.items():
        functions[form] = timed(partial(layers, x.to(layers.dtype), used))
    seconds = repeat(functions)
    speed = {
        "ours": used * packed_bytes / median(seconds["ours"]) / 1e9,
        "dense": used * rivals.nbytes / median(seconds["bf16"]) / 1e9,
        "memory": rivals.same_memory.nbytes / median(seconds["memory"]) / 1e9,
    }
    return {
        "isa": isa,
        "n": case.n,
        "k": case.k,
        "m": x.shape[0],
        "sparsity": case.sparsity,
        "structure": case.structure,
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "ratio": ratio(seconds["bf16"], seconds["ours"]),
        "bytes_ratio": packed_bytes / rivals.nbytes,
        "spread": spread(ratios(seconds["bf16"], seconds["ours"])),
        "gb_per_s": speed["ours"],
        "dense_gb_per_s": speed["dense"],
        "limit_gb_per_s": speed["memory"],
        "fraction_of_limit": speed["ours"] / speed["memory"],
        "ratio_to": {form: ratio(seconds[form], seconds["ours"]) for form in rivals.layers},
        "rival_ratio": {form: ratio(seconds["bf16"], seconds[form]) for form in rivals.layers if form != "bf16"},
    }


def copies(weight: Tensor, working_set: float) -> int:
    return math.ceil(working_set / weight.nbytes)


def activations(m: int, case: Case) -> Tensor:
    return torch.empty(m, case.k, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(2))


def repeat(functions: Timed) -> dict[str, list[float]]:
    """As many rounds as fit into `SECONDS`, after a first one in which the libraries prepare themselves."""
    interleave(functions, 1)
    one = sum(figures[0] for figures in interleave(functions, 1).values())
    least, most = ROUNDS
    return interleave(functions, max(least, min(most, round(SECONDS / one))))


def check(output: Tensor, right: Tensor, name: str, case: Case, m: int) -> None:
    error = (torch.linalg.vector_norm(output.float() - right.float()) / torch.linalg.vector_norm(right.float())).item()
    if not error < TOLERANCE[name]:
        raise EfxError(f"the output of {name} is off by {error:.3g} of oneDNN's with {m} tokens and {case}")


def print_table(records: list[dict], console: Console) -> None:
    """Tables for each kernel, a line for each weight, a column for each number of tokens: times over dense bf16's, with
    lines for the other rivals; and over the fastest rival's, if there is one but bf16.
    """
    tokens = sorted({record["m"] for record in records})
    for isa in dict.fromkeys(record["isa"] for record in records):
        rows: dict[tuple[str, str], dict[int, dict]] = {}
        for record in records:
            if record["isa"] == isa:
                rows.setdefault((label(record), f"{record['n']}x{record['k']}"), {})[record["m"]] = record
        table = new_table(f"{isa}: time / time of oneDNN's bf16", "bytes", *(f"M={m}" for m in tokens), "±", "of limit")
        for names, by_tokens in rows.items():
            first = by_tokens[min(by_tokens)]
            table.add_row(
                *(*names, f"{first['bytes_ratio']:.3f}"),
                *(f"{by_tokens[m]['ratio']:.2f}" if m in by_tokens else "" for m in tokens),
                f"{median(record['spread'] for record in by_tokens.values()):.2f}",
                f"{first['fraction_of_limit']:.2f}",
            )
        for (form, shape), by_tokens in rival_ratios(records, isa).items():
            ratios_of_form = (f"{median(by_tokens[m]):.2f}" if m in by_tokens else "" for m in tokens)
            table.add_row(f"dense {form}", shape, "", *ratios_of_form, "", "")
        console.print(table)
        if any(record["rival_ratio"] for record in records if record["isa"] == isa):
            table = new_table(f"{isa}: time / time of the fastest rival", *(f"M={m}" for m in tokens))
            for names, by_tokens in rows.items():
                table.add_row(*names, *(fastest(by_tokens[m]) if m in by_tokens else "" for m in tokens))
            console.print(table)
    console.print("bytes: packed / dense. ±: interquartile range of the ratios, median over M.")
    console.print("of limit: bytes read per second at the smallest M / those of a sum over memory.")
    letters = ", ".join(f"{letter} {form}" for form, letter in LETTERS.items())
    console.print(f"rivals: dense forms of at least as many bits per weight; {letters}.")


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("weight")
    for column in ("shape", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def rival_ratios(records: list[dict], isa: str) -> dict[tuple[str, str], dict[int, list[float]]]:
    """Form and shape to number of tokens to the times over oneDNN's, one from each of the kernel's records."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for record in records:
        for form, figure in record["rival_ratio"].items():
            if record["isa"] == isa:
                by_tokens = found.setdefault((form, f"{record['n']}x{record['k']}"), {})
                by_tokens.setdefault(record["m"], []).append(figure)
    return found


def fastest(record: dict) -> str:
    """The ratio to the fastest rival, and which that is."""
    form = max(record["ratio_to"], key=record["ratio_to"].get)
    return f"{record['ratio_to'][form]:.2f} {LETTERS[form]}"


def label(record: dict) -> str:
    structure = "" if record["structure"] == "unstructured" else f" {record['structure']}"
    return f"{record['dtype']} {record['sparsity']:.0%}{structure}"


def plot(records: list[dict], path: Path) -> None:
    """Ratio over M: a panel for each kind of weight, a line for each shape, and the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record in records if record["structure"] != "csr"]
    labels = list(dict.fromkeys(label(record) for record in records))
    columns = min(3, len(labels))
    rows = math.ceil(len(labels) / columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(1 + 4.5 * columns, 1.5 + 3.5 * rows), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel in panels.flat:
        panel.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    # From this M on, the arithmetic of the dense weights takes longer than reading them.
    balance = max(record["m"] * record["dense_gb_per_s"] / record["limit_gb_per_s"] for record in records)
    for panel, name in zip(panels.flat, labels, strict=False):
        here = [record for record in records if label(record) == name]
        for shape in dict.fromkeys((record["n"], record["k"]) for record in here):
            line = sorted((r["m"], r["ratio"]) for r in here if (r["n"], r["k"]) == shape)
            panel.plot(*zip(*line, strict=True), marker=".", linewidth=1, label="{}x{}".format(*shape))
        tokens = sorted({record["m"] for record in here})
        bytes_ratio = median(record["bytes_ratio"] for record in here)
        grid = [2 ** (exponent / 8) for exponent in range(8 * round(math.log2(max(tokens))) + 1)]
        limit = [max(bytes_ratio, m / balance) / max(1, m / balance) for m in grid]
        panel.plot(grid, limit, "k--", label="limit: bytes, then arithmetic")
        panel.axhline(1, color="grey", linewidth=0.5)
        panel.set_title(name, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks(tokens, [str(m) for m in tokens])
        panel.set_xlabel("M, tokens at once")
        panel.set_ylim(bottom=0)
    figure.supylabel("time of ours / time of oneDNN")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=120)
    partial.replace(path)


def shape(text: str) -> tuple[int, int]:
    n, k = map(int, text.split("x"))
    if n % 32 or k % dense.GROUP:  # vLLM's int4
        raise argparse.ArgumentTypeError(f"32 has to divide OUT, and {dense.GROUP} IN")
    return n, k


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def fractions(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4096x4096 only")
    parser.add_argument("--shape", type=shape, help="one shape, OUTxIN, such as 4096x4096")
    parser.add_argument("--m", type=integers, default=TOKENS, help="numbers of tokens, such as 1,8")
    parser.add_argument("--sparsity", type=fractions, default=SPARSITIES, help="sparsities, such as 0.5,0.6")
    parser.add_argument("--threads", type=int, help="threads (default: all cores, or OMP_NUM_THREADS)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = [args.shape] if args.shape else QUICK if args.quick else SHAPES
    name = "kernels" if (shapes, args.m, args.sparsity) == (SHAPES, TOKENS, SPARSITIES) else "kernels-part"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # before vLLM is imported
    try:
        run(cases(shapes, args.sparsity), args.m, OUTPUT / name)
    except EfxError as error:
        sys.exit(f"error: {error}")


@torch.inference_mode()
def run(to_measure: list[Case], tokens: list[int], output: Path) -> None:
    """Measure, print, and write output.json and output.png."""
    console = Console(width=max(100, Console().width))  # the table needs them
    records = []
    with progress_on(console) as progress:
        task = progress.add_task("", total=len(to_measure) * len(tokens))
        for case in to_measure:
            progress.update(
                task, description=f"{case.n}x{case.k} {case.dtype} {case.structure} {case.sparsity:.0%}".ljust(40)
            )
            for record in measure(case, tokens):
                records.append(record)
                progress.advance(task)
        if any((case.n, case.k, case.sparsity) == (4096, 4096, 0.5) for case in to_measure) and 1 in tokens:
            progress.update(task, description="torch CSR".ljust(40))
            records.append(measure_csr())
    print_table(records, console)
    write_json(output.with_suffix(".json"), records)
    plot(records, output.with_suffix(".png"))
    console.print(f"{output}.json, {output.name}.png; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
