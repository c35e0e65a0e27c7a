"""`make bench-kernels-gpu`: sparse linear layers on an NVIDIA GPU against cuBLAS, in the shapes of Llama's layers.

What is right comes first: the kernels against float64, on outputs and buffers that are full of NaN. Then times, in CUDA
graphs: a graph holds one product with each of several weights of one shape, which together exceed the L2 cache by far,
and the graphs of the sparse and the dense weights are replayed in turn. A ratio is sparse/dense, the median over the
replays. At the end a random Llama of 8B parameters decodes in transformers, dense and then sparse.

The steps come in the order of their importance; one for which the time does not suffice is left out and named. Each
record is written when it is made: to kernels_gpu.json in the output folder, after those of earlier runs. Then
kernels_gpu.png is drawn. It takes torch for CUDA, from the root of the repository, and no installation; without
transformers the model is left out, without matplotlib the picture.
"""

import argparse
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist, median
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if find_spec("wrapt") is None:  # which the package needs for its hooks into other libraries, and the kernels do not
    package = ModuleType("efx_plugin")
    package.__path__ = [str(ROOT / "efx_plugin")]
    sys.modules["efx_plugin"] = package

from efx_plugin.kernels.cuda import program, variants  # noqa: E402
from efx_plugin.kernels.cuda.kernel import KERNEL, loaded, prepared  # noqa: E402
from integration.benchmarks import kernels_gpu_report as report  # noqa: E402
from integration.benchmarks.timing import OUTPUT, interleave, ratio, ratios, spread, write_json  # noqa: E402

# The linear layers of Llama 3.2 1B, 3.1 8B and 3.1 70B as vLLM fuses them, [out, in]: qkv, o, gate_up, down.
SHAPES = {
    "1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    "8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
}
FEW, MANY = [1, 2, 4, 8, 16, 32, 64], [128, 256, 512, 1024, 2048, 4096, 8192]  # tokens
STRUCTURES = [(0.5, "unstructured"), (0.4, "unstructured"), (0.6, "unstructured"), (0.5, "2:4")]

WORKING_SET = 1 << 30  # bytes of all dense weights of a graph, at least, where reading them takes most of the time
CACHES = 4  # the same in sizes of the L2 cache, where arithmetic does
ROUNDS = 5, 30  # replays, at least and at most, within these:
SECONDS = 0.05
TOLERANCE = 5e-3  # of an output: bfloat16 rounds to 8 bits

DEVICE = "cuda"

# Rows, columns and tokens that are checked.
CHECKED = [
    *[(16, 64, 1), (1, 1, 1), (40, 72, 5), (1000, 1096, 8), (4096, 4096, 1), (512, 4096, 9), (513, 4096, 16)],
    *[(272, 14336, 31), (528, 2048, 33), (1040, 2048, 64), (50, 70, 3), (128, 1 << 16, 7)],
    *[(4096, 4096, 65), (3000, 8192, 130), (4096, 14336, 300), (33, 70, 1000), (1000, 4096, 96), (20000, 1024, 200)],
]


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    sparsity: float
    structure: str
    weights: str = "bfloat16"  # of the sparse side: or "int8"


@dataclass(frozen=True)
class Step:
    """`seconds`: what it takes on a slow GPU, start-up aside."""

    name: str
    seconds: float
    records: Callable[[], Iterator[dict]]


def plan() -> list[Step]:
    """All steps, the most important first."""
    steps = [Step("correctness", 60, correctness), Step("copy bandwidth", 2, copy_bandwidth)]
    first, *others = STRUCTURES
    steps.append(decode_step("8B", first))
    steps += [many_step("8B", 20), Step("crossovers", 40, crossovers)]
    steps += [decode_step("8B", first, "int8"), Step("model", 75, model)]
    steps += [decode_step(size, first) for size in ("70B", "1B")]
    steps += [decode_step(size, structure) for size, structure in itertools.product(("8B", "70B", "1B"), others)]
    return [*steps, many_step("70B", 60), many_step("1B", 15)]


def decode_step(size: str, structure: tuple[float, str], weights: str = "bfloat16") -> Step:
    cases = [Case(*shape, *structure, weights) for shape in SHAPES[size]]
    kind = f"{'' if structure[1] == 'unstructured' else ' 2:4'}{'' if weights == 'bfloat16' else f' {weights}'}"
    name = f"{size} at {structure[0]:.0%}{kind}, few tokens"
    return Step(name, 5, lambda: itertools.chain.from_iterable(measure(case, FEW) for case in cases))


def many_step(size: str, seconds: float) -> Step:
    cases = [Case(*shape, *STRUCTURES[0]) for shape in SHAPES[size]]
    name = f"{size} at 50%, many tokens"
    return Step(name, seconds, lambda: itertools.chain.from_iterable(measure(case, MANY) for case in cases))


