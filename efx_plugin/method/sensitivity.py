"""Sensitivity c_o of what follows to each output of a linear layer.

The paper takes c_o from the norm of the consumer's weights alone, which ignores gates, attention and norms. The two
estimates here measure them: from activations (`*_sensitivity`, forward statistics of a Llama-type block) and from
gradients (`square_gradient_sum`, everything between the layer and the block's output).
"""

import torch
from torch import Tensor
from torch.nn import functional


def gated_moments(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens of silu(g)² and (u · silu'(g))² for a gated MLP, each fp32 [intermediate].

    Args:
        gate: outputs g of gate_proj, [..., intermediate].
        up: outputs u of up_proj, the same shape.
    """
    gate, up = gate.reshape(-1, gate.shape[-1]).float(), up.reshape(-1, up.shape[-1]).float()
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return functional.silu(gate).square().sum(dim=0), (up * slope).square().sum(dim=0)


def gated_sensitivity(moment: Tensor, down_weight: Tensor) -> Tensor:
    """c of up_proj or gate_proj: the partner's moment times the energy of down_proj's column, [intermediate].

    Args:
        moment: E[silu(g)²] for up_proj, E[(u silu'(g))²] for gate_proj, [intermediate].
        down_weight: [hidden, intermediate].
    """
    return moment * down_weight.float().square().sum(dim=0)


def value_sensitivity(output_weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """c of v_proj: the energy of o_proj's columns, summed over the query heads that share a kv head.

    Args:
        output_weight: o_proj, [hidden, heads · d].

    Returns:
        [kv_heads · d].
    """
    columns = output_weight.float().square().sum(dim=0)
    return columns.reshape(kv_heads, heads // kv_heads, -1).sum(dim=1).flatten()


def query_sensitivity(key_energy: Tensor, heads: int, kv_heads: int) -> Tensor:
    """c of q_proj: E[k²] of the key channel it meets, averaged over the pair that rotary embedding mixes, [heads · d].

    A rotation keeps the energy of its pair (channels j and j + d/2 of a head), so energies before it serve.

    Args:
        key_energy: E[k²] per output of k_proj, [kv_heads · d].
    """
    return _pair_mean(key_energy.reshape(kv_heads, -1)).repeat_interleave(heads // kv_heads, dim=0).flatten()


def key_sensitivity(query_energy: Tensor, heads: int, kv_heads: int) -> Tensor:
    """c of k_proj: E[q²], averaged over the rotary pair, summed over the query heads of the group, [kv_heads · d].

    Args:
        query_energy: E[q²] per output of q_proj, [heads · d].
    """
    pairs = _pair_mean(query_energy.reshape(heads, -1))
    return pairs.reshape(kv_heads, heads // kv_heads, -1).sum(dim=1).flatten()


def _pair_mean(energy: Tensor) -> Tensor:
    first, second = energy.chunk(2, dim=-1)
    return ((first + second) / 2).repeat(1, 2)


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
