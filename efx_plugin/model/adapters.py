"""Linear layers with and without LoRA: their effective weight, and the merge that keeps zeros.

A LoRA pair adds s·B A to the base weight W, with s = alpha / r (rsLoRA: alpha / √r; PEFT stores the quotient). Masking
W alone is undone by the merge, which adds the dense product s·B A to every zero. So scores, masks and repair work on
the effective weight U = W + s·B A, and the result goes into the base layer with B set to zero: whatever merges the
adapter afterwards adds nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from compressed_tensors.utils import update_offload_parameter
from loguru import logger
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from efx_plugin.errors import EfxError
from efx_plugin.model.adapter_kinds import refuse_config, refuse_type


class LoraParts(Protocol):
    """What a LoRA layer of PEFT holds of each of its adapters, by the adapter's name."""

    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_dropout: Mapping[str, nn.Module]
    r: Mapping[str, int]
    scaling: Mapping[str, float]


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of the model, wrapped by LoRA or not.

    Attributes:
        name: name in the model without adapters, such as `model.layers.0.self_attn.q_proj`.
        module: what the model calls: the Linear, or the LoRA layer around it.
        base: the Linear that owns the weight.
    """

    name: str
    module: nn.Module
    base: nn.Linear

    @property
    def lora(self) -> LoraParts:
        """The LoRA layer around the Linear, for the adapters that `active_adapters` names."""
        module: Any = self.module
        parts: LoraParts = module
        return parts


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """Every linear layer of a model in order, each LoRA pair with its base layer as one.

    Modules that PEFT trains whole (`modules_to_save`) are left out: they are not part of the base model. So are
    routers that are a Linear by name and compute something else.

    Raises:
        EfxError: an adapter other than plain LoRA sits on a linear layer, or its weight is quantized.
    """
    layers: list[LinearLayer] = []
    wrapped: tuple[str, ...] = ()
    for name, module in inner_model(model).named_modules():
        if wrapped and name.startswith(wrapped):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrapped = (name + ".",)
        if isinstance(module, BaseTunerLayer):
            if isinstance(base := module.get_base_layer(), nn.Linear):
                _require_plain_lora(name, module)
                layers.append(LinearLayer(name, module, base))
        elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            layers.append(LinearLayer(name, module, module))
    for layer in layers:
        if not layer.base.weight.is_floating_point():
            raise EfxError(
                f"the weight of {layer.name} is quantized ({layer.base.weight.dtype}, as in QLoRA): load the base "
                "model in bfloat16, or dequantize it"
            )
    return layers


def effective_weight(layer: LinearLayer) -> Tensor:
    """U = W + Σ s·B A over the active adapters that are not merged yet, fp32 [out, in]."""
    weight = read_parameter(layer.base.weight).to(torch.float32, copy=True)
    for adapter in active_adapters(layer):
        lora_a = read_parameter(layer.lora.lora_A[adapter].weight).float()
        lora_b = read_parameter(layer.lora.lora_B[adapter].weight).float()
        weight = torch.addmm(weight, lora_b, lora_a, alpha=layer.lora.scaling[adapter])
    return weight


def stacked_adapter(layer: LinearLayer) -> Tensor | None:
    """A' = s·A of the active adapters, one below the other, fp32 [rank of all, in]; None where there is none."""
    parts = [
        layer.lora.scaling[adapter] * read_parameter(layer.lora.lora_A[adapter].weight).float()
        for adapter in active_adapters(layer)
    ]
    return torch.cat(parts) if parts else None


@torch.no_grad()
def add_to_adapter(layer: LinearLayer, update: Tensor) -> None:
    """Move B of the active adapters, so that U grows by `update` times `stacked_adapter`.

    Args:
        update: [out, rank of all].
    """
    adapters = active_adapters(layer)
    for adapter, part in zip(adapters, update.split([layer.lora.r[name] for name in adapters], dim=1), strict=True):
        lora_b = layer.lora.lora_B[adapter]
        write_parameter(lora_b, read_parameter(lora_b.weight).float() + part)


@torch.no_grad()
def absorb(layer: LinearLayer, weight: Tensor) -> None:
    """Store `weight` [out, in] in the base layer, rounded once to its dtype, and zero B of the active adapters."""
    write_parameter(layer.base, weight)
    for adapter in active_adapters(layer):
        lora_b = layer.lora.lora_B[adapter]
        write_parameter(lora_b, torch.zeros_like(lora_b.weight))


