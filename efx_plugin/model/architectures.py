"""Who consumes whose output in a decoder block, by architecture.

A table names the layers of the architectures that were checked; any other is refused.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import LinearLayer


@dataclass(frozen=True)
class PropagationMap:
    """The parts of a decoder block with rotary attention and a gated MLP, by their names inside it.

    v is consumed by o through the heads of its group, q and k by each other through the attention scores, gate and up
    by down, o by gate and up of the same block; down feeds the residual stream. Layers that share a name are fused: in
    the rows of the one matrix they follow one another in the order of these fields.

    Attributes:
        query, key, value, output: linear layers of the attention.
        mlp: the gated MLP, or a pattern (`re:`, matched whole) that names each expert.
        gate, up, down: its linear layers, inside it.
        query_norm, key_norm: normalize queries and keys before rotary embedding.
        output_norm, down_norm: normalize what o and down add to the residual stream.
        mlp_norm: normalizes what gate and up read from the residual stream.
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    output_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    down_norm: str | None = None


class _QueryKeyNorms(TypedDict):
    query_norm: str
    key_norm: str


class _StreamNorms(TypedDict):
    output_norm: str | None
    mlp_norm: str | None
    down_norm: str | None


_QK_NORMS: _QueryKeyNorms = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_NORMS_BEHIND: _StreamNorms = {
    "output_norm": "post_attention_layernorm",
    "mlp_norm": None,
    "down_norm": "post_feedforward_layernorm",
}
_NORMS_AROUND: _StreamNorms = _NORMS_BEHIND | {"mlp_norm": "pre_feedforward_layernorm"}

PROPAGATION_MAPS = {
    "LlamaForCausalLM": PropagationMap(),
    "MistralForCausalLM": PropagationMap(),
    "MinistralForCausalLM": PropagationMap(),
    "Ministral3ForCausalLM": PropagationMap(),
    "SeedOssForCausalLM": PropagationMap(),
    "GraniteForCausalLM": PropagationMap(),
    "Qwen2ForCausalLM": PropagationMap(),
    "Qwen3ForCausalLM": PropagationMap(**_QK_NORMS),
    "GemmaForCausalLM": PropagationMap(),
    "Gemma2ForCausalLM": PropagationMap(**_NORMS_AROUND),
    "Gemma3ForCausalLM": PropagationMap(**_QK_NORMS, **_NORMS_AROUND),
    "Phi3ForCausalLM": PropagationMap(
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        gate="gate_up_proj",
        up="gate_up_proj",
    ),
    "OlmoForCausalLM": PropagationMap(),
    "Olmo2ForCausalLM": PropagationMap(**_QK_NORMS, **_NORMS_BEHIND),
    "Olmo3ForCausalLM": PropagationMap(**_QK_NORMS, **_NORMS_BEHIND),
    # Experts as llm-compressor makes linear layers of them; a Qwen3-MoE may have dense blocks among the others.
    "MixtralForCausalLM": PropagationMap(mlp=r"re:mlp\.experts\.\d+"),
    "OlmoeForCausalLM": PropagationMap(mlp=r"re:mlp\.experts\.\d+", **_QK_NORMS),
    "Qwen3MoeForCausalLM": PropagationMap(mlp=r"re:mlp(\.experts\.\d+)?", **_QK_NORMS),
}


@dataclass(frozen=True)
class Rows:
    """Outputs `start` to `stop` of a linear layer: all of them, or the part that one role has in a fused layer."""

    layer: LinearLayer
    start: int
    stop: int

    def of(self, outputs: Tensor) -> Tensor:
        """Their share of a tensor [..., out]."""
        return outputs[..., self.start : self.stop]


@dataclass(frozen=True)
class Attention:
    """The attention of a block; `rotary_dim` is how many of the channels of a head are rotated, the first ones."""

    query: Rows
    key: Rows
    value: Rows
    output: Rows
    heads: int
    kv_heads: int
    rotary_dim: int
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    output_norm: nn.Module | None


