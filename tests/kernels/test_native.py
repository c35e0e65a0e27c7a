"""The compiled kernels compute the sparse product to the last rounding, in every instruction set of this processor."""

import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efx_plugin.kernels import native, registry
from tests.support.native_calls import (
    ALL,
    DTYPES,
    HEADER,
    ISAS,
    KINDS,
    make_weight,
)
from tests.support.products import expected, scaled

pytestmark = pytest.mark.skipif(not ISAS, reason="the kernels are not compiled")
every_isa = pytest.mark.parametrize("isa", ISAS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def pack(isa: str, kind: str, weight: torch.Tensor, scales: torch.Tensor | None) -> list[torch.Tensor]:
    return list(registry.find(isa).pack(weight, scales, kind.endswith("dynamic")))


def linear(isa: str, x: torch.Tensor, packed: list[torch.Tensor], bias, rows: int) -> torch.Tensor:
    return registry.find(isa).linear(x, packed, bias, rows)


# Against float64.


@every_isa
@every_kind
@settings(max_examples=170)  # of 20 combinations: 3,400 cases
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    m=st.one_of(st.integers(1, 70), st.sampled_from([513, 530])),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_rounding_of_a_sum_in_float32(isa, kind, rows, columns, m, density, dtype, with_bias, seed):
    """Rounding is monotone: a result is right if and only if it lies between the roundings of the bounds of its sum."""
    weight, scales = make_weight(kind, rows, columns, density, seed)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    x[m // 2] = 0
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(seed + 2)).to(dtype) if with_bias else None
    y = linear(isa, x, pack(isa, kind, weight, scales), bias, rows)
    exact, error = expected(kind, weight, scales, x, bias)
    assert y.dtype == dtype and y.is_contiguous()
    assert ((exact - error).to(dtype) <= y).all() and (y <= (exact + error).to(dtype)).all()


@every_isa
@pytest.mark.parametrize("kind", ["int4", "int4_dynamic"])
@pytest.mark.parametrize("columns", [1300, 1301, 1302, 1303])  # as seeds: groups of 32, 64, 128, and all
@pytest.mark.parametrize("m", [2, 9, 40])
def test_groups_of_inputs_in_rows_that_are_expanded_in_parts(isa, kind, columns, m):
    weight, scales = make_weight(kind, 35, columns, seed=columns)
    x = torch.randn(m, columns)
    y = linear(isa, x, pack(isa, kind, weight, scales), None, 35)
    exact, error = expected(kind, weight, scales, x, None)
    assert ((exact - error).float() <= y).all() and (y <= (exact + error).float()).all()


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int4", "int4_dynamic"])
@pytest.mark.parametrize("m", [1, 3, 7, 14, 50])
@pytest.mark.parametrize(("value", "other"), [(-8, -8), (7, 7), (-8, 7), (0, 0)])
def test_weights_of_four_bits_at_the_ends_of_their_range(isa, dtype, kind, m, value, other):
    """Rows that are full, on activations whose sums are the largest: they are exact."""
    weight = torch.full((21, 200), value, dtype=torch.int8)
    weight[:, ::2] = other
    scales = torch.tensor([2.0, 4, 8, 16]).repeat(21, 1)  # of groups of 64
    x = torch.full((m, 200), 127.0).to(dtype)
    x[0, 1::2] = -127
    y = linear(isa, x, pack(isa, kind, weight, scales), None, 21)
    assert torch.equal(y, (x.double() @ scaled(weight, scales).T).to(dtype))


# What the result does not depend on.


@every_isa
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [334, 1300, 1303])
def test_a_row_is_the_same_bits_in_any_batch_and_on_any_threads(isa, kind, columns, dtype):
    weight, scales = make_weight(kind, 115, columns, seed=columns)
    packed, bias = pack(isa, kind, weight, scales), torch.randn(115).to(dtype)
    x = torch.randn(513, columns).to(dtype)
    y = linear(isa, x, packed, bias, 115)
    for m in [*range(1, 20), 70, 512]:
        assert torch.equal(linear(isa, x[-m:], packed, bias, 115), y[-m:]), m
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for m in (1, 5, 513):
                assert torch.equal(linear(isa, x[:m], packed, bias, 115), y[:m]), (count, m)
            assert torch.equal(pack(isa, kind, weight, scales)[0], packed[0])
    finally:
        torch.set_num_threads(1)


