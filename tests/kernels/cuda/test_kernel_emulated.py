"""The whole way from a weight to a product, with nothing but the hardware replaced: the kernel for GPUs launches the
source, compiled for a CPU, with the grids and the arguments that a GPU would get.
"""

import shutil

import pytest
import torch

from efx_plugin.kernels.cuda import buffer, kernel, variants
from tests.support.emulated_gpu import EmulatedGpu
from tests.support.fake_gpu import FakeGpu

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The emulated kernels that were compiled with some macros."""
    compiled: dict[tuple, EmulatedGpu] = {}

    def find(defines: dict[str, int]) -> EmulatedGpu:
        key = tuple(defines.items())
        if key not in compiled:
            variant = variants.Variant("", key, 0, 0, 0)
            compiled[key] = EmulatedGpu(variant, tmp_path_factory.mktemp("emulated"))
        return compiled[key]

    return find


@pytest.fixture
def gpu(monkeypatch, emulated) -> FakeGpu:
    gpu = FakeGpu()
    gpu.install(monkeypatch)

    def compute(function, how, arguments):
        geometry = variants.Launch(how.grid, how.block, how.shared_bytes)
        emulated(function.defines).launch(how.symbol, geometry, arguments)

    monkeypatch.setattr(gpu, "compute", compute)
    for module in (variants, buffer):
        monkeypatch.setattr(module, "PANEL_BYTES", 2 * 16 * 1024)  # so that a small weight has several panels
    kernel.panels.cache_clear()
    yield gpu
    kernel.panels.cache_clear()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 12, 66])
@pytest.mark.parametrize("shape", [(100, 128), (33, 100), (60, 1000)])
def test_computes_the_product(gpu, shape, tokens, is_int8):
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(shape, generator=generator) < 0.5
    weight, scales = (torch.randn(shape, generator=generator) * kept).bfloat16(), None
    dense = weight
    if is_int8:
        scales = torch.rand(rows, generator=generator) / 64
        weight = (torch.randint(-128, 128, shape, generator=generator) * kept).to(torch.int8)
        dense = weight * scales[:, None]
        dense = dense.bfloat16() if tokens > 64 else dense  # as a panel is
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    bias = torch.randn(rows, generator=generator).bfloat16()
    packed = kernel.KERNEL.pack(weight, scales, False)
    y = kernel.KERNEL.linear(x, packed, bias, rows)
    exact = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    torch.testing.assert_close(y, exact.bfloat16())
    panels = [one for one in gpu.launched if one.symbol == "efx_expand"]
    assert len(panels) == (0 if tokens <= 64 else len(kernel.panels(rows, -(-columns // 64) * 64)))
