"""What a product with a sparse weight has to be, and how far from it the rounding of sums may lead."""

import torch

from efx_plugin.kernels import groups


def scaled(weight: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The weight in float64."""
    if scales is None:
        return weight.double()
    if scales.ndim == 1:
        return weight.double() * scales[:, None]
    size = groups.group_size(weight.shape[1], scales)
    return weight.double() * scales.double().repeat_interleave(size, 1)[:, : weight.shape[1]]


def expected(kind, weight, scales, x, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and how far from it sums in float32 may be.

    K products added in any order, each product and each sum rounded, are off by at most gamma_n = n u / (1 - n u) times
    the sum of magnitudes, with u = 2^-24 and n = K (Higham, Accuracy and Stability of Numerical Algorithms, section
    3.1); sums of groups that are added up are rounded no more often. Four roundings more come from the scales and the
    bias. Quantized activations are integers, except that x / s within 3 roundings of a half may go to either side: s,
    1 / s and x (1 / s) are rounded.
    """
    w, x = scaled(weight, scales), x.double()
    undecided = torch.zeros_like(x)
    x_scale = torch.ones(())
    if kind.endswith("dynamic"):
        x_scale = x.abs().amax(-1, keepdim=True) / 127
        exact = torch.where(x_scale > 0, x / x_scale, 0)
        x = exact.round()
        undecided = (((exact - exact.floor()) - 0.5).abs() < 127 * 3 * 2**-24).double()
    y, magnitude = (x @ w.T) * x_scale, (x.abs() @ w.abs().T) * x_scale
    slack = (undecided @ w.abs().T) * x_scale
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    n = (weight.shape[1] + 4) * 2.0**-24
    return y, n / (1 - n) * (magnitude + slack) + slack


def is_sum(y, kind, weight, scales, x, bias) -> bool:
    """Whether y is the rounding of a sum in float32."""
    exact, error = expected(kind, weight, None if scales is None else scales.float(), x, bias)
    return bool((((exact - error).to(y.dtype) <= y) & (y <= (exact + error).to(y.dtype))).all())
