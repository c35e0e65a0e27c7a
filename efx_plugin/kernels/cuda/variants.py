"""What is compiled from sparse_linear.cu, and how it is launched: macros, symbols, grids, shared memory and arguments.
`gemm` has those of gemm.cu, `wgmma` those of wgmma.cu.

Two kernels work on the records of `layout`. Both take whole tiles of 64 columns: where a weight has others, the caller
pads the activations with columns of zeros up to it, and so the rows of `dense`; the records are the same.

W is of the activations' dtype, or int8 with a scale per row: then variants have the macro EFX_INT8. Eight bits are
expanded exactly in front of the tensor cores, and the float32 sums are multiplied by the scales.

`decode`: y = x W^T + bias for up to 64 tokens, straight from the records. The columns are split among the warps of a
block, as many as keep the device busy; this number belongs to the weight. So a token's result is the same, to the bit,
for every number of tokens. Arguments, in this order:

    x            [tokens, columns], contiguous, at a multiple of 16 bytes
    starts       int32 [tiles + 1], from `layout.pack`
    records      uint8 [units, 16], from `layout.pack`, at a multiple of 16 bytes
    scales       float32 [rows] of int8 weights; else a null pointer
    bias         [rows], or a null pointer
    y            [tokens, rows], contiguous
    tokens       int32, 1 to the variant's
    rows         int32
    columns      int32, a multiple of 64

`expand`: rows of W as a dense matrix; integers times scales, rounded to the activations' dtype. (A product of the
integers would be rounded before it is scaled: on random weights the error of the result is the same, and float16 may
overflow.) Arguments, in this order:

    starts, records, scales   as above
    dense                     [rows, columns], contiguous, at a multiple of 16 bytes
    first_row                 int32, a multiple of 16: the row of W that comes first
    rows                      int32, how many
    columns                   int32, a multiple of 64
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from efx_plugin.kernels.cuda.layout import TILE_ROWS, slot_bytes, tiles_of

DTYPES = (torch.bfloat16, torch.float16)
MOST_TOKENS_DECODED = 64

# A weight is expanded by panels of about so many bytes. Larger ones take memory, and on an H100 no less time; panels of
# 16 MB, which stay in its L2 cache, are so few rows that cuBLAS takes longer by up to two thirds.
PANEL_BYTES = 64 << 20


class Properties(Protocol):
    """Of a device, as torch tells them."""

    multi_processor_count: int
    shared_memory_per_multiprocessor: int


class Crossovers(NamedTuple):
    """Up to how many tokens `decode`, and beyond these `gemm` or `wgmma`, is to be used; then `expand` and a dense
    product.
    """

    decode: int
    gemm: int


# Where the next of them becomes the faster one, by compute capability: measured, else by a reckoning (see gemm.py).
MEASURED = {(9, 0): Crossovers(16, 1024)}  # an H100
RECKONED = {
    (8, 0): Crossovers(64, 2048),
    (8, 6): Crossovers(64, 2048),
    (10, 0): Crossovers(64, 192),
    (12, 0): Crossovers(64, 2048),
}

_STAGES = 3  # records in flight per warp, at least
_SUM_BYTES = 512  # of a warp, by tiles of 8 tokens: in the end they take the place of the records
_WARPS = (4, 6, 8, 12, 16)  # of a block of `decode`, one of these, each for its part of the columns
_FEW_WARPS = 8  # at most, where 32 or more tokens need the registers
_WARPS_AT_ONCE = 32  # that a multiprocessor runs at a time with the registers that `decode` takes, at most
_WARPS_OF_EXPAND = 8
RESERVED_BYTES = 1 << 10  # of shared memory, that each block takes beside its own

# Blocks of 16 rows for a thread block to take, by tiles of 8 tokens, of the variants of `decode`: as many as registers
# suffice for. Two halve what is read of the activations, where that leaves no multiprocessor idle.
_ROW_BLOCKS = {1: (1, 2), 2: (1, 2), 4: (2,), 8: (4,)}
_ROW_BLOCKS_INT8 = {1: (1, 2), 2: (1, 2), 4: (2,), 8: (2,)}


@dataclass(frozen=True)
class Variant:
    """One compilation of the source and the kernel in it.

    Attributes:
        symbol: the kernel's name.
        defines: macros and their values.
        tokens: the most tokens that it takes; 0 for `expand`.
        row_blocks: blocks of 16 rows that a thread block takes, or a warp of `gemm` or `wgmma`.
        warps: of a block.
        stages: records that a warp holds for a block of rows.
        value_bytes: of a stored weight, 1 or 2.
        file: the kernel's, in this folder.
        headers: what it needs beside ptx.cuh and records.cuh.
    """

    symbol: str
    defines: tuple[tuple[str, int], ...]
    tokens: int
    row_blocks: int
    warps: int
    stages: int
    value_bytes: int
    file: str = "sparse_linear.cu"
    headers: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """What is compiled, one after the other."""
        return "ptx.cuh", *self.headers, "records.cuh", self.file


class Launch(NamedTuple):
    """Blocks, threads per block, and bytes of dynamic shared memory per block, all in one dimension."""

    grid: int
    block: int
    shared_bytes: int


def source(*names: str) -> str:
    """The CUDA C++ in files of this folder, one after the other; it includes no header."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text() for name in names)