@dataclass(frozen=True)
class GatedMLP:
    """An MLP down(gated(gate(x), up(x))), dense or one expert of several.

    Attributes:
        gated: the function between, entry by entry, of the outputs of gate and up.
    """

    gate: Rows
    up: Rows
    down: Rows
    module: nn.Module

    @property
    def gated(self) -> Callable[[Tensor, Tensor], Tensor]:
        if (apply_gate := getattr(self.module, "_apply_gate", None)) is not None:  # an expert of llm-compressor's
            return lambda gate, up: apply_gate(torch.cat([gate, up], dim=-1))
        (activation,) = _activations(self.module)
        return lambda gate, up: activation(gate) * up


@dataclass(frozen=True)
class BlockMap:
    """A `PropagationMap` resolved in one decoder block.

    Attributes:
        mlps: the one dense MLP, or all experts.
        mlps_per_token: how many of them a token goes through.
        mlp_norm, down_norm: see `PropagationMap`.
    """

    attention: Attention
    mlps: tuple[GatedMLP, ...]
    mlps_per_token: int
    mlp_norm: nn.Module | None
    down_norm: nn.Module | None


class _Unfit(Exception):
    """Why a map does not fit, as a clause to stand after "a model"."""


# What a user may do where there is no map for propagation, or it does not fit.
_OTHER_PROPAGATION = "use propagation 'block' or 'fisher', which need none"
_ADD_ONE = ", or add one to efx_plugin.model.architectures.PROPAGATION_MAPS"


def block_map(model: nn.Module, block: str, layers: list[LinearLayer], *, remedy: str | None = None) -> BlockMap:
    """The map of the model's class, resolved and checked by shapes.

    Args:
        model: the transformers model.
        block: name of the decoder block.
        layers: every linear layer of the block, pruned or not.
        remedy: what to do, or what is done, without a map, for messages; None for that of propagation.

    Raises:
        EfxError: the class has no map, or the model does not fit it.
    """
    architecture = type(model).__name__
    names = PROPAGATION_MAPS.get(architecture)
    if names is None:
        raise EfxError(f"there is no propagation map for {architecture}: {remedy or _OTHER_PROPAGATION + _ADD_ONE}")
    by_name = {layer.name.removeprefix(block + "."): layer for layer in layers}
    module = model.get_submodule(block)
    try:
        if any(parameter.dim() == 3 for parameter in module.parameters()):
            raise _Unfit("whose experts are fused into one tensor, which llm-compressor's linearize_moe takes apart")
        config: Any = model.config
        return _resolve(names, module, by_name, config.get_text_config())
    except _Unfit as reason:
        raise EfxError(
            f"the propagation map of {architecture} does not fit a model {reason} ({block}): "
            f"{remedy or _OTHER_PROPAGATION}"
        ) from None


# ------------------------------------------------------------------------------------------------ resolving


def _resolve(names: PropagationMap, block: nn.Module, by_name: dict[str, LinearLayer], config: Any) -> BlockMap:
    attention = _attention(names, block, by_name, config)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in by_name)
    paths = [path for path in parents if _matches(path, names.mlp)]
    if not paths:
        raise _Unfit(f"which has no linear layers at {names.mlp}")
    mlps = tuple(_gated_mlp(names, path, block, by_name) for path in paths)
    _check_layers(attention, mlps, by_name)
    return BlockMap(
        attention=attention,
        mlps=mlps,
        mlps_per_token=1 if len(mlps) == 1 else config.num_experts_per_tok,
        mlp_norm=_module(block, names.mlp_norm),
        down_norm=_module(block, names.down_norm),
    )


