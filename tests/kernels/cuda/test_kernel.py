"""The kernel for GPUs, on a device whose launches torch computes: what is launched, when, and with which memory."""

import math
import re
import threading
from weakref import WeakKeyDictionary

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from efx_plugin.errors import EfxError
from efx_plugin.kernels import kernel_summary, pack, registry
from efx_plugin.kernels.cuda import buffer, gemm, layout, program, variants, wgmma
from efx_plugin.kernels.cuda.kernel import KERNEL, panels
from tests.support.fake_gpu import FakeGpu, Stream
from tests.support.products import is_sum

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    """One that changes the way to multiply after 64 and after 512 tokens."""
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    monkeypatch.setitem(variants.MEASURED, gpu.capability, variants.Crossovers(64, 512))
    return gpu


@pytest.fixture
def hopper(gpu, monkeypatch) -> FakeGpu:
    """An H100, which changes it after 16 and after 512 tokens."""
    gpu.capability, gpu.multi_processor_count, gpu.shared_memory_per_multiprocessor = (9, 0), 132, 228 << 10
    monkeypatch.setitem(variants.MEASURED, gpu.capability, variants.Crossovers(16, 512))
    return gpu


@pytest.fixture
def small_panels(monkeypatch) -> None:
    """Panels of 16 rows of 64 columns, so that small weights have several."""
    monkeypatch.setattr(variants, "PANEL_BYTES", 2 * 16 * 64)
    monkeypatch.setattr(buffer, "PANEL_BYTES", 2 * 16 * 64)
    panels.cache_clear()
    yield
    panels.cache_clear()


def sparse_weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < 0.5
    return (torch.randn(rows, columns, generator=generator) * kept).to(dtype)


def int8_weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With its scales."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (rows, columns), generator=generator)
    kept = torch.rand(rows, columns, generator=generator) < 0.5
    return (weight * kept).to(torch.int8), torch.rand(rows, generator=generator) / 64


def linear(x, packed, bias, rows):
    return torch.ops.efx.sparse_linear(x, list(packed), bias, rows, "cuda")


def assert_is_product(y, weight, x, bias=None, scales=None, by_panels=False) -> None:
    """A sum in float32, rounded; `by_panels`: torch's own product, which may round parts of the sum to the dtype."""
    if not by_panels:
        assert is_sum(y, "", weight, scales, x, bias)
        return
    weight, x, bias = weight.double(), x.double(), torch.zeros(()) if bias is None else bias.double()
    info = torch.finfo(y.dtype)
    magnitude = x.abs() @ weight.abs().T + bias.abs() + info.smallest_normal  # below that, numbers lie no closer
    assert ((y.double() - (x @ weight.T + bias)).abs() <= info.eps * magnitude).all()


# The product.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (33, 24), (50, 30), (1, 1), (200, 7)])
@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 65, 300, 513])
def test_is_the_product_for_any_number_of_tokens(gpu, small_panels, shape, tokens, with_bias, dtype):
    rows, columns = shape
    weight = sparse_weight(rows, columns, dtype)
    x = torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    y = linear(x, KERNEL.pack(weight, None, False), bias, rows)
    assert y.is_contiguous() and y.dtype == dtype
    symbol = "efx_decode" if tokens <= 64 else "efx_gemm" if tokens <= 512 else "efx_expand"
    assert_is_product(y, weight, x, bias, by_panels=symbol == "efx_expand")
    assert {one.symbol for one in gpu.launched} == {symbol}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (33, 24), (50, 1000)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 300, 513])
def test_is_the_product_on_an_h100_too(hopper, shape, tokens, dtype):
    rows, columns = shape
    weight = sparse_weight(rows, columns, dtype)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    y = linear(x, KERNEL.pack(weight, None, False), bias, rows)
    symbol = "efx_decode" if tokens <= 16 else "efx_wgmma" if tokens <= 512 else "efx_expand"
    assert_is_product(y, weight, x, bias, by_panels=symbol == "efx_expand")
    assert {one.symbol for one in hopper.launched} - {"efx_arrange", "efx_add"} == {symbol}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (33, 24), (200, 7)])
