"""The CUDA kernels for many tokens, on an emulation of the hardware, compute the sparse product to the last rounding.

There are two fifths of EFX_EMULATED_CASES random cases of theirs.
"""

import os
import random
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from efx_plugin.kernels.cuda import gemm, variants
from efx_plugin.kernels.cuda.variants import Variant
from tests.support.emulated_gpu import EmulatedGpu, emulated_source
from tests.support.sparse_products import KINDS, value
from tests.support.split_products import SplitCase, check, multiply, random_split_case

CASES = 2 * int(os.environ.get("EFX_EMULATED_CASES", "500")) // 5
VARIANTS = [(variant, *kind) for kind in KINDS for variant in gemm.gemm_variants(*kind)]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
every_kind = pytest.mark.parametrize(("dtype", "is_int8"), KINDS)


def random_case(variant: Variant, dtype: torch.dtype, is_int8: bool, seed: int) -> SplitCase:
    choose = random.Random(seed)
    columns = choose.randint(1, 900)
    tokens = choose.randint(1, variant.tokens + variant.tokens // 2)
    rows = choose.choice((choose.randint(1, 48), choose.randint(1, 300)))
    return random_split_case(choose, dtype, is_int8, tokens, rows, columns, seed)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_products_are_those_of_float64(gpus, number, part):
    variant, dtype, is_int8 = VARIANTS[number]
    for seed in range(4 * number + part, CASES, 4 * len(VARIANTS)):
        check(gpus(variant), random_case(variant, dtype, is_int8, seed))


@every_kind
@pytest.mark.parametrize("splits", [1, 3])
def test_a_token_depends_neither_on_its_batch_nor_on_the_variant(gpus, dtype, is_int8, splits):
    case = SplitCase(dtype, is_int8, tokens=200, rows=40, columns=600, splits=splits)
    x, *others = case.tensors()
    all_variants = gemm.gemm_variants(dtype, is_int8)
    whole = multiply(gpus(all_variants[0]), case, x, others)
    for variant in all_variants:
        for first, last in ((0, 200), (0, 1), (3, 68), (50, 179), (199, 200)):
            assert torch.equal(multiply(gpus(variant), case, x[first:last], others), whole[first:last])


@every_kind
@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_no_number_stays_within_its_token_and_spreads_as_in_a_dense_product(gpus, dtype, is_int8, splits):
    case = SplitCase(dtype, is_int8, tokens=70, rows=20, columns=100, splits=splits)
    x, weight, scales, bias = case.tensors()
    x[1, 7], x[69, 99] = torch.nan, torch.inf
    if not is_int8:
        weight[3, 50] = -torch.inf
    y = multiply(gpus(gemm.gemm_variants(dtype, is_int8)[0]), case, x, (weight, scales, bias))
    dense = x.double() @ value(weight, scales).T + bias.double()
    assert torch.equal(y.isnan(), dense.isnan()) and torch.equal(y.isinf(), dense.isinf())


@pytest.mark.parametrize("variant", gemm.gemm_variants(torch.bfloat16))
@pytest.mark.parametrize("splits", [1, 2])
def test_no_bank_of_shared_memory_is_needed_twice_at_a_time(gpus, variant, splits):
    """But where non-zeros are read, whose places are random."""
    of_gemm = {} if splits == 2 else {"load128": 1, "copy16": 1}  # with two, `reduce` comes last
    assert worst_of_bank(gpus(variant), variant, splits) == of_gemm | {"store32": 1, "load32": 1}


BANKS = {
    "units are not swapped": (("16 * (unit ^ token % 2)", "16 * unit"), ("16 * (2 * t ^ g % 2)", "16 * (2 * t)")),
    "no distance between tokens": (("4 * (kRowBlocks * 16 + 4)", "4 * kRowBlocks * 16"),),
}


@pytest.mark.parametrize("change", BANKS)
def test_a_bank_that_is_needed_twice_at_a_time_is_seen(tmp_path, change):
    variant = MUTATED
    source = emulated_source(variant)
    for before, after in BANKS[change]:
        assert source.count(before) == 1
        source = source.replace(before, after)
    assert max(worst_of_bank(EmulatedGpu(variant, tmp_path, source), variant, 1).values()) > 1


def worst_of_bank(gpu: EmulatedGpu, variant: Variant, splits: int) -> dict[str, int]:
    gpu.is_watched = True
    case = SplitCase(torch.bfloat16, False, tokens=variant.tokens, rows=130, columns=300, splits=splits)
    check(gpu, case)
    gpu.is_watched = False
    return gpu.worst_of_bank()


# Which variant, how many splits, and whether they fit.

SHARED_KIB = {
    "sm_80": 164,
    "sm_86": 100,
    "sm_89": 100,
    "sm_90": 228,
    "sm_100": 228,
    "sm_120": 100,
}  # of a multiprocessor


@dataclass
class Properties:
    multi_processor_count: int
    shared_memory_per_multiprocessor: int


@every_kind
@pytest.mark.parametrize("arch", SHARED_KIB)
def test_blocks_fit_every_device(dtype, is_int8, arch):
    all_variants = gemm.gemm_variants(dtype, is_int8)
    at_once = gemm.blocks_at_once(all_variants, Properties(10, SHARED_KIB[arch] << 10))
    assert at_once == (10 if SHARED_KIB[arch] == 100 else 20)
    for variant in all_variants:
        for one in (variant, gemm.reduce_variant(variant)):
            assert gemm.shared_bytes(one) + 1024 <= SHARED_KIB[arch] << 10 and gemm.shared_bytes(one) <= 99 << 10


@pytest.mark.parametrize(
    "shape", [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1, 64), (33, 200), (16, 8192)]
)
@pytest.mark.parametrize("tokens", [1, 65, 96, 97, 128, 200, 257, 1000, 5000])
def test_splits_keep_the_device_busy_and_their_sums_fit_into_the_buffer(shape, tokens):
    rows, columns = shape
    plan = gemm.plan(gemm.gemm_variants(torch.bfloat16), tokens, rows, columns, 264)
    blocks = plan.gemm.grid // plan.splits
    assert blocks * plan.variant.tokens * 128 >= tokens * rows
    assert 1 <= plan.splits <= max(1, columns // 64 // 4)
    assert (plan.reduce is None) == (plan.splits == 1)
    if plan.splits > 1:
        assert plan.gemm.grid <= 264
        assert gemm.partial_bytes(plan.variant, tokens, rows, plan.splits) <= variants.PANEL_BYTES
    one_more = gemm.partial_bytes(plan.variant, tokens, rows, plan.splits + 1)
    assert (
        blocks * (plan.splits + 1) > 264 or one_more > variants.PANEL_BYTES or (plan.splits + 1) * 4 > -(-columns // 64)
    )


def test_the_variant_is_the_one_that_takes_less_work():
    all_variants = gemm.gemm_variants(torch.bfloat16)
    chosen = {tokens: gemm.plan(all_variants, tokens, 4096, 4096, 264).variant.tokens for tokens in range(65, 2000)}
    assert {chosen[tokens] for tokens in (65, 96, 129, 192, 288)} == {96}
    assert {chosen[tokens] for tokens in (97, 128, 193, 256, 1024)} == {128}


# What the emulation would not notice, the tests above would not either: so faults are planted.

MUTATED = gemm.gemm_variants(torch.bfloat16)[0]
MUTATIONS = {
    "a record is not waited for": ("wait_copies<1>();\n                __syncwarp", "wait_copies<2>();\n__syncwarp"),
    "the first records are not waited for": ("left);\n    wait_copies<1>();", "left);\n    wait_copies<3>();"),
    "activations are not waited for": ("wait_copies<kRowBlocks>();", "wait_copies<kRowBlocks + 1>();"),
    "warps do not wait for each other's copies": ("        __syncthreads();  // this", "// this"),
    "lanes do not wait for each other's copies": (
        "wait_copies<1>();\n                __syncwarp();",
        "wait_copies<1>();",
    ),
    "lanes do not wait for each other's first copies": ("wait_copies<1>();\n    __syncwarp();", "wait_copies<1>();"),
    "a record is copied to the slot that is read": ("copy_next(free_slots + r", "copy_next(slots + r"),
    "the slots that become free are not used": ("next_slots = free_slots;", ""),
    "slots without a record are read": ("slots = tile + 1 < last ? next_slots : slots;", "slots = next_slots;"),
    "the rings of the warps overlap": ("warp * 2 * kPairBytes", "warp * kPairBytes"),
    "the records of a warp overlap": ("next_slots = ring + kPairBytes", "next_slots = ring + kSlotBytes"),
    "the stage that becomes free is not used": ("stage = next_stage, next_stage = free_stage;", "stage = next_stage;"),
    "activations are copied to the stage that is read": ("copy_activations(next_stage", "copy_activations(stage"),
    "units are not swapped when copied": ("16 * (unit ^ token % 2)", "16 * unit"),
    "units are not swapped when read": ("16 * (2 * t ^ g % 2)", "16 * (2 * t)"),
    "the second half is the first": ("(units ^ 16 * half)", "units"),
    "the activations stand still": ("x += 64;", ""),
    "activations are read beyond the last": ("tile + 1 < last ? left : 0", "left"),
    "tokens are read beyond the last": ("if (token + i * 4 * kWarps < tokens)", ""),
    "tokens of a block begin at the first": ("(place.token + threadIdx.x / 8)", "(threadIdx.x / 8)"),
    "rows are read beyond the last": ("min(place.row_block + r, high - 1)", "(place.row_block + r)"),
    "warps take the same rows": ("/ across * kWarps + warp)", "/ across * kWarps)"),
    "a last column is left out": ("(split + 1) * wide / splits", "(split + 1) * (wide / splits)"),
    "a split begins too early": ("first = split * wide / splits", "first = split * (wide / splits)"),
    "the records of a split begin at the first": ("* wide + first, records", "* wide, records"),
    "the activations of a split begin at the first": ("+ first * 64", ""),
    "registers of B are swapped": ("b.x, b.y", "b.y, b.x"),
    "fragments are mistaken": ("a[half][r][1], b.z", "a[half][r][0], b.z"),
    "registers of A are mistaken": ("[p / 2 % 4] =", "[p / 2 % 4 ^ 1] ="),
    "row blocks are mistaken": ("[p % 2][p / 8]", "[1 - p % 2][p / 8]"),
    "a half is expanded twice": ("16 * (1 - half) + p", "16 * half + p"),
    "a pair is not expanded": ("p < (n + 1) * 16 / kTokenTiles", "p < (n + 1) * 15 / kTokenTiles"),
    "owners of sums are mistaken": ("8 * n + 2 * t + i % 2", "8 * n + t + i % 2 * 4"),
    "rows of sums are mistaken": ("8 * (i / 2) + g", "8 * (i % 2) + g"),
    "sums are read before they are there": ("    __syncwarp();\n    static_assert", "    static_assert"),
    "sums are overwritten before they are read": ("% 4;\n    __syncwarp();", "% 4;"),
    "sums are written to the first tokens": ("(u16*)out, place.token + 8 * n", "(u16*)out, place.token"),
    "the bias is another row's": ("__ldg(bias + row)", "__ldg(bias + lane)"),
    "the bias is left out": ("* scale + added)", "* scale)"),
    "rows are written beyond the last": ("if (row >= rows) return;", ""),
    "tokens are written beyond the last": (" && token + i < tokens", ""),
    "warps leave their sums in one place": ("((u64)blockIdx.x * kWarps + warp)", "((u64)blockIdx.x * kWarps)"),
    "row blocks leave their sums in one place": ("partial[(n * kRowBlocks + r) * 32]", "partial[n * kRowBlocks * 32]"),
    "a split is not added": ("split < splits;", "split < splits - 1;"),
    "one split is added for the others": ("    partial += (u64)place.blocks", "    (u64)place.blocks"),
    "the first sums are added for the others": ("kTokenTiles + n) * (kRow", "kTokenTiles) * (kRow"),
    "added sums are written to the first tokens": (
        "own, scales, bias, y, place.token + 8 * n",
        "own, scales, bias, y, place.token",
    ),
}
MUTATIONS_OF_INT8 = {
    "scales are left out": ("* scale + added)", "+ added)"),
    "the bias is scaled": (
        "load32(ring + i * kPitch + 4 * lane)) * scale + added",
        "load32(ring + i * kPitch + 4 * lane)) * scale + added * scale",
    ),
    "a scale is another row's": ("__ldg(scales + row)", "__ldg(scales + lane)"),
    "a part is taken for the whole": ("kParts * __ldg", "__ldg"),
}
PROBES = (
    SplitCase(torch.bfloat16, False, tokens=130, rows=45, columns=450, splits=1),
    SplitCase(torch.bfloat16, False, tokens=75, rows=150, columns=700, splits=3, descending=True),
    SplitCase(torch.bfloat16, False, tokens=96, rows=128, columns=384, splits=1, at_once=True, descending=True),
    SplitCase(torch.bfloat16, False, tokens=99, rows=40, columns=130, splits=3, mask="blocks", at_once=True),
)


PLANTED = [*((False, one) for one in MUTATIONS), *((True, one) for one in MUTATIONS_OF_INT8)]


def probe(gpu: EmulatedGpu, is_int8: bool) -> None:
    for case in PROBES:
        check(gpu, replace(case, is_int8=is_int8))


@pytest.mark.parametrize("is_int8", [False, True])
def test_probes_pass_without_a_mutation(gpus, is_int8):
    probe(gpus(gemm.gemm_variants(torch.bfloat16, is_int8)[0]), is_int8)


@pytest.mark.parametrize(("is_int8", "mutation"), PLANTED)
def test_a_planted_fault_is_caught(tmp_path, is_int8, mutation):
    before, after = (MUTATIONS_OF_INT8 if is_int8 else MUTATIONS)[mutation]
    variant = gemm.gemm_variants(torch.bfloat16, is_int8)[0]
    source = emulated_source(variant)
    assert source.count(before) == 1
    gpu = EmulatedGpu(variant, tmp_path, source.replace(before, after), optimize="-O1")
    with pytest.raises(AssertionError):
        probe(gpu, is_int8)
