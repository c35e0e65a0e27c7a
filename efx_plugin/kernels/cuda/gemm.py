"""How gemm.cu is compiled and launched: products for many tokens, straight from the records.

`gemm`: y = x W^T + bias. A thread block takes 128 rows and 96 or 128 tokens, and expands each record once for all of
these. Where that makes few blocks, the columns are split among more, whose sums `reduce` adds in one order. A token's
result is the same, to the bit, in all batches that have as many splits. Arguments, in this order:

    x, starts, records, scales, bias     as for `decode` (see `variants`)
    out                                  y [tokens, rows], contiguous; with several splits the float32 sums for
                                         `reduce`, at a multiple of 16 bytes
    tokens, rows, columns                int32; columns a multiple of 64
    splits                               int32, 1 to columns / 64

`reduce`, with several splits:

    partial                              what `gemm` made
    scales, bias, y                      as above
    tokens, rows, splits                 int32

A reckoning, at half density: for a record and 128 tokens a multiprocessor needs 82 cycles to issue instructions, 140 of
its shared memory, and for the products 128 (A100), 256 (L40S) or 512 (4090). So a token costs at best 1.1 times what
cuBLAS takes at its peak on an A100, and the same on L40S and 4090. An H100, where it measured 245 cycles, has `wgmma`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from efx_plugin.kernels.cuda import variants
from efx_plugin.kernels.cuda.buffer import PanelBuffer
from efx_plugin.kernels.cuda.driver import Function
from efx_plugin.kernels.cuda.layout import TILE_COLUMNS, TILE_ROWS, slot_bytes, tiles_of
from efx_plugin.kernels.cuda.variants import Launch, Properties, Variant

_WARPS = 4  # of a block
_ROW_BLOCKS = 2  # blocks of 16 rows that a warp takes
_STAGES = 2  # tiles of activations, and of records per warp, that a block holds
_TOKEN_TILES = (12, 16)  # of 8 tokens, that a block takes
_PART = 4  # of these, whose sums are written at a time
_PITCH = 4 * (_ROW_BLOCKS * TILE_ROWS + 4)  # bytes of a token's sums on the way to y

# What expanding the records of a tile costs, in products with 8 tokens; by reckoning.
_EXPANSION = 12

_FEWEST_TILES = 4  # of columns, that are worth a split
_BLOCKS_BY_REGISTERS = 2  # that a multiprocessor runs at a time; a thread takes up to 255


class Plan(NamedTuple):
    """How a product is launched; `reduce` is None with one split."""

    variant: Variant
    splits: int
    gemm: Launch
    reduce: Launch | None


def gemm_variants(dtype: torch.dtype, is_int8: bool = False) -> tuple[Variant, ...]:
    """The variants of `gemm` for activations of one of `DTYPES` and weights of the same or int8, by rising number of
    tokens of a block.
    """
    return tuple(_gemm(dtype, is_int8, tiles) for tiles in _TOKEN_TILES)


def reduce_variant(gemm: Variant) -> Variant:
    """The variant of `reduce` that adds what this one of `gemm` leaves; both come in one cubin."""
    return replace(gemm, symbol="efx_reduce")


def shared_bytes(variant: Variant) -> int:
    """Dynamic shared memory of a block."""
    if variant.symbol == "efx_reduce":
        return _WARPS * _PART * 8 * _PITCH
    return _STAGES * (variant.tokens * TILE_COLUMNS * 2 + _WARPS * _ROW_BLOCKS * slot_bytes(variant.value_bytes))


def blocks_at_once(all_variants: tuple[Variant, ...], properties: Properties) -> int:
    """Blocks of any of these variants that a device runs at a time."""
    per_block = max(map(shared_bytes, all_variants)) + variants.RESERVED_BYTES
    per_multiprocessor = properties.shared_memory_per_multiprocessor // per_block
    return properties.multi_processor_count * max(1, min(_BLOCKS_BY_REGISTERS, per_multiprocessor))


@lru_cache(maxsize=1 << 12)
def plan(all_variants: tuple[Variant, ...], tokens: int, rows: int, columns: int, at_once: int) -> Plan:
    """How to multiply so many tokens by a weight [rows, columns].

    Args:
        all_variants: to choose from.
        at_once: their `blocks_at_once`.
    """
    variant = min(all_variants, key=lambda one: -(-tokens // one.tokens) * (one.tokens // 8 + _EXPANSION))
    return planned(variant, tokens, rows, _splits(variant, tokens, rows, columns, at_once))


def planned(variant: Variant, tokens: int, rows: int, splits: int) -> Plan:
    """How to launch this variant, and `reduce`, with so many splits."""
    blocks = _blocks(variant, tokens, rows)
    reduce = Launch(blocks * (variant.tokens // 8 // _PART), _WARPS * 32, shared_bytes(reduce_variant(variant)))
    return Plan(
        variant,
        splits,
        Launch(blocks * splits, _WARPS * 32, shared_bytes(variant)),
        reduce if splits > 1 else None,
    )


def partial_bytes(variant: Variant, tokens: int, rows: int, splits: int) -> int:
    """What the sums for `reduce` take."""
    return splits * _blocks(variant, tokens, rows) * _block_rows(variant) * variant.tokens * 4


class Gemm:
    """The functions for one kind of weight and activations on a device.

    Args:
        load: loads a variant for an architecture, with so many bytes of dynamic shared memory.
        architecture: of the device.
        dtype: of activations.
        is_int8: weights are int8; else of that dtype too.
        properties: of the device.
    """

    def __init__(
        self,
        load: Callable[[Variant, str, int], Function],
        architecture: str,
        dtype: torch.dtype,
        is_int8: bool,
        properties: Properties,
    ) -> None:
        self._variants = gemm_variants(dtype, is_int8)
        self._at_once = blocks_at_once(self._variants, properties)
        self._gemm = {one: load(one, architecture, shared_bytes(one)) for one in self._variants}
        reduce = {one: reduce_variant(one) for one in self._variants}
        self._reduce = {one: load(other, architecture, shared_bytes(other)) for one, other in reduce.items()}

    def multiply(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        y: Tensor,
        buffer: PanelBuffer,
        stream: torch.cuda.Stream,
    ) -> None:
        """Set y [tokens, out].

        Args:
            operands: x [tokens, in], starts, records, scales and bias, as `Loaded.multiply` has them.
            buffer: for partial sums.
            stream: the current one.
        """
        (tokens, columns), rows = operands[0].shape, y.shape[1]
        how = plan(self._variants, tokens, rows, columns, self._at_once)
        function, sizes = self._gemm[how.variant], (tokens, rows, columns, how.splits)
        if how.reduce is None:
            function.launch(*how.gemm, stream.cuda_stream, (*operands, y, *sizes))
            return
        with buffer.borrowed(stream, torch.float32) as partial:
            function.launch(*how.gemm, stream.cuda_stream, (*operands, partial, *sizes))
            arguments = (partial, *operands[3:], y, tokens, rows, how.splits)
            self._reduce[how.variant].launch(*how.reduce, stream.cuda_stream, arguments)


def _splits(variant: Variant, tokens: int, rows: int, columns: int, at_once: int) -> int:
    """As many as keep the device busy with one round of blocks, whose sums fit into the buffer."""
    bounds = (
        at_once // _blocks(variant, tokens, rows),
        variants.PANEL_BYTES // partial_bytes(variant, tokens, rows, 1),
        tiles_of(rows, columns)[1] // _FEWEST_TILES,
    )
    return max(1, min(bounds))


def _blocks(variant: Variant, tokens: int, rows: int) -> int:
    """Of a split."""
    return -(-tokens // variant.tokens) * -(-rows // _block_rows(variant))


def _block_rows(variant: Variant) -> int:
    return _WARPS * variant.row_blocks * TILE_ROWS


def _gemm(dtype: torch.dtype, is_int8: bool, token_tiles: int) -> Variant:
    defines = {
        "EFX_FP16": int(dtype == torch.float16),
        "EFX_INT8": int(is_int8),
        "EFX_TOKEN_TILES": token_tiles,
        "EFX_ROW_BLOCKS": _ROW_BLOCKS,
        "EFX_WARPS": _WARPS,
    }
    value_bytes = 1 if is_int8 else 2
    size = 8 * token_tiles, _ROW_BLOCKS, _WARPS, _STAGES, value_bytes
    return Variant("efx_gemm", tuple(defines.items()), *size, "gemm.cu")