@pytest.mark.parametrize("tokens", [1, 64, 65, 513])
def test_rows_of_int8_are_scaled_before_the_bias_is_added(gpu, small_panels, shape, tokens, with_bias, dtype):
    rows, columns = shape
    weight, scales = int8_weight(rows, columns)
    x = torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    y = linear(x, KERNEL.pack(weight, scales, False), bias, rows)
    assert y.is_contiguous() and y.dtype == dtype
    if tokens <= 512:
        assert_is_product(y, weight, x, bias, scales)
    else:  # scaled and rounded as a panel is expanded
        assert_is_product(y, (weight * scales[:, None]).to(dtype), x, bias, by_panels=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (33, 24), (50, 1000), (200, 7)])
def test_panels_lose_nothing_where_every_sum_has_few_bits(gpu, shape, is_int8, dtype):
    """Integers and powers of two, so that no order of adding rounds and torch's product has to be the exact one."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randint(-1, 2, size, generator=generator) for size in (shape, (513, columns), (rows,)))
    scales = 2.0 ** torch.randint(-3, 4, (rows,), generator=generator) if is_int8 else None
    packed = KERNEL.pack(weight.to(torch.int8 if is_int8 else dtype), scales, False)
    y = linear(x.to(dtype), packed, (0 * bias if is_int8 else bias).to(dtype), rows)
    exact = x.double() @ weight.double().T
    assert torch.equal(y.double(), exact * scales if is_int8 else exact + bias)
    assert {one.symbol for one in gpu.launched} == {"efx_expand"}


def test_that_activations_are_not_quantized_is_said_once(gpu, caplog):
    weight, scales = int8_weight(20, 64)
    KERNEL.pack(weight, scales, False)
    assert not caplog.records
    packed = [KERNEL.pack(weight, scales, True) for _ in range(2)]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "W8A8" in record.message and "leaves them in 16 bits" in record.message
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(linear(x, packed[0], None, 20), linear(x, KERNEL.pack(weight, scales, False), None, 20))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3), (3, 40)])
def test_leading_dimensions_are_those_of_torch(gpu, shape):
    weight = sparse_weight(20, 24)
    x = torch.randn(*shape, 24).bfloat16()
    y = linear(x, KERNEL.pack(weight, None, False), None, 20)
    assert_is_product(y, weight, x)
    assert bool(gpu.launched) == (x.numel() > 0)


@pytest.mark.parametrize("tokens", [3, 70, 600])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :24],
        lambda x: x[:, 3:27],
        lambda x: x[::2, ::2],
        lambda x: x.T[: len(x), :24] if len(x) >= 24 else x[:, 1:25],
        lambda x: x[:, :1].expand(-1, 24),
        lambda x: x.flatten()[1 : 1 + len(x) * 24].view(-1, 24),  # contiguous, but not aligned
    ],
)
def test_activations_may_lie_anywhere(gpu, view, tokens):
    x = view(torch.randn(tokens, 80).bfloat16())
    weight = sparse_weight(20, x.shape[1])
    bias = torch.randn(20, 2).bfloat16()[:, 0]
    y = linear(x, KERNEL.pack(weight, None, False), bias, 20)
    assert_is_product(y, weight, x, bias, by_panels=tokens > 512)


def test_activations_that_are_in_order_are_not_copied(gpu):
    weight, x = sparse_weight(20, 128), torch.randn(2, 128).bfloat16()
    packed = KERNEL.pack(weight, None, False)
    with Recorder() as recorder:
        KERNEL.linear(x, packed, None, 20)
    assert recorder.allocated == [(2, 20)]


def test_what_does_not_fit_is_refused(gpu):
    packed = KERNEL.pack(sparse_weight(20, 24), None, False)
    packed_int8 = KERNEL.pack(*int8_weight(20, 24), False)
    x, bias = torch.randn(2, 24).bfloat16(), torch.randn(20).bfloat16()
    for wrong in (
        (x.float(), packed_int8, None, 20),
        (x, packed_int8, bias.half(), 20),
        (x[:, :16], packed, None, 20),
        (x.half(), packed, None, 20),
        (x, packed, None, 21),
        (x, packed, bias[:16], 20),
        (x, packed, bias.float(), 20),
    ):
        with pytest.raises(ValueError, match="sizes or dtypes of activations, weight and bias disagree"):
            KERNEL.linear(*wrong)
    assert not gpu.launched


# The layers of a model that is captured in CUDA graphs.


class Recorder(TorchDispatchMode):
    """The operators that are called, and the shapes of the memory that they allocate; not those within an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []
        self.allocated: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {one.untyped_storage().data_ptr() for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)}
        result = function(*args, **kwargs)
        self.called.append(function.name())
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.allocated.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("tokens", [1, 8, 16, 32, 64, 65, 200, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("columns", [64, 1024])  # of which the second are split among blocks, for many tokens
@pytest.mark.parametrize(("dtype", "is_int8"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)])
def test_a_call_compiles_nothing_and_allocates_its_result_alone(gpu, tokens, with_bias, columns, dtype, is_int8):
    packed = KERNEL.pack(*(int8_weight(80, columns) if is_int8 else (sparse_weight(80, columns, dtype), None)), False)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(80).to(dtype) if with_bias else None
    compiled, loaded = len(gpu.compiled), len(gpu.loaded)
    # Four numbers of tokens, the expansion, and two sizes for many tokens, with what adds their sums; for int8 with
    # activations of either dtype.
    assert compiled == loaded == (18 if is_int8 else 9)
    gpu.is_capturing = True
    with Recorder() as recorder:
        KERNEL.linear(x, packed, bias, 80)
    assert recorder.allocated == [(tokens, 80)]
    assert (len(gpu.compiled), len(gpu.loaded)) == (compiled, loaded)
    # Nothing that waits for the device, as a number read from it or a copy to the host does.
    views = {"aten::view", "aten::view.dtype", "aten::slice.Tensor", "aten::permute", "aten::detach", "aten::alias"}
    assert set(recorder.called) - views <= {"aten::new_empty", "aten::mm.out", "aten::addmm.out"}


@pytest.mark.parametrize("tokens", [1, 16, 17, 200, 1000])
@pytest.mark.parametrize("columns", [64, 1024])  # of which the second are split among blocks, for many tokens
def test_a_call_on_an_h100_allocates_activations_in_another_order_besides(hopper, tokens, columns):
    packed = KERNEL.pack(sparse_weight(80, columns), None, False)
    x = torch.randn(tokens, columns).bfloat16()
    compiled, hopper.is_capturing = len(hopper.compiled), True
    with Recorder() as recorder:
        KERNEL.linear(x, packed, None, 80)
    plan = wgmma.plan(wgmma.wgmma_variants(torch.bfloat16), tokens, 80, columns, hopper.multi_processor_count)
    copied = [(wgmma.image_bytes(plan.variant, tokens, columns) // 2,)] if 16 < tokens <= 512 else []
    assert recorder.allocated == [(tokens, 80), *copied] and len(hopper.compiled) == compiled


def test_it_is_compiled_once_per_dtype(gpu):
    for _ in range(3):
        KERNEL.pack(sparse_weight(20, 24), None, False)
    assert len(gpu.compiled) == 9
    KERNEL.pack(sparse_weight(20, 24, torch.float16), None, False)
    assert len(gpu.compiled) == 18


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64])
def test_few_tokens_are_one_launch_on_the_current_stream(gpu, tokens):
    rows, columns = 90, 128
    packed = KERNEL.pack(sparse_weight(rows, columns), None, False)
    gpu.stream = Stream(0x123, gpu)
    linear(torch.randn(tokens, columns).bfloat16(), packed, None, rows)
    variant = variants.decode_variant(variants.decode_variants(torch.bfloat16), tokens, rows, gpu.multi_processor_count)
    how = variants.launch(variant, rows, columns)
    expected = ("efx_decode", 0x123, how.grid, how.block, how.shared_bytes, (tokens, rows, columns))
    assert gpu.launched == [expected]


@pytest.mark.parametrize("tokens", [65, 96, 97, 300, 512])
@pytest.mark.parametrize("columns", [128, 1024])
def test_many_tokens_are_one_launch_or_with_splits_two_on_the_current_stream(gpu, tokens, columns):
    rows = 90
    packed = KERNEL.pack(sparse_weight(rows, columns), None, False)
    gpu.stream = Stream(0x123, gpu)
    linear(torch.randn(tokens, columns).bfloat16(), packed, None, rows)
    plan = gemm.plan(gemm.gemm_variants(torch.bfloat16), tokens, rows, columns, at_once=2 * 108)
    expected = [("efx_gemm", 0x123, *plan.gemm, (tokens, rows, columns, plan.splits))]
    if columns > 128:
        expected += [("efx_reduce", 0x123, *plan.reduce, (tokens, rows, plan.splits))]
    assert gpu.launched == expected


@pytest.mark.parametrize("tokens", [17, 33, 129, 512])
@pytest.mark.parametrize("columns", [128, 1024])
def test_many_tokens_on_an_h100_are_two_launches_or_with_splits_three(hopper, tokens, columns):
    rows = 90
    packed = KERNEL.pack(sparse_weight(rows, columns), None, False)
    hopper.stream = Stream(0x123, hopper)
    linear(torch.randn(tokens, columns).bfloat16(), packed, None, rows)
    plan = wgmma.plan(wgmma.wgmma_variants(torch.bfloat16), tokens, rows, columns, hopper.multi_processor_count)
    expected = [
        ("efx_arrange", 0x123, *plan.arrange, (tokens, columns)),
        ("efx_wgmma", 0x123, *plan.wgmma, (tokens, rows, columns, plan.splits)),
    ]
    if columns > 128:
        expected += [("efx_add", 0x123, *plan.add, (tokens, rows, plan.splits))]
    assert hopper.launched == expected


def test_the_largest_batches_are_a_launch_per_panel_on_the_current_stream(gpu, small_panels):
    packed = KERNEL.pack(sparse_weight(90, 64), None, False)
    gpu.stream = Stream(0x123, gpu)
    linear(torch.randn(513, 64).bfloat16(), packed, None, 90)
    assert [(one.stream, one.numbers) for one in gpu.launched] == [
        (0x123, (first, min(16, 90 - first), 64)) for first in range(0, 90, 16)
    ]


def test_the_numbers_of_tokens_at_which_it_changes_the_way_are_the_devices(gpu, monkeypatch):
    monkeypatch.setitem(variants.MEASURED, gpu.capability, variants.Crossovers(16, 20))
    packed = KERNEL.pack(sparse_weight(20, 24), None, False)
    for tokens in (16, 17, 20, 21):
        linear(torch.randn(tokens, 24).bfloat16(), packed, None, 20)
    assert [one.symbol for one in gpu.launched] == ["efx_decode", "efx_gemm", "efx_gemm", "efx_expand"]


@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (4096, 14336), (8192, 28672), (100, 64), (5, 500_000)])
def test_panels_cover_the_rows_and_fit_into_the_buffer(shape):
    rows, columns = shape
    found = panels(rows, columns)
    assert [first for first, _ in found] == [sum(height for _, height in found[:i]) for i in range(len(found))]
    assert sum(height for _, height in found) == rows
    assert all(first % 16 == 0 and 2 * columns * height <= variants.PANEL_BYTES for first, height in found)
    assert len(found) <= math.ceil(1.2 * 2 * rows * columns / variants.PANEL_BYTES) + 1


