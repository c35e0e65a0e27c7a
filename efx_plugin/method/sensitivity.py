"""Sensitivity c_o of what follows to each output of a linear layer.

The paper takes c_o from the norm of the consumer's weights alone (eq. 2), which ignores gates, attention and the data.
`*_sensitivity` are that form where they are given weights, and the measured form where they are given statistics of
activations; `square_gradient_sum` measures everything between the layer and the block's output by gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# What normalizers add to a mean square before they divide by its root.
NORM_EPSILON = 1e-6


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(g) · u, the gated MLP of Llama."""
    return functional.silu(gate) * up


def gated_moments(
    gate: Tensor,
    up: Tensor,
    gated: Callable[[Tensor, Tensor], Tensor] = silu_gate,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of (∂h/∂u)² and (∂h/∂g)² of a gated MLP, for up_proj and gate_proj, each fp32 [intermediate].

    With h = silu(g) · u they are silu(g)² and (u · silu'(g))².

    Args:
        gate: outputs g of gate_proj, [..., intermediate].
        up: outputs u of up_proj, the same shape.
        gated: h(g, u), entry by entry.
        weights: factors on h, one per token, as a router gives them; [...]. None stands for 1.
    """
    gate, up = (part.detach().reshape(-1, part.shape[-1]).float().requires_grad_() for part in (gate, up))
    with torch.enable_grad():
        by_gate, by_up = torch.autograd.grad(gated(gate, up).sum(), (gate, up))
    factors = 1 if weights is None else weights.detach().reshape(-1, 1).float().square()
    return (by_up.square() * factors).sum(dim=0), (by_gate.square() * factors).sum(dim=0)


def column_energy(weight: Tensor, sensitivity: Tensor | None = None) -> Tensor:
    """Σ_k V_ko² c_k, fp32 [in]: what an input of the consumer V is worth (paper, eq. 2, where c_k = 1).

    Args:
        weight: V, [out, in].
        sensitivity: c of the consumer's own outputs, [out].
    """
    squares = weight.float().square()
    return squares.sum(dim=0) if sensitivity is None else sensitivity.float() @ squares


def gated_sensitivity(moment: Tensor, down_weight: Tensor, sensitivity: Tensor | None = None) -> Tensor:
    """c of up_proj or gate_proj: the partner's moment times the energy of down_proj's column, [intermediate].

    Args:
        moment: E[(∂h/∂u)²] for up_proj, E[(∂h/∂g)²] for gate_proj, [intermediate].
        down_weight: [hidden, intermediate].
        sensitivity: c of down_proj's outputs, [hidden]; None stands for 1.
    """
    return moment * column_energy(down_weight, sensitivity)


def value_sensitivity(output_weight: Tensor, heads: int, kv_heads: int, sensitivity: Tensor | None = None) -> Tensor:
    """c of v_proj: the energy of o_proj's columns, summed over the query heads that share a kv head.

    Args:
        output_weight: o_proj, [hidden, heads · d].
        sensitivity: c of o_proj's outputs, [hidden]; None stands for 1.

    Returns:
        [kv_heads · d].
    """
    columns = column_energy(output_weight, sensitivity)
    return columns.reshape(kv_heads, heads // kv_heads, -1).sum(dim=1).flatten()


def query_sensitivity(key_energy: Tensor, heads: int, kv_heads: int, rotary_dim: int | None = None) -> Tensor:
    """c of q_proj: E[k²] of the key channel it meets, averaged over the pair that rotary embedding mixes, [heads · d].

    A rotation keeps the energy of its pair (channels j and j + rotary_dim / 2 of a head), so energies before it serve.

    Args:
        key_energy: E[k²] per key channel before rotation, [kv_heads · d].
        rotary_dim: how many of the d channels are rotated, the first ones; None stands for all.
    """
    pairs = _pair_mean(key_energy.reshape(kv_heads, -1), rotary_dim)
    return pairs.repeat_interleave(heads // kv_heads, dim=0).flatten()


def key_sensitivity(query_energy: Tensor, heads: int, kv_heads: int, rotary_dim: int | None = None) -> Tensor:
    """c of k_proj: E[q²], averaged over the rotary pair, summed over the query heads of the group, [kv_heads · d].

    Args:
        query_energy: E[q²] per query channel before rotation, [heads · d].
        rotary_dim: as in `query_sensitivity`.
    """
    pairs = _pair_mean(query_energy.reshape(heads, -1), rotary_dim)
    return pairs.reshape(kv_heads, heads // kv_heads, -1).sum(dim=1).flatten()


def _pair_mean(energy: Tensor, rotary_dim: int | None) -> Tensor:
    rotated = energy.shape[-1] if rotary_dim is None else rotary_dim
    first, second = energy[..., :rotated].chunk(2, dim=-1)
    mean = (first + second) / 2
    return torch.cat([mean, mean, energy[..., rotated:]], dim=-1)


def normalized_moments(squares: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """What a normalizer y ↦ gain · y / rms(y) makes of outputs y: sums of its results' squares and of its slopes'.

    The slope holds the root mean square fixed: (gain / rms(y))², exact but for the direction of y itself.

    Args:
        squares: y², [tokens, out]; `out` is one or more groups, each normalized by itself.
        gain: of every channel of a group, [width]; `out` is a multiple of `width`.

    Returns:
        Sums over tokens of (gain y / rms)² and of (gain / rms)², each fp32 [out].
    """
    groups = squares.float().unflatten(-1, (-1, len(gain)))
    slopes = gain.float().square() / (groups.mean(dim=-1, keepdim=True) + NORM_EPSILON)
    return (groups * slopes).sum(dim=0).flatten(), slopes.sum(dim=0).flatten()


def square_gradient_sum(gradient: Tensor) -> Tensor:
    """Sum over tokens of (∂(z·h)/∂y_o)², fp32 [out].

    With z ~ N(0, I) and h the block's output, its mean is the diagonal of the Gauss-Newton matrix of ‖h‖² in y: one
    unit for every matrix of the block, with norms, softmax, gates and residuals included.

    Args:
        gradient: gradient of z·h with respect to the layer's outputs, [..., out].
    """
    return gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)


def random_direction(output: Tensor, generator: torch.Generator) -> Tensor:
    """z ~ N(0, I) of the shape, dtype and device of `output`."""
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