@every_isa
@every_kind
def test_a_batch_that_no_cache_would_hold_is_multiplied_in_parts(isa, kind):
    """Rows so long that fewer than 150 of them are multiplied at once; they are the same in smaller batches."""
    weight, scales = make_weight(kind, 20, 30_001, seed=1)
    packed, x = pack(isa, kind, weight, scales), torch.randn(150, 30_001).bfloat16()
    y = linear(isa, x, packed, None, 20)
    exact, error = expected(kind, weight, scales, x, None)
    assert ((exact - error).bfloat16() <= y).all() and (y <= (exact + error).bfloat16()).all()
    assert all(torch.equal(linear(isa, x[i : i + m], packed, None, 20), y[i : i + m]) for i, m in [(60, 1), (70, 80)])


@every_isa
@every_kind
def test_several_threads_may_use_a_packed_weight_at_once(isa, kind):
    weight, scales = make_weight(kind, 67, 261)
    packed = pack(isa, kind, weight, scales)
    batches = [torch.randn(m, 261).bfloat16() for m in [1, 3, 17, 40, 9, 2, 64, 31] * 8]
    alone = [linear(isa, x, packed, None, 67) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: linear(isa, x, packed, None, 67), batches))
    assert all(map(torch.equal, together, alone))


@every_isa
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_leading_dimensions_and_strides_are_those_of_torch(isa, shape):
    weight, _ = make_weight("bf16", 33, 20)
    packed = pack(isa, "bf16", weight, None)
    x = torch.randn(*shape, 20, 2).bfloat16()[..., 0]
    bias = torch.randn(33, 2).bfloat16()[:, 0]
    y = linear(isa, x, packed, bias, 33)
    assert y.shape == (*shape, 33)
    assert torch.equal(y, linear(isa, x.clone(), packed, bias.clone(), 33))
    assert torch.equal(pack(isa, "bf16", weight.t().contiguous().t(), None)[0], packed[0])


# The packed weight.


@every_kind
@given(rows=st.integers(1, 70), columns=st.integers(1, 300), seed=st.integers(0, 1000))
def test_every_instruction_set_packs_the_same_bytes(kind, rows, columns, seed):
    weight, scales = make_weight(kind, rows, columns, 0.5, seed)
    first, *others = [pack(isa, kind, weight, scales)[0] for isa in ISAS]
    assert all(torch.equal(other, first) for other in others)


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns // 4, 4)
    order = weight.abs().argsort(-1).argsort(-1)
    return (weight * (order >= 2)).reshape(rows, columns).bfloat16()


@every_isa
def test_half_the_weights_take_a_little_more_than_half_the_bytes(isa):
    scattered = torch.randn(576, 1536).bfloat16()
    scattered[torch.rand(576, 1536) < 0.5] = 0
    for weight in (scattered, two_of_four(576, 1536)):
        (buffer,) = pack(isa, "bf16", weight, None)
        assert buffer.nbytes <= 0.58 * weight.nbytes
        x = torch.randn(3, 1536).bfloat16()
        exact, error = expected("bf16", weight, None, x, None)
        y = linear(isa, x, [buffer], None, 576)
        assert ((exact - error).bfloat16() <= y).all() and (y <= (exact + error).bfloat16()).all()


