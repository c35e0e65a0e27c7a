"""The CUDA kernels on a CPU: their source, compiled by g++ against an emulation of the hardware, called by ctypes."""

import ctypes
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from efx_plugin.kernels.cuda import gemm, variants, wgmma
from efx_plugin.kernels.cuda.variants import Launch, Variant

EMULATION = Path(__file__).parents[1] / "kernels" / "cuda" / "emulation.cpp"
COMPILE = ("g++", "-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
MOST_RANGES = 6  # tensors that a kernel takes
MARGIN = 1 << 17  # bytes beside a result that are watched
KINDS, WIDE = ("load128", "copy16", "store32", "load32"), ("128", "16")  # of accesses to shared memory; of 16 bytes
BANKS = 32


Packed = tuple[Tensor, Tensor, Tensor | None]  # `starts`, `records`, and the scales of an int8 weight


class Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p))


class Call(ctypes.Structure):
    """`Call` in emulation.cpp."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("grid", "block", "shared_bytes", "at_once", "descending")),
        *((name, ctypes.c_int) for name in ("is_watched", "ranges")),
        ("range", Range * MOST_RANGES),
    )


class Access(ctypes.Structure):
    """`Access` in emulation.cpp."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("kind", "block", "thread", "before", "index")),
        ("address", ctypes.c_uint32),
    )


class Fault(AssertionError):
    """What would be an error or undefined on a GPU."""


