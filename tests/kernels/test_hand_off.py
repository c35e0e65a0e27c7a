"""Panels for oneDNN: they give the sums that the kernel owes, with AMX or without; and when they are taken."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efx_plugin.kernels import native, panels
from efx_plugin.kernels.native import hand_off
from tests.support.native_calls import expected, make_weight, scaled

NAME = "avx512_bf16"  # the kernel that hands off
KERNEL = next((kernel for kernel in native.KERNELS if kernel.name == NAME and kernel.is_supported), None)
KINDS = ["bf16", "int8", "int4"]  # with activations of 16 bits

needs_kernel = pytest.mark.skipif(KERNEL is None, reason=f"this processor, or this build, has no {NAME}")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def handing_off():
    """The kernel hands off from two tokens on, in panels of 32 rows. Called, the fixture says in how many."""
    counts = []

    def multiply(x, bias, y, found, buffer, expand):
        assert buffer.numel() == max(rows for _, rows in found) * x.shape[1] <= 32 * x.shape[1]
        counts.append(len(found))
        panels.multiply(x, bias, y, found, buffer, expand)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNEL, "hand_off_from", 2)
        patch.setattr(hand_off, "PANEL_UNIT", 16)
        patch.setattr(hand_off, "panel_rows", lambda columns, threads: 32)
        patch.setattr(native, "multiply", multiply)
        yield lambda: [counts.pop() for _ in range(len(counts))]


def pack(kind: str, weight: torch.Tensor, scales: torch.Tensor | None):
    return KERNEL.pack(weight, scales, kind.endswith("dynamic"))


# Against float64, and against the kernel's own products.


@needs_kernel
@every_kind
@settings(max_examples=170, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    m=st.integers(2, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_rounding_of_a_sum_in_float32(handing_off, kind, rows, columns, m, density, with_bias, seed):
    """A weight that is an integer times its scale is rounded before it is multiplied."""
    weight, scales = make_weight(kind, rows, columns, density, seed)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(seed + 1)).bfloat16()
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(seed + 2)).bfloat16() if with_bias else None
    y = KERNEL.linear(x, pack(kind, weight, scales), bias, rows)
    exact, error = expected(kind, weight, scales, x, bias)
    if scales is not None:
        error += 2**-8 * x.double().abs() @ scaled(weight, scales).abs().T
    assert handing_off() == [-(-rows // 32)] and y.is_contiguous()
    assert ((exact - error).bfloat16() <= y).all() and (y <= (exact + error).bfloat16()).all()


@needs_kernel
@every_kind
@pytest.mark.parametrize(("rows", "columns"), [(70, 130), (64, 128), (33, 45)])
@pytest.mark.parametrize("seed", range(4))  # groups of 32, 64, 128 inputs, and all
def test_sums_that_are_exact_are_those_of_the_kernel(handing_off, kind, rows, columns, seed):
    """Integers, and scales that are powers of two."""
    weight, scales = make_weight(kind, rows, columns, 0.5, seed)
    if scales is None:
        weight = weight.mul(4).round()
    else:
        scales = scales.log2().round().exp2()
    x = torch.randint(-8, 9, (40, columns)).bfloat16()
    bias = torch.randint(-8, 9, (rows,)).bfloat16()
    packed = pack(kind, weight, scales)
    one_by_one = [KERNEL.linear(row[None], packed, bias, rows) for row in x]
    assert handing_off() == []
    assert torch.equal(KERNEL.linear(x, packed, bias, rows), torch.cat(one_by_one))
    assert handing_off()


# What it takes, and what it leaves to the kernel.


@needs_kernel
@pytest.mark.parametrize("shape", [(2,), (2, 3), (3, 1), (2, 1, 5)])
def test_leading_dimensions_and_strides_are_those_of_torch(handing_off, shape):
    weight, _ = make_weight("bf16", 70, 20)
    packed = pack("bf16", weight, None)
    x, bias = torch.randn(*shape, 20, 2).bfloat16()[..., 0], torch.randn(70, 2).bfloat16()[:, 0]
    y = KERNEL.linear(x, packed, bias, 70)
    assert y.shape == (*shape, 70) and y.is_contiguous()
    assert torch.equal(y, KERNEL.linear(x.clone(), packed, bias.clone(), 70))
    exact = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(y, exact.bfloat16())
    assert handing_off() == [3, 3]


@needs_kernel
@pytest.mark.parametrize("shape", [(20,), (0, 20), (1, 20), (3, 0, 20)])
def test_fewer_tokens_are_left_to_the_kernel(handing_off, shape):
    weight, _ = make_weight("bf16", 70, 20)
    y = KERNEL.linear(torch.ones(shape).bfloat16(), pack("bf16", weight, None), None, 70)
    assert y.shape == (*shape[:-1], 70) and handing_off() == []


@needs_kernel
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("bf16", torch.float32), ("int8_dynamic", torch.bfloat16), ("int4_dynamic", torch.bfloat16)],
)
def test_other_activations_than_bfloat16_are_left_to_the_kernel(handing_off, kind, dtype):
    weight, scales = make_weight(kind, 70, 100)
    x, packed = torch.randn(9, 100).to(dtype), pack(kind, weight, scales)
    y = KERNEL.linear(x, packed, None, 70)
    one_by_one = [KERNEL.linear(row[None], packed, None, 70) for row in x]
    assert torch.equal(y, torch.cat(one_by_one)) and handing_off() == []


@needs_kernel
def test_parameters_and_activations_that_ask_for_gradients_get_none(handing_off):
    weight, _ = make_weight("bf16", 40, 20)
    x, bias = (torch.ones(shape).bfloat16().requires_grad_() for shape in ((3, 20), (40,)))
    y = KERNEL.linear(x, pack("bf16", weight, None), bias, 40)
    assert not y.requires_grad and handing_off() == [2]
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias).detach())


@needs_kernel
def test_what_does_not_fit_is_refused(handing_off):
    weight, _ = make_weight("bf16", 40, 30)
    packed, x, bias = pack("bf16", weight, None), torch.randn(3, 30).bfloat16(), torch.randn(40).bfloat16()
    wrong = [(x[:, :29], None, 40), (x, None, 39), (x, None, 41), (x, bias[:39], 40), (x, bias.float(), 40)]
    for arguments in [(one, packed, *others) for one, *others in wrong] + [(x, (packed[0][:-1],), None, 40)]:
        with pytest.raises(ValueError, match="sizes of activations"):
            KERNEL.linear(*arguments)


@needs_kernel
@every_kind
def test_a_panel_is_written_to_its_end_and_no_further(kind):
    weight, scales = make_weight(kind, 50, 75, seed=1)
    (buffer,) = pack(kind, weight, scales)
    whole, library = torch.full((50 * 75 + 64,), 7.0).bfloat16(), native.library()
    packed = (KERNEL.index, buffer.data_ptr(), buffer.numel(), 50, 75)
    assert library.efx_expand(*packed, 0, 50, whole.data_ptr(), 1) == 0
    for first, count in [(0, 1), (16, 20), (48, 2), (32, 18)]:
        part = torch.full_like(whole, 7)
        assert library.efx_expand(*packed, first, count, part.data_ptr(), 1) == 0
        assert torch.equal(part[: count * 75], whole[first * 75 : (first + count) * 75])
        assert (part[count * 75 :] == 7).all()
    assert (whole[50 * 75 :] == 7).all()
    for first, count in [(-16, 16), (8, 8), (64, 1), (0, 0), (0, 51), (48, 3), (0, -1), (2**62, 1), (16, 2**63 - 1)]:
        assert library.efx_expand(*packed, first, count, whole.data_ptr(), 1) == -1


# When it is taken.


@pytest.fixture
def with_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def test_with_amx_it_is_taken_from_64_tokens_on_and_the_log_says_so(with_amx):
    assert hand_off.hand_off_from(NAME) == 64
    kernel = native.NativeKernel(NAME, None, 0)
    assert kernel.hand_off_from == 64
    assert kernel.summary.startswith(native.SUMMARIES[NAME]) and "from 64 tokens on in panels, AMX" in kernel.summary


@pytest.mark.parametrize("allowed", ["AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_VNNI", "avx2"])
def test_where_onednn_may_not_use_amx_it_is_never_taken(with_amx, monkeypatch, allowed):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert hand_off.hand_off_from(NAME) == hand_off.NEVER


def test_without_amx_it_is_never_taken(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    kernels = [native.NativeKernel(name, None, 0) for name in native.SUMMARIES]
    assert {kernel.hand_off_from for kernel in kernels} == {hand_off.NEVER}
    assert {kernel.name: kernel.summary for kernel in kernels} == native.SUMMARIES


@pytest.mark.parametrize("name", sorted(set(native.SUMMARIES) - {NAME}))
def test_kernels_for_processors_that_emulate_bfloat16_never_take_it(with_amx, name):
    """Also where the processor has AMX, and EFX_KERNEL lets it pose as a lesser one."""
    assert hand_off.hand_off_from(name) == hand_off.NEVER


@given(columns=st.integers(1, 200_000), threads=st.integers(1, 256))
def test_a_panel_is_a_few_mb(columns, threads):
    rows = hand_off.panel_rows(columns, threads)
    assert rows >= 64 and rows % 64 == 0
    assert rows == 64 or 2 * rows * columns <= 2**24
    assert rows == 64 or threads > 8 or 2 * rows * columns <= 2**22
