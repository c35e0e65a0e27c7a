"""The CUDA kernels compile for every architecture, and to no more instructions and registers than they once did.

Compiling needs NVRTC, and no GPU.
"""

from functools import cache
from itertools import groupby

import pytest
import torch

from efx_plugin.kernels.cuda import gemm, program, variants, wgmma
from efx_plugin.kernels.cuda.layout import TILE
from efx_plugin.kernels.cuda.variants import Variant
from tests.support import machine_code

# Registers per thread, and instructions per weight in the main loop, of `decode` by architecture, most tokens and
# blocks of rows. Compiled by NVRTC 13.0.88.
FIGURES = {
    "sm_80": {
        (8, 1): (40, 6.53),
        (8, 2): (48, 6.23),
        (16, 1): (48, 7.62),
        (16, 2): (64, 6.72),
        (32, 2): (114, 7.14),
        (64, 4): (241, 7.58),
    },
    "sm_86": {
        (8, 1): (40, 6.53),
        (8, 2): (48, 6.23),
        (16, 1): (48, 7.69),
        (16, 2): (64, 6.72),
        (32, 2): (114, 7.14),
        (64, 4): (241, 7.58),
    },
    "sm_89": {
        (8, 1): (40, 6.53),
        (8, 2): (48, 6.23),
        (16, 1): (48, 7.69),
        (16, 2): (64, 6.72),
        (32, 2): (114, 7.14),
        (64, 4): (241, 7.58),
    },
    "sm_90": {
        (8, 1): (40, 6.56),
        (8, 2): (48, 6.23),
        (16, 1): (48, 7.59),
        (16, 2): (64, 6.75),
        (32, 2): (114, 7.16),
        (64, 4): (242, 7.61),
    },
    "sm_100": {
        (8, 1): (40, 7.06),
        (8, 2): (48, 6.94),
        (16, 1): (48, 7.56),
        (16, 2): (64, 7.14),
        (32, 2): (118, 7.38),
        (64, 4): (246, 7.89),
    },
    "sm_120": {
        (8, 1): (42, 6.78),
        (8, 2): (48, 6.7),
        (16, 1): (48, 7.34),
        (16, 2): (64, 7.0),
        (32, 2): (118, 7.42),
        (64, 4): (243, 8.27),
    },
}
FIGURES_OF_INT8 = {
    "sm_80": {
        (8, 1): (40, 6.28),
        (8, 2): (48, 5.59),
        (16, 1): (48, 7.31),
        (16, 2): (62, 6.22),
        (32, 2): (118, 6.48),
        (64, 2): (169, 7.66),
    },
    "sm_86": {
        (8, 1): (40, 6.28),
        (8, 2): (48, 5.59),
        (16, 1): (48, 7.31),
        (16, 2): (62, 6.22),
        (32, 2): (118, 6.48),
        (64, 2): (169, 7.66),
    },
    "sm_89": {
        (8, 1): (40, 6.28),
        (8, 2): (48, 5.59),
        (16, 1): (48, 7.31),
        (16, 2): (62, 6.22),
        (32, 2): (118, 6.48),
        (64, 2): (169, 7.66),
    },
    "sm_90": {
        (8, 1): (40, 5.44),
        (8, 2): (48, 5.55),
        (16, 1): (48, 5.84),
        (16, 2): (64, 5.78),
        (32, 2): (121, 6.2),
        (64, 2): (169, 7.48),
    },
    "sm_100": {
        (8, 1): (32, 5.91),
        (8, 2): (48, 6.0),
        (16, 1): (48, 6.16),
        (16, 2): (64, 5.81),
        (32, 2): (116, 6.33),
        (64, 2): (182, 7.05),
    },
    "sm_120": {
        (8, 1): (40, 5.69),
        (8, 2): (48, 5.81),
        (16, 1): (48, 5.91),
        (16, 2): (64, 5.64),
        (32, 2): (114, 6.33),
        (64, 2): (182, 7.3),
    },
}
FIGURES_OF = {False: FIGURES, True: FIGURES_OF_INT8}  # by whether weights are int8
REGISTERS_OF_EXPAND = 40

# The same of `gemm`, by tokens of a block.
FIGURES_OF_GEMM = {
    "sm_80": {96: (204, 8.91), 128: (230, 10.14)},
    "sm_86": {96: (204, 8.91), 128: (230, 10.14)},
    "sm_89": {96: (204, 8.91), 128: (230, 10.14)},
    "sm_90": {96: (204, 8.98), 128: (240, 10.28)},
    "sm_100": {96: (212, 9.42), 128: (236, 10.34)},
    "sm_120": {96: (210, 9.81), 128: (255, 10.83)},
}
FIGURES_OF_GEMM_INT8 = {
    "sm_80": {96: (204, 7.34), 128: (250, 8.33)},
    "sm_86": {96: (204, 7.34), 128: (250, 8.33)},
    "sm_89": {96: (204, 7.34), 128: (250, 8.33)},
    "sm_90": {96: (202, 7.30), 128: (254, 8.38)},
    "sm_100": {96: (198, 7.69), 128: (233, 8.56)},
    "sm_120": {96: (208, 8.12), 128: (254, 9.36)},
}
FIGURES_OF_GEMMS = {False: FIGURES_OF_GEMM, True: FIGURES_OF_GEMM_INT8}
REGISTERS_OF_REDUCE = 64

