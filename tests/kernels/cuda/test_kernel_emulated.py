"""The whole way from a weight to a product, with nothing but the hardware replaced: the kernel for GPUs launches the
source, compiled for a CPU, with the grids and the arguments that a GPU would get.
"""

import shutil

import pytest
import torch

from efx_plugin.kernels.cuda import buffer, kernel, variants
from tests.support.fake_gpu import FakeGpu

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
every_kind = pytest.mark.parametrize("is_int8", [False, True])


@pytest.fixture
def gpu(monkeypatch, gpus) -> FakeGpu:
    gpu = FakeGpu()
    gpu.install(monkeypatch)

    def compute(function, how, arguments):
        geometry = variants.Launch(how.grid, how.block, how.shared_bytes)
        headers = ("hopper.cuh",) if function.file == "wgmma.cu" else ()
        variant = variants.Variant("", tuple(function.defines.items()), 0, 0, 0, 0, 0, function.file, headers)
        gpus(variant).launch(how.symbol, geometry, arguments)

    monkeypatch.setattr(gpu, "compute", compute)
    return gpu


@pytest.fixture
def small_panels(gpu, monkeypatch) -> None:
    """So that a small weight has several."""
    for module in (variants, buffer):
        monkeypatch.setattr(module, "PANEL_BYTES", 2 * 16 * 1024)
    kernel.panels.cache_clear()
    yield
    kernel.panels.cache_clear()


@every_kind
@pytest.mark.parametrize("tokens", [1, 7, 12])
@pytest.mark.parametrize("shape", [(100, 128), (33, 100), (60, 1000)])
def test_few_tokens(gpu, shape, tokens, is_int8):
    check(shape, tokens, is_int8)
    assert [one.symbol for one in gpu.launched] == ["efx_decode"]


@every_kind
@pytest.mark.parametrize("tokens", [66, 130])
@pytest.mark.parametrize("shape", [(100, 128), (33, 100), (150, 1000)])
def test_many_tokens(gpu, shape, tokens, is_int8):
    check(shape, tokens, is_int8)
    is_split = shape[1] == 1000
    assert [one.symbol for one in gpu.launched] == ["efx_gemm", "efx_reduce"][: 1 + is_split]


@every_kind
@pytest.mark.parametrize("tokens", [17, 40])
@pytest.mark.parametrize("shape", [(100, 128), (33, 100), (150, 1000)])
def test_many_tokens_on_an_h100(gpu, shape, tokens, is_int8):
    gpu.capability, gpu.multi_processor_count, gpu.shared_memory_per_multiprocessor = (9, 0), 132, 228 << 10
    check(shape, tokens, is_int8)
    is_split = shape[1] == 1000
    assert [one.symbol for one in gpu.launched] == ["efx_arrange", "efx_wgmma", "efx_add"][: 2 + is_split]


@every_kind
@pytest.mark.parametrize("shape", [(100, 128), (33, 100), (60, 1000)])
def test_the_largest_batches(gpu, small_panels, monkeypatch, shape, is_int8):
    monkeypatch.setitem(variants.MEASURED, gpu.capability, variants.Crossovers(1, 1))
    check(shape, 66, is_int8, is_rounded=True)
    panels = [one for one in gpu.launched if one.symbol == "efx_expand"]
    assert len(panels) == len(kernel.panels(shape[0], -(-shape[1] // 64) * 64)) and panels == gpu.launched


def check(shape: tuple[int, int], tokens: int, is_int8: bool, is_rounded: bool = False) -> None:
    """The product is that of torch; `is_rounded`: as scaled int8 weights in a panel are, to the activations' dtype."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(shape, generator=generator) < 0.5
    weight, scales = (torch.randn(shape, generator=generator) * kept).bfloat16(), None
    dense = weight
    if is_int8:
        scales = torch.rand(rows, generator=generator) / 64
        weight = (torch.randint(-128, 128, shape, generator=generator) * kept).to(torch.int8)
        dense = weight * scales[:, None]
        dense = dense.bfloat16() if is_rounded else dense
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    bias = torch.randn(rows, generator=generator).bfloat16()
    packed = kernel.KERNEL.pack(weight, scales, False)
    y = kernel.KERNEL.linear(x, packed, bias, rows)
    exact = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    torch.testing.assert_close(y, exact.bfloat16())