# One buffer for all.


@pytest.mark.parametrize("tokens", [65, 513])  # for partial sums and for panels
def test_streams_that_share_the_buffer_take_turns(gpu, tokens):
    packed, x = KERNEL.pack(sparse_weight(20, 600), None, False), torch.randn(tokens, 600).bfloat16()
    one, other = Stream(1, gpu), Stream(2, gpu)
    for stream in (one, one, other, other, one):
        gpu.stream = stream
        linear(x, packed, None, 20)
    assert gpu.waits == [(2, 1), (1, 2)]


@pytest.mark.parametrize("tokens", [65, 513])
def test_a_captured_stream_waits_for_no_other(gpu, tokens):
    packed, x = KERNEL.pack(sparse_weight(20, 600), None, False), torch.randn(tokens, 600).bfloat16()
    linear(x, packed, None, 20)
    gpu.stream, gpu.is_capturing = Stream(2, gpu), True
    linear(x, packed, None, 20)
    assert gpu.waits == []


@pytest.mark.parametrize("tokens", [70, 520])
def test_threads_do_not_write_into_each_others_panels_or_sums(gpu, tokens):
    weights = [sparse_weight(90, 600, seed=seed) for seed in range(4)]
    packed = [KERNEL.pack(weight, None, False) for weight in weights]
    x = torch.randn(tokens, 600).bfloat16()
    wrong = []

    def run(index):
        for _ in range(5):
            y = linear(x, packed[index], None, 90)
            if not torch.allclose(y, torch.nn.functional.linear(x, weights[index]), rtol=0.02, atol=0.02):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The operator.


