"""Sparse linear layers of SparAMX (Intel Labs, arXiv 2502.12444) beside ours on a CPU with AMX, at 50 % sparsity.

    python -m integration.benchmarks.sparamx DIR

DIR is the user's own copy of SparAMX, the folder of its setup.py; nothing is fetched. Its two kernels, of AMX and of
AVX-512, are compiled to build/bench/sparamx. They and ours multiply one weight in turn, copies of it in memory of their
own, as in `make bench-kernels`. Ratios are over oneDNN's bfloat16.
"""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from rich.console import Console
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.kernels import kernel_summary, pack, sparse_linear
from efx_plugin.machine import cpu_name
from integration.benchmarks import dense
from integration.benchmarks.kernels import Case, activations, check, copies, make_weight, new_table, repeat, shape
from integration.benchmarks.timing import OUTPUT, ratio, ratios, spread, timed, write_json

TOKENS = [1, 2, 4, 8, 16, 32, 64]
WORKING_SET = 100e6  # bytes of all dense weights together
# Kernel -> the class of its layer; the modules of both are named alike.
LAYERS = {"sparse_linear": "SparseLinear", "avx_sparse_linear": "AvxSparseLinear"}
FLAGS = ["-O3", "-fopenmp", "-DNDEBUG", "-march=sapphirerapids", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]


def build(directory: Path, kernel: str) -> type[torch.nn.Module]:
    """The class of a layer of SparAMX.

    Raises:
        EfxError: the folder is not that of SparAMX.
    """
    from torch.utils import cpp_extension

    source = directory / "csrc" / f"{kernel}.cpp"
    if not source.is_file():
        raise EfxError(f"{source} is missing: DIR is to be the folder of SparAMX that has setup.py")
    output = OUTPUT / "sparamx"
    output.mkdir(parents=True, exist_ok=True)
    compiled = cpp_extension.load(
        kernel, [source], extra_cflags=FLAGS, extra_ldflags=["-lgomp"], build_directory=output
    )
    package = sys.modules.setdefault("sparamx", ModuleType("sparamx"))
    setattr(package, kernel, compiled)
    sys.path.insert(0, str(directory))
    layer: type[torch.nn.Module] = getattr(import_module(f"layer.{kernel}"), LAYERS[kernel])
    return layer


def rival(layer: type[torch.nn.Module], weight: Tensor, count: int) -> list[Callable[[Tensor], Tensor]]:
    """Products of x [tokens, in] with copies of the weight, in as many parts as there are threads."""
    made = [layer.from_weights(weight, num_threads=torch.get_num_threads()) for _ in range(count)]
    return [lambda x, one=one: one(x[None])[0] for one in made]


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the folder of SparAMX")
    parser.add_argument("--shape", type=shape, default=(4096, 4096), help="OUTxIN of the weight")
    given = parser.parse_args()
    try:
        bench(given.directory, given.shape)
    except EfxError as error:
        sys.exit(f"error: {error}")


def bench(directory: Path, size: tuple[int, int]) -> None:
    """Measure, print, and write build/bench/sparamx.json.

    Args:
        directory: the folder of SparAMX.
        size: of the weight, [out, in].

    Raises:
        EfxError: the folder is not that of SparAMX, or a kernel computes something else than oneDNN.
    """
    amx, avx512 = (build(directory, kernel) for kernel in LAYERS)
    case = Case(*size, 0.5, "unstructured", "bf16")
    weight = make_weight(case)
    count = copies(weight, WORKING_SET)
    ours = [pack(weight) for _ in range(count)]
    products: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "oneDNN, dense": dense.Layers("bf16", weight, count).linears,
        "ours": [lambda x, one=one: sparse_linear(x, one) for one in ours],
        "SparAMX, AMX": rival(amx, weight, count),
        "SparAMX, AVX-512": rival(avx512, weight, count),
    }
    console = Console()
    console.print(f"{cpu_name()}, {torch.get_num_threads()} threads; ours: {kernel_summary(ours[0])}", highlight=False)
    records = [record for m in TOKENS for record in measure(case, m, products)]
    table = new_table("time / time of oneDNN's bf16", *(f"M={m}" for m in TOKENS), "±")
    for name in products:
        found = [record for record in records if record["name"] == name]
        figures = (f"{record['ratio']:.2f}" for record in found)
        middle = median(record["spread"] for record in found)
        table.add_row(name, "{}x{}".format(*size), *figures, f"{middle:.2f}")
    console.print(table)
    write_json(OUTPUT / "sparamx.json", records)


def measure(case: Case, m: int, products: dict[str, list[Callable[[Tensor], Tensor]]]) -> list[dict]:
    """A record of each kernel, for m tokens.

    Raises:
        EfxError: a kernel computes something else than oneDNN.
    """
    x = activations(m, case)
    right = products["oneDNN, dense"][0](x)
    for one in products.values():
        check(one[0](x), right, "bf16", case, m)
    seconds = repeat({name: timed(lambda ones=ones: [one(x) for one in ones]) for name, ones in products.items()})
    first = seconds["oneDNN, dense"]
    return [
        {"name": name, "m": m, "ratio": ratio(first, figures), "spread": spread(ratios(first, figures))}
        for name, figures in seconds.items()
    ]


if __name__ == "__main__":
    main()