def _attention(names: PropagationMap, block: nn.Module, by_name: dict[str, LinearLayer], config: Any) -> Attention:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise _Unfit(f"whose {heads} query heads do not share {kv_heads} key-value heads evenly")
    query, key, value = _split(
        by_name,
        [(names.query, heads * width), (names.key, kv_heads * width), (names.value, kv_heads * width)],
    )
    norms = {role: _module(block, getattr(names, role)) for role in ("query_norm", "key_norm")}
    for norm, rows in zip(norms.values(), (query, key), strict=True):
        gain: Any = None if norm is None else norm.weight
        if gain is not None and gain.shape not in ((width,), (rows.stop - rows.start,)):
            raise _Unfit(f"where a norm of shape {tuple(gain.shape)} fits neither a head nor all of them")
    rotary_dim = int(width * _partial_rotary_factor(config))
    if rotary_dim % 2:
        raise _Unfit(f"whose heads have {rotary_dim} channels to rotate in pairs")
    return Attention(
        query=query,
        key=key,
        value=value,
        output=_whole(by_name, names.output),
        heads=heads,
        kv_heads=kv_heads,
        rotary_dim=rotary_dim,
        output_norm=_module(block, names.output_norm),
        **norms,
    )


def _gated_mlp(names: PropagationMap, path: str, block: nn.Module, by_name: dict[str, LinearLayer]) -> GatedMLP:
    down = _whole(by_name, f"{path}.{names.down}")
    width = down.layer.base.in_features
    gate, up = _split(by_name, [(f"{path}.{names.gate}", width), (f"{path}.{names.up}", width)])
    module = block.get_submodule(path)
    if not hasattr(module, "_apply_gate") and len(_activations(module)) != 1:
        raise _Unfit(f"in whose {path} the activation function is not clear")
    return GatedMLP(gate, up, down, module)


def _check_layers(attention: Attention, mlps: Iterable[GatedMLP], by_name: dict[str, LinearLayer]) -> None:
    """Every layer has a role, and every layer's inputs are as wide as what it consumes."""
    hidden = attention.output.stop
    widths = {attention.output.layer: attention.query.stop - attention.query.start}
    widths |= {rows.layer: hidden for rows in (attention.query, attention.key, attention.value)}
    for mlp in mlps:
        widths |= {mlp.gate.layer: hidden, mlp.up.layer: hidden, mlp.down.layer: mlp.up.stop - mlp.up.start}
        if mlp.down.stop != hidden:
            raise _Unfit(f"whose {mlp.down.layer.name} has {mlp.down.stop} outputs, not {hidden}")
    for name, layer in by_name.items():
        if layer not in widths:
            raise _Unfit(f"where nothing is known of the consumers of {name}")
        if layer.base.in_features != widths[layer]:
            raise _Unfit(f"whose {name} has {layer.base.in_features} inputs, not {widths[layer]}")


def _split(by_name: dict[str, LinearLayer], roles: list[tuple[str, int]]) -> list[Rows]:
    """Rows of layers (name, number of outputs); those that share a layer one after the other."""
    taken = dict.fromkeys((name for name, _ in roles), 0)
    rows = []
    for name, size in roles:
        rows.append(Rows(_layer(by_name, name), taken[name], taken[name] + size))
        taken[name] += size
    for name, size in taken.items():
        if by_name[name].base.out_features != size:
            raise _Unfit(f"whose {name} has {by_name[name].base.out_features} outputs, not {size}")
    return rows


def _whole(by_name: dict[str, LinearLayer], name: str) -> Rows:
    layer = _layer(by_name, name)
    return Rows(layer, 0, layer.base.out_features)


def _layer(by_name: dict[str, LinearLayer], name: str) -> LinearLayer:
    if name not in by_name:
        raise _Unfit(f"which has no linear layer {name}")
    return by_name[name]


def _module(block: nn.Module, name: str | None) -> nn.Module | None:
    if name is None:
        return None
    try:
        return block.get_submodule(name)
    except AttributeError:
        raise _Unfit(f"which has no {name}") from None


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), path) is not None
    return path == pattern


def _partial_rotary_factor(config: Any) -> float:
    """The fraction of a head that is rotated, which must be the same in all types of layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [group for group in parameters.values() if isinstance(group, dict)] or [parameters]
    factors: set[float] = {group.get("partial_rotary_factor", 1.0) for group in groups}
    if len(factors) > 1:
        raise _Unfit("whose layers rotate different parts of a head")
    return factors.pop()


def _activations(mlp: nn.Module) -> list[nn.Module]:
    return [child for child in mlp.children() if next(child.parameters(), None) is None]
