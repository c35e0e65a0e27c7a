"""The best kernel that takes a weight is chosen, and the log says which, and why it is not a better one."""

import shutil

import pytest
import torch

from efx_plugin.errors import EfxError
from efx_plugin.kernels import kernel_summary, native, pack, reference, registry, sparse_linear
from efx_plugin.kernels.cuda import kernel as cuda
from tests.support.native_calls import ISAS

needs_library = pytest.mark.skipif(not ISAS, reason="the kernels are not compiled")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_library_is_there_where_a_compiler_is():
    assert ISAS, "g++ is there, so `pip install --editable .` should have built the kernels"


def sparse_weight(dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(20, 12).mul(torch.rand(20, 12) < 0.5).bfloat16().to(dtype)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_best_that_the_processor_has_is_chosen(dtype):
    weight = sparse_weight(dtype)
    packed = pack(weight)
    assert packed.kernel == ISAS[0]
    assert kernel_summary(packed).startswith(native.SUMMARIES[packed.kernel])
    x = torch.randn(3, 12).to(dtype)
    torch.testing.assert_close(sparse_linear(x, packed), torch.nn.functional.linear(x, weight))


@needs_library
@pytest.mark.parametrize("name", [*ISAS, "reference"])
def test_each_kernel_can_be_forced(monkeypatch, name):
    monkeypatch.setenv("EFX_KERNEL", name)
    packed = pack(sparse_weight())
    assert packed.kernel == name
    assert kernel_summary(packed) == f"{registry.find(name).summary}; EFX_KERNEL={name} is set"


def test_a_name_of_no_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("EFX_KERNEL", "fastest")
    names = f"{native.KERNELS[0].name}, .*, reference"
    with pytest.raises(EfxError, match=f"EFX_KERNEL=fastest is no kernel: choose one of {names}$"):
        pack(sparse_weight())


@needs_library
def test_a_processor_that_lacks_the_best_gets_the_next_and_refuses_to_be_forced(monkeypatch):
    best, *rest = native.KERNELS
    monkeypatch.setattr(best, "is_supported", False)
    available = [*(kernel.name for kernel in rest if kernel.is_supported), "reference"]
    packed = pack(sparse_weight())
    assert packed.kernel == available[0]
    assert kernel_summary(packed).endswith(f"; this processor lacks what {best.name} needs")
    monkeypatch.setenv("EFX_KERNEL", best.name)
    with pytest.raises(EfxError, match=f"this processor lacks what {best.name} needs.*one of {', '.join(available)}$"):
        pack(sparse_weight())


def test_without_the_library_the_reference_serves_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(registry, "KERNELS", (*native.kernels(), reference.KERNEL))
    packed = pack(sparse_weight())
    assert packed.kernel == "reference"
    assert "install g++ and run `pip install --force-reinstall" in kernel_summary(packed)
    monkeypatch.setenv("EFX_KERNEL", "portable")
    with pytest.raises(EfxError, match=r"EFX_KERNEL=portable, but .* without a C\+\+ compiler"):
        pack(sparse_weight())


def test_a_device_without_a_kernel_of_its_own_gets_the_reference(monkeypatch):
    weight = sparse_weight().to("meta")
    packed = pack(weight)
    assert packed.kernel == "reference"
    assert kernel_summary(packed).endswith("; there is no sparse kernel for meta devices")
    monkeypatch.setenv("EFX_KERNEL", "portable")
    with pytest.raises(
        EfxError, match=r"=portable, but that kernel runs on cpu devices, and the weights are on a meta"
    ):
        pack(weight)


def test_the_kernel_for_gpus_is_refused_on_a_cpu(monkeypatch):
    assert "cuda" not in kernel_summary(pack(sparse_weight()))
    monkeypatch.setenv("EFX_KERNEL", "cuda")
    available = ", ".join([*ISAS, "reference"])
    expected = "that kernel runs on cuda devices, and the weights are on a cpu device: unset it, or choose one of"
    with pytest.raises(EfxError, match=f"^EFX_KERNEL=cuda, but {expected} {available}$"):
        pack(sparse_weight())


def wide_int8() -> dict:
    weight = torch.zeros(1, native.MOST_INT8_COLUMNS + 1, dtype=torch.int8)
    return {"weight": weight, "scales": torch.ones(1), "dtype": torch.bfloat16}


def four_bits(scales: torch.Tensor) -> dict:
    return {"weight": torch.ones(4, 64, dtype=torch.int8), "scales": scales, "dtype": torch.bfloat16}


def test_the_kernel_for_gpus_takes_no_weights_of_four_bits():
    weight, scales, dtype = four_bits(torch.ones(4, 2)).values()
    assert cuda.KERNEL.obstacle(weight, dtype, scales) == "the sparse kernel for GPUs takes no weights of four bits"


@needs_library
@pytest.mark.parametrize("name", [*ISAS, "reference"])
@pytest.mark.parametrize("quantize_activations", [False, True])
def test_each_kernel_can_be_forced_on_four_bits(monkeypatch, name, quantize_activations):
    monkeypatch.setenv("EFX_KERNEL", name)
    packed = pack(**four_bits(torch.ones(4, 2)), quantize_activations=quantize_activations)
    assert packed.kernel == name
    x = torch.ones(2, 64).bfloat16()
    torch.testing.assert_close(sparse_linear(x, packed), torch.full((2, 4), 64).bfloat16())


@needs_library
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"weight": sparse_weight(torch.float16)}, "bfloat16 and float32 activations, not float16"),
        ({"weight": sparse_weight(torch.float64)}, "bfloat16 and float32 activations, not float64"),
        ({"weight": torch.full((4, 4), 1 / 3)}, "float32 values that bfloat16 cannot hold"),
        ({"weight": torch.empty(0, 4).bfloat16()}, "the weight is empty"),
        ({"weight": torch.empty(4, 0).bfloat16()}, "the weight is empty"),
        (wide_int8(), "more than 65536 int8 weights"),
        (four_bits(torch.full((4, 2), 1 / 3)), "float32 values that neither bfloat16 nor float16 can hold"),
    ],
)
def test_what_no_sparse_kernel_takes_is_left_to_the_reference(monkeypatch, arguments, reason):
    packed = pack(**arguments)
    assert packed.kernel == "reference"
    assert reason in kernel_summary(packed)
    monkeypatch.setenv("EFX_KERNEL", "portable")
    with pytest.raises(EfxError, match=f"{reason}.*choose one of reference$"):
        pack(**arguments)