def decode_variants(dtype: torch.dtype, is_int8: bool = False, warps: int = 8, most: int = 64) -> tuple[Variant, ...]:
    """The variants of `decode` for activations of one of `DTYPES` and weights of the same or int8, by rising number of
    tokens, then of rows.

    Args:
        warps: of a block.
        most: tokens that they are for.
    """
    sizes = _ROW_BLOCKS_INT8 if is_int8 else _ROW_BLOCKS
    return tuple(
        _decode(dtype, is_int8, tiles, row_blocks, warps)
        for tiles, all_row_blocks in sizes.items()
        if tiles == 1 or 4 * tiles < most
        for row_blocks in all_row_blocks
    )


def decode_warps(rows: int, value_bytes: int, most: int, properties: Properties) -> int:
    """Warps of a block of `decode`, for a weight of so many rows: as many as run at a time on the whole device.

    Args:
        most: tokens at a time.
    """
    ring = _STAGES * slot_bytes(value_bytes)
    of_one = min(_WARPS_AT_ONCE, (properties.shared_memory_per_multiprocessor - RESERVED_BYTES) // ring)
    high, _ = tiles_of(rows, 1)
    fit = [
        warps
        for warps in _WARPS
        if warps <= of_one and warps * high <= of_one * properties.multi_processor_count
        if most < 32 or warps <= _FEW_WARPS
    ]
    return max(fit, default=_WARPS[0])


def decode_variant(all_variants: tuple[Variant, ...], tokens: int, rows: int, multiprocessors: int) -> Variant:
    """The variant among those of `decode_variants` for so many tokens and rows: the one with the most rows per block of
    those that spread best over the device.
    """
    size = next(variant.tokens for variant in all_variants if tokens <= variant.tokens)
    high, _ = tiles_of(rows, 1)

    def spread(variant: Variant) -> tuple[float, int]:
        blocks = -(-high // variant.row_blocks)
        return round(blocks / -(-blocks // multiprocessors), 6), variant.row_blocks

    return max((variant for variant in all_variants if variant.tokens == size), key=spread)


def expand_variant(dtype: torch.dtype, is_int8: bool = False) -> Variant:
    """The variant of `expand`."""
    decode = _decode(dtype, is_int8, 1, 1, _WARPS_OF_EXPAND)
    return replace(decode, symbol="efx_expand", tokens=0)


def launch(variant: Variant, rows: int, columns: int) -> Launch:
    """How to launch a variant on a weight, or for `expand` on a panel, of so many rows and columns."""
    high, wide = tiles_of(rows, columns)
    slots = variant.warps * slot_bytes(variant.value_bytes)
    if variant.tokens == 0:
        return Launch(-(-high * wide // variant.warps), variant.warps * 32, slots)
    return Launch(-(-high // variant.row_blocks), variant.warps * 32, variant.stages * slots)


def panel_rows(columns: int) -> int:
    """Rows of a panel for `expand`: a multiple of 16, at least 16."""
    return max(1, PANEL_BYTES // (2 * columns * TILE_ROWS)) * TILE_ROWS


def crossovers(capability: tuple[int, int]) -> Crossovers:
    """Those of a device of that compute capability, 8.0 or later; reckoned ones hold for later capabilities as well."""
    measured = MEASURED.get(capability)
    return measured or RECKONED[max(one for one in RECKONED if one <= capability)]


def _decode(dtype: torch.dtype, is_int8: bool, token_tiles: int, row_blocks: int, warps: int) -> Variant:
    value_bytes = 1 if is_int8 else 2
    stages = max(_STAGES, -(-_SUM_BYTES * token_tiles // slot_bytes(value_bytes)))
    defines = {
        "EFX_FP16": int(dtype == torch.float16),
        "EFX_INT8": int(is_int8),
        "EFX_TOKEN_TILES": token_tiles,
        "EFX_ROW_BLOCKS": row_blocks,
        "EFX_WARPS": warps,
        "EFX_STAGES": stages,
    }
    return Variant("efx_decode", tuple(defines.items()), 8 * token_tiles, row_blocks, warps, stages, value_bytes)
