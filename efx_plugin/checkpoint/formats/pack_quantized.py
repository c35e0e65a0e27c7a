"""`pack-quantized` of compressed-tensors: as many integers of a row in each int32 as it has room for.

    weight_packed  int32 [rows, ceil(columns / n)]  n = 32 // bits; each weight plus 2^(bits-1), the first lowest
    weight_shape   int64 [2]                        rows, columns

vLLM takes weights that are quantized while activations are not in this form alone. It has no room for zeros to be left
out, so it is the form in which such weights arrive, and leave again when the sparse compression is taken off.
"""

import torch

from efx_plugin.checkpoint.formats.protocol import Layout
from efx_plugin.errors import SparseCheckpointError

NAME = "pack-quantized"


def layout(rows: int, columns: int, bits: int = 8) -> Layout:
    """The tensors of a weight [rows, columns]: name -> (dtype, shape)."""
    return {
        "weight_packed": (torch.int32, (rows, -(-columns // (32 // bits)))),
        "weight_shape": (torch.int64, (2,)),
    }


def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack an int8 weight [rows, columns]."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    return {
        "weight_packed": pack_to_int32(weight, num_bits=8).contiguous(),
        "weight_shape": torch.tensor(weight.shape, device="cpu"),
    }


def decompress(parts: dict[str, torch.Tensor], where: str, bits: int = 8) -> torch.Tensor:
    """The integers of a weight of that many bits, int8 [rows, columns].

    Raises:
        SparseCheckpointError: `weight_shape` disagrees with the words that are there; `where` is the module.
    """
    words, shape = parts["weight_packed"], parts["weight_shape"].flatten().tolist()
    if len(shape) != 2 or (words.dtype, tuple(words.shape)) != layout(shape[0], shape[1], bits)["weight_packed"]:
        raise SparseCheckpointError(
            f"{where}.weight_shape declares {shape}, but weight_packed is {words.dtype} {list(words.shape)}: "
            "the checkpoint is corrupt, save it again"
        )
    return unpack(words, bits, torch.Size(shape))


def unpack(words: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    """The integers of a weight of that many bits, int8 [rows, columns]."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    weight: torch.Tensor = unpack_from_int32(words, num_bits=bits, shape=shape).contiguous()
    return weight
