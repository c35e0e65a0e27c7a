"""`efx::sparse_linear` computes what torch's linear computes on the expanded weight, and behaves as an operator."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efx_plugin.errors import EfxError
from efx_plugin.kernels import PackedWeight, kernel_summary, pack, registry, sparse_linear, unpack

WEIGHT = torch.eye(4)
KERNELS = [kernel.name for kernel in registry.KERNELS if kernel.obstacle(WEIGHT, WEIGHT.dtype, None) is None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=[KERNELS[0], KERNELS[-1]])
def kernel(request, monkeypatch) -> str:
    """The best kernel and the reference, forced in turn."""
    monkeypatch.setenv("EFX_KERNEL", request.param)
    return request.param


def sparse_weight(rows: int, columns: int, density: float, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return (torch.randn(rows, columns, generator=generator) * kept).to(dtype)


@settings(max_examples=150)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    leading=st.lists(st.integers(0, 5), max_size=2),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_linear_of_the_expanded_weight(rows, columns, density, leading, dtype, with_bias, seed):
    weight = sparse_weight(rows, columns, density, dtype, seed)
    x = torch.randn(*leading, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    y = sparse_linear(x, pack(weight), bias)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[::2, ::2], lambda x: x[:, :1].expand(-1, 24)])
def test_activations_need_not_be_contiguous(view, dtype):
    x = view(torch.randn(48, 48).to(dtype))
    weight = sparse_weight(10, x.shape[-1], 0.5, dtype)
    torch.testing.assert_close(sparse_linear(x, pack(weight)), torch.nn.functional.linear(x, weight))


def test_the_weight_is_expanded_at_packing_and_not_looked_at_again():
    for dtype in (torch.bfloat16, torch.float64):
        weight = sparse_weight(6, 8, 0.5, dtype)
        x = torch.randn(3, 8).to(dtype)
        packed = pack(weight)
        before = sparse_linear(x, packed)
        weight.fill_(1)
        assert torch.equal(sparse_linear(x, packed), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_survives_torch_compile_without_a_graph_break(kernel, dtype):
    packed = pack(sparse_weight(40, 24, 0.5).to(dtype))
    bias = torch.randn(40).to(dtype)

    def layer(x):
        return torch.relu(sparse_linear(x * 2, packed, bias)) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (1, 3, 8):
        x = torch.randn(batch, 24).to(dtype)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_is_a_well_formed_operator(dtype, shape, with_bias):
    packed = pack(sparse_weight(40, 24, 0.5).to(dtype))
    bias = torch.randn(40).to(dtype) if with_bias else None
    check_operator(torch.randn(*shape).to(dtype), packed, bias)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_reference_is_a_well_formed_operator(monkeypatch, with_bias):
    monkeypatch.setenv("EFX_KERNEL", "reference")
    packed = pack(sparse_weight(40, 24, 0.5))
    check_operator(torch.randn(3, 24).bfloat16(), packed, torch.randn(40).bfloat16() if with_bias else None)


def check_operator(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> None:
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(tensor.is_mkldnn for tensor in packed.tensors):
        checks = checks[2:]  # oneDNN's layout has no storage, which the other two look at
    arguments = (x, list(packed.tensors), bias, packed.out_features, packed.kernel)
    torch.library.opcheck(torch.ops.efx.sparse_linear, arguments, test_utils=checks)


def test_registering_again_in_the_same_process_is_harmless(kernel):
    script = (
        "import importlib, torch, efx_plugin.kernels.op as op; importlib.reload(op);"
        "print(op.sparse_linear(torch.ones(2, 4), op.pack(torch.eye(4))).tolist())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str([[1.0] * 4] * 2)


def test_a_packed_weight_says_what_it_is(kernel):
    packed = pack(sparse_weight(5, 7, 0.5))
    assert isinstance(packed, PackedWeight)
    assert (packed.out_features, packed.in_features, packed.dtype) == (5, 7, torch.bfloat16)
    assert packed.kernel == kernel
    assert registry.find(kernel).summary in kernel_summary(packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantize_activations", [False, True])
def test_int8_weights_are_scaled_row_by_row(kernel, dtype, quantize_activations):
    weight = torch.randint(-128, 128, (40, 24), dtype=torch.int8) * (torch.rand(40, 24) < 0.5)
    scales, x, bias = torch.rand(40), torch.randn(3, 24).to(dtype), torch.randn(40).to(dtype)
    packed = pack(weight, scales=scales, dtype=dtype, quantize_activations=quantize_activations)
    activations = x.double()
    if quantize_activations:
        step = x.float().abs().amax(-1, keepdim=True) / 127  # in float32, as the kernels: halves are rounded alike
        activations = (x.float() * step.reciprocal()).round().double() * step.double()
    expected = activations @ (scales[:, None] * weight).double().T + bias.double()
    torch.testing.assert_close(sparse_linear(x, packed, bias), expected.to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_unpacking_gives_back_every_bit(monkeypatch, name, dtype):
    weight = sparse_weight(37, 50, 0.5).to(dtype)
    if name == "reference" or dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setenv("EFX_KERNEL", name)
    unpacked, scales = unpack(pack(weight))
    assert unpacked.dtype == dtype and scales is None
    assert torch.equal(unpacked, weight)


@pytest.mark.parametrize("quantize_activations", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_unpacking_gives_back_int8_and_scales(monkeypatch, name, quantize_activations):
    monkeypatch.setenv("EFX_KERNEL", name)
    weight = torch.randint(-128, 128, (37, 50), dtype=torch.int8) * (torch.rand(37, 50) < 0.5)
    scales = torch.rand(37)
    packed = pack(weight, scales=scales, dtype=torch.bfloat16, quantize_activations=quantize_activations)
    unpacked = unpack(packed)
    assert [tensor.dtype for tensor in unpacked] == [torch.int8, torch.float32]
    assert torch.equal(unpacked[0], weight) and torch.equal(unpacked[1], scales)


def four_bits(rows: int, columns: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(-8, 8, (rows, columns), dtype=torch.int8) * (torch.rand(rows, columns) < 0.5)
    return weight, torch.rand(rows, groups).bfloat16().float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantize_activations", [False, True])
@pytest.mark.parametrize(("columns", "groups", "size"), [(96, 3, 32), (100, 2, 64), (300, 3, 128), (300, 1, 300)])
def test_weights_of_four_bits_are_scaled_by_groups(kernel, dtype, quantize_activations, columns, groups, size):
    weight, scales = four_bits(40, columns, groups)
    x, bias = torch.randn(3, columns).to(dtype), torch.randn(40).to(dtype)
    packed = pack(weight, scales=scales, dtype=dtype, quantize_activations=quantize_activations)
    activations = x.double()
    if quantize_activations:
        step = x.float().abs().amax(-1, keepdim=True) / 127
        activations = (x.float() * step.reciprocal()).round().double() * step.double()
    products = [
        activations[:, i * size : (i + 1) * size] @ weight[:, i * size : (i + 1) * size].double().T * scales[:, i]
        for i in range(groups)
    ]
    expected = sum(products) + bias.double()
    torch.testing.assert_close(sparse_linear(x, packed, bias), expected.to(dtype), rtol=1e-2, atol=1e-2)
    scheme = "W4A8" if quantize_activations else "W4A16"
    assert kernel_summary(packed).startswith(f"{scheme}: {registry.find(kernel).summary}")


@pytest.mark.parametrize("quantize_activations", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_unpacking_gives_back_four_bits_and_scales(monkeypatch, name, quantize_activations):
    monkeypatch.setenv("EFX_KERNEL", name)
    weight, scales = four_bits(37, 150, 3)
    scales[3] = 0
    packed = pack(weight, scales=scales, dtype=torch.bfloat16, quantize_activations=quantize_activations)
    unpacked = unpack(packed)
    assert [tensor.dtype for tensor in unpacked] == [torch.int8, torch.float32]
    assert torch.equal(unpacked[0], weight) and torch.equal(unpacked[1], scales)


@pytest.mark.parametrize(("columns", "groups"), [(128, 3), (128, 5), (128, 128), (40, 3)])
def test_groups_of_other_sizes_are_refused(columns, groups):
    weight, scales = four_bits(4, columns, groups)
    with pytest.raises(EfxError, match=rf"{columns} inputs in {groups} groups are no groups of 32, 64, 128 or all"):
        pack(weight, scales=scales, dtype=torch.bfloat16)


@pytest.mark.parametrize("value", [-9, 8])
def test_values_of_more_than_four_bits_are_refused(value):
    weight, scales = four_bits(4, 64, 2)
    weight[1, 2] = value
    with pytest.raises(EfxError, match="values from -8 to 7, not from"):
        pack(weight, scales=scales, dtype=torch.bfloat16)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(2, 2, 2), torch.ones(4, 4, dtype=torch.int32)])
def test_what_is_no_matrix_of_weights_is_refused(weight):
    with pytest.raises(EfxError, match="must be a floating-point or int8 matrix"):
        pack(weight)


INT8 = torch.ones(4, 6, dtype=torch.int8)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": torch.bfloat16},
        {"scales": torch.ones(4)},
        {"scales": torch.ones(6), "dtype": torch.bfloat16},
        {"scales": torch.ones(6, 1), "dtype": torch.bfloat16},
        {"scales": torch.ones(4, 0), "dtype": torch.bfloat16},
        {"scales": torch.ones(4, 1, 1), "dtype": torch.bfloat16},
        {"scales": torch.ones(4).double(), "dtype": torch.bfloat16},
    ],
)
def test_int8_weights_without_what_they_need_are_refused(arguments):
    with pytest.raises(EfxError, match="an int8 weight needs"):
        pack(INT8, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"scales": torch.ones(4)}, {"quantize_activations": True}, {"dtype": torch.bfloat16}]
)
def test_what_belongs_to_int8_is_refused_for_floats(arguments):
    with pytest.raises(EfxError, match="belong to int8"):
        pack(INT8.float(), **arguments)


@pytest.mark.parametrize("x", [torch.ones(2, 9, dtype=torch.bfloat16), torch.ones(2, 8)])
def test_activations_that_do_not_fit_are_refused(x):
    with pytest.raises(EfxError, match="do not fit a sparse weight"):
        sparse_linear(x, pack(sparse_weight(6, 8, 0.5)))