class EmulatedGpu:
    """The kernels of one variant. Reads outside of the arguments, or not aligned, are faults, as are writes outside of
    the result and threads that wait for ever.

    Attributes:
        at_once: asynchronous copies land at once, not as late as they may.
        descending: the lanes of a warp run in falling order, not in rising, and warps by turns.
        is_watched: accesses to shared memory are noted, for `worst_of_bank`.
    """

    def __init__(self, variant: Variant, folder: Path, source: str | None = None, optimize: str = "-O2") -> None:
        path = folder / f"{'_'.join(str(value) for _, value in variant.defines)}.cu"
        path.write_text(source or emulated_source(variant))
        defines = [f"-D{macro}={value}" for macro, value in variant.defines]
        defines += [f"-DEFX_{kind.upper()}={int(variant.file == f'{kind}.cu')}" for kind in ("gemm", "wgmma")]
        library = path.with_suffix(".so")
        command = [*COMPILE, optimize, *defines, f'-DEFX_SOURCE="{path}"', EMULATION, "-o", library]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))
        self._variant = variant
        self.at_once = self.descending = self.is_watched = False

    def decode(self, x: Tensor, packed: Packed, bias: Tensor | None, rows: int) -> Tensor:
        """x [tokens, columns] times the packed weight, plus `bias`: [tokens, rows]."""
        tokens, columns = x.shape
        how = variants.launch(self._variant, rows, columns)
        return self._call("emulate_decode", how, [x, *packed, bias], (tokens, rows), x.dtype, (tokens, rows, columns))

    def multiply_many(self, x: Tensor, packed: Packed, bias: Tensor | None, rows: int, splits: int) -> Tensor:
        """x [tokens, columns] times the packed weight, plus `bias`, by way of so many partial sums: [tokens, rows]."""
        tokens, columns = x.shape
        if self._variant.file == "wgmma.cu":
            plan = wgmma.planned(self._variant, tokens, rows, columns, splits)
            size = wgmma.image_bytes(self._variant, tokens, columns) // x.element_size()
            first = self._call("emulate_arrange", plan.arrange, [x], (1, size), x.dtype, (tokens, columns))
            product, how, bytes_of, added, how_added = "wgmma", plan.wgmma, wgmma.partial_bytes, "add", plan.add
        else:
            planned = gemm.planned(self._variant, tokens, rows, splits)
            first, product, how, bytes_of = x, "gemm", planned.gemm, gemm.partial_bytes
            added, how_added = "reduce", planned.reduce
        inputs, sizes = [first, *packed, bias], (tokens, rows, columns, splits)
        if how_added is None:
            return self._call(f"emulate_{product}", how, inputs, (tokens, rows), x.dtype, sizes)
        numbers = bytes_of(self._variant, tokens, rows, splits) // 4
        partial = self._call(f"emulate_{product}", how, inputs, (1, numbers), torch.float32, sizes)
        inputs, sizes = [partial, packed[2], bias], (tokens, rows, splits)
        return self._call(f"emulate_{added}", how_added, inputs, (tokens, rows), x.dtype, sizes)

    def worst_of_bank(self) -> dict[str, int]:
        """By kind of access to shared memory, how many different words of one bank are needed at a time, at most, in
        the last launch. 1 is free of conflicts.

        The hardware serves a warp at a time, and for accesses of 16 bytes a quarter of it.
        """
        count = ctypes.c_long()
        self._library.accesses.restype = ctypes.POINTER(Access)
        noted = self._library.accesses(ctypes.byref(count))[: count.value]
        words: dict[tuple[int, ...], set[int]] = defaultdict(set)  # that are needed of a bank at a time
        for one in noted:
            size, lanes = (4, 8) if KINDS[one.kind].endswith(WIDE) else (1, 32)
            for word in range(one.address // 4, one.address // 4 + size):
                words[one.kind, one.block, one.thread // lanes, one.before, one.index, word % BANKS].add(word)
        worst: dict[str, int] = {}
        for (kind, *_), needed in words.items():
            worst[KINDS[kind]] = max(worst.get(KINDS[kind], 0), len(needed))
        return worst

    def expand(self, packed: Packed, dtype: torch.dtype, panel: tuple[int, int, int]) -> Tensor:
        """The `panel` of the packed weight: from its first row on so many rows and columns."""
        _, rows, columns = panel
        how = variants.launch(replace(self._variant, tokens=0), rows, columns)
        return self._call("emulate_expand", how, [*packed], (rows, columns), dtype, panel)

    def launch(self, symbol: str, how: Launch, arguments: Sequence[Tensor | int | None]) -> None:
        """Launch a kernel on its arguments as they are.

        Raises:
            Fault: on a GPU it would be an error or undefined.
        """
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        ranges = [Range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
        call = Call(*how, self.at_once, self.descending, self.is_watched)
        call.ranges, call.range = len(ranges), (Range * MOST_RANGES)(*ranges)
        values = [ctypes.c_int(one) if isinstance(one, int) else _pointer(one) for one in arguments]
        faults = getattr(self._library, symbol.replace("efx", "emulate"))(ctypes.byref(call), *values)
        if faults:
            raise Fault(f"{faults} faults")

    def _call(
        self,
        name: str,
        how: Launch,
        inputs: list[Tensor | None],
        shape: tuple[int, int],
        dtype: torch.dtype,
        sizes: tuple[int, ...],
    ) -> Tensor:
        copies = [
            tensor if tensor is None else _allocate(tensor.shape, tensor.dtype)[0].copy_(tensor) for tensor in inputs
        ]
        ranges = [Range(copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies if copy is not None]
        call = Call(*how, self.at_once, self.descending, self.is_watched, len(ranges))
        call.range = (Range * MOST_RANGES)(*ranges)
        result, memory = _allocate(shape, dtype)
        pointers = map(_pointer, (*copies, result))
        faults = getattr(self._library, name)(ctypes.byref(call), *pointers, *map(ctypes.c_int, sizes))
        begin = result.data_ptr() - memory.data_ptr()
        outside = torch.cat((memory[:begin], memory[begin + result.nbytes :]))
        if faults or not torch.all(outside == 0xFF):
            raise Fault(f"{faults} faults, {(outside != 0xFF).sum()} bytes written outside of the result")
        return result


def emulated_source(variant: Variant) -> str:
    """Of a variant, all but ptx.cuh and what `headers` names, which the emulation replaces."""
    return variants.source(*variant.files[1 + len(variant.headers) :])


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor at a multiple of 16 bytes, and the memory that it is a part of; all bits are set, which is no number."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.full((size + 3 * MARGIN,), 0xFF, dtype=torch.uint8)
    begin = MARGIN + -memory.data_ptr() % 16
    return memory[begin : begin + size].view(dtype).view(shape), memory
