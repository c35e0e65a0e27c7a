"""The codec compiled from the C++ files beside this one, over the same arrays as `numpy_codec`.

It is called through ctypes, which releases the GIL: threads pack and unpack in parallel. The library uses AVX512-VBMI2
where the processor has it. Every buffer is passed with its size and checked against it, whatever the bytes in it say.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

_PROBLEMS = {  # `Status` in bits.hpp
    -1: "the sizes of the arrays disagree",
    -2: "there are no integers of that width",
    -3: "there are more bits in the mask than values",
    -4: "there are more values than bits in the mask",
    -5: "a bit is set beyond the last column",
}
_NOT_24 = -6

_HUGE_PAGE = 1 << 21  # bytes, on x86-64 and most of aarch64
_LARGE = 1 << 25  # bytes; what is smaller the C library takes from memory that it has used before

_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p
_ARRAY = [_POINTER, _SIZE]
_ARGUMENTS = {
    "efx_pack": [_SIZE, *_ARRAY, _SIZE, _SIZE, ctypes.c_uint32, _SIZE, *_ARRAY, *_ARRAY, *_ARRAY],
    "efx_unpack": [_SIZE, *_ARRAY, *_ARRAY, _SIZE, _SIZE, *_ARRAY],
    "efx_count": [*_ARRAY, _SIZE, _SIZE, *_ARRAY],
    "efx_fours": [*_ARRAY, _SIZE, _SIZE],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None if the package was installed without a C++ compiler."""
    paths = (Path(__file__).with_name(f"_bits{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else declare(ctypes.CDLL(str(path)))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the library's functions."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _SIZE
    library.efx_instruction_set.restype = ctypes.c_char_p
    return library


def nonzero_mask(values: np.ndarray, magnitude: int) -> np.ndarray:
    """See `numpy_codec.nonzero_mask`."""
    mask, counts = _new_mask(values)
    _pack(values, magnitude, False, mask, counts, None)
    return mask


def pack(values: np.ndarray, magnitude: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See `numpy_codec.pack`."""
    mask, counts = _new_mask(values)
    # How many values there are is known only afterwards. Pages that are not written to take no memory, and shrinking
    # hands them back without copying.
    packed = np.empty(values.size, values.dtype)
    packed.resize(_pack(values, magnitude, False, mask, counts, packed), refcheck=False)
    return mask, counts, packed


def pack_24(values: np.ndarray, magnitude: int) -> tuple[np.ndarray, np.ndarray] | None:
    """See `numpy_codec.pack_24`."""
    if values.shape[1] % 4:
        return None
    mask, counts = _new_mask(values)
    packed = np.empty(values.size // 2, values.dtype)
    if _pack(values, magnitude, True, mask, counts, packed) == _NOT_24:
        return None
    return mask, packed


def unpack(packed: np.ndarray, mask: np.ndarray, columns: int) -> np.ndarray:
    """See `numpy_codec.unpack`.

    Raises:
        ValueError: the mask has not as many bits as there are values, or bits beyond the last column.
    """
    packed, mask = _plain(packed), _plain(mask)
    values = _new_weight(len(mask), columns, packed.dtype)
    _succeed(_call("efx_unpack", packed.itemsize, *_array(packed), *_array(mask), len(mask), columns, *_array(values)))
    return values


def row_counts(mask: np.ndarray) -> np.ndarray:
    """See `numpy_codec.row_counts`."""
    mask = _plain(mask)
    counts = np.empty(len(mask), np.int64)
    _succeed(_call("efx_count", *_array(mask), len(mask), 8 * mask.shape[1], *_array(counts)))
    return counts


def fours(mask: np.ndarray, columns: int) -> int:
    """See `numpy_codec.fours`."""
    mask = _plain(mask)
    return _succeed(_call("efx_fours", *_array(mask), len(mask), columns))


def _pack(
    values: np.ndarray,
    magnitude: int,
    is_24: bool,
    mask: np.ndarray,
    counts: np.ndarray,
    packed: np.ndarray | None,
) -> int:
    values = _plain(values)
    result = _call(
        "efx_pack",
        values.itemsize,
        *_array(values),
        *values.shape,
        magnitude,
        is_24,
        *_array(mask),
        *_array(counts),
        *((None, 0) if packed is None else _array(packed)),
    )
    return result if result == _NOT_24 else _succeed(result)


def _call(function: str, *arguments: int | None) -> int:
    """A function of the compiled library, which `library` has found."""
    result: int = getattr(library(), function)(*arguments)
    return result


def _new_mask(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = values.shape
    return np.empty((rows, (columns + 7) // 8), np.uint8), np.empty(rows, np.int64)


def _new_weight(rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """Memory for a weight, which begins at the boundary of a huge page if it is large.

    Most of the time to expand a large weight is the kernel's, which clears the pages: huge ones take it least. numpy
    asks for huge pages, and gets them between two of their boundaries only.
    """
    nbytes = rows * columns * dtype.itemsize
    if nbytes < _LARGE:
        return np.empty((rows, columns), dtype)
    memory = np.empty(nbytes + _HUGE_PAGE, np.uint8)
    begin = -memory.ctypes.data % _HUGE_PAGE
    return memory[begin : begin + nbytes].view(dtype).reshape(rows, columns)


def _plain(array: np.ndarray) -> np.ndarray:
    """The array itself unless it is strided or misaligned."""
    return np.require(array, requirements=("C", "A"))


def _array(array: np.ndarray) -> tuple[int, int]:
    return array.ctypes.data, array.size


def _succeed(result: int) -> int:
    if result < 0:
        raise ValueError(f"{_PROBLEMS[result]} (native codec, {result})")
    return result
