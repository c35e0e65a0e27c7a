"""Calls of the compiled sparse kernels: weights, and a program that replays calls."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from efx_plugin.kernels import groups, native, registry
from tests.support.products import is_sum

ALL = [kernel.name for kernel in native.KERNELS]  # a kernel's place is its number
ISAS = [kernel.name for kernel in native.KERNELS if kernel.is_supported]
ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "efx_plugin" / "kernels" / "native"
REPLAY = ROOT / "tests" / "kernels" / "native_replay.cpp"
KINDS = ["bf16", "int8", "int8_dynamic", "int4", "int4_dynamic"]
DTYPES = [torch.bfloat16, torch.float32]
SCALE_DTYPES = [torch.bfloat16, torch.float16]
HEADER = ("magic", "kind", "rows", "columns", "span", "scale_type", "blocks", "groups", "values")
HEADER += ("scales_at", "sums_at", "offsets_at", "masks_at", "values_at", "size")
FIELDS = ("isa", "kind", "type", "rows", "columns", "m", "span", "scale_type", "scale_bytes", "bias", "field", "value")

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
AVX512_BF16 = [*AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni", "-mavx512bf16"]

Call = tuple[dict[str, int], list[torch.Tensor | None]]  # as `make_call` gives it


class Architecture(NamedTuple):
    """What of the library is for one architecture alone."""

    defines: list[str]
    files: dict[str, list[str]]  # and their flags


X86 = Architecture(
    ["-DEFX_WITH_X86"],
    {
        "amx.cpp": AVX512_BF16,
        "avx512_bf16.cpp": AVX512_BF16,
        "avx512_vnni.cpp": [*AVX512, "-mbmi2", "-mavx512vnni"],
        "avx512.cpp": [*AVX512, "-mbmi2"],
        "avx2.cpp": ["-mavx2", "-mfma"],
    },
)
ARM64 = Architecture(
    ["-DEFX_WITH_ARM64"],
    {"neon_bf16.cpp": ["-march=armv8.2-a+dotprod+bf16"], "neon.cpp": ["-march=armv8-a"]},
)
PORTABLE = Architecture([], {})


def make_weight(kind: str, rows: int, columns: int, density=0.5, seed=0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A sparse weight of which a row is empty and a row is full, and the scales if it is int8 or int4.

    Scales of int4 are for groups of 32, 64, 128 or all columns, in bfloat16 or float16, as the seed has it.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    keep[0], keep[-1] = False, True
    if kind == "bf16":
        return (torch.randn(rows, columns, generator=generator) * keep).bfloat16(), None
    if kind.startswith("int8"):
        weight = torch.randint(-128, 128, (rows, columns), generator=generator) * keep
        return weight.to(torch.int8), torch.rand(rows, generator=generator) + 0.01
    weight = (torch.randint(-8, 8, (rows, columns), generator=generator) * keep).to(torch.int8)
    size, scale_dtype = (*groups.SIZES, columns)[seed % 4], SCALE_DTYPES[seed // 4 % 2]
    scales = torch.rand(rows, -(-columns // size), generator=generator) + 0.01
    return weight, scales.to(scale_dtype).float()


def compile_replay(
    folder: Path, compiler: str, architecture: Architecture, flags: list[str], vector_flags: list[str] | None = None
) -> Path:
    """The program of native_replay.cpp, from the sources of the library; `vector_flags` are for the architecture's."""
    common = [compiler, "-std=c++17", "-O1", "-g0", "-w", "-fopenmp", "-ffp-contract=off", f"-I{SOURCES}"]
    common += [*architecture.defines, *flags]

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        own = [*(vector_flags or []), *architecture.files[source.name]] if source.name in architecture.files else []
        subprocess.run([*common, *own, "-c", source, "-o", output], check=True)
        return output

    sources = [SOURCES / name for name in (*architecture.files, "portable.cpp", "entry.cpp")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, REPLAY]))
    subprocess.run([*common, *objects, "-o", folder / "replay"], check=True)
    return folder / "replay"


def replay(command: list[str | Path], folder: Path, calls: list[Call]) -> tuple[list[str], list[torch.Tensor]]:
    """The line that the program prints for each call, and its product [m, rows]."""
    write_calls(folder / "calls", calls)
    replayed = subprocess.run([*command, folder / "calls", folder / "results"], capture_output=True, text=True)
    assert (replayed.returncode, replayed.stderr) == (0, "")
    lines, results, products = replayed.stdout.splitlines(), (folder / "results").read_bytes(), []
    for _, (weight, _, x, _) in calls:
        size = len(x) * len(weight) * x.element_size()
        products.append(torch.frombuffer(bytearray(results[:size]), dtype=x.dtype).view(len(x), len(weight)))
        results = results[size:]
    assert not results and len(lines) == len(calls)
    return lines, products


def assert_right(calls: list[Call], lines: list[str], products: list[torch.Tensor]) -> None:
    """What was replayed are roundings of sums in float32, of weights packed as on this processor."""
    portable = registry.find("portable")
    for (call, arrays), line, y in zip(calls, lines, products, strict=True):
        kind = KINDS[call["kind"]]
        assert is_sum(y, kind, *arrays), (call, line)
        weight, scales, _, _ = arrays
        (packed,) = portable.pack(weight, None if scales is None else scales.float(), kind.endswith("dynamic"))
        assert line == f"{packed.numel()} 0 0 {digest(bytes_of(packed) + bytes_of(y))}", call


def make_call(isa: int, kind: str, weight, scales, x, bias) -> Call:
    """A call of native_replay.cpp; its weight, scales, activations and bias, of the dtypes that it takes."""
    span = scale_type = 0
    if scales is not None and scales.ndim == 2:
        span = groups.group_size(weight.shape[1], scales)
        scale_type = next(i for i, dtype in enumerate(SCALE_DTYPES) if torch.equal(scales.to(dtype).float(), scales))
        scales = scales.to(SCALE_DTYPES[scale_type])
    scale_bytes = 0 if scales is None else scales.nbytes
    numbers = (isa, KINDS.index(kind), DTYPES.index(x.dtype), *weight.shape, len(x), span, scale_type, scale_bytes)
    return dict(zip(FIELDS, (*numbers, bias is not None, -1, 0), strict=True)), [weight, scales, x, bias]


def random_call(rng: np.random.Generator, isa: int) -> Call:
    kind, dtype = KINDS[rng.integers(len(KINDS))], DTYPES[rng.integers(2)]
    rows, columns = int(rng.integers(1, 60)), int(rng.integers(1, 90))
    m = int(rng.choice([1, 2, 3, 7, 8, 9, 16, 17, 40, 513], p=[0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.08, 0.02]))
    weight, scales = make_weight(kind, rows, columns, float(rng.choice([0, 0.5, 1])), int(rng.integers(2**31)))
    x, bias = torch.from_numpy(rng.standard_normal((m, columns))), torch.from_numpy(rng.standard_normal(rows))
    return make_call(isa, kind, weight, scales, x.to(dtype), bias.to(dtype) if rng.integers(2) else None)


def write_calls(path: Path, calls: list[Call]) -> None:
    """The file that native_replay.cpp reads."""
    with open(path, "wb") as file:
        for call, arrays in calls:
            file.write(np.array(list(call.values()), np.int64).tobytes() + b"".join(map(bytes_of, arrays)))


def bytes_of(tensor: torch.Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def digest(content: bytes) -> str:
    """FNV-1a, as native_replay.cpp prints it."""
    value = 0xCBF29CE484222325
    for byte in content:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"
