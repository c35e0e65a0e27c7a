"""The kernels compiled from the C++ files beside this one, one per instruction set; layout.hpp says what they pack.

They are called through ctypes, which releases the GIL. A packed weight is one uint8 tensor, the same for all
instruction sets, and read-only: several threads may use it at once.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

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

_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS = {
    "efx_isa_name": (ctypes.c_char_p, [_SIZE]),
    "efx_isa_supported": (_SIZE, [_SIZE]),
    "efx_packed_size": (_SIZE, [_SIZE, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE]),
    "efx_pack": (_SIZE, [_SIZE, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE]),
    "efx_linear": (
        _SIZE,
        [_SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE],
    ),
}

SUMMARIES = {
    "avx512_bf16": "non-zeros expanded in registers, AVX-512 dot products",
    "avx512": "non-zeros expanded in registers, AVX-512 without bfloat16 instructions",
    "avx2": "non-zeros expanded in registers, AVX2: less memory, about the speed of dense",
    "portable": "plain C++: less memory, slower than dense",
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None if the package was installed without a C++ compiler.

    It is loaded after torch, whose OpenMP runtime, and so its threads, it shares.
    """
    paths = (Path(__file__).with_name(f"_linear{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else declare(ctypes.CDLL(str(path)))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the library's functions."""
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class NativeKernel:
    """One instruction set.

    Args:
        library: the compiled library.
        index: the library's number of the instruction set.
    """

    def __init__(self, library: ctypes.CDLL, index: int) -> None:
        self.library = library
        self.index = index
        self.name: str = library.efx_isa_name(index).decode()
        self.is_supported = bool(library.efx_isa_supported(index))
        self.summary = SUMMARIES[self.name]
        self._linear = library.efx_linear

    def pack(self, weight: Tensor, scales: Tensor | None, quantize_activations: bool) -> tuple[Tensor]:
        """Pack a weight [out, in] on the CPU, bfloat16 or int8 with `scales` float32 [out]: one uint8 tensor."""
        kind = _KINDS["bf16" if scales is None else "int8_dynamic" if quantize_activations else "int8"]
        weight = weight.contiguous()
        threads = torch.get_num_threads()
        shape = (self.index, kind, weight.data_ptr(), *weight.shape)
        buffer = torch.empty(_succeed(self.library.efx_packed_size(*shape, threads)), dtype=torch.uint8)
        scales = None if scales is None else scales.contiguous()
        pointer = None if scales is None else scales.data_ptr()
        _succeed(self.library.efx_pack(*shape, pointer, buffer.data_ptr(), buffer.numel(), threads))
        return (buffer,)

    def linear(self, x: Tensor, packed: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x [..., in], bfloat16 or float32, times the packed weight, plus `bias` [out] of x's dtype if given."""
        (buffer,) = packed
        if not x.is_contiguous():
            x = x.contiguous()
        shape, dtype = x.shape, x.dtype
        columns = shape[-1]
        y = torch.empty((*shape[:-1], out_features), dtype=dtype)
        pointer = None
        if bias is not None:
            if bias.dtype is not dtype or bias.numel() != out_features:
                raise ValueError(_PROBLEMS[-1])
            pointer = bias.contiguous().data_ptr()
        status = self._linear(
            self.index,
            buffer.data_ptr(),
            buffer.numel(),
            x.data_ptr(),
            _TYPES[dtype],
            y.numel() // out_features,
            columns,
            pointer,
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
