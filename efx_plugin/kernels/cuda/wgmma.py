"""How wgmma.cu is compiled, planned and launched: products for many tokens on compute capability 9.0 (H100, H200),
straight from the records.

`arrange`: activations in the order in which tensor cores take them; tokens beyond the last are zeros. Arguments:

    x            [tokens, columns], contiguous
    image        as many bytes as `image_bytes` says, at a multiple of 16
    tokens       int32
    columns      int32, a multiple of 64

`wgmma`: y = x W^T + bias. A thread block takes 128 to 256 rows and 32 to 256 tokens, and expands each record once for
all of these. Where that makes few blocks, the columns are split among more, whose sums `add` adds in one order.
Arguments, in this order:

    image        what `arrange` made
    starts, records, scales, bias        as for `decode` (see `variants`)
    out          y [tokens, rows], contiguous; with several splits the float32 sums for `add`, at a multiple of 16 bytes
    tokens, rows, columns                int32; columns a multiple of 64
    splits       int32, 1 to columns / 64

`add`, with several splits: what `wgmma` made; scales, bias, y; tokens, rows, splits, as above.

The limit is shared memory: at half density a record is read by 41 accesses of 128 bytes, and a product of its 64 rows
with n tokens reads 128 n bytes of activations, a quarter of them for each record. At 256 tokens that is 147 cycles with
what is copied there, where the products need 128.
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

CAPABILITY = (9, 0)
ARCHITECTURE = "sm_90a"  # `wgmma` is not of sm_90

# Tokens and groups of 64 rows that a thread block takes, and the cycles for a record as measured on an H100 with random
# weights of half density. For up to 64 tokens it is the time to read the record.
_CYCLES = {
    **{(32, 2): 112, (32, 3): 107, (32, 4): 105},
    **{(64, 2): 112, (64, 3): 107, (64, 4): 105},
    **{(128, 2): 157, (128, 3): 134, (128, 4): 120},
    **{(256, 2): 206},
}
_CYCLES_OF_ADD = 4000
_SUM_BYTES_PER_CYCLE = 3200  # written or read, of the sums for `add`

# Registers of each thread that multiplies, where others give some away: more than all have in a block of that size.
_REGISTERS = {(128, 4): 112, (256, 2): 232}

_SHARED_BYTES = 227 << 10  # of a block, at most
_BARRIER_BYTES = 16  # of a stage
_MOST_STAGES = 8
_FEWEST_TILES = 4  # of columns, that are worth a split
_THREADS = 256  # of a block of `arrange`
_ADD_WARPS, _ADD_TOKENS = 4, 32  # of a block of `add`, and that a warp of it takes
_HEADERS = ("hopper.cuh",)


class Plan(NamedTuple):
    """How a product is launched; `add` is None with one split."""

    variant: Variant
    splits: int
    arrange: Launch
    wgmma: Launch
    add: Launch | None


def wgmma_variants(dtype: torch.dtype, is_int8: bool = False) -> tuple[Variant, ...]:
    """The variants of `wgmma` for activations of one of `DTYPES` and weights of the same or int8, by rising number of
    tokens of a block.
    """
    return tuple(_wgmma(dtype, is_int8, *size) for size in _CYCLES)


def arrange_variant(wgmma: Variant) -> Variant:
    """The variant of `arrange` for this one of `wgmma`; both come in one cubin."""
    return replace(wgmma, symbol="efx_arrange")


def add_variant(wgmma: Variant) -> Variant:
    """The variant of `add` that adds what this one of `wgmma` leaves; both come in one cubin."""
    return replace(wgmma, symbol="efx_add")


def shared_bytes(variant: Variant) -> int:
    """Dynamic shared memory of a block."""
    if variant.symbol != "efx_wgmma":
        return 0
    return variant.stages * _stage_bytes(variant.tokens, variant.row_blocks, variant.value_bytes)


def image_bytes(variant: Variant, tokens: int, columns: int) -> int:
    """What `arrange` makes."""
    return -(-tokens // variant.tokens) * variant.tokens * columns * 2


def partial_bytes(variant: Variant, tokens: int, rows: int, splits: int) -> int:
    """What the sums for `add` take."""
    return splits * _blocks(variant, tokens, rows) * variant.row_blocks * TILE_ROWS * variant.tokens * 4


@lru_cache(maxsize=1 << 12)
def plan(all_variants: tuple[Variant, ...], tokens: int, rows: int, columns: int, multiprocessors: int) -> Plan:
    """How to multiply so many tokens by a weight [rows, columns] in the fewest cycles.

    Args:
        all_variants: to choose from.
        multiprocessors: of the device.
    """
    sizes = tokens, rows, columns
    _, index, splits = min(
        (_cycles(variant, splits, *sizes, multiprocessors), index, splits)
        for index, variant in enumerate(all_variants)
        for splits in _possible_splits(variant, *sizes, multiprocessors)
    )
    return planned(all_variants[index], *sizes, splits)


def planned(variant: Variant, tokens: int, rows: int, columns: int, splits: int) -> Plan:
    """How to launch this variant, and what belongs to it, with so many splits."""
    blocks = _blocks(variant, tokens, rows)
    units = image_bytes(variant, tokens, columns) // 16
    pieces = blocks * variant.row_blocks * (variant.tokens // _ADD_TOKENS)  # row_blocks is a multiple of _ADD_WARPS
    return Plan(
        variant,
        splits,
        Launch(-(-units // _THREADS), _THREADS, 0),
        Launch(blocks * splits, variant.warps * 32, shared_bytes(variant)),
        Launch(pieces // _ADD_WARPS, _ADD_WARPS * 32, 0) if splits > 1 else None,
    )


class Wgmma:
    """The functions for one kind of weight and activations on a device.

    Args:
        load: loads a variant for an architecture, with so many bytes of dynamic shared memory.
        dtype: of activations.
        is_int8: weights are int8; else of that dtype too.
        properties: of the device.
    """

    def __init__(
        self,
        load: Callable[[Variant, str, int], Function],
        dtype: torch.dtype,
        is_int8: bool,
        properties: Properties,
    ) -> None:
        self._variants = wgmma_variants(dtype, is_int8)
        self._multiprocessors = properties.multi_processor_count
        self._functions = {
            (one.symbol, variant): load(one, ARCHITECTURE, shared_bytes(one))
            for variant in self._variants
            for one in (variant, arrange_variant(variant), add_variant(variant))
        }

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
        x, starts, records, scales, bias = operands
        (tokens, columns), rows = x.shape, y.shape[1]
        how = plan(self._variants, tokens, rows, columns, self._multiprocessors)
        arrange, wgmma, add = (self._functions[name, how.variant] for name in ("efx_arrange", "efx_wgmma", "efx_add"))
        image = x.new_empty(image_bytes(how.variant, tokens, columns) // x.element_size())
        address = stream.cuda_stream
        arrange.launch(*how.arrange, address, (x, image, tokens, columns))
        sizes = tokens, rows, columns, how.splits
        if how.add is None:
            wgmma.launch(*how.wgmma, address, (image, starts, records, scales, bias, y, *sizes))
            return
        with buffer.borrowed(stream, torch.float32) as partial:
            wgmma.launch(*how.wgmma, address, (image, starts, records, scales, bias, partial, *sizes))
            add.launch(*how.add, address, (partial, scales, bias, y, tokens, rows, how.splits))


def _cycles(variant: Variant, splits: int, tokens: int, rows: int, columns: int, multiprocessors: int) -> float:
    """A reckoning."""
    rounds = -(-_blocks(variant, tokens, rows) * splits // multiprocessors)
    records = -(-tiles_of(rows, columns)[1] // splits) * variant.row_blocks
    cycles = rounds * records * _CYCLES[variant.tokens, variant.row_blocks // 4]
    if splits == 1:
        return cycles
    return cycles + _CYCLES_OF_ADD + 2 * partial_bytes(variant, tokens, rows, splits) / _SUM_BYTES_PER_CYCLE


def _possible_splits(variant: Variant, tokens: int, rows: int, columns: int, multiprocessors: int) -> range:
    """Such that all blocks run at once and their sums fit into the buffer; or one."""
    most = min(
        multiprocessors // _blocks(variant, tokens, rows),
        variants.PANEL_BYTES // partial_bytes(variant, tokens, rows, 1),
        tiles_of(rows, columns)[1] // _FEWEST_TILES,
    )
    return range(1, max(1, most) + 1)


def _blocks(variant: Variant, tokens: int, rows: int) -> int:
    """Of a split."""
    return -(-tokens // variant.tokens) * -(-rows // (variant.row_blocks * TILE_ROWS))


def _stage_bytes(tokens: int, row_blocks: int, value_bytes: int) -> int:
    return tokens * TILE_COLUMNS * 2 + row_blocks * slot_bytes(value_bytes) + _BARRIER_BYTES


def _wgmma(dtype: torch.dtype, is_int8: bool, tokens: int, groups: int) -> Variant:
    value_bytes, row_blocks = 1 if is_int8 else 2, 4 * groups
    stages = min(_MOST_STAGES, _SHARED_BYTES // _stage_bytes(tokens, row_blocks, value_bytes))
    registers = _REGISTERS.get((tokens, groups), 0)
    defines = {
        "EFX_FP16": int(dtype == torch.float16),
        "EFX_INT8": int(is_int8),
        "EFX_TOKENS": tokens,
        "EFX_GROUPS": groups,
        "EFX_STAGES": stages,
        "EFX_REGISTERS": registers,
    }
    size = tokens, row_blocks, row_blocks + (4 if registers else 1), stages, value_bytes
    return Variant("efx_wgmma", tuple(defines.items()), *size, "wgmma.cu", _HEADERS)
