"""Who consumes whose output in a decoder block, and the sensitivities measured there.

Each class measures what it needs in forward hooks while the block sees calibration data, and then gives c (see
`efx_plugin.method`) by the name of the linear layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efx_plugin.errors import EfxError
from efx_plugin.method import sensitivity
from efx_plugin.model.adapters import LinearLayer, effective_weight


@dataclass(frozen=True)
class PropagationMap:
    """The linear layers of a gated decoder block with rotary attention, by the end of their names.

    v is consumed by o through the heads of its group, q and k by each other through the attention scores, gate and up
    by down; o and down feed the residual stream.
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


PROPAGATION_MAPS = {
    "LlamaForCausalLM": PropagationMap(),
    "MistralForCausalLM": PropagationMap(),
    "Qwen2ForCausalLM": PropagationMap(),
}

# Gives a bool mask [batch, tokens] of the tokens to calibrate on in the current batch; None stands for all of them.
TokenMask = Callable[[], Tensor | None]


def every_token() -> None:
    """The token mask of calibration data without padding."""


# Registers a forward hook on a module; the keyword arguments are those of Module.register_forward_hook.
RegisterHook = Callable[..., object]


class NoPropagation:
    """c = 1 for every output: scores are the saliencies."""

    measuring = False

    def attach(self, register: RegisterHook) -> None:
        pass

    def result(self) -> dict[str, Tensor]:
        return {}


class ActivationPropagation:
    """c from forward statistics of the consumers. Its q and k terms lack the unit of the others, so compare within a
    matrix only.

    Args:
        model: the transformers model (for its class and configuration).
        block: name of the decoder block.
        layers: every linear layer of the block, pruned or not.
        token_mask: which tokens count.

    Raises:
        EfxError: the architecture has no propagation map.
    """

    measuring = False

    def __init__(self, model: nn.Module, block: str, layers: list[LinearLayer], token_mask: TokenMask = every_token):
        architecture = type(model).__name__
        known = PROPAGATION_MAPS.get(architecture)
        if known is None:
            raise EfxError(
                f"propagation 'activation' does not know the architecture {architecture} (it knows "
                f"{', '.join(PROPAGATION_MAPS)}): use propagation 'block', which needs no map"
            )
        if model.config.hidden_act not in ("silu", "swish"):
            raise EfxError(
                f"propagation 'activation' needs a SiLU gate, not {model.config.hidden_act!r}: use propagation 'block'"
            )
        by_name = {layer.name: layer for layer in layers}
        self._layers = {role: by_name[f"{block}.{name}"] for role, name in vars(known).items()}
        self._token_mask = token_mask
        self._heads = model.config.num_attention_heads
        self._kv_heads = model.config.num_key_value_heads
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._gate_output: Tensor | None = None

    def attach(self, register: RegisterHook) -> None:
        for role in ("query", "key", "gate", "up"):
            register(self._layers[role].module, getattr(self, f"_see_{role}"), "forward")

    def _see_query(self, _module, _args, output: Tensor) -> None:
        self._add("query", self._rows(output).square().sum(dim=0))

    def _see_key(self, _module, _args, output: Tensor) -> None:
        self._add("key", self._rows(output).square().sum(dim=0))

    def _see_gate(self, _module, _args, output: Tensor) -> None:
        self._gate_output = self._rows(output)

    def _see_up(self, _module, _args, output: Tensor) -> None:
        rows = self._rows(output)
        for_up, for_gate = sensitivity.gated_moments(self._gate_output, rows)
        self._gate_output = None
        self._add("up", for_up)
        self._add("gate", for_gate)
        self._count += len(rows)

    def _rows(self, output: Tensor) -> Tensor:
        mask = self._token_mask()
        return (output if mask is None else output[mask.to(output.device)]).reshape(-1, output.shape[-1]).float()

    def _add(self, role: str, total: Tensor) -> None:
        self._sums[role] = self._sums[role] + total if role in self._sums else total

    def result(self) -> dict[str, Tensor]:
        mean = {role: total / self._count for role, total in self._sums.items()}
        down = effective_weight(self._layers["down"])
        output = effective_weight(self._layers["output"])
        heads = (self._heads, self._kv_heads)
        by_role = {
            "up": sensitivity.gated_sensitivity(mean["up"], down),
            "gate": sensitivity.gated_sensitivity(mean["gate"], down),
            "value": sensitivity.value_sensitivity(output, *heads),
            "query": sensitivity.query_sensitivity(mean["key"], *heads),
            "key": sensitivity.key_sensitivity(mean["query"], *heads),
        }
        return {self._layers[role].name: c for role, c in by_role.items()}


class BlockPropagation:
    """c_o = E[(∂(z·h)/∂y_o)²], z ~ N(0, I), h the decoder block's output: Gauss-Newton within the block.

    The first calibration tokens go through the block once more with gradients, one batch at a time, so the memory is
    that of one block's backward pass; no gradient leaves the block and no parameter gets one.

    Args:
        block: the decoder block.
        layers: the linear layers to measure.
        tokens: how many calibration tokens to spend.
        seed: of z.
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
        self._block, self._layers = block, layers
        self._tokens, self._seed, self._token_mask = tokens, seed, token_mask
        self._generator: torch.Generator | None = None
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self.measuring = False  # the block runs for gradients: other hooks must not count this pass

    def attach(self, register: RegisterHook) -> None:
        register(self._block, self._see_block, "forward", with_kwargs=True)

    def _see_block(self, block: nn.Module, args: tuple, kwargs: dict, _output) -> None:
        if self.measuring or self._count >= self._tokens:
            return
        outputs: dict[str, Tensor] = {}
        handles = [
            layer.module.register_forward_hook(
                lambda _module, _args, output, name=layer.name: outputs.__setitem__(name, output)
            )
            for layer in self._layers
        ]
        self.measuring = True
        try:
            with torch.enable_grad():
                # A cache would be extended a second time and attended to twice.
                kwargs = {name: None if name == "past_key_values" else value for name, value in kwargs.items()}
                hidden = block(*_with_gradient(args), **_with_gradient(kwargs))
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                if self._generator is None:
                    self._generator = torch.Generator(hidden.device).manual_seed(self._seed)
                direction = sensitivity.random_direction(hidden, self._generator)
                if (mask := self._token_mask()) is not None:
                    direction = direction * mask.to(direction).unsqueeze(-1)
                gradients = torch.autograd.grad(hidden, list(outputs.values()), direction)
        finally:
            self.measuring = False
            for handle in handles:
                handle.remove()
        for name, gradient in zip(outputs, gradients, strict=True):
            total = sensitivity.square_gradient_sum(gradient)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._count += hidden.numel() // hidden.shape[-1] if mask is None else int(mask.sum())

    def result(self) -> dict[str, Tensor]:
        return {name: total / self._count for name, total in self._sums.items()}


def _with_gradient(arguments: tuple | dict) -> tuple | dict:
    """The same arguments, hidden states detached and made leaves that require a gradient, so that a graph is recorded
    whether or not parameters do."""

    def leaf(value):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
            return value.detach().requires_grad_()
        return value

    if isinstance(arguments, dict):
        return {name: leaf(value) for name, value in arguments.items()}
    return tuple(leaf(value) for value in arguments)
