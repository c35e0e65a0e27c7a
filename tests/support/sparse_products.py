"""Products by sparse weights, random but for their seed, and how near to float64 a kernel has to come."""

from dataclasses import dataclass

import torch
from torch import Tensor

from efx_plugin.kernels.cuda import layout
from efx_plugin.kernels.cuda.variants import DTYPES

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
KINDS = [(dtype, is_int8) for is_int8 in (False, True) for dtype in DTYPES]  # of activations and weights
MASKS = ("dense", "empty", "random", "2:4", "rows", "blocks")


@dataclass(frozen=True)
class Case:
    """A product; `seed` says the values."""

    dtype: torch.dtype
    is_int8: bool
    tokens: int
    rows: int
    columns: int
    mask: str = "random"
    density: float = 0.5
    biased: bool = True
    at_once: bool = False
    descending: bool = False
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Activations, weight, its scales if it is int8, and bias."""
        generator = torch.Generator().manual_seed(self.seed)
        weight = torch.randn(self.rows, self.columns, generator=generator)
        if self.is_int8:
            weight = torch.randint(-128, 128, weight.shape, generator=generator)
        weight = (weight * self._mask(generator)).to(torch.int8 if self.is_int8 else self.dtype)
        x = torch.randn(self.tokens, self.columns, generator=generator).to(self.dtype)
        bias = torch.randn(self.rows, generator=generator).to(self.dtype)
        scales = torch.randn(self.rows, generator=generator).exp() / 64
        return x, weight, scales if self.is_int8 else None, bias if self.biased else None

    def _mask(self, generator: torch.Generator) -> Tensor:
        scores = torch.rand(self.rows, self.columns, generator=generator)
        if self.mask == "2:4":
            groups = torch.nn.functional.pad(scores, (0, -self.columns % 4)).view(self.rows, -1, 4)
            kept = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1)
            return kept.view(self.rows, -1)[:, : self.columns]
        if self.mask == "rows":  # empty and full ones
            return (scores[:, :1] < self.density).expand_as(scores)
        if self.mask == "blocks":  # of 16 x 64, empty and full
            return (
                scores[::16, ::64].repeat_interleave(16, 0).repeat_interleave(64, 1)[: self.rows, : self.columns] < 0.5
            )
        return scores < {"dense": 1.0, "empty": 0.0, "random": self.density}[self.mask]


def padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % layout.TILE_COLUMNS))


def value(weight: Tensor, scales: Tensor | None) -> Tensor:
    """The weight in float64."""
    return weight.double() if scales is None else weight.double() * scales.double()[:, None]


def rounded(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype of 16 bits; a scaled integer is float32 before."""
    return value(weight, scales).float().to(dtype)


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # as `Case.tensors` has them


def is_near(y: Tensor, case: Case, operands: Operands, additions: float) -> bool:
    """Whether y is the product in float64, but for the rounding of so many additions in float32 and of the result."""
    x, weight, scales, bias = operands
    products = [x.double() @ value(weight, scales).T, x.double().abs() @ value(weight, scales).abs().T]
    exact, magnitude = products if bias is None else (products[0] + bias.double(), products[1] + bias.double().abs())
    before = magnitude * additions * 2.0**-24
    allowed = before + UNIT_ROUNDOFF[case.dtype] * (exact.abs() + before) + SMALLEST[case.dtype]
    return bool(torch.all((y.double() - exact).abs() <= allowed))
