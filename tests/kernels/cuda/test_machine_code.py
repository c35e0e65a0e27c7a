"""The CUDA kernels compile for every architecture, and to no more instructions and registers than they once did.

Compiling needs NVRTC, and no GPU.
"""

from functools import cache
from itertools import groupby

import pytest
import torch

from efx_plugin.kernels.cuda import gemm, program, variants
from efx_plugin.kernels.cuda.layout import TILE
from efx_plugin.kernels.cuda.variants import Variant
from tests.support import machine_code

# Registers per thread, and instructions per weight in the main loop, of `decode` by architecture and most tokens.
# Compiled by NVRTC 13.0.88.
FIGURES = {
    "sm_80": {8: (40, 6.53), 16: (48, 7.63), 32: (112, 7.13), 64: (239, 7.57)},
    "sm_86": {8: (40, 6.53), 16: (48, 7.69), 32: (112, 7.13), 64: (239, 7.57)},
    "sm_89": {8: (40, 6.53), 16: (48, 7.69), 32: (112, 7.13), 64: (239, 7.57)},
    "sm_90": {8: (40, 6.56), 16: (48, 7.59), 32: (113, 7.14), 64: (242, 7.59)},
    "sm_100": {8: (40, 7.06), 16: (48, 7.56), 32: (117, 7.38), 64: (246, 7.89)},
    "sm_120": {8: (42, 6.78), 16: (48, 7.34), 32: (118, 7.39), 64: (244, 8.21)},
}
FIGURES_OF_INT8 = {
    "sm_80": {8: (40, 6.28), 16: (48, 7.31), 32: (117, 6.52), 64: (169, 7.66)},
    "sm_86": {8: (40, 6.28), 16: (48, 7.31), 32: (117, 6.52), 64: (169, 7.66)},
    "sm_89": {8: (40, 6.28), 16: (48, 7.31), 32: (117, 6.52), 64: (169, 7.66)},
    "sm_90": {8: (40, 5.44), 16: (48, 5.84), 32: (121, 6.23), 64: (169, 7.48)},
    "sm_100": {8: (32, 5.91), 16: (48, 6.16), 32: (116, 6.38), 64: (182, 7.05)},
    "sm_120": {8: (40, 5.69), 16: (48, 5.91), 32: (112, 6.33), 64: (182, 7.30)},
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
TOLERANCE = 1.10
MOST_REGISTERS = 255  # of a thread

every_figure = pytest.mark.parametrize(
    ("arch", "is_int8", "tokens"),
    [(arch, is_int8, tokens) for is_int8 in FIGURES_OF for arch in FIGURES for tokens in FIGURES_OF[is_int8][arch]],
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
    return instruction.operation.startswith("HMMA")


@every_figure
def test_instructions_and_registers_do_not_rise(arch, is_int8, tokens):
    registers, instructions = FIGURES_OF[is_int8][arch][tokens]
    variant = variants.decode_variant(torch.bfloat16, tokens, is_int8)
    cubin = compiled(variant, arch)
    found = machine_code.resources(cubin)
    assert found[variant.symbol].registers <= min(MOST_REGISTERS, registers * TOLERANCE)
    assert found[variants.expand_variant(torch.bfloat16, is_int8).symbol].registers <= REGISTERS_OF_EXPAND * TOLERANCE
    assert all(kernel.stack_bytes == 0 for kernel in found.values()), "registers are spilled"
    assert instructions_per_weight(cubin, variant) <= instructions * TOLERANCE


@every_figure
def test_float16_needs_what_bfloat16_does(arch, is_int8, tokens):
    variant = variants.decode_variant(torch.float16, tokens, is_int8)
    found = machine_code.resources(compiled(variant, arch))[variant.symbol]
    assert found.registers <= FIGURES_OF[is_int8][arch][tokens][0] * TOLERANCE and found.stack_bytes == 0


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
    for figures_of, all_variants in (
        (FIGURES_OF[is_int8], variants.decode_variants(dtype, is_int8)),
        (FIGURES_OF_GEMMS[is_int8], gemm.gemm_variants(dtype, is_int8)),
    ):
        tokens = [variant.tokens for variant in all_variants]
        assert all(list(figures) == tokens for figures in figures_of.values())


def test_decoding_for_few_tokens_is_within_the_budget():
    """Of issue slots while an H100 streams a weight of half density, and of registers for four blocks at a time."""
    for figures in (*FIGURES.values(), *FIGURES_OF_INT8.values()):
        registers, instructions = figures[8]
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