@pytest.mark.parametrize("tokens", [3, 70, 600])
def test_is_a_well_formed_operator(gpu, tokens):
    packed = KERNEL.pack(sparse_weight(40, 24), None, False)
    arguments = (torch.randn(tokens, 24).bfloat16(), list(packed), torch.randn(40).bfloat16(), 40, "cuda")
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.efx.sparse_linear, arguments, test_utils=checks)


def test_survives_torch_compile_without_a_graph_break(gpu):
    packed = list(KERNEL.pack(sparse_weight(40, 24), None, False))

    def layer(x):
        return torch.relu(torch.ops.efx.sparse_linear(x * 2, packed, None, 40, "cuda")) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (1, 3, 70, 600):
        x = torch.randn(tokens, 24).bfloat16()
        torch.testing.assert_close(compiled(x), layer(x))


# Packing.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (33, 50), (1, 1)])
def test_unpacking_gives_back_every_bit(gpu, shape, dtype):
    weight = sparse_weight(*shape, dtype)
    unpacked, scales = KERNEL.unpack(KERNEL.pack(weight, None, False))
    assert scales is None and unpacked.dtype == dtype and torch.equal(unpacked, weight)


@pytest.mark.parametrize("shape", [(48, 64), (33, 50), (1, 1)])
def test_unpacking_gives_back_int8_and_scales(gpu, shape):
    weight, scales = int8_weight(*shape)
    unpacked, own_scales = KERNEL.unpack(KERNEL.pack(weight, scales, False))
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, weight)
    assert own_scales.dtype == torch.float32 and torch.equal(own_scales, scales)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside of it take at a time; `given` was there before."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.peak = 0
        self.alive = WeakKeyDictionary({given.untyped_storage(): 0})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.alive.setdefault(storage, storage.nbytes())
            self.peak = max(self.peak, sum(self.alive.values()))
        return result


