"""The sensitivities that are measured in a decoder block, or computed from its weights.

Each class measures what it needs in forward hooks while the block sees calibration data, and then gives c (see
`efx_plugin.method`) by the name of the linear layer. Of a mixture of experts, an expert counts the tokens routed to it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from efx_plugin.errors import EfxError
from efx_plugin.method import sensitivity
from efx_plugin.model.adapters import LinearLayer, effective_weight, read_parameter
from efx_plugin.model.architectures import Attention, Rows, block_map
from efx_plugin.model.experts import CountedRows, expert_places
from efx_plugin.model.hooks import RegisterHook, TokenMask, every_token


class Propagation(Protocol):
    """Measures c, what each output of a block's linear layers is worth to what follows.

    Attributes:
        measuring: the block runs once more for its own sake; other hooks must not count that pass.
    """

    @property
    def measuring(self) -> bool: ...

    def attach(self, register: RegisterHook) -> None:
        """Hook what has to be seen of the block."""

    def result(self) -> dict[str, Tensor]:
        """c, fp32 [out], by name of the layer; a layer that is missing counts every output alike."""

    def reached(self) -> dict[str, int]:
        """By name of the layers of experts, where they were counted, how many tokens c was measured on."""


class NoPropagation:
    """c = 1 for every output: scores are the saliencies."""

    measuring = False

    def attach(self, register: RegisterHook) -> None:
        pass

    def result(self) -> dict[str, Tensor]:
        return {}

    def reached(self) -> dict[str, int]:
        return {}


class WeightPropagation:
    """c_o = Σ_k V_ko² over the consumer V of the output, and no data (paper, eq. 2).

    q and k have no weights between them: each takes the energies of the other's rows, which are those of its outputs on
    inputs without correlation. Norms between a layer and its consumer count with their gains.

    Args:
        model: the transformers model.
        block: name of the decoder block.
        layers: every linear layer of the block, pruned or not.

    Raises:
        EfxError: the architecture has no propagation map.
    """

    measuring = False

    def __init__(self, model: nn.Module, block: str, layers: list[LinearLayer]):
        self._map = block_map(model, block, layers)

    def attach(self, register: RegisterHook) -> None:
        pass

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        attention = self._map.attention
        output = effective_weight(attention.output.layer)
        ones = torch.ones(len(output), device=output.device)
        into_stream = _gain(attention.output_norm, ones).square()
        from_mlp = _gain(self._map.down_norm, ones).square()
        moments = {role: _moments(_row_energies(rows).unsqueeze(0), norm) for role, rows, norm in _scored(attention)}
        parts = _attention_parts(attention, output, into_stream, moments)
        into_mlps = torch.zeros_like(ones)
        for mlp in self._map.mlps:
            columns = sensitivity.column_energy(effective_weight(mlp.down.layer), from_mlp)
            parts += [(mlp.up, columns), (mlp.gate, columns), (mlp.down, from_mlp)]
            for layer in dict.fromkeys((mlp.gate.layer, mlp.up.layer)):  # one where they are fused
                into_mlps += sensitivity.column_energy(effective_weight(layer))
        # A token goes through some of the experts, whichever they are.
        into_mlps *= _gain(self._map.mlp_norm, ones).square() * self._map.mlps_per_token / len(self._map.mlps)
        return _by_layer([*parts, (attention.output, into_stream * into_mlps)])

    def reached(self) -> dict[str, int]:
        return {}


class ActivationPropagation:
    """c from forward statistics of the consumers. That of q and k has another unit than the others have, so it can only
    compare weights within one matrix.

    Norms between a layer and its consumer are taken as linear, their root mean square held fixed. An output of o or
    down counts 1 in the residual stream, times the squared slope of the norm behind it if there is one, and in an
    expert times the square of the router's weight.

    Args:
        model: the transformers model (for its class and configuration).
        block: name of the decoder block.
        layers: every linear layer of the block, pruned or not.
        token_mask: which tokens count.

    Raises:
        EfxError: the architecture has no propagation map, or does to activations what is not measured here.
    """

    measuring = False

    def __init__(self, model: nn.Module, block: str, layers: list[LinearLayer], token_mask: TokenMask = every_token):
        self._map, self._layers = block_map(model, block, layers), layers
        config: Any = model.config
        if getattr(config.get_text_config(), "clip_qkv", None) is not None:
            raise EfxError(
                f"propagation 'activation' does not know what clip_qkv of {type(model).__name__} cuts off: use "
                "propagation 'block' or 'fisher'"
            )
        self._rows = CountedRows(model.get_submodule(block), layers, token_mask)
        self._sums: dict[str | tuple[str, int], Tensor] = {}
        self._count = 0
        self._reached: Counter[int] = Counter()
        self._gated: dict[int, dict[str, Tensor]] = {}  # outputs of a gate or up that wait for the other's

    def attach(self, register: RegisterHook) -> None:
        def see(rows: Rows, hook: Callable[..., None], *args: object) -> None:
            register(rows.layer.module, partial(hook, *args), "forward")

        self._rows.attach(register)
        attention = self._map.attention
        for role, rows, norm in _scored(attention):
            see(rows, self._see_scored, role, rows, norm)
        if attention.output_norm is not None:
            see(attention.output, self._see_normed, "output", attention.output_norm, attention.output.layer)
        for index, mlp in enumerate(self._map.mlps):
            see(mlp.gate, self._see_gated, index, "gate")
            see(mlp.up, self._see_gated, index, "up")
            if self._map.down_norm is not None:
                see(mlp.down, self._see_normed, "down", self._map.down_norm, mlp.down.layer)

    @torch.no_grad()
    def _see_scored(
        self, role: str, rows: Rows, norm: nn.Module | None, _module: nn.Module, _args: object, output: Tensor
    ) -> None:
        counted = rows.of(self._rows.of(rows.layer.name, output)).float()
        self._add(role, _moments(counted.square(), norm))
        if role == "query":
            self._count += len(counted)

    @torch.no_grad()
    def _see_normed(
        self, role: str, norm: nn.Module, layer: LinearLayer, _module: nn.Module, _args: object, output: Tensor
    ) -> None:
        self._add(role, _moments(self._rows.of(layer.name, output).float().square(), norm)[1])

    def _see_gated(self, index: int, part: str, _module: nn.Module, _args: object, output: Tensor) -> None:
        mlp, seen = self._map.mlps[index], self._gated.setdefault(index, {})
        rows = getattr(mlp, part)
        seen[part] = rows.of(self._rows.of(rows.layer.name, output))
        if len(seen) < 2:
            return
        del self._gated[index]
        name, (gate, up) = rows.layer.name, (seen["gate"], seen["up"])
        weights = self._rows.weights(name)
        for_up, for_gate = sensitivity.gated_moments(gate, up, mlp.gated, weights)
        self._add(("up", index), for_up)
        self._add(("gate", index), for_gate)
        squares = torch.ones(len(up), device=up.device) if weights is None else weights.float().square()
        self._add(("down", index), squares.sum())
        self._reached[index] += len(up)

    def _add(self, key: str | tuple[str, int], total: Tensor) -> None:
        self._sums[key] = self._sums[key] + total if key in self._sums else total

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """c by name of the layer; 0 for an expert that no token has reached, and for all where no token was seen."""
        if self._count == 0:
            return {layer.name: _nothing(layer) for layer in self._layers}
        attention = self._map.attention
        mean = {key: total / self._count for key, total in self._sums.items()}
        output = effective_weight(attention.output.layer)
        ones = torch.ones(len(output), device=output.device)
        into_stream, from_mlp = mean.get("output", ones), mean.get("down", ones)
        moments = {role: mean[role] for role, _, _ in _scored(attention)}
        parts = [*_attention_parts(attention, output, into_stream, moments), (attention.output, into_stream)]
        for index, mlp in enumerate(self._map.mlps):
            down, nothing = effective_weight(mlp.down.layer), torch.zeros((), device=output.device)
            for part in ("up", "gate"):
                moment = mean.get((part, index), nothing)
                parts.append((getattr(mlp, part), sensitivity.gated_sensitivity(moment, down, from_mlp)))
            parts.append((mlp.down, from_mlp * mean.get(("down", index), nothing)))
        return _by_layer(parts)

    def reached(self) -> dict[str, int]:
        return {
            rows.layer.name: self._reached[index]
            for index, mlp in enumerate(self._map.mlps)
            for rows in (mlp.gate, mlp.up, mlp.down)
            if self._rows.expert(rows.layer.name) is not None
        }


class BlockPropagation:
    """c_o = E[(∂(z·h)/∂y_o)²], z ~ N(0, I), h the decoder block's output: Gauss-Newton within the block.

    The first calibration tokens go through the block once more with gradients, one batch at a time, so the memory is
    that of one block's backward pass; no gradient leaves the block and no parameter gets one. The mean is over all
    tokens of the block. Those that are not routed to an expert add zero to its c, so c grows with how often the expert
    is used.

    Args:
        block: the decoder block.
        layers: the linear layers to measure.
        tokens: how many calibration tokens to spend.
        seed: of the random directions z.
        token_mask: which tokens of the block's output count.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: list[LinearLayer],
        *,
        tokens: int = 4096,
        seed: int = 0,
        token_mask: TokenMask = every_token,
    ):
        self._block, self._layers, self._tokens, self._seed = block, layers, tokens, seed
        self._token_mask = token_mask
        self._generator: torch.Generator | None = None
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._reached = dict.fromkeys(expert_places(block, layers), 0)
        self.measuring = False  # the block runs for gradients: other hooks must not count this pass

    def attach(self, register: RegisterHook) -> None:
        register(self._block, self._see_block, "forward", with_kwargs=True)

    def _see_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object) -> None:
        if self.measuring or self._count >= self._tokens:
            return
        # Edges of the graph, because the block may change an output in place (OLMo clips queries).
        edges: dict[str, GradientEdge] = {}
        handles = [
            layer.module.register_forward_hook(
                lambda _module, _args, output, name=layer.name: edges.__setitem__(name, get_gradient_edge(output))
            )
            for layer in self._layers
        ]
        self.measuring = True
        try:
            with torch.enable_grad():
                # A cache would be extended a second time and attended to twice.
                named = {name: None if name == "past_key_values" else _leaf(value) for name, value in kwargs.items()}
                hidden = block(*map(_leaf, args), **named)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                if self._generator is None:
                    self._generator = torch.Generator(hidden.device).manual_seed(self._seed)
                direction = sensitivity.random_direction(hidden, self._generator)
                if (mask := self._token_mask()) is not None:
                    direction = direction * mask.to(direction).unsqueeze(-1)
                gradients = torch.autograd.grad(hidden, list(edges.values()), direction, allow_unused=True)
        finally:
            self.measuring = False
            for handle in handles:
                handle.remove()
        for name, gradient in zip(edges, gradients, strict=True):
            if gradient is None:  # of an expert whose output nothing uses
                continue
            total = sensitivity.square_gradient_sum(gradient)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            if name in self._reached:
                self._reached[name] += int((gradient != 0).any(dim=-1).sum())
        self._count += hidden.numel() // hidden.shape[-1] if mask is None else int(mask.sum())

    def result(self) -> dict[str, Tensor]:
        """c by name of the layer; 0 for an expert that no token has reached."""
        return {
            layer.name: self._sums[layer.name] / self._count if layer.name in self._sums else _nothing(layer)
            for layer in self._layers
        }

    def reached(self) -> dict[str, int]:
        """By the name of every expert's layer, how many tokens its c was measured on."""
        return self._reached


