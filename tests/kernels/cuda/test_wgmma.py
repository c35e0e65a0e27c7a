"""The CUDA kernel for many tokens on compute capability 9.0, on an emulation of the hardware, computes the sparse
product to the last rounding.

There is a fifth of EFX_EMULATED_CASES random cases of it.
"""

import os
import random
import shutil
from dataclasses import replace

import pytest
import torch

from efx_plugin.kernels.cuda import variants, wgmma
from efx_plugin.kernels.cuda.variants import Variant
from tests.support.emulated_gpu import EmulatedGpu, emulated_source
from tests.support.sparse_products import KINDS, value
from tests.support.split_products import SplitCase, check, multiply, random_split_case

CASES = int(os.environ.get("EFX_EMULATED_CASES", "500")) // 5
# All of bfloat16; of the other kinds one of each number of tokens.
VARIANTS = [
    (variant, *kind)
    for kind in KINDS
    for variant in wgmma.wgmma_variants(*kind)[:: 1 if kind == (torch.bfloat16, False) else 3]
]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
every_kind = pytest.mark.parametrize(("dtype", "is_int8"), KINDS)


def random_case(variant: Variant, dtype: torch.dtype, is_int8: bool, seed: int) -> SplitCase:
    """Every other one has more tiles than a block has stages."""
    choose = random.Random(seed)
    columns = choose.randint(64 * variant.stages, 64 * variant.stages + 400) if seed % 2 else choose.randint(1, 400)
    tokens = choose.randint(1, variant.tokens + variant.tokens // 4)
    rows = choose.choice((choose.randint(1, 48), choose.randint(1, 300), 8 * choose.randint(1, 20)))
    return random_split_case(choose, dtype, is_int8, tokens, rows, columns, seed)


@needs_compiler
@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_products_are_those_of_float64(gpus, number):
    variant, dtype, is_int8 = VARIANTS[number]
    for seed in range(number, max(CASES, number + 1), len(VARIANTS)):
        check(gpus(variant), random_case(variant, dtype, is_int8, seed))


@needs_compiler
@every_kind
@pytest.mark.parametrize("splits", [1, 3])
def test_a_token_depends_neither_on_its_batch_nor_on_the_variant(gpus, dtype, is_int8, splits):
    case = SplitCase(dtype, is_int8, tokens=150, rows=40, columns=600, splits=splits)
    x, *others = case.tensors()
    first, *rest = wgmma.wgmma_variants(dtype, is_int8)
    whole = multiply(gpus(first), case, x, others)
    for variant in rest[::3]:
        for begin, end in ((0, 150), (3, 68), (149, 150)):
            assert torch.equal(multiply(gpus(variant), case, x[begin:end], others), whole[begin:end])


@needs_compiler
@every_kind
@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_no_number_stays_within_its_token_and_spreads_as_in_a_dense_product(gpus, dtype, is_int8, splits):
    case = SplitCase(dtype, is_int8, tokens=70, rows=20, columns=100, splits=splits)
    x, weight, scales, bias = case.tensors()
    x[1, 7], x[69, 99] = torch.nan, torch.inf
    if not is_int8:
        weight[3, 50] = -torch.inf
    y = multiply(gpus(wgmma.wgmma_variants(dtype, is_int8)[0]), case, x, (weight, scales, bias))
    dense = x.double() @ value(weight, scales).T + bias.double()
    assert torch.equal(y.isnan(), dense.isnan()) and torch.equal(y.isinf(), dense.isinf())


# Which variant, how many splits, and whether they fit.


@every_kind
def test_blocks_fit_the_device(dtype, is_int8):
    for variant in wgmma.wgmma_variants(dtype, is_int8):
        assert wgmma.shared_bytes(variant) <= 227 << 10 and variant.stages >= 3
        assert variant.warps * 32 <= 1024
        registers = dict(variant.defines)["EFX_REGISTERS"]
        assert 128 * (registers * variant.row_blocks // 4 + 24) <= 1 << 16  # of a multiprocessor


@pytest.mark.parametrize(
    "shape", [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1, 64), (33, 200), (16, 8192)]
)
@pytest.mark.parametrize("tokens", [17, 32, 33, 65, 128, 129, 256, 1000, 5000])
def test_splits_are_those_that_run_at_once_and_their_sums_fit_into_the_buffer(shape, tokens):
    rows, columns = shape
    plan = wgmma.plan(wgmma.wgmma_variants(torch.bfloat16), tokens, rows, columns, 132)
    blocks = plan.wgmma.grid // plan.splits
    assert blocks * plan.variant.tokens * plan.variant.row_blocks * 16 >= tokens * rows
    assert 1 <= plan.splits <= max(1, columns // 64 // 4)
    assert (plan.add is None) == (plan.splits == 1)
    if plan.splits > 1:
        assert plan.wgmma.grid <= 132
        assert wgmma.partial_bytes(plan.variant, tokens, rows, plan.splits) <= variants.PANEL_BYTES


# Measured on an H100: of all variants and splits the fastest, or one within 5 % of it.
FASTEST = {
    (64, 28672, 4096): (64, 4, 1),
    (128, 28672, 4096): (128, 4, 1),
    (256, 28672, 4096): (256, 2, 1),
    (64, 6144, 4096): (64, 3, 4),
    (128, 6144, 4096): (128, 3, 4),
    (64, 4096, 4096): (64, 2, 4),
    (128, 4096, 4096): (128, 2, 4),
    (256, 4096, 14336): (256, 2, 4),
    (512, 4096, 14336): (256, 2, 2),
}


@pytest.mark.parametrize("sizes", FASTEST)
def test_the_plan_is_the_one_that_was_fastest(sizes):
    plan = wgmma.plan(wgmma.wgmma_variants(torch.bfloat16), *sizes, 132)
    assert (plan.variant.tokens, plan.variant.row_blocks // 4, plan.splits) == FASTEST[sizes]


# What the emulation would not notice, the tests above would not either: so faults are planted.

MUTATED = (64, 2)  # tokens, groups
MUTATIONS = {
    "a stage is taken before it is full": ("wait_barrier(full + 8 * stage, parity);", ""),
    "a stage is filled before it is free": ("wait_barrier(empty + 8 * stage, parity);", ""),
    "a stage is free too early": (
        "half == 0 && tile > first && lane == 0) arrive(empty + 8 * before)",
        "half == 0 && lane == 0) arrive(empty + 8 * stage)",
    ),
    "products are not waited for": ("wait_products<1>();", "wait_products<2>();"),
    "the last products are not waited for": ("wait_products<0>();", ""),
    "stages begin with the wrong parity": ("u32 parity = 1;", "u32 parity = 0;"),
    "parity does not change where stages are filled": (
        "stage = 0, parity ^= 1;\n            }",
        "stage = 0;\n            }",
    ),
    "parity does not change where stages are taken": ("stage = 0, parity ^= 1;\n    }", "stage = 0;\n    }"),
    "not all warps are waited for": ("init_barrier(empty + 8 * i, kWarps)", "init_barrier(empty + 8 * i, kWarps / 2)"),
    "activations are not expected": ("init_barrier(full + 8 * i, kWarps + 1)", "init_barrier(full + 8 * i, kWarps)"),
    "the slots of the warps overlap": ("own = slots + warp * kStages * kSlotBytes", "own = slots + warp * kSlotBytes"),
    "a pointer stands still": ("from += units;", ""),
    "a record has the length of all records so far": ("units = end - begin, begin = end;", "units = end - begin;"),
    "an end is not read": ("if (tile + 1 < last) end", "if (tile < first) end"),
    "an end is read beyond the last": ("if (tile + 1 < last) end", "if (tile < last + 64) end"),
    "rows are read beyond the last": ("min(place.row_block + (int)lane, high - 1)", "(place.row_block + (int)lane)"),
    "warps take the same rows": (
        "const u32* ends = starts + (u64)block",
        "const u32* ends = starts + (u64)place.row_block",
    ),
    "a last column is left out": ("(split + 1) * wide / splits", "(split + 1) * (wide / splits)"),
    "a split begins too early": ("first = split * wide / splits", "first = split * (wide / splits)"),
    "the records of a split begin at the first": ("(u64)block * wide + first;", "(u64)block * wide;"),
    "the activations of a split begin at the first": (
        "place.token_block * wide + first) * units",
        "place.token_block * wide) * units",
    ),
    "activations are of the first tokens": ("((u64)place.token_block * wide + first) * units", "first * units"),
    "steps are mistaken": ("32 * (2 * half + s)", "32 * (half + 2 * s)"),
    "registers of A are mistaken": ("a[half][i / 4][i % 4] =", "a[half][i / 4][i % 4 ^ 1] ="),
    "a half is expanded twice": ("weights.pair(16 * half + 2 * i)", "weights.pair(2 * i)"),
    "the stage of the activations is the first": ("tiles + stage * kTileBytes", "tiles"),
    "units are not swizzled": ("(unit ^ token % 8)", "unit"),
    "columns are in order": (
        "{__ldg(from), __ldg(from + 8), __ldg(from + 16)",
        "{__ldg(from), __ldg(from + 16), __ldg(from + 8)",
    ),
    "tokens beyond the last are read": ("    if (token < tokens) {\n", "    if (token < across * kTokens) {\n"),
    "tiles are mistaken": ("tile * 64 + 2 * unit", "tile * 64 + unit"),
    "owners of sums are mistaken": ("(i / 4 * 8 + 2 * t + i % 2) * kPitch", "(i / 4 * 8 + t + i % 2 * 4) * kPitch"),
    "rows of sums are mistaken": ("2 * (g + i / 2 % 2 * 8)", "2 * (g + i % 2 * 8)"),
    "results are read before they are there": ("i / 2 % 2));\n        __syncwarp();", "i / 2 % 2));"),
    "the bias is another row's": ("__ldg(bias + row + 8 * i)", "__ldg(bias + row)"),
    "the bias is left out": ("* scales[i] + added[i])", "* scales[i])"),
    "rows are written beyond the last": ("|| first_row >= rows) continue", ") continue"),
    "tokens are written beyond the last": ("if (of_all >= tokens ||", "if ("),
    "a last row is left out": ("min(8, rows - first_row)", "min(7, rows - first_row)"),
    "warps leave their sums in one place": ("((u64)blockIdx.x * kWarps + warp)", "((u64)blockIdx.x * kWarps)"),
    "a split is not added": ("split < splits;", "split < splits - 1;"),
    "one split is added for the others": ("        partial += (u64)place.blocks", "        (u64)place.blocks"),
    "pieces are mistaken": ("* kPieces + part) * (4 * 32)", "* kPieces) * (4 * 32)"),
    "added rows are written beyond the last": ("of_all < tokens && own_row < rows", "of_all < tokens"),
    "added tokens are written beyond the last": ("of_all < tokens && own_row < rows", "own_row < rows"),
}
MUTATIONS_OF_INT8 = {
    "scales are left out": ("sum * scales[i] + added[i]", "sum + added[i]"),
    "a scale is another row's": ("__ldg(of_rows + row + 8 * i)", "__ldg(of_rows + row)"),
    "a part is taken for the whole": ("kParts * __ldg", "__ldg"),
}
PROBES = (
    SplitCase(torch.bfloat16, False, tokens=70, rows=45, columns=900, splits=1),
    SplitCase(torch.bfloat16, False, tokens=65, rows=150, columns=850, splits=3, descending=True),
    SplitCase(torch.bfloat16, False, tokens=64, rows=136, columns=1024, splits=1, at_once=True, descending=True),
    SplitCase(torch.bfloat16, False, tokens=35, rows=40, columns=130, splits=2, mask="blocks", at_once=True),
)
PLANTED = [*((False, one) for one in MUTATIONS), *((True, one) for one in MUTATIONS_OF_INT8)]


def mutated(is_int8: bool) -> Variant:
    all_variants = wgmma.wgmma_variants(torch.bfloat16, is_int8)
    return next(one for one in all_variants if (one.tokens, one.row_blocks // 4) == MUTATED)


def probe(gpu: EmulatedGpu, is_int8: bool) -> None:
    for case in PROBES:
        check(gpu, replace(case, is_int8=is_int8))


@needs_compiler
@pytest.mark.parametrize("is_int8", [False, True])
def test_probes_pass_without_a_mutation(gpus, is_int8):
    probe(gpus(mutated(is_int8)), is_int8)


@needs_compiler
@pytest.mark.parametrize(("is_int8", "mutation"), PLANTED)
def test_a_planted_fault_is_caught(tmp_path, is_int8, mutation):
    before, after = (MUTATIONS_OF_INT8 if is_int8 else MUTATIONS)[mutation]
    source = emulated_source(mutated(is_int8))
    assert source.count(before) == 1
    gpu = EmulatedGpu(mutated(is_int8), tmp_path, source.replace(before, after), optimize="-O1")
    with pytest.raises(AssertionError):
        probe(gpu, is_int8)