def test_packing_takes_the_packed_weight_and_a_bounded_number_of_bytes_per_weight_of_a_chunk(gpu, monkeypatch):
    KERNEL.pack(sparse_weight(16, 64), None, False)  # what is made once
    monkeypatch.setattr(layout, "CHUNK", 1 << 14)
    peaks = {}
    for rows in (1024, 4096):
        weight = sparse_weight(rows, 256)
        with PeakMemory(weight) as memory:
            packed = KERNEL.pack(weight, None, False)
        size = sum(tensor.nbytes for tensor in packed)
        assert size <= 0.59 * weight.nbytes
        peaks[rows] = memory.peak - size
    assert peaks[4096] <= 1.05 * peaks[1024] <= 48 * layout.CHUNK


# Which weights it takes.


@pytest.fixture
def devices(monkeypatch) -> FakeGpu:
    """Tensors say that they are on a GPU."""
    monkeypatch.delenv("EFX_KERNEL", raising=False)
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    monkeypatch.setattr(program, "missing", lambda: None)
    with FakeTensorMode():
        yield gpu


def on_gpu(rows: int = 32, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="cuda:0")


def test_it_is_the_kernel_for_gpus(devices):
    for dtype in DTYPES:
        assert registry.choose(on_gpu(dtype=dtype), dtype, None) == (KERNEL, None)
        assert registry.choose(on_gpu(dtype=torch.int8), dtype, torch.ones(32, device="cuda:0")) == (KERNEL, None)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), "the sparse kernel needs a GPU of compute capability 8.0, this one has 7.5"),
        ((99, 1), r"NVRTC \d+.\d+ does not know a GPU of compute capability 99.1: install a newer torch"),
    ],
)
def test_a_gpu_that_is_too_old_or_too_new_gets_the_reference(devices, monkeypatch, capability, expected, forced):
    devices.capability = capability
    check_refused(monkeypatch, forced, expected, on_gpu(), torch.bfloat16)