def read_parameter(parameter: Tensor) -> Tensor:
    """A parameter without its history, gathered where FSDP2 shards it: then every process has to ask."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def write_parameter(linear: nn.Linear, weight: Tensor, name: str = "weight") -> None:
    """Store the weight [out, in] of a linear layer, or its "bias" [out], rounded to its dtype, wherever it lies:
    offloaded or sharded."""
    parameter: Tensor = getattr(linear, name)
    weight = weight.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        if not isinstance(weight, DTensor):
            weight = distribute_tensor(weight.to(parameter.device), parameter.device_mesh, parameter.placements)
        parameter.copy_(weight)
    else:
        update_offload_parameter(linear, name, weight)


def merge_adapters(model: PeftModel, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Merge the active LoRA adapters in fp32, keep the masks' zeros, and return the plain model inside.

    The model is changed in place; the adapter is consumed, so save it first if it is still needed. A model that
    `EfficientXpertModifier` has pruned needs no masks: its zeros are in place and its adapter adds nothing.

    Where the output layer is the embedding and only one of them was trained, each gets a weight of its own, and the
    model's config says so.

    Args:
        model: a PeftModel with LoRA adapters.
        masks: bool [out, in], True where a weight is kept, by name of the linear layer in the plain model.

    Raises:
        EfxError: not a PeftModel, an adapter that weights cannot take in, or a mask that fits no linear layer.
    """
    if not isinstance(model, PeftModel):
        raise EfxError(f"{type(model).__name__} is no PeftModel: only a model with adapters can be merged")
    refuse_adapters(model)
    merge_unusual(model)
    layers = {layer.name: layer for layer in linear_layers(model)}
    masks = masks or {}
    for name, mask in masks.items():
        if name not in layers or mask.shape != layers[name].base.weight.shape:
            raise EfxError(f"the mask {name!r} of shape {tuple(mask.shape)} fits no linear layer of the model")
    for name, layer in layers.items():
        if name in masks or active_adapters(layer):
            weight = effective_weight(layer)
            absorb(layer, weight * masks[name] if name in masks else weight)
    plain: nn.Module = model.merge_and_unload()  # adds nothing any more
    return plain


def refuse_adapters(model: PeftModel) -> None:
    """Refuse adapters that the weights of a model cannot take in.

    Raises:
        EfxError: one is active.
    """
    for name in model.active_adapters:
        config = model.peft_config[name]
        refuse_type(config.peft_type, f"adapter {name!r}")
        refuse_config(config, f"adapter {name!r}")


@torch.no_grad()
def merge_unusual(model: PeftModel) -> None:
    """Merge, in fp32, everything that was trained but plain LoRA on linear layers, which the method knows.

    That is modules that were trained whole, adapters of the embeddings, of the output layer and of fused experts, and
    variants of LoRA.
    """
    untie_adapted(model)
    inner = model.get_base_model()
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    done: tuple[str, ...] = ()
    for name, module in list(inner.named_modules()):
        if done and name.startswith(done):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif isinstance(module, BaseTunerLayer) and (module in ends or not _is_plain_lora(module)):
            plain = module.get_base_layer()
            dtypes = {parameter: parameter.dtype for parameter in plain.parameters(recurse=False)}
            for parameter in dtypes:
                parameter.data = parameter.data.float()
            if isinstance(module, lora.ParamWrapper):  # one inside the other
                module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                module.merge()
            for parameter, dtype in dtypes.items():
                parameter.data = parameter.data.to(dtype)
        else:
            continue
        done = (*done, name + ".")
        parent, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(parent), leaf, plain)


@torch.no_grad()
def untie_adapted(model: PeftModel) -> None:
    """Give the output layer a weight of its own where it is the embedding and LoRA changes only one of the two."""
    inner = model.get_base_model()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is None or not any(isinstance(end, LoraLayer) for end in (embedding, head)):
        return
    base = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    if base.weight is not embedding.weight:
        return
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
    for config in (inner.config, inner.config.get_text_config()):
        config.tie_word_embeddings = False
    logger.warning("the output layer and the embedding were one weight and LoRA trained them apart: each gets its own")


def active_adapters(layer: LinearLayer) -> list[str]:
    """The adapters that add to the layer now: switched on, and not merged."""
    module = layer.module
    if not isinstance(module, LoraLayer) or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A and name not in module.merged_adapters]


def _is_plain_lora(module: BaseTunerLayer) -> bool:
    return isinstance(module, lora.Linear) and not any(
        name in module.lora_variant or module.lora_bias.get(name) for name in module.active_adapters
    )


def _require_plain_lora(name: str, module: BaseTunerLayer) -> None:
    if not isinstance(module, lora.Linear):
        raise EfxError(f"{name} has a {type(module).__name__} adapter: only LoRA is supported, merge it first")
    if not _is_plain_lora(module):
        raise EfxError(f"the adapter of {name} is not plain LoRA (DoRA, bias, ...): merge it first")