def run(steps: list[Step], seconds: float, append: Callable[[dict], None], now: Callable[[], float]) -> None:
    """Make the records of all steps that fit into the time; `now` is a clock."""
    end = now() + seconds
    for step in steps:
        left = end - now()
        if step.seconds > left:
            append({"what": "left out", "step": step.name, "because": f"{left:.0f} s are left of {seconds:.0f}"})
            continue
        begin = now()
        try:
            for record in step.records():
                append(record)
                if now() > end:
                    rest = f"the rest of {step.name}"
                    append({"what": "left out", "step": rest, "because": f"{seconds:.0f} s are over"})
                    break
        except Exception as error:  # the steps after it may yet succeed
            traceback.print_exc()
            append({"what": "failed", "step": step.name, "error": f"{type(error).__name__}: {error}"})
        append({"what": "seconds", "step": step.name, "seconds": round(now() - begin, 1), "planned": step.seconds})


# Is it right?


def correctness() -> Iterator[dict]:
    """Every case with activations of both dtypes, and weights of the same and int8; the bias in every other one."""
    for index, (is_int8, dtype, (rows, columns, tokens)) in enumerate(
        itertools.product((False, True), (torch.bfloat16, torch.float16), CHECKED)
    ):
        weight = make_weight(Case(rows, columns, 0.5, "unstructured")).to(dtype)
        weight[0], weight[-1] = 0, 1
        weight, scales = quantized(weight) if is_int8 else (weight, None)
        x = normal(tokens, columns, seed=index).to(dtype)
        bias = normal(1, rows, seed=index)[0].to(dtype) if index % 2 else None
        packed = KERNEL.pack(weight, scales, False)
        functions = loaded(weight.device, dtype, is_int8=is_int8)
        value = weight.double() if scales is None else weight.double() * scales.double()[:, None]
        exact = x.double() @ value.T + (0 if bias is None else bias.double())
        is_kept = all(map(same, KERNEL.unpack(packed), (weight, scales)))
        is_invariant = is_batch_invariant(x[:1], packed, bias, rows)
        for path in ("multiply", *report.PATHS[0 if tokens <= functions.crossovers.decode else 1 :]):
            with functions.buffer.borrowed(torch.cuda.current_stream(), dtype) as buffer:
                buffer.fill_(math.nan)
            y = torch.full((tokens + 1, rows), math.nan, dtype=dtype, device=DEVICE)
            getattr(functions, path)(prepared(x), *packed[:2], scales, bias, y[:tokens])
            error = ((y[:tokens].double() - exact).norm() / exact.norm()).item()
            yield {
                "what": "correctness",
                "path": path,
                "n": rows,
                "k": columns,
                "m": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "weights": str(weight.dtype).removeprefix("torch."),
                "error": error,
                "right": bool(
                    error < TOLERANCE  # false for NaN
                    and y[tokens:].isnan().all()  # nothing is written beyond the output
                    and (path != "multiply" or torch.equal(KERNEL.linear(x, packed, bias, rows), y[:tokens]))
                    and is_kept
                    and is_invariant
                ),
            }


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def is_batch_invariant(x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, rows: int) -> bool:
    """Whether a token [1, in] has the same result in any batch that is multiplied from the records."""
    starts, records, _, *scales = packed
    functions = loaded(x.device, x.dtype, is_int8=bool(scales))
    results = []
    for m in (m for m in (1, 2, 8, 16, 17, 32, 33, 64) if m <= functions.crossovers.decode):
        y = x.new_empty(m, rows)
        functions.multiply_records(prepared(x.expand(m, -1)), starts, records, scales[0] if scales else None, bias, y)
        results += [y[:1], y[-1:]]
    return all(torch.equal(result, results[0]) for result in results)


# How fast is it?