# The same of `wgmma`, which is of one architecture, by tokens and groups of 64 rows of a block.
FIGURES_OF_WGMMA = {
    False: {
        **{(32, groups): (58, 6.09) for groups in (2, 3, 4)},
        **{(64, groups): (74, 6.12) for groups in (2, 3, 4)},
        **{(128, 2): (106, 6.06), (128, 3): (106, 6.12), (128, 4): (96, 6.09), (256, 2): (168, 7.0)},
    },
    True: {
        **{(32, groups): (58, 6.19) for groups in (2, 3, 4)},
        **{(64, groups): (74, 6.19) for groups in (2, 3, 4)},
        **{(128, 2): (106, 5.47), (128, 3): (106, 5.5), (128, 4): (96, 6.19), (256, 2): (168, 7.06)},
    },
}
REGISTERS_OF_ADD = 48
TOLERANCE = 1.10
MOST_REGISTERS = 255  # of a thread

every_figure = pytest.mark.parametrize(
    ("arch", "is_int8", "size"),
    [(arch, is_int8, size) for is_int8 in FIGURES_OF for arch in FIGURES for size in FIGURES_OF[is_int8][arch]],
)


every_figure_of_gemm = pytest.mark.parametrize(
    ("arch", "is_int8", "tokens"),
    [
        (arch, is_int8, tokens)
        for is_int8, figures in FIGURES_OF_GEMMS.items()
        for arch in figures
        for tokens in figures[arch]
    ],
)


@cache
def compiled(variant: Variant, arch: str) -> bytes:
    return program.compile_cubin(variants.source(*variant.files), variant.file, dict(variant.defines), arch)


def gemm_variant(dtype: torch.dtype, tokens: int, is_int8: bool) -> Variant:
    return next(variant for variant in gemm.gemm_variants(dtype, is_int8) if variant.tokens == tokens)


def instructions_per_weight(cubin: bytes, variant: Variant) -> float:
    """In the main loop, in each pass of which a warp takes one tile of each of its blocks of rows."""
    return len(main_loop(cubin, variant)) / (variant.row_blocks * TILE / 32)


def main_loop(cubin: bytes, variant: Variant) -> list[machine_code.Instruction]:
    """The one with the matrix products."""
    loops = machine_code.loops(cubin, variant.symbol)
    (loop,) = (loop for loop in loops if any(map(is_product, loop)))
    return loop


def is_product(instruction: machine_code.Instruction) -> bool:
    return instruction.operation.startswith(("HMMA", "HGMMA"))


def decode_variant(dtype: torch.dtype, size: tuple[int, int], is_int8: bool, warps: int = 8) -> Variant:
    all_variants = variants.decode_variants(dtype, is_int8, warps)
    return next(variant for variant in all_variants if (variant.tokens, variant.row_blocks) == size)


@every_figure
def test_instructions_and_registers_do_not_rise(arch, is_int8, size):
    registers, instructions = FIGURES_OF[is_int8][arch][size]
    variant = decode_variant(torch.bfloat16, size, is_int8)
    cubin = compiled(variant, arch)
    found = machine_code.resources(cubin)
    assert found[variant.symbol].registers <= min(MOST_REGISTERS, registers * TOLERANCE)
    assert found["efx_expand"].registers <= REGISTERS_OF_EXPAND * TOLERANCE
    assert all(kernel.stack_bytes == 0 for kernel in found.values()), "registers are spilled"
    assert instructions_per_weight(cubin, variant) <= instructions * TOLERANCE


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("is_int8", "size"), [(kind, size) for kind in FIGURES_OF for size in FIGURES_OF[kind]["sm_90"]]
)
def test_float16_needs_what_bfloat16_does(arch, is_int8, size):
    variant = decode_variant(torch.float16, size, is_int8)
    found = machine_code.resources(compiled(variant, arch))[variant.symbol]
    assert found.registers <= FIGURES_OF[is_int8][arch][size][0] * TOLERANCE and found.stack_bytes == 0


@pytest.mark.parametrize("is_int8", FIGURES_OF)
@pytest.mark.parametrize("warps", [12, 16])
def test_larger_blocks_for_few_tokens_leave_a_multiprocessor_its_32_warps(warps, is_int8):
    for variant in variants.decode_variants(torch.bfloat16, is_int8, warps, 16):
        found = machine_code.resources(compiled(variant, "sm_90"))[variant.symbol]
        assert found.registers * 32 * 24 <= 1 << 16 and found.stack_bytes == 0


