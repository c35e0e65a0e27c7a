"""The kernels compiled from the C++ files beside this one, one per instruction set; layout.hpp says what they pack.

A call releases the GIL. A packed weight is one uint8 tensor, the same for all instruction sets, and read-only: several
threads may use it at once.
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efx_plugin.kernels.groups import group_size

_PROBLEMS = {  # `Status` in layout.hpp
    -1: "the sizes of activations, weight, bias and packed buffer disagree",
    -2: "there is no such kind of weight, or type of activations",
    -3: "this processor lacks the instructions",
    -4: "there is not enough memory",
}
_KINDS = {"bf16": 0, "int8": 1, "int8_dynamic": 2, "int4": 3, "int4_dynamic": 4}
_TYPES = {torch.bfloat16: 0, torch.float32: 1}
_SCALE_TYPES = (torch.bfloat16, torch.float16)  # of int4, by number
_ORDER = [0, 2, 1, 3]  # of a row's columns in a group of int4
_BLOCK = 16  # rows that share a group: `kBlock` in layout.hpp
_HEADER = 15  # numbers in `Header`

MOST_INT8_COLUMNS = 65_536

SUMMARIES = {
    "amx": "non-zeros expanded in registers, tiles multiplied by AMX",
    "avx512_bf16": "non-zeros expanded in registers, AVX-512 dot products",
    "avx512_vnni": "non-zeros expanded in registers, AVX-512 without bfloat16 instructions, dot products of int8",
    "avx512": "non-zeros expanded in registers, AVX-512 without bfloat16 instructions",
    "avx2": "non-zeros expanded in registers, AVX2: less memory, about the speed of dense",
    "neon_bf16": "non-zeros expanded in registers, NEON with dot products: less memory, speed not measured",
    "neon": "non-zeros expanded in registers, NEON: less memory, speed not measured",
    "portable": "plain C++: less memory, slower than dense",
}


@cache
def library() -> ModuleType | None:
    """The compiled module, or None if the package was installed without a C++ compiler.

    It is imported after torch, whose OpenMP runtime, and so its threads, it shares.
    """
    try:
        return import_module("efx_plugin.kernels.native._linear")
    except ModuleNotFoundError:
        return None


class NativeKernel:
    """One instruction set.

    Args:
        name: one of `SUMMARIES`.
        library: the compiled module; None if there is none, which is an obstacle for every weight.
        index: the module's number of the instruction set.
    """

    device = "cpu"

    def __init__(self, name: str, library: ModuleType | None, index: int) -> None:
        self.name = name
        self.summary = SUMMARIES[name]
        self.library: Any = library
        self.index = index
        self.is_supported = library is not None and bool(library.efx_isa_supported(index))
        self._linear: Any = None if library is None else library.efx_linear

    def obstacle(self, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> str | None:
        """Why the weight [out, in] cannot be packed: its dtypes or values, or what this machine lacks."""
        if self.library is None:
            return (
                "efx-plugin was installed without a C++ compiler: install g++ and run "
                "`pip install --force-reinstall --no-deps efx-plugin`"
            )
        if weight.numel() == 0:
            return "the weight is empty"
        if dtype not in _TYPES:
            return f"the sparse kernels take bfloat16 and float32 activations, not {str(dtype).removeprefix('torch.')}"
        if weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float()):
            return "the weights are float32 values that bfloat16 cannot hold"
        if weight.dtype == torch.int8 and weight.shape[1] > MOST_INT8_COLUMNS:
            return f"a row has more than {MOST_INT8_COLUMNS} int8 weights, whose products may overflow their sum"
        if scales is not None and scales.ndim == 2 and _scale_type(scales) is None:
            return "the scales of groups are float32 values that neither bfloat16 nor float16 can hold"
        return None if self.is_supported else f"this processor lacks what {self.name} needs"

    def pack(self, weight: Tensor, scales: Tensor | None, quantize_activations: bool) -> tuple[Tensor]:
        """Pack a weight [out, in] on the CPU, bfloat16 values or int8 with `scales` float32 [out] or [out, groups]: one
        uint8 tensor.
        """
        kind, span, scale_type = "bf16", 0, 0
        if scales is None:
            weight = weight.bfloat16()
        elif scales.ndim == 1:
            kind = "int8"
        else:
            kind, span = "int4", group_size(weight.shape[1], scales)
            found = _scale_type(scales)
            assert found is not None, "the kernel's obstacle was not asked for"
            scale_type, scales = found, scales.to(_SCALE_TYPES[found])
        if quantize_activations:
            kind += "_dynamic"
        weight = weight.contiguous()
        scales = None if scales is None else scales.contiguous()
        pointer = None if scales is None else scales.data_ptr()
        threads = torch.get_num_threads()
        shape = (self.index, _KINDS[kind], weight.data_ptr(), *weight.shape, span)
        buffer = torch.empty(_succeed(self.library.efx_packed_size(*shape, threads)), dtype=torch.uint8)
        _succeed(self.library.efx_pack(*shape, scale_type, pointer, buffer.data_ptr(), buffer.numel(), threads))
        return (buffer,)

    def linear(self, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x [..., in], bfloat16 or float32, times the packed weight, plus `bias` [out] of x's dtype if given."""
        buffer = packed[0]
        if not x.is_contiguous():
            x = x.contiguous()
        *leading, columns = x.shape
        m = leading[0] if len(leading) == 1 else math.prod(leading)
        if bias is not None and (bias.dtype is not x.dtype or bias.numel() != out_features):
            raise ValueError(_PROBLEMS[-1])
        y = x.new_empty((*leading, out_features))
        bias_address = None
        if bias is not None:
            bias = bias.contiguous()
            bias_address = bias.data_ptr()
        status = self._linear(
            self.index,
            buffer.data_ptr(),
            buffer.numel(),
            x.data_ptr(),
            _TYPES[x.dtype],
            m,
            columns,
            bias_address,
            y.data_ptr(),
            out_features,
            torch.get_num_threads(),
        )
        if status:
            _succeed(status)
        return y

    def unpack(self, packed: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in], bfloat16 or int8, and the scales of int8, float32 [out] or [out, groups]."""
        (buffer,) = packed
        header = buffer[: 8 * _HEADER].view(torch.int64).tolist()
        _, kind, rows, columns, span, scale_type, blocks, groups, count, scales_at, _, _, masks_at, values_at, _ = (
            header
        )
        dtype, width = (torch.bfloat16, 2) if kind == _KINDS["bf16"] else (torch.int8, 4)
        is_int4 = kind in (_KINDS["int4"], _KINDS["int4_dynamic"])
        masks = buffer[masks_at : masks_at + blocks * groups * _BLOCK * width // 8]
        kept = (masks[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()
        values = buffer[values_at : values_at + count * dtype.itemsize]
        values = _nibbles(values, kept.view(blocks * groups, -1).sum(1)) if is_int4 else values.view(dtype)
        dense = torch.zeros(kept.shape, dtype=dtype).masked_scatter_(kept, values)
        dense = dense.view(blocks, groups, _BLOCK, width).transpose(1, 2)
        if is_int4:
            dense = dense[..., _ORDER]
        weight = dense.reshape(blocks * _BLOCK, groups * width)[:rows, :columns].contiguous()
        if dtype == torch.bfloat16:
            return weight, None
        if not is_int4:
            return weight, buffer[scales_at : scales_at + 4 * rows].view(torch.float32).clone()
        spans = -(-columns // span)
        scales = buffer[scales_at : scales_at + 2 * blocks * spans * _BLOCK].view(_SCALE_TYPES[scale_type])
        scales = scales.view(blocks, spans, _BLOCK).transpose(1, 2).reshape(blocks * _BLOCK, spans)
        return weight, scales[:rows].float()


def kernels() -> tuple[NativeKernel, ...]:
    """The instruction sets that the library was built with, best first; all of `SUMMARIES` if it was not built."""
    compiled = library()
    if compiled is None:
        return tuple(NativeKernel(name, None, index) for index, name in enumerate(SUMMARIES))
    built: list[NativeKernel] = []
    while name := compiled.efx_isa_name(len(built)):
        built.append(NativeKernel(name, compiled, len(built)))
    return tuple(built)


KERNELS = kernels()


def _scale_type(scales: Tensor) -> int | None:
    """The number of the first type of 16 bits that holds the scales; None if there is none."""
    holds = (torch.equal(scales, scales.to(dtype).float()) for dtype in _SCALE_TYPES)
    return next((number for number, is_exact in enumerate(holds) if is_exact), None)


def _nibbles(values: Tensor, counts: Tensor) -> Tensor:
    """The int8 in groups of `counts` nibbles, each group in whole bytes."""
    nibbles = torch.stack([values & 15, values >> 4], 1).flatten()
    is_value = torch.ones(len(nibbles), dtype=torch.bool)
    ends = 2 * ((counts + 1) // 2).cumsum(0)
    is_value[ends[counts % 2 == 1] - 1] = False
    return (nibbles[is_value].to(torch.int8) ^ 8) - 8


def _succeed(result: int) -> int:
    if result == -4:
        raise MemoryError(_PROBLEMS[result])
    if result < 0:
        raise ValueError(f"{_PROBLEMS[result]} (sparse kernel, {result})")
    return result
