"""A new kernel is a class in a file of its own and a line in the registry: nothing else has to know of it."""

import pytest
import torch
from torch import Tensor

from efx_plugin.errors import EfxError
from efx_plugin.kernels import kernel_summary, pack, registry, sparse_linear, unpack


class CoordinateKernel:
    """torch's sparse matrices, for square weights of any dtype."""

    name = "toy-coordinates"
    summary = "torch's sparse product"
    device = None

    def obstacle(self, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> str | None:
        return None if weight.shape[0] == weight.shape[1] else "toy-coordinates takes square weights only"

    def pack(self, weight: Tensor, scales: Tensor | None, quantize_activations: bool) -> tuple[Tensor, ...]:
        return weight.nonzero().T.contiguous(), weight[weight != 0], torch.tensor(weight.shape)

    def linear(self, x: Tensor, packed: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        y = (self.unpack(packed)[0] @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], out_features)
        return (y if bias is None else y + bias).contiguous()

    def unpack(self, packed: list[Tensor]) -> tuple[Tensor, None]:
        indices, values, shape = packed
        return torch.sparse_coo_tensor(indices, values, shape.tolist(), check_invariants=True).to_dense(), None


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "KERNELS", (CoordinateKernel(), *registry.KERNELS))


def sparse_weight(rows: int) -> Tensor:
    return torch.randn(rows, 8, dtype=torch.float64) * (torch.rand(rows, 8) < 0.5)


def test_it_is_chosen_and_runs_through_the_operator():
    weight = sparse_weight(8)
    packed = pack(weight)
    assert (packed.kernel, kernel_summary(packed)) == ("toy-coordinates", "torch's sparse product")
    x, bias = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(sparse_linear(x, packed, bias), torch.nn.functional.linear(x, weight, bias))
    compiled = torch.compile(lambda x: sparse_linear(x, packed, bias) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), 2 * sparse_linear(x, packed, bias))
    assert torch.equal(unpack(packed)[0], weight)


def test_a_weight_that_it_does_not_take_goes_to_the_next_and_the_log_says_why():
    packed = pack(sparse_weight(9))
    assert packed.kernel == "reference"
    assert kernel_summary(packed).endswith("; toy-coordinates takes square weights only")


def test_it_can_be_forced(monkeypatch):
    monkeypatch.setenv("EFX_KERNEL", "toy-coordinates")
    assert kernel_summary(pack(sparse_weight(8))).endswith("; EFX_KERNEL=toy-coordinates is set")
    with pytest.raises(EfxError, match=r"EFX_KERNEL=toy-coordinates, but .* square weights only: unset it, or choose"):
        pack(sparse_weight(9))