class Graph:
    """Calls that are captured in a CUDA graph."""

    def __init__(self, calls: Callable[[], object]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            calls()
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        """The seconds of a replay."""
        self.begin.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1000


def copy_bandwidth() -> Iterator[dict]:
    """Of a copy on the device, the bytes read and the bytes written counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    graph = Graph(lambda: target.copy_(source))
    seconds = median(interleave({"copy": graph}, 15)["copy"])
    yield {"what": "copy", "gb_per_s": 2 * source.nbytes / seconds / 1e9}


def measure(case: Case, tokens: list[int], paths: tuple[str, ...] = ("multiply",)) -> Iterator[dict]:
    """A record for every number of tokens, and for every method of `Loaded` that multiplies."""
    torch.cuda.empty_cache()
    weight = make_weight(case)
    least = WORKING_SET if tokens[0] < MANY[0] else CACHES * torch.cuda.get_device_properties().L2_cache_size
    copies = max(2, math.ceil(least / weight.nbytes))
    is_int8 = case.weights == "int8"
    packed = KERNEL.pack(*(quantized(weight) if is_int8 else (weight, None)), False)
    starts, records, _, *scales = packed
    dense = [weight.clone() for _ in range(copies)]
    sparse = [(starts.clone(), records.clone(), scales[0] if scales else None) for _ in range(copies)]
    packed_bytes = sum(tensor.nbytes for tensor in packed)
    for m, path in itertools.product(tokens, paths):
        x = normal(m, case.k, seed=1).bfloat16()
        multiply = getattr(loaded(x.device, x.dtype, is_int8=is_int8), path)

        def ours(x: Tensor = x, multiply: Callable[..., None] = multiply) -> None:
            for one in sparse:
                multiply(x, *one, None, x.new_empty((len(x), case.n)))

        def theirs(x: Tensor = x) -> None:
            for one in dense:
                torch.nn.functional.linear(x, one)

        seconds = repeat({"sparse": Graph(ours), "dense": Graph(theirs)})
        each = {name: median(figures) / copies for name, figures in seconds.items()}
        yield {
            "what": "linear",
            "path": path,
            "n": case.n,
            "k": case.k,
            "m": m,
            "sparsity": case.sparsity,
            "structure": case.structure,
            "weights": case.weights,
            "ratio": ratio(seconds["dense"], seconds["sparse"]),
            "spread": spread(ratios(seconds["dense"], seconds["sparse"])),
            "bytes_ratio": packed_bytes / weight.nbytes,
            "sparse_us": each["sparse"] * 1e6,
            "dense_us": each["dense"] * 1e6,
            "gb_per_s": packed_bytes / each["sparse"] / 1e9,
        }


def crossovers() -> Iterator[dict]:
    """All ways to multiply, where one of them takes the lead."""
    most = variants.crossovers(torch.cuda.get_device_capability()).decode
    for n, k in SHAPES["8B"]:
        case = Case(n, k, 0.5, "unstructured")
        yield from measure(case, [m for m in (8, 16, 32, 64) if m <= most], report.PATHS)
        yield from measure(case, [m for m in (16, 32, 64) if m > most], report.PATHS[1:])
        yield from measure(case, [96, 128, 192, 256, 512, 1024, 2048, 4096], report.PATHS[1:])


def model() -> Iterator[dict]:
    if find_spec("transformers") is None:
        yield {"what": "left out", "step": "the model", "because": "transformers is not installed"}
        return
    from integration.benchmarks.decode_gpu import LLAMA_8B, measure_model

    yield from measure_model(LLAMA_8B, DEVICE, Graph)


def repeat(graphs: dict[str, Graph]) -> dict[str, list[float]]:
    """As many rounds as fit into `SECONDS`, after a first one."""
    interleave(graphs, 1)
    one = sum(figures[0] for figures in interleave(graphs, 1).values())
    least, most = ROUNDS
    return interleave(graphs, max(least, min(most, round(SECONDS / one))))


def make_weight(case: Case) -> Tensor:
    """A normal weight [n, k]: its smallest values zero, or two in every four."""
    weight = normal(case.n, case.k, seed=0).bfloat16()
    if case.structure == "2:4":
        groups = weight.view(-1, 4)
        return groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0).view_as(weight)
    return weight.masked_fill_(weight.abs() < NormalDist().inv_cdf(0.5 + case.sparsity / 2), 0)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and its scales; zeros stay zero."""
    scales = weight.float().abs().amax(1).clamp(min=1e-3) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def normal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(rows, columns, device=DEVICE, generator=generator)


def obstacle() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return KERNEL.obstacle(torch.empty(1, 1, dtype=torch.bfloat16, device=DEVICE), torch.bfloat16, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=480, metavar="SECONDS", help="default: 480")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="default: build/bench")
    parser.add_argument("--report", action="store_true", help="only print and draw the last run of the output folder")
    args = parser.parse_args()
    path = args.output / "kernels_gpu.json"
    if args.report and not path.is_file():
        sys.exit(f"error: {path} is not there: run this without --report on a machine with an NVIDIA GPU first")
    records = json.loads(path.read_text()) if path.is_file() else []
    if not args.report:
        if (because := obstacle()) is not None:
            sys.exit(f"error: there is nothing to measure: {because}")
        measure_all(records, path, args.time_limit)
    last = report.last_run(records)
    report.print_tables(last)
    report.draw(last, path.with_suffix(".png"))
    print(path)
    if any(record.get("right") is False for record in last):
        sys.exit("error: the kernels compute something else than float64: no figure above counts")
    if failed := [record["step"] for record in last if record["what"] == "failed"]:
        sys.exit(f"error: {', '.join(failed)} failed: the messages are above")


@torch.inference_mode()
def measure_all(records: list[dict], path: Path, seconds: float) -> None:
    """Append the records of all steps to those that are there, and write them."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    properties = torch.cuda.get_device_properties()
    common = {"run": time.strftime("%Y-%m-%d %H:%M:%S"), "card": properties.name}

    def append(record: dict) -> None:
        records.append(common | record)
        write_json(path, records)
        print(report.line(record), flush=True)

    append(
        {
            "what": "machine",
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nvrtc": list(program.nvrtc_version()),
        }
    )
    run(plan(), seconds, append, time.monotonic)


if __name__ == "__main__":
    main()
