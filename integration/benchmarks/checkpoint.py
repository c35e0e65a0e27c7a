"""`make bench-checkpoint`: how fast weights are packed and unpacked, next to a memory copy and to the old compressors.

Everything runs on one thread, on weights several times larger than the caches, interleaved: first the codec alone, then
beside compressed-tensors 0.13.0, in a process of its own that waits for its turn, and files. GB/s are bytes of the
dense weight per second; figures are medians of the rounds, ratios medians of the ratios within each round.

Packing and unpacking are timed as a checkpoint calls them: into new memory, and with all the validation. The memory
copy that they are compared with goes into memory that has been used before. The same copy into new memory, which the
kernel has to clear first, shows how much of their time that takes.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from safetensors.torch import load_file, save_file

from efx_plugin.checkpoint import decompress, find_format
from efx_plugin.checkpoint.codec import bits, native
from integration.benchmarks.timing import OUTPUT, Timed, interleave, process, ratio, timed, write_json
from integration.old_releases import install

ROUNDS = 31
ROUNDS_BESIDE_OTHERS = 5  # the old compressor needs seconds for each
NBYTES = 2**27  # of each dense weight
COLUMNS = 8192
OLD = "0.13.0"
OLD_NAME = f"compressed-tensors {OLD}"

# Does what a line on stdin says, "pack" or "unpack", and answers with the seconds that it took.
OLD_COMPRESSOR = """
import sys, time
import compressed_tensors, torch
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
from safetensors.torch import load_file

torch.set_num_threads(1)
assert compressed_tensors.__version__ == sys.argv[2]
weight = load_file(sys.argv[1])["weight"].clone()
packed = BitmaskTensor.from_dense(weight)
assert torch.equal(packed.decompress(), weight)
print("ready", flush=True)
for line in sys.stdin:
    begin = time.perf_counter()
    if line == "pack\\n":
        BitmaskTensor.from_dense(weight)
    else:
        packed.decompress()
    print(time.perf_counter() - begin, flush=True)
"""


def make_weights() -> dict[tuple[str, torch.dtype], torch.Tensor]:
    """Half of every weight is zero: (name of the format, dtype) -> weight [rows, 8192]."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, dtype in [
        ("sparse-bitmask", torch.bfloat16),
        ("sparse-24-bitmask", torch.bfloat16),
        ("sparse-bitmask", torch.float32),
        ("sparse-bitmask", torch.float8_e4m3fn),
    ]:
        shape = (NBYTES // dtype.itemsize // COLUMNS, COLUMNS)
        weight = torch.randn(shape, generator=generator).to(dtype)
        order = torch.rand(shape, generator=generator)
        zeros = order < 0.5
        if name == "sparse-24-bitmask":
            zeros = order.view(-1, 4).argsort(-1).argsort(-1).view(shape) < 2
        # 0.0 also for what rounds to -0.0, so that unpacking gives every bit back.
        weight.view(bits.BITS[dtype].integer)[zeros | (weight.float() == 0)] = 0
        weights[name, dtype] = weight
    return weights


def codec_and_copy(weight: torch.Tensor, format_name: str) -> Timed:
    """What is timed for every weight."""
    source = weight.view(torch.uint8).numpy()
    target = source.copy()
    parts = find_format(format_name).compress(weight)
    restored = decompress(format_name, parts, where="benchmark")
    assert torch.equal(restored.view(torch.uint8), weight.view(torch.uint8))
    return {
        "memory copy": timed(lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, source.nbytes)),
        "memory copy into new memory": timed(source.copy),
        "pack": timed(lambda: find_format(format_name).compress(weight)),
        "unpack": timed(lambda: decompress(format_name, parts, where="benchmark")),
    }


def files(weight: torch.Tensor) -> Timed:
    """Through files, as a model is saved and loaded: dense, and packed."""
    dense, sparse = OUTPUT / "dense.safetensors", OUTPUT / "sparse.safetensors"
    parameter = weight.clone()
    return {
        "safetensors save": timed(lambda: save_file({"weight": weight}, dense)),
        "pack and safetensors save": timed(lambda: save_file(find_format("sparse-bitmask").compress(weight), sparse)),
        # The file is only mapped; it is read when the model copies it.
        "safetensors load": timed(lambda: parameter.copy_(load_file(dense)["weight"])),
        "safetensors load and unpack": timed(
            lambda: parameter.copy_(decompress("sparse-bitmask", load_file(sparse), where="benchmark"))
        ),
    }


@contextmanager
def old_compressor(weight: torch.Tensor) -> Iterator[Timed]:
    """compressed-tensors 0.13.0 in a process of its own."""
    path = OUTPUT / "weight.safetensors"
    save_file({"weight": weight}, path)
    environment = os.environ | {"PYTHONPATH": str(install(OLD))}
    command = [sys.executable, "-c", OLD_COMPRESSOR, str(path), OLD]
    with process(OLD_NAME, command, environment) as (ask, _):
        yield {f"{OLD_NAME} {what}": lambda what=what: float(ask(what)) for what in ("pack", "unpack")}


def print_speeds(title: str, seconds: dict[str, list[float]]) -> None:
    """Median, least and most GB/s, and the ratio to the memory copy of the same rounds."""
    print(f"\n{title}")
    for name, figures in seconds.items():
        least, most = NBYTES / max(figures) / 1e9, NBYTES / min(figures) / 1e9
        print(
            f"  {name:32} {NBYTES / median(figures) / 1e9:6.2f} GB/s  ({least:5.2f} to {most:5.2f})"
            f"  {ratio(figures, seconds['memory copy']):5.2f} of a memory copy"
        )


def main() -> None:
    torch.set_num_threads(1)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    codec = "numpy" if native.library() is None else native.library().efx_instruction_set().decode()
    print(f"One thread, {NBYTES >> 20} MiB per weight, half zeros, {ROUNDS} rounds, codec: {codec}")
    weights = make_weights()
    ratios = {}
    for (name, dtype), weight in weights.items():
        seconds = interleave(codec_and_copy(weight, name), ROUNDS)
        print_speeds(f"{name}, {str(dtype).removeprefix('torch.')}", seconds)
        ratios[name, dtype] = {what: ratio(seconds[what], seconds["memory copy"]) for what in ("pack", "unpack")}

    headline = "sparse-bitmask", torch.bfloat16
    weight = weights[headline]
    with old_compressor(weight) as old:
        seconds = interleave(codec_and_copy(weight, headline[0]) | old | files(weight), ROUNDS_BESIDE_OTHERS)
    for file in OUTPUT.glob("*.safetensors"):
        file.unlink()
    print_speeds("sparse-bitmask, bfloat16, beside others", seconds)
    report = {
        "pack_ratio": ratios[headline]["pack"],
        "unpack_ratio": ratios[headline]["unpack"],
        # The smaller of the two speed-ups.
        "vs_compressed_tensors": min(
            ratio(seconds[what], seconds[f"{OLD_NAME} {what}"]) for what in ("pack", "unpack")
        ),
        "bytes_ratio": sum(part.nbytes for part in find_format(headline[0]).compress(weight).values()) / weight.nbytes,
    }
    print("\n" + "\n".join(f"{name:24} {figure:.3f}" for name, figure in report.items()))
    write_json(OUTPUT / "checkpoint.json", report)


if __name__ == "__main__":
    main()
