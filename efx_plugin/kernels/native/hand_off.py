"""From how many tokens on a product is left to oneDNN, and the size of the panels that it gets.

oneDNN has an instruction that the kernels have not: AMX multiplies tiles of bfloat16 (Intel, from Sapphire Rapids on).
Without it panels are slower than the kernel that has dot products of bfloat16: measured on Zen 4 (docs/results.md).
"""

import sys

from efx_plugin.machine import cpu_multiplies_tiles

NEVER = sys.maxsize  # tokens
PANEL_UNIT = 64  # rows, of which a panel is a multiple: oneDNN's blocks have so many
_TILES_FROM = 64  # tokens, see `hand_off_from`
_THREAD_BYTES, _LEAST_BYTES, _MOST_BYTES = 1 << 19, 1 << 22, 1 << 24  # of panels


def hand_off_from(kernel: str) -> int:
    """From how many tokens on the kernel of this name hands bfloat16 panels to oneDNN on this machine; or NEVER.

    Reckoned, since no processor with AMX was at hand. For 32 weights and M tokens a core takes
      - in the kernel: M dot products, one or two a cycle, and expands the weights meanwhile;
      - handing off: 15 cycles to read and expand them, and 9 in which oneDNN brings them into the order of tiles (both
        measured on a core of Zen 4), and M / 16 in tiles at their peak, of which half is taken here: 24 + M / 8.
    So the kernel wins up to 27 tokens, or up to 64 with two products a cycle. Dense weights, which are in the order of
    tiles from the start, take M / 8: handing off is to take 1.75 times as long as they with 256 tokens, 1.19 with 1,024
    and 1.09 with 2,048, where the kernel would take 4 or 8 times as long.
    """
    return _TILES_FROM if kernel == "avx512_bf16" and cpu_multiplies_tiles() else NEVER


def panel_rows(columns: int, threads: int) -> int:
    """How many rows of a weight a panel has at most: a multiple of PANEL_UNIT.

    It should stay in the cache between its expansion and its product, and give each thread some rows: half a MB for
    each, at least 4 MB, and at most 16 MB, or PANEL_UNIT rows.
    """
    size = min(max(_LEAST_BYTES, threads * _THREAD_BYTES), _MOST_BYTES)
    return max(1, size // (2 * columns * PANEL_UNIT)) * PANEL_UNIT