@pytest.mark.parametrize(
    ("is_int8", "size"), [(kind, size) for kind in FIGURES_OF_WGMMA for size in FIGURES_OF_WGMMA[kind]]
)
def test_products_of_warpgroups_run_while_weights_are_expanded(is_int8, size):
    """The compiler waits for them where the source does, twice in a tile, and spills no register."""
    registers, instructions = FIGURES_OF_WGMMA[is_int8][size]
    all_variants = wgmma.wgmma_variants(torch.bfloat16, is_int8)
    variant = next(one for one in all_variants if (one.tokens, one.row_blocks // 4) == size)
    cubin = compiled(variant, wgmma.ARCHITECTURE)
    found = machine_code.resources(cubin)
    assert found[variant.symbol].registers <= registers * TOLERANCE
    assert found[wgmma.add_variant(variant).symbol].registers <= REGISTERS_OF_ADD * TOLERANCE
    assert all(kernel.stack_bytes == 0 for kernel in found.values()), "registers are spilled"
    loop = min((loop for loop in machine_code.loops(cubin, variant.symbol) if any(map(is_product, loop))), key=len)
    waits = [one for one in loop if one.operation.startswith("WARPGROUP.DEPBAR")]
    assert sum(map(is_product, loop)) == 4 * max(1, variant.tokens // 128) and len(waits) == 2
    assert len(loop) / (TILE / 32) <= instructions * TOLERANCE


@pytest.mark.parametrize("is_int8", FIGURES_OF_WGMMA)
@pytest.mark.parametrize("dtype", variants.DTYPES)
def test_the_figures_of_warpgroups_are_of_all_variants(dtype, is_int8):
    sizes = [(variant.tokens, variant.row_blocks // 4) for variant in wgmma.wgmma_variants(dtype, is_int8)]
    assert sizes == list(FIGURES_OF_WGMMA[is_int8])


@every_figure_of_gemm
def test_instructions_and_registers_for_many_tokens_do_not_rise(arch, is_int8, tokens):
    registers, instructions = FIGURES_OF_GEMMS[is_int8][arch][tokens]
    variant = gemm_variant(torch.bfloat16, tokens, is_int8)
    cubin = compiled(variant, arch)
    found = machine_code.resources(cubin)
    assert found[variant.symbol].registers <= min(MOST_REGISTERS, registers * TOLERANCE)
    assert found[gemm.reduce_variant(variant).symbol].registers <= REGISTERS_OF_REDUCE * TOLERANCE
    assert all(kernel.stack_bytes == 0 for kernel in found.values()), "registers are spilled"
    assert instructions_per_weight(cubin, variant) <= instructions * TOLERANCE


@pytest.mark.parametrize("is_int8", FIGURES_OF_GEMMS)
@pytest.mark.parametrize("arch", FIGURES_OF_GEMM)
def test_the_larger_blocks_of_float16_spill_no_register_either(arch, is_int8):
    variant = gemm.gemm_variants(torch.float16, is_int8)[-1]
    assert machine_code.resources(compiled(variant, arch))[variant.symbol].stack_bytes == 0


@pytest.mark.parametrize("is_int8", FIGURES_OF_GEMMS)
@pytest.mark.parametrize("arch", FIGURES_OF_GEMM)
def test_weights_are_expanded_among_the_products(arch, is_int8):
    """At most an eighth of the products follow each other, so that one warp keeps both units busy."""
    variant = gemm.gemm_variants(torch.bfloat16, is_int8)[-1]
    kinds = list(map(is_product, main_loop(compiled(variant, arch), variant)))
    longest = max(len(list(run)) for kind, run in groupby(kinds) if kind)
    assert longest <= sum(kinds) / 8


@pytest.mark.parametrize("is_int8", FIGURES_OF)
@pytest.mark.parametrize("dtype", variants.DTYPES)
def test_the_figures_are_of_all_variants(dtype, is_int8):
    sizes = [(variant.tokens, variant.row_blocks) for variant in variants.decode_variants(dtype, is_int8)]
    assert all(list(figures) == sizes for figures in FIGURES_OF[is_int8].values())
    tokens = [variant.tokens for variant in gemm.gemm_variants(dtype, is_int8)]
    assert all(list(figures) == tokens for figures in FIGURES_OF_GEMMS[is_int8].values())


def test_decoding_for_few_tokens_is_within_the_budget():
    """Of issue slots while an H100 streams a weight of half density, and of registers for four blocks at a time."""
    for figures in (*FIGURES.values(), *FIGURES_OF_INT8.values()):
        for row_blocks in (1, 2):
            registers, instructions = figures[8, row_blocks]
            assert registers <= 64 and instructions <= 7.5


def test_a_spill_is_seen():
    source = """extern "C" __global__ void __launch_bounds__(1024) spilling(float* x) {
        float values[200];
        for (int i = 0; i < 200; i++) values[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < 200; i++) x[threadIdx.x * 200 + i] = values[199 - i] * values[i];
    }"""
    cubin = program.compile_cubin(source, "spilling.cu", {}, "sm_90")
    assert machine_code.resources(cubin)["spilling"].stack_bytes > 0