# What the weights and the activations have in common: c of each role from moments of the others.


def _scored(attention: Attention) -> list[tuple[str, Rows, nn.Module | None]]:
    """The two roles that meet in the attention scores, and what normalizes them."""
    return [("query", attention.query, attention.query_norm), ("key", attention.key, attention.key_norm)]


def _attention_parts(
    attention: Attention, output: Tensor, into_stream: Tensor, moments: Mapping[str, Tensor]
) -> list[tuple[Rows, Tensor]]:
    """c of q, k and v.

    Args:
        output: weight of o_proj, [hidden, heads · d].
        into_stream: what an output of o_proj is worth, [hidden].
        moments: of "query" and "key" the pair of `_moments`.
    """
    heads, rotary_dim = (attention.heads, attention.kv_heads), attention.rotary_dim
    (query, query_slope), (key, key_slope) = moments["query"], moments["key"]
    return [
        (attention.query, query_slope * sensitivity.query_sensitivity(key, *heads, rotary_dim)),
        (attention.key, key_slope * sensitivity.key_sensitivity(query, *heads, rotary_dim)),
        (attention.value, sensitivity.value_sensitivity(output, *heads, into_stream)),
    ]


def _moments(squares: Tensor, norm: nn.Module | None) -> Tensor:
    """Sums over tokens of the squared outputs behind the norm and of the norm's squared slopes, fp32 [2, out].

    Args:
        squares: squared outputs before the norm, [tokens, out].
        norm: None takes the outputs as they are, with a slope of 1.
    """
    if norm is None:
        energy = squares.sum(dim=0)
        return torch.stack([energy, torch.full_like(energy, len(squares))])
    gain: Any = norm.weight
    gains = _gain(norm, squares.new_ones(gain.numel()))
    return torch.stack(sensitivity.normalized_moments(squares, gains))


