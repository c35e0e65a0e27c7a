"""What we assume of torch's private parts."""

import pytest
import torch

from tests.upstream.contract import holds

KERNEL, MACHINE = "efx_plugin.kernels.reference", "efx_plugin.machine"


@pytest.mark.parametrize(
    ("space", "name", "user"),
    [
        (torch.ops.mkldnn, "_reorder_linear_weight", KERNEL),
        (torch.ops.mkldnn, "_linear_pointwise", KERNEL),
        (torch.ops.mkldnn, "_is_mkldnn_bf16_supported", MACHINE),
        (torch.ops.mkldnn, "_is_mkldnn_fp16_supported", MACHINE),
        (torch.cpu, "_is_avx512_bf16_supported", MACHINE),
        (torch.cpu, "_is_amx_tile_supported", MACHINE),
    ],
)
def test_private_functions_are_there(space, name, user):
    holds(hasattr(space, name), "torch", f"there is no {name}", user)


@pytest.mark.parametrize("name", ["_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"])
def test_the_processor_can_be_asked(name):
    holds(type(getattr(torch.ops.mkldnn, name)()) is bool, "torch", f"mkldnn.{name}() gives no bool", MACHINE)


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_the_instructions_can_be_asked(name):
    holds(type(getattr(torch.cpu, name)()) is bool, "torch", f"torch.cpu.{name}() gives no bool", MACHINE)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_onednn_takes_a_weight_in_its_own_layout_and_gives_it_back():
    weight, x, bias = torch.randn(37, 50), torch.randn(3, 50), torch.randn(37)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    holds(reordered.is_mkldnn, "torch", "a reordered weight is no mkldnn tensor", KERNEL)
    holds(torch.equal(reordered.to_dense(), weight), "torch", "to_dense() of a reordered weight is another", KERNEL)
    y = torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")
    expected = torch.nn.functional.linear(x, weight, bias)
    holds(torch.allclose(y, expected, atol=1e-4), "torch", "mkldnn._linear_pointwise computes something else", KERNEL)
