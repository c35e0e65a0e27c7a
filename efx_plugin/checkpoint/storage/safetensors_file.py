"""safetensors files and their index, read without trusting them and written without copying.

A file is 8 bytes (little endian: length of the header), the header (JSON: name -> dtype, shape, first byte and end),
and the tensors. Source: https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from efx_plugin.errors import SparseCheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**48


class StoredTensor(NamedTuple):
    """A tensor in a file: `nbytes` bytes from byte `begin` of `file` (a name inside the directory)."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_index(directory: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name, from the headers alone: no tensor is read.

    The directory holds `model.safetensors`, or shards listed in `model.safetensors.index.json`.

    Raises:
        SparseCheckpointError: a file is missing, truncated or has a header that contradicts itself or the bytes that
            are there; the index and the shards disagree, name a file outside the directory, or hold a tensor twice.
    """
    directory = Path(directory)
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise SparseCheckpointError(f"{directory} holds both {SINGLE_FILE} and {INDEX_FILE}: remove the one left over")
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise SparseCheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}: is it a checkpoint?")
    listed = _read_weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(listed.values())):
        for name, tensor in read_header(directory / file).items():
            if name in tensors:
                raise SparseCheckpointError(
                    f"{file}: {name} is also stored in {tensors[name].file}: only one can be right"
                )
            if listed.get(name) != file:
                raise SparseCheckpointError(
                    f"{file}: {name} is not where {INDEX_FILE} lists it: export the checkpoint again"
                )
            tensors[name] = tensor
    for name, file in listed.items():
        if name not in tensors:
            raise SparseCheckpointError(
                f"{file}: {name} is listed in {INDEX_FILE} but missing: download the file again"
            )
    return tensors


def on_meta(index: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """Tensors of the stored dtypes and shapes on the meta device, which hold no values."""
    return {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in index.items()}


def read_tensor(directory: str | os.PathLike[str], stored: StoredTensor) -> torch.Tensor:
    """Read one tensor into memory of its own, on the CPU.

    Raises:
        SparseCheckpointError: the file ends before the tensor does.
    """
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")  # whatever the default device is
    try:
        with open(Path(directory) / stored.file, "rb") as file:
            file.seek(stored.begin)
            read = file.readinto(_raw(tensor).data)
    except OSError as error:
        raise SparseCheckpointError(f"{stored.file} cannot be read: {error.strerror}") from error
    if read != stored.nbytes:
        raise SparseCheckpointError(f"{stored.file} ends early: it has been truncated since it was opened")
    return tensor


def write_file(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    written: Callable[[int], object],
) -> str:
    """Write one file whose tensors arrive one by one, in the order of the layout, so that none is kept.

    Args:
        path: the new file.
        layout: name -> (dtype, shape) of every tensor.
        tensors: name and contiguous CPU tensor.
        written: called with the number of bytes of each tensor once it is written.

    Returns:
        The SHA-256 of the file, hexadecimal.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors begin at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)

        write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, (dtype, shape)), (given, tensor) in zip(layout.items(), tensors, strict=True):
            if (given, tensor.dtype, tuple(tensor.shape)) != (name, dtype, tuple(shape)):
                raise RuntimeError(
                    f"{given} {tensor.dtype} {list(tensor.shape)} came where {name} {dtype} {shape} was due"
                )
            write(_raw(tensor.contiguous()))
            written(tensor.nbytes)
    return digest.hexdigest()


def nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)


def is_storable(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for the dtype."""
    return dtype in _NAMES


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object in which no key occurs twice.

    Raises:
        SparseCheckpointError: it is something else.
    """
    try:
        parsed = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise SparseCheckpointError(f"{path.name} is not the JSON it should hold: {error}") from error
    if not isinstance(parsed, dict):
        raise SparseCheckpointError(f"{path.name} does not hold a JSON object")
    return parsed


def _raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} occurs twice")
    for key in keys:  # errors quote names, and a hostile one must not forge lines of its own
        if not key.isprintable():
            raise ValueError(f"{key!r} is no printable name")
    return keys


def _read_weight_map(index: Path) -> dict[str, str]:
    listed = parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise SparseCheckpointError(f"{index.name} has no weight_map")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise SparseCheckpointError(f"{index.name} lists {name} in {file!r}, which is no file of this directory")
        if not (index.parent / file).is_file():
            raise SparseCheckpointError(f"{file}, which {index.name} lists for {name}, is missing: download it again")
    return listed


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name, from its header alone.

    Raises:
        SparseCheckpointError: it is truncated, or its header contradicts itself or the bytes that are there.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise SparseCheckpointError(
                f"{path.name} declares a header of {length:,} bytes in a file of {size:,}: "
                "it is truncated or no safetensors file"
            )
        header = parse_json(path, file.read(length))
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _read_entry(path.name, name, entry, data, size) for name, entry in header.items()}
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != end:
            raise SparseCheckpointError(
                f"{path.name}: {name} does not begin where the tensor before it ends: the header is corrupt"
            )
        end += tensor.nbytes
    if end != size:
        raise SparseCheckpointError(
            f"{path.name} has {size:,} bytes, but its tensors end at byte {end:,}: download it again"
        )
    return tensors


def _read_entry(file: str, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    """One entry of a header. Shapes and offsets may be of any size: Python's integers do not overflow."""

    def wrong(problem: str) -> SparseCheckpointError:
        return SparseCheckpointError(f"{file}: {name} {problem}: the header is corrupt, download the file again")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("is not described by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise wrong(f"has the dtype {entry['dtype']!r}, which is not supported")
    if not _are_sizes(entry["shape"]) or len(entry["shape"]) > _MAX_DIMENSIONS:
        raise wrong("has a shape that is none")
    # Of a tensor without elements no byte count limits the other dimensions, and torch overflows.
    if math.prod(extent or 1 for extent in entry["shape"]) > _MAX_ELEMENTS:
        raise wrong(f"has the shape {entry['shape']}, larger than any file")
    if not _are_sizes(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise wrong("has data_offsets that are none")
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not begin <= end <= size - data:
        raise wrong(f"lies at bytes {begin:,} to {end:,} of {size - data:,}")
    if nbytes(dtype, shape) != end - begin:
        raise wrong(f"has a shape that takes {nbytes(dtype, shape):,} bytes, but {end - begin:,} are stored")
    return StoredTensor(file, dtype, shape, data + begin, end - begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