def _gain(norm: nn.Module | None, ones: Tensor) -> Tensor:
    """|gain| of each channel of a norm, of the shape and device of `ones`, whatever the norm adds to its parameter.

    It is measured on a vector of mean 0 and mean square 1, which a norm of either kind only multiplies by its gain.
    """
    if norm is None:
        return ones
    probe = ones.clone()
    probe[1::2] = -1
    apply: Callable[[Tensor], Tensor] = norm
    if any(isinstance(parameter, DTensor) for parameter in norm.parameters()):  # FSDP2 gathers them in forward passes
        whole = {name: read_parameter(parameter) for name, parameter in norm.named_parameters()}
        apply = partial(functional_call, norm, whole)
    return ((apply(probe) - apply(-probe)) / 2).float().abs()


def _nothing(layer: LinearLayer) -> Tensor:
    return torch.zeros(layer.base.out_features, device=layer.base.weight.device)


def _row_energies(rows: Rows) -> Tensor:
    return effective_weight(rows.layer)[rows.start : rows.stop].square().sum(dim=1)


def _by_layer(parts: list[tuple[Rows, Tensor]]) -> dict[str, Tensor]:
    """c of whole layers from c of their parts."""
    result: dict[str, Tensor] = {}
    for rows, c in parts:
        layer = rows.layer
        rows.of(result.setdefault(layer.name, c.new_zeros(layer.base.out_features))).copy_(c)
    return result


def _leaf(argument: Any) -> Any:
    """An argument of a block. Hidden states become a detached leaf that requires a gradient: then a graph is recorded
    even where no parameter requires one."""
    if isinstance(argument, Tensor) and argument.is_floating_point() and argument.dim() == 3:
        return argument.detach().requires_grad_()
    return argument
