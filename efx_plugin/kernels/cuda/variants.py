"""What is compiled from sparse_linear.cu, and how it is launched: macros, symbols, grids, shared memory and arguments.
`gemm` has those of gemm.cu.

Two kernels work on the records of `layout`. Both take whole tiles of 64 columns: where a weight has others, the caller
pads the activations with columns of zeros up to it, and so the rows of `dense`; the records are the same.

W is of the activations' dtype, or int8 with a scale per row: then variants have the macro EFX_INT8. Eight bits are
expanded exactly in front of the tensor cores, and the float32 sums are multiplied by the scales.

`decode`: y = x W^T + bias for up to 64 tokens, straight from the records. A token's result is the same, to the bit, for
every number of tokens, hence for every variant. Arguments, in this order:

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
from typing import NamedTuple

import torch

from efx_plugin.kernels.cuda.layout import TILE_ROWS, slot_bytes, tiles_of

DTYPES = (torch.bfloat16, torch.float16)
MOST_TOKENS_DECODED = 64

# A weight is expanded by panels of about so many bytes, for the product to read them from the L2 cache.
PANEL_BYTES = 16 << 20


class Crossovers(NamedTuple):
    """Up to how many tokens `decode`, and beyond these `gemm`, is to be used; then `expand` and a dense product."""

    decode: int
    gemm: int


# Where the next of them becomes the faster one, by compute capability: measured, else by a reckoning (see gemm.py).
MEASURED: dict[tuple[int, int], Crossovers] = {}
RECKONED = {
    (8, 0): Crossovers(64, 2048),
    (8, 6): Crossovers(64, 2048),
    (9, 0): Crossovers(64, 512),
    (10, 0): Crossovers(64, 192),
    (12, 0): Crossovers(64, 2048),
}

_WARPS = 8  # of a block; in `decode` each takes its part of the columns
_STAGES = 4  # records in flight per warp

# Tiles of 8 tokens, and blocks of rows for a thread block to take, of the variants of `decode`: as many as registers
# suffice for.
_SIZES = ((1, 1), (2, 1), (4, 2), (8, 4))
_SIZES_INT8 = ((1, 1), (2, 1), (4, 2), (8, 2))


@dataclass(frozen=True)
class Variant:
    """One compilation of the source and the kernel in it.

    Attributes:
        symbol: the kernel's name.
        defines: macros and their values.
        tokens: the most tokens that it takes; 0 for `expand`.
        row_blocks: blocks of 16 rows that a thread block takes, or a warp of `gemm`.
        value_bytes: of a stored weight, 1 or 2.
        file: the kernel's, in this folder.
    """

    symbol: str
    defines: tuple[tuple[str, int], ...]
    tokens: int
    row_blocks: int
    value_bytes: int
    file: str = "sparse_linear.cu"

    @property
    def files(self) -> tuple[str, ...]:
        """What is compiled, one after the other."""
        return "ptx.cuh", "records.cuh", self.file


class Launch(NamedTuple):
    """Blocks, threads per block, and bytes of dynamic shared memory per block, all in one dimension."""

    grid: int
    block: int
    shared_bytes: int


def source(*names: str) -> str:
    """The CUDA C++ in files of this folder, one after the other; it includes no header."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text() for name in names)


def decode_variants(dtype: torch.dtype, is_int8: bool = False) -> tuple[Variant, ...]:
    """The variants of `decode` for activations of one of `DTYPES` and weights of the same or int8, by rising number of
    tokens.
    """
    sizes = _SIZES_INT8 if is_int8 else _SIZES
    return tuple(_decode(dtype, is_int8, tiles, row_blocks) for tiles, row_blocks in sizes)


def decode_variant(dtype: torch.dtype, tokens: int, is_int8: bool = False) -> Variant:
    """The variant of `decode` for 1 to 64 tokens."""
    return next(variant for variant in decode_variants(dtype, is_int8) if tokens <= variant.tokens)


def expand_variant(dtype: torch.dtype, is_int8: bool = False) -> Variant:
    """The variant of `expand`, which comes in one cubin with the first variant of `decode`."""
    return replace(decode_variants(dtype, is_int8)[0], symbol="efx_expand", tokens=0)


def launch(variant: Variant, rows: int, columns: int) -> Launch:
    """How to launch a variant on a weight, or for `expand` on a panel, of so many rows and columns."""
    high, wide = tiles_of(rows, columns)
    slots = _WARPS * slot_bytes(variant.value_bytes)
    if variant.tokens == 0:
        return Launch(-(-high * wide // _WARPS), _WARPS * 32, slots)
    return Launch(-(-high // variant.row_blocks), _WARPS * 32, _STAGES * slots)


def panel_rows(columns: int) -> int:
    """Rows of a panel for `expand`: a multiple of 16, at least 16."""
    return max(1, PANEL_BYTES // (2 * columns * TILE_ROWS)) * TILE_ROWS


def crossovers(capability: tuple[int, int]) -> Crossovers:
    """Those of a device of that compute capability, 8.0 or later; reckoned ones hold for later capabilities as well."""
    measured = MEASURED.get(capability)
    return measured or RECKONED[max(one for one in RECKONED if one <= capability)]


def _decode(dtype: torch.dtype, is_int8: bool, token_tiles: int, row_blocks: int) -> Variant:
    defines = {
        "EFX_FP16": int(dtype == torch.float16),
        "EFX_INT8": int(is_int8),
        "EFX_TOKEN_TILES": token_tiles,
        "EFX_ROW_BLOCKS": row_blocks,
        "EFX_WARPS": _WARPS,
        "EFX_STAGES": _STAGES,
    }
    value_bytes = 1 if is_int8 else 2
    return Variant("efx_decode", tuple(defines.items()), 8 * token_tiles, row_blocks, value_bytes)
