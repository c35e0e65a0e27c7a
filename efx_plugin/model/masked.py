"""Training under a mask: a LoRA layer computes y = x ((W + s·B A) ∘ M)ᵀ + bias.

Masking W alone would leave B A dense, and the merge would refill what was pruned. So the mask lies on the effective
weight: the adapter learns inside the support, and what is merged at the end is what was trained.

The effective weight is built in each forward pass, freed, and built again in the backward pass, which then needs one
product more than plain LoRA, G = (∂L/∂y)ᵀ x: dB = s (G ∘ M) Aᵀ and dA = s Bᵀ (G ∘ M). Nothing flows through pruned
entries, and no weight of the layer's size outlives the layer's own pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import LinearLayer, active_adapters

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked_linear(
    inputs: Tensor,
    weight: Tensor,
    keep: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x ((W + B A) ∘ M)ᵀ + bias, differentiable in everything but the mask.

    It is computed, and returned, in autocast's dtype where that is on, else in that of the inputs. The gradients of W,
    A and B are exactly those of the dense expression: zero for what is pruned.

    Args:
        inputs: x, [..., in].
        weight: W, [out, in]; memory for its gradient is taken only if it wants one.
        keep: the mask M, bool [out, in], True where a weight is kept.
        lora_a: A, [rank, in]; None where there is no adapter.
        lora_b: s·B, [out, rank].
        bias: [out].
    """
    kind = inputs.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
    outputs: Tensor = _MaskedLinear.apply(inputs, weight, keep, lora_a, lora_b, bias, dtype)
    return outputs


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch types none of what its contexts hold
        inputs: Tensor,
        weight: Tensor,
        keep: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = inputs.to(dtype)
        learns = any(ctx.needs_input_grad[index] for index in (1, 3, 4))
        ctx.save_for_backward(rows if learns else None, weight, keep, lora_a, lora_b)
        ctx.dtype, ctx.inputs_dtype, ctx.bias_dtype = dtype, inputs.dtype, None if bias is None else bias.dtype
        effective = _effective(weight, keep, lora_a, lora_b, dtype)
        return F.linear(rows, effective, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, keep, lora_a, lora_b = ctx.saved_tensors
        for_inputs = for_weight = for_a = for_b = for_bias = None
        gradient = gradient.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            effective = _effective(weight, keep, lora_a, lora_b, ctx.dtype)
            for_inputs = (gradient @ effective).to(ctx.inputs_dtype)
            del effective
        flat = gradient.reshape(-1, gradient.shape[-1])
        if rows is not None:
            outer = _mask_(flat.T @ rows.reshape(-1, rows.shape[-1]), keep)
            if ctx.needs_input_grad[3]:
                for_a = (lora_b.to(ctx.dtype).T @ outer).to(lora_a.dtype)
            if ctx.needs_input_grad[4]:
                for_b = (outer @ lora_a.to(ctx.dtype).T).to(lora_b.dtype)
            if ctx.needs_input_grad[1]:
                for_weight = outer.to(weight.dtype)
        if ctx.needs_input_grad[5]:
            for_bias = flat.sum(dim=0, dtype=ctx.bias_dtype)
        return for_inputs, for_weight, None, for_a, for_b, for_bias, None


def _effective(
    weight: Tensor, keep: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(W + B A) ∘ M in `dtype`, rounded once."""
    if lora_a is None or lora_b is None:
        return _mask_(weight.to(dtype, copy=True), keep)
    return _mask_(torch.addmm(weight.to(dtype), lora_b.to(dtype), lora_a.to(dtype)), keep)


def _mask_(matrix: Tensor, keep: Tensor) -> Tensor:
    """Zero in place what is not kept. On a CPU, an "and" of bits takes a tenth of the time of a product with a mask."""
    bits = _BITS[matrix.element_size()]
    matrix.view(bits).bitwise_and_(keep.to(bits).neg_())
    return matrix


def install_mask(layer: LinearLayer, keep: Tensor) -> None:
    """Make a layer compute with its masked effective weight, until `remove_mask`. A mask it already has is replaced.

    The weights stay as they are: what is masked today may come back. Where the adapters are switched off
    (`disable_adapter()`), the layer is the base model's and the mask does not apply. LoRA's dropout has no counterpart
    for a merged weight and is off under a mask.

    Args:
        keep: bool [out, in], True where a weight is kept.
    """
    remove_mask(layer)
    previous = vars(layer.module).get("forward")
    layer.module.forward = partial(_masked_forward, layer, keep.to(layer.base.weight.device), previous)


def remove_mask(layer: LinearLayer) -> None:
    """Give a layer its own forward pass back; nothing where it has no mask."""
    if (installed := _installed(layer)) is None:
        return
    _layer, _keep, previous = installed
    del layer.module.forward
    if previous is not None:
        layer.module.forward = previous


def mask_of(layer: LinearLayer) -> Tensor | None:
    """The mask that a layer computes with, bool [out, in], True where a weight is kept; None where it has none."""
    return None if (installed := _installed(layer)) is None else installed[1]


def has_dropout(layer: LinearLayer) -> bool:
    """Whether an active adapter of the layer drops inputs, which it cannot under a mask."""
    return any(
        isinstance(dropout := layer.lora.lora_dropout[adapter], nn.Dropout) and dropout.p > 0
        for adapter in active_adapters(layer)
    )


def _installed(layer: LinearLayer) -> tuple[LinearLayer, Tensor, Callable[..., Tensor] | None] | None:
    forward = vars(layer.module).get("forward")
    return forward.args if isinstance(forward, partial) and forward.func is _masked_forward else None


def _masked_forward(
    layer: LinearLayer,
    keep: Tensor,
    previous: Callable[..., Tensor] | None,
    inputs: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    module, base = layer.module, layer.base
    if isinstance(module, LoraLayer) and module.disable_adapters:
        own: Callable[..., Tensor] = previous or partial(type(module).forward, module)
        return own(inputs, *args, **kwargs)
    if kwargs.get("adapter_names") is not None:
        raise EfxError(f"{layer.name} is masked and cannot mix adapters in a batch: leave adapter_names out")
    adapters = active_adapters(layer)
    lora_a = [layer.lora.lora_A[adapter].weight for adapter in adapters]
    lora_b = [layer.lora.lora_B[adapter].weight * layer.lora.scaling[adapter] for adapter in adapters]
    if len(adapters) > 1:
        lora_a, lora_b = [torch.cat(lora_a)], [torch.cat(lora_b, dim=1)]
    return masked_linear(
        inputs,
        base.weight,
        keep,
        lora_a[0] if adapters else None,
        lora_b[0] if adapters else None,
        base.bias,
    )