@pytest.mark.parametrize(("size", "share"), [(64, 0.2055), (128, 0.198)])
def test_four_bits_and_half_the_weights_take_a_fifth_of_the_bytes_of_bf16(size, share):
    weight = torch.randint(1, 8, (4096, 4096), dtype=torch.int8)
    weight[torch.rand(4096, 4096) < 0.5] = 0
    (buffer,) = pack(ISAS[0], "int4", weight, torch.ones(4096, 4096 // size))
    assert buffer.nbytes <= share * 2 * weight.numel()


@every_isa
@every_kind
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_unpacking_gives_back_every_bit(isa, kind, rows, columns, density, seed):
    weight, scales = make_weight(kind, rows, columns, density, seed)
    unpacked, unpacked_scales = registry.find(isa).unpack(pack(isa, kind, weight, scales))
    assert unpacked.is_contiguous() and unpacked.dtype == weight.dtype
    assert torch.equal(unpacked, weight) and not unpacked[weight == 0].float().signbit().any()
    assert (scales is None) == (unpacked_scales is None)
    assert scales is None or torch.equal(unpacked_scales, scales)


@every_isa
def test_float32_weights_that_bfloat16_holds_are_packed_as_such(isa):
    weight, _ = make_weight("bf16", 30, 50)
    assert torch.equal(pack(isa, "bf16", weight.float(), None)[0], pack(isa, "bf16", weight, None)[0])


# Numbers that are not like others.


@every_isa
@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_the_rows_that_use_it_and_no_other_token(isa, m, special):
    weight, _ = make_weight("bf16", 40, 52)
    packed = pack(isa, "bf16", weight, None)
    x = torch.randn(m, 52).bfloat16()
    clean = linear(isa, x, packed, None, 40)
    x[m // 2, 7] = special
    y = linear(isa, x, packed, None, 40)
    assert not y[m // 2][weight[:, 7] != 0].isfinite().any()
    others = torch.arange(m) != m // 2
    assert torch.equal(y[others], clean[others])


@every_isa
def test_negative_zeros_are_no_weights(isa):
    weight, _ = make_weight("bf16", 20, 30)
    negative = torch.where(weight == 0, -0.0, weight)
    assert negative.signbit().sum() > weight.signbit().sum()
    assert torch.equal(pack(isa, "bf16", negative, None)[0], pack(isa, "bf16", weight, None)[0])


@every_isa
def test_denormal_weights_are_kept_or_count_as_zeros(isa):
    """They are packed. Instructions for bfloat16 take and give zeros for them."""
    weight = torch.full((16, 4), 2.0**-130).bfloat16()
    assert (weight != 0).all()
    x = torch.full((1, 4), 2.0**20).bfloat16()
    y = linear(isa, x, pack(isa, "bf16", weight, None), None, 16)
    assert (y == (0 if isa in ("amx", "avx512_bf16", "neon_bf16") else 2.0**-108)).all()


# No memory is left behind.


@every_isa
def test_calls_allocate_nothing_but_their_results(isa):
    """A leak of one row of activations per call would take 8 MB."""
    weight, _ = make_weight("bf16", 64, 1024)
    packed, x, bias = pack(isa, "bf16", weight, None), torch.randn(16, 1024), torch.randn(64)
    for _ in range(50):
        linear(isa, x, packed, bias, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        linear(isa, x, packed, bias, 64)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth * (1 if sys.platform == "darwin" else 1024) < 2**20


# What the C interface refuses.

SIZES, ARGUMENTS, UNSUPPORTED = "sizes of activations", "no such kind of weight", "lacks the instructions"


@every_isa
@every_kind
@settings(max_examples=60)
@given(data=st.data())
def test_a_corrupt_header_is_refused(isa, kind, data):
    weight, scales = make_weight(kind, 40, 30)
    (buffer,) = pack(isa, kind, weight, scales)
    fields = buffer.view(torch.int64)
    index = data.draw(st.integers(0, len(HEADER) - 1))
    old = fields[index].item()
    near = st.integers(max(-(2**63), old - 100), min(2**63 - 1, old + 100))
    new = data.draw(st.one_of(st.integers(-(2**63), 2**63 - 1), near).filter(lambda value: value != old))
    x = torch.randn(3, 30)
    y = linear(isa, x, [buffer], None, 40)
    fields[index] = new
    if HEADER[index] == "values":  # padding hides a small difference; the kernels do not look at it
        try:
            assert torch.equal(linear(isa, x, [buffer], None, 40), y)
        except ValueError as error:
            assert SIZES in str(error)
    else:
        with pytest.raises(ValueError, match=SIZES):
            linear(isa, x, [buffer], None, 40)


@every_isa
def test_what_does_not_fit_is_refused(isa):
    weight, _ = make_weight("bf16", 40, 30)
    (buffer,) = pack(isa, "bf16", weight, None)
    x, bias = torch.randn(3, 30), torch.randn(40)
    longer = torch.cat([buffer, torch.zeros(64, dtype=torch.uint8)])
    for other in (buffer[:-64], buffer[:-1], buffer[:50], buffer[:0], longer, longer[1 : 1 + len(buffer)]):
        with pytest.raises(ValueError, match=SIZES):
            linear(isa, x, [other], None, 40)
    for other in (x[:, :29], torch.randn(3, 31), torch.randn(3, 60)):
        with pytest.raises(ValueError, match=SIZES):
            linear(isa, other, [buffer], None, 40)
    for rows in (39, 41):
        with pytest.raises(ValueError, match=SIZES):
            linear(isa, x, [buffer], None, rows)
    for other in (bias[:39], torch.randn(41), bias.bfloat16()):
        with pytest.raises(ValueError, match=SIZES):
            linear(isa, x, [buffer], other, 40)


def refused(result: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        native._succeed(result)


def test_unknown_numbers_are_refused_by_every_function():
    library = native.library()
    weight, scales = make_weight("int8", 20, 12)
    (buffer,) = pack(ISAS[-1], "int8", weight, scales)
    four_bits, four_scales = make_weight("int4", 20, 40, seed=0)
    w4, s4 = four_bits.data_ptr(), four_scales.bfloat16()
    index = ALL.index(ISAS[-1])
    x, y = torch.randn(2, 12), torch.empty(2, 20)
    w, s, b = weight.data_ptr(), scales.data_ptr(), (buffer.data_ptr(), buffer.numel())
    for isa in (-1, len(ALL), 2**40):
        assert library.efx_isa_name(isa) is None and not library.efx_isa_supported(isa)
        refused(library.efx_packed_size(isa, 1, w, 20, 12, 0, 1), UNSUPPORTED)
        refused(library.efx_pack(isa, 1, w, 20, 12, 0, 0, s, *b, 1), UNSUPPORTED)
        refused(library.efx_linear(isa, *b, x.data_ptr(), 1, 2, 12, None, y.data_ptr(), 20, 1), UNSUPPORTED)
    for kind in (-1, 5, 2**40):
        refused(library.efx_packed_size(index, kind, w, 20, 12, 0, 1), ARGUMENTS)
        refused(library.efx_pack(index, kind, w, 20, 12, 0, 0, s, *b, 1), ARGUMENTS)
    refused(library.efx_pack(index, 1, w, 20, 12, 0, 0, None, *b, 1), ARGUMENTS)
    refused(library.efx_pack(index, 0, w, 20, 12, 0, 0, s, *b, 1), ARGUMENTS)
    refused(library.efx_pack(index, 1, w, 20, 12, 0, 1, s, *b, 1), ARGUMENTS)
    refused(library.efx_pack(index, 3, w4, 20, 40, 32, 2, s4.data_ptr(), *b, 1), ARGUMENTS)
    for span in (-1, 0, 1, 16, 33, 64, 128, 2**40):
        refused(library.efx_packed_size(index, 3, w4, 20, 40, span, 1), SIZES)
        refused(library.efx_pack(index, 3, w4, 20, 40, span, 0, s4.data_ptr(), *b, 1), SIZES)
    refused(library.efx_packed_size(index, 1, w, 20, 12, 12, 1), SIZES)
    for type_ in (-1, 2):
        refused(library.efx_linear(index, *b, x.data_ptr(), type_, 2, 12, None, y.data_ptr(), 20, 1), ARGUMENTS)
    for rows, columns in ((0, 12), (20, 0), (-20, 12), (20, -12), (2**31, 12), (2**30, 2**30), (2**62, 2**62)):
        refused(library.efx_packed_size(index, 1, w, rows, columns, 0, 1), SIZES)
        refused(library.efx_pack(index, 1, w, rows, columns, 0, 0, s, *b, 1), SIZES)
    for size in (b[1] - 64, b[1] + 64, 100, 0, -1):
        refused(library.efx_pack(index, 1, w, 20, 12, 0, 0, s, b[0], size, 1), SIZES)
    refused(library.efx_pack(index, 1, w, 20, 12, 0, 0, s, b[0] + 1, b[1], 1), SIZES)
    refused(library.efx_linear(index, *b, x.data_ptr(), 1, -1, 12, None, y.data_ptr(), 20, 1), SIZES)