@pytest.mark.parametrize("forced", [False, True])
def test_a_gpu_of_amd_gets_the_reference(devices, monkeypatch, forced):
    monkeypatch.setattr(torch.version, "hip", "7.2")
    check_refused(monkeypatch, forced, r"there is no sparse kernel for AMD GPUs \(ROCm\)", on_gpu(), torch.bfloat16)


@pytest.mark.parametrize("forced", [False, True])
def test_without_nvrtc_the_reference_serves_and_says_what_to_install(devices, monkeypatch, forced):
    monkeypatch.setattr(program, "missing", lambda: "run `pip install this`")
    check_refused(monkeypatch, forced, "run `pip install this`", on_gpu(), torch.bfloat16)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((4, 4), torch.float32, "the sparse kernel for GPUs takes bfloat16 and float16, not float32"),
        ((4, 4), torch.int8, "the sparse kernel for GPUs takes bfloat16 and float16, not float32"),
        ((0, 4), torch.bfloat16, "the weight is empty"),
        ((4, 0), torch.bfloat16, "the weight is empty"),
        ((1, 2**21 + 1), torch.bfloat16, "the sparse kernel for GPUs takes rows of up to 2097152 weights, not 2097153"),
    ],
)
def test_what_it_does_not_take_is_left_to_the_reference(devices, monkeypatch, shape, dtype, expected, forced):
    weight = on_gpu(*shape, dtype)
    scales = torch.ones(shape[0], device="cuda:0") if dtype == torch.int8 else None
    check_refused(monkeypatch, forced, expected, weight, torch.float32 if dtype == torch.int8 else dtype, scales)


def check_refused(monkeypatch, forced, expected, weight, dtype, scales=None):
    if forced:
        monkeypatch.setenv("EFX_KERNEL", "cuda")
        with pytest.raises(EfxError, match=f"^EFX_KERNEL=cuda, but {expected}: unset it, or choose one of reference$"):
            registry.choose(weight, dtype, scales)
        return
    packed = pack(weight, scales=scales, dtype=dtype)
    assert packed.kernel == "reference"
    scheme = "W8A16: " if dtype is not weight.dtype else ""
    assert re.fullmatch(f"{scheme}weights expanded to dense once at load.*; {expected}", kernel_summary(packed))
