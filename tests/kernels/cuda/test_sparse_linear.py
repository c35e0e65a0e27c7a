"""The CUDA kernels, on an emulation of the hardware, compute the sparse product to the last rounding.

EFX_EMULATED_CASES is the number of random cases.
"""

import os
import random
import shutil
from dataclasses import replace

import pytest
import torch

from efx_plugin.kernels.cuda import layout, variants
from efx_plugin.kernels.cuda.variants import DTYPES, Variant
from tests.support.emulated_gpu import EmulatedGpu, emulated_source
from tests.support.sparse_products import KINDS, MASKS, Case, is_near, padded, rounded, value

CASES = int(os.environ.get("EFX_EMULATED_CASES", "500"))
# All sizes of bfloat16, and of the other kinds every other one, each with another number of warps.
WARPS = (4, 6, 8, 12, 16)
VARIANTS = [
    (variants.decode_variants(*kind, WARPS[(index + shift) % (3 if size.tokens > 16 else 5)])[index], *kind)
    for shift, kind in enumerate(KINDS)
    for index, size in enumerate(variants.decode_variants(*kind))
    if kind == (torch.bfloat16, False) or index % 2 == shift % 2
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
every_kind = pytest.mark.parametrize(("dtype", "is_int8"), KINDS)


def variant_for(dtype: torch.dtype, tokens: int, is_int8: bool = False) -> Variant:
    return next(one for one in variants.decode_variants(dtype, is_int8) if tokens <= one.tokens)


def random_case(variant: Variant, dtype: torch.dtype, is_int8: bool, seed: int) -> Case:
    """One for the variant. Every third has more records than the rings have slots."""
    choose = random.Random(seed)
    columns = choose.randint(2048, 2560) if seed % 3 == 0 else choose.randint(1, 700)
    return Case(
        dtype,
        is_int8,
        tokens=choose.randint(variant.tokens // 2 + 1 if variant.tokens > 8 else 1, variant.tokens),
        rows=choose.randint(1, 16 * variant.row_blocks) if seed % 3 == 0 else choose.randint(1, 70),
        columns=choose.choice((columns, -(-columns // 64) * 64)),
        mask=choose.choice((*MASKS, "random", "random")),
        density=choose.choice((0.1, 0.4, 0.5, 0.6, 0.9)),
        biased=choose.random() < 0.5,
        at_once=choose.random() < 0.5,
        descending=choose.random() < 0.5,
        seed=seed,
    )


def check(gpu: EmulatedGpu, case: Case) -> None:
    """The product is the float64 one but for the rounding of each step of 16 columns in float32, and of the result; the
    expanded weight is the weight.
    """
    gpu.at_once, gpu.descending = case.at_once, case.descending
    x, weight, scales, bias = case.tensors()
    packed = (*layout.pack(weight), scales)
    y = gpu.decode(padded(x), packed, bias, case.rows)
    assert is_near(y, case, (x, weight, scales, bias), additions=case.columns / 16 + 16), case
    dense = gpu.expand(packed, case.dtype, (0, case.rows, padded(x).shape[1]))
    assert torch.equal(dense[:, : case.columns], rounded(weight, scales, case.dtype)), case
    assert not dense[:, case.columns :].any(), case


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_products_and_expansions_are_those_of_float64(gpus, number, part):
    variant, dtype, is_int8 = VARIANTS[number]
    for seed in range(4 * number + part, CASES, 4 * len(VARIANTS)):
        check(gpus(variant), random_case(variant, dtype, is_int8, seed))


@every_kind
def test_a_token_does_not_depend_on_its_batch(gpus, dtype, is_int8):
    """Nor on how many rows a block takes."""
    case = Case(dtype, is_int8, tokens=64, rows=20, columns=600)
    x, weight, scales, bias = case.tensors()
    packed = (*layout.pack(weight), scales)
    gpu = gpus(variant_for(dtype, 1, is_int8))
    alone = torch.cat([gpu.decode(padded(token[None]), packed, bias, case.rows) for token in x[:8]])
    for variant in variants.decode_variants(dtype, is_int8):
        for tokens in (variant.tokens // 2 + 1, variant.tokens):
            together = gpus(variant).decode(padded(x[:tokens]), packed, bias, case.rows)
            assert torch.equal(together[:8], alone[:tokens])


@every_kind
def test_what_is_no_number_stays_within_its_token_and_spreads_as_in_a_dense_product(gpus, dtype, is_int8):
    case = Case(dtype, is_int8, tokens=4, rows=20, columns=100)
    x, weight, scales, bias = case.tensors()
    x[1, 7], x[2, 99] = torch.nan, torch.inf
    if not is_int8:
        weight[3, 50] = -torch.inf
    packed = (*layout.pack(weight), scales)
    y = gpus(variant_for(dtype, 4, is_int8)).decode(padded(x), packed, bias, case.rows)
    dense = x.double() @ value(weight, scales).T + bias.double()
    assert torch.equal(y.isnan(), dense.isnan()) and torch.equal(y.isinf(), dense.isinf())


@every_kind
@pytest.mark.parametrize("panel", [(0, 48, 192), (16, 16, 192), (32, 10, 192), (48, 37, 192)])
def test_a_panel_is_those_rows(gpus, panel, dtype, is_int8):
    _, weight, scales, _ = Case(dtype, is_int8, tokens=1, rows=85, columns=150).tensors()
    first, rows, columns = panel
    gpu = gpus(variant_for(dtype, 1, is_int8))
    dense = gpu.expand((*layout.pack(weight), scales), dtype, panel)
    expected = torch.nn.functional.pad(rounded(weight, scales, dtype), (0, columns - 150))
    assert torch.equal(dense, expected[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_is_expanded_to_itself(gpus, dtype):
    weight = torch.arange(-128, 128).to(torch.int8).repeat(16).view(64, 64)
    packed = (*layout.pack(weight), torch.ones(64))
    gpu = gpus(variant_for(dtype, 64, is_int8=True))
    assert torch.equal(gpu.decode(torch.eye(64, dtype=dtype), packed, None, 64).T, weight.to(dtype))
    assert torch.equal(gpu.expand(packed, dtype, (0, 64, 64)), weight.to(dtype))


# What the emulation would not notice, the tests above would not either: so faults are planted.

MUTATIONS = {
    "one record too few is waited for": ("wait_copies<kStages - 1>", "wait_copies<kStages>"),
    "an expansion does not wait": ("wait_copies<0>();", "wait_copies<1>();"),
    "lanes do not wait for each other's copies": (
        "wait_copies<kStages - 1>();\n            __syncwarp();",
        "wait_copies<kStages - 1>();",
    ),
    "a record is copied to the slot that is read": ("copy_next(free_slot, lane)", "copy_next(slot, lane)"),
    "the slot that becomes free is not used": ("free_slot = slot;", ""),
    "the ring is one slot longer": ("slot = slot == last_slot ? ring :", "slot = slot > last_slot ? ring :"),
    "the ring is one slot shorter": ("slot == last_slot ? ring", "slot == last_slot - kSlotBytes ? ring"),
    "the rings of the warps overlap": ("warp * kRingBytes", "warp * (kRingBytes - kSlotBytes)"),
    "a pointer stands still": ("from += units, begin = end", "begin = end"),
    "a record has the length of all records so far": ("from += units, begin = end", "from += units"),
    "the activations stand still": ("x += tile + 1 < last ? 64 : 0", "x += 0"),
    "activations are read beyond the last": ("x += tile + 1 < last ? 64 : 0", "x += 64"),
    "tokens are read beyond the last": ("min(n * 8 + (int)g, tokens - 1)", "(n * 8 + (int)g)"),
    "rows are read beyond the last": (
        "min((int)blockIdx.x * kRowBlocks + r, high - 1)",
        "((int)blockIdx.x * kRowBlocks + r)",
    ),
    "records are read beyond the last": ("if (left > 0) end", "if (left > -2) end"),
    "dense records are cut off": ("units > 96", "units > 128"),
    "the longest record is cut off": ("if (mine > 128) copy16(slot + 2048, from + 128);", ""),
    "a lane's own bits count as those below": ("even_below -= even, odd_below -= odd;", ""),
    "the farthest lanes are not counted": ("add_from_below<16>(value);", ""),
    "offsets of steps are missing": ("places[1] = steps.y + 2", "places[1] = 2"),
    "an offset of lanes is missing": (
        "places[2] = steps.z + 2 * permute(even_below, odd_below, 0xE6A2)",
        "places[2] = steps.z",
    ),
    "bytes of counts are mistaken": ("0xD591", "0xD592"),
    "an upper byte is not cleared": ("0xC480", "0xC400"),
    "halves of a pair are swapped": (
        "permute(both, load16(record + place), 0x5410)",
        "permute(both, load16(record + place), 0x1054)",
    ),
    "registers of B are swapped": (
        "b.pairs[n][2 * s], b.pairs[n][2 * s + 1]",
        "b.pairs[n][2 * s + 1], b.pairs[n][2 * s]",
    ),
    "columns of a lane are mistaken": ("columns + 16 * t", "columns + 8 * t"),
    "registers of sums are mistaken": ("row_of_block / 8 * 2 + token % 2", "row_of_block / 8 + token % 2 * 2"),
    "owners of sums are mistaken": ("row_of_block % 8 * 4 + token % 8 / 2", "row_of_block % 8 + token % 8 / 2 * 8"),
    "a warp's sum is missing": ("w < kWarps; w++", "w < kWarps - 1; w++"),
    "sums are added before they are there": ("        __syncthreads();\n        for", "        for"),
    "sums are overwritten before they are added": ("        }\n        __syncthreads();", "        }"),
    "a last column is left out": ("(warp + 1) * wide / kWarps", "(warp + 1) * (wide / kWarps)"),
    "the bias is another row's": ("__ldg(bias + row)", "__ldg(bias + row_of_block)"),
    "rows are written beyond the last": (
        "if (token >= tokens || row >= rows) continue;",
        "if (token >= tokens) continue;",
    ),
    "tokens are written beyond the last": (
        "if (token >= tokens || row >= rows) continue;",
        "if (row >= rows) continue;",
    ),
    "a panel begins at the first row": ("(u64)first_row / 16 * wide + tile", "tile"),
    "rows of a panel are written beyond the last": ("if (row >= rows) continue;\n        if", "if"),
}
MUTATIONS_OF_INT8 = {
    "a scale is missing": ("if (EFX_INT8) sum *= kParts * __ldg(scales + row)", "if (EFX_INT8) sum *= kParts"),
    "a scale is another row's": ("__ldg(scales + row)", "__ldg(scales + row_of_block)"),
    "a part is taken for the whole": ("sum *= kParts * __ldg", "sum *= __ldg"),
    "the bias is scaled": (
        "            if (EFX_INT8) sum *= kParts * __ldg(scales + row);\n"
        "            if (bias) sum += to_float(__ldg(bias + row));",
        "            if (bias) sum += to_float(__ldg(bias + row));\n"
        "            if (EFX_INT8) sum *= kParts * __ldg(scales + row);",
    ),
    "a panel is not scaled": (
        "const float scale = kParts * __ldg(scales + first_row + row)",
        "const float scale = kParts",
    ),
    "a panel has the scales of the first rows": ("__ldg(scales + first_row + row)", "__ldg(scales + row)"),
    "the second of two weights is not scaled": ("round_to_16_bits(scale * to_float(pair >> 16))", "(pair >> 16)"),
    "a record is longer than its slot": ("1024 * kValueBytes + 15", "1008 * kValueBytes"),
    "counts of bits overflow": ("(counts + (counts >> 4)) & 0x0F0F0F0F", "(counts + (counts >> 4)) & 0x07070707"),
    "a lane's own bits count as those below": ("        below -= counts;", ""),
    "the farthest lanes are not counted": ("add_from_below<16>(value);", ""),
    "an offset of a step is missing": ("load32(record + kMaskBytes + 4) + permute", "permute"),
    "an offset of lanes is missing": (" + permute(below, 0, 0x4342)", ""),
    "bytes are not aligned": ("load32(word), middle, 8 * place", "load32(word), middle, 0"),
    "the third word is not read": ("load32(word + 8), 8 * place", "middle, 8 * place"),
    "bytes that are used come again": ("spread >> 16", "0"),
    "four bytes that are used come again": ("__funnelshift_rc", "__funnelshift_r"),
    "bits of the lane are mistaken": ("lane >> i & 1", "lane >> (i + 1) & 1"),
    "the first four bits are those of the second": ("spreading, mask >> i);", "spreading, mask >> (i + 4));"),
    "the second four bits are those of the first": ("spreading, mask >> i));", "spreading, mask >> (i - 4)));"),
    "weights that are not stored are no zeros": ("kZeros = 0x80808080", "kZeros = 0"),
    "halves of a pair are swapped": ("0x4140 : 0x4342;", "0x4041 : 0x4243;"),
    "both pairs are the first": ("0x4140 : 0x4342;", "0x4140 : 0x4140;"),
    "integers are without sign": ("0x7F007F00, 0xC000C000", "0x7F007F00, 0"),
    "integers are doubled": ("0x7F007F00, 0xC000C000", "0x7F807F80, 0xC080C080"),
}
PROBES = (
    Case(torch.bfloat16, False, tokens=27, rows=45, columns=2112),
    Case(torch.bfloat16, False, tokens=32, rows=32, columns=2560, at_once=True, descending=True),
    Case(torch.bfloat16, False, tokens=17, rows=40, columns=450, mask="blocks", at_once=True),
    Case(torch.bfloat16, False, tokens=20, rows=16, columns=64, density=0.85, descending=True),
)
PLANTED = [
    *(
        (is_int8, mutation)
        for is_int8, mutations in ((False, MUTATIONS), (True, MUTATIONS_OF_INT8))
        for mutation in mutations
    )
]


def probe(gpu: EmulatedGpu, is_int8: bool) -> None:
    """All probes, and a panel."""
    cases = [replace(case, is_int8=is_int8) for case in PROBES]
    for case in cases:
        check(gpu, case)
    _, weight, scales, _ = cases[0].tensors()
    panel = gpu.expand((*layout.pack(weight), scales), cases[0].dtype, (16, 20, 2112))
    assert torch.equal(panel, rounded(weight, scales, cases[0].dtype)[16:36])


@pytest.mark.parametrize("is_int8", [False, True])
def test_probes_pass_without_a_mutation(gpus, is_int8):
    probe(gpus(variant_for(torch.bfloat16, 32, is_int8)), is_int8)


@pytest.mark.parametrize(("is_int8", "mutation"), PLANTED)
def test_a_planted_fault_is_caught(tmp_path, is_int8, mutation):
    before, after = (MUTATIONS_OF_INT8 if is_int8 else MUTATIONS)[mutation]
    mutated = variant_for(torch.bfloat16, 32, is_int8)
    source = emulated_source(mutated)
    assert source.count(before) == 1
    gpu = EmulatedGpu(mutated, tmp_path, source.replace(before, after), optimize="-O1")
    with pytest.raises(AssertionError):
        probe(gpu, is_int8)
