"""The kernels compiled from the C++ files beside this one, one per instruction set; layout.hpp says what they pack.

A call releases the GIL. A packed weight is one uint8 tensor, the same for all instruction sets, and read-only: several
threads may use it at once.
"""

import math
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

_PROBLEMS = {  # `Status` in layout.hpp
    -1: "the sizes of activations, weight, bias and packed buffer disagree",
    -2: "there is no such kind of weight, or type of activations",
    -3: "this processor lacks the instructions",
    -4: "there is not enough memory",
}
_KINDS = {"bf16": 0, "int8": 1, "int8_dynamic": 2}
_TYPES = {torch.bfloat16: 0, torch.float32: 1}

SUMMARIES = {
    "avx512_bf16": "non-zeros expanded in registers, AVX-512 dot products",
    "avx512": "non-zeros expanded in registers, AVX-512 without bfloat16 instructions",
    "avx2": "non-zeros expanded in registers, AVX2: less memory, about the speed of dense",
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
        library: the compiled module.
        index: the module's number of the instruction set.
    """

    def __init__(self, library: ModuleType, index: int) -> None:
        self.library = library
        self.index = index
        self.name: str = library.efx_isa_name(index)
        self.is_supported = bool(library.efx_isa_supported(index))
        self.summary = SUMMARIES[self.name]
        self._linear = library.efx_linear

    def pack(self, weight: Tensor, scales: Tensor | None, quantize_activations: bool) -> tuple[Tensor]:
        """Pack a weight [out, in] on the CPU, bfloat16 values or int8 with `scales` float32 [out]: one uint8 tensor."""
        kind = _KINDS["bf16" if scales is None else "int8_dynamic" if quantize_activations else "int8"]
        weight = (weight.bfloat16() if scales is None else weight).contiguous()
        threads = torch.get_num_threads()
        shape = (self.index, kind, weight.data_ptr(), *weight.shape)
        buffer = torch.empty(_succeed(self.library.efx_packed_size(*shape, threads)), dtype=torch.uint8)
        scales = None if scales is None else scales.contiguous()
        pointer = None if scales is None else scales.data_ptr()
        _succeed(self.library.efx_pack(*shape, pointer, buffer.data_ptr(), buffer.numel(), threads))
        return (buffer,)

    def linear(self, x: Tensor, packed: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x [..., in], bfloat16 or float32, times the packed weight, plus `bias` [out] of x's dtype if given."""
        buffer = packed[0]
        if not x.is_contiguous():
            x = x.contiguous()
        *leading, columns = x.shape
        y = x.new_empty((*leading, out_features))
        bias_address = None
        if bias is not None:
            if bias.dtype is not x.dtype or bias.numel() != out_features:
                raise ValueError(_PROBLEMS[-1])
            bias = bias.contiguous()
            bias_address = bias.data_ptr()
        status = self._linear(
            self.index,
            buffer.data_ptr(),
            buffer.numel(),
            x.data_ptr(),
            _TYPES[x.dtype],
            leading[0] if len(leading) == 1 else math.prod(leading),
            columns,
            bias_address,
            y.data_ptr(),
            out_features,
            torch.get_num_threads(),
        )
        if status:
            _succeed(status)
        return y


@cache
def kernels() -> dict[str, NativeKernel]:
    """The instruction sets that the library was built with, by name, best first; none if it was not built."""
    found = []
    while library() is not None and library().efx_isa_name(len(found)):
        found.append(NativeKernel(library(), len(found)))
    return {kernel.name: kernel for kernel in found}


def _succeed(result: int) -> int:
    if result == -4:
        raise MemoryError(_PROBLEMS[result])
    if result < 0:
        raise ValueError(f"{_PROBLEMS[result]} (sparse kernel, {result})")
    return result
