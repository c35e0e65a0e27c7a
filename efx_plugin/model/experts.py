"""Mixtures of experts: which rows an expert counts, and what a starved expert is scored by."""

import inspect
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from efx_plugin.errors import EfxError
from efx_plugin.method import sensitivity
from efx_plugin.model.adapters import LinearLayer, effective_weight
from efx_plugin.model.hooks import RegisterHook, TokenMask, every_token

# An expert that fewer calibration tokens reach than this is scored by its weights alone.
MIN_EXPERT_TOKENS = 32


def expert_places(block: nn.Module, layers: list[LinearLayer]) -> dict[str, tuple[str, int]]:
    """Where the experts' linear layers belong: by name of the layer, the path of the list of experts in the block, and
    the expert's index in that list."""
    paths = {module: path for path, module in block.named_modules()}
    places = {}
    for layer in layers:
        if match := re.match(r"(.*\bexperts)\.(\d+)\.", paths[layer.module]):
            places[layer.name] = (match[1], int(match[2]))
    return places


@dataclass(frozen=True)
class _Routing:
    """What a list of experts was called with: the tokens, and for each the experts it goes to and their weights."""

    hidden: Tensor
    experts: Tensor
    weights: Tensor


class CountedRows:
    """Picks the rows of the tokens that count from an input or an output of a layer.

    Those are the tokens of the mask. An expert counts only those that are routed to it, although llm-compressor
    calibrates every expert on every token unless it is told `moe_calibrate_all_experts=False`. Either way it calls the
    list of experts with the router's choice.

    Args:
        block: the decoder block.
        layers: linear layers in it.
        token_mask: which tokens count.
    """

    def __init__(self, block: nn.Module, layers: list[LinearLayer], token_mask: TokenMask = every_token):
        self._block, self._token_mask = block, token_mask
        self._places = expert_places(block, layers)
        self._routing: dict[str, _Routing] = {}
        self._whole: dict[tuple[str, int], bool] = {}  # the expert was called with all tokens, not with its own

    def attach(self, register: RegisterHook) -> None:
        for path in dict.fromkeys(path for path, _ in self._places.values()):
            experts = self._block.get_submodule(path)
            register(experts, partial(self._see_experts, path), "forward_pre", with_kwargs=True)
            register(experts, partial(self._forget_experts, path), "forward")
        for path, index in dict.fromkeys(self._places.values()):
            expert = self._block.get_submodule(f"{path}.{index}")
            register(expert, partial(self._see_expert, path, index), "forward_pre")

    def _see_experts(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        if "top_k_index" in given:
            self._routing[path] = _Routing(given["hidden_states"], given["top_k_index"], given["top_k_weights"])

    def _forget_experts(self, path: str, *_: object) -> None:
        self._routing.pop(path, None)  # it holds on to the hidden states

    def _see_expert(self, path: str, index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._whole[path, index] = path in self._routing and args[0] is self._routing[path].hidden

    def expert(self, name: str) -> tuple[str, int] | None:
        """The expert that a layer belongs to, None for one that every token goes through."""
        return self._places.get(name)

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The rows that count, [tokens, features], of an input or output of the layer `name`.

        Args:
            tensor: [batch, tokens, features], or [rows, features] as experts have it.

        Raises:
            EfxError: there is a token mask, and which token a row belongs to cannot be told.
        """
        mask = self._token_mask()
        rows = tensor.reshape(-1, tensor.shape[-1])
        mask = None if mask is None else mask.reshape(-1).to(tensor.device)
        if (place := self._places.get(name)) is not None and place[0] in self._routing:
            tokens, _ = self._routed(*place)
            if self._whole[place]:
                return rows[tokens if mask is None else tokens[mask[tokens]]]
            mask = None if mask is None else mask[tokens]
        if mask is None:
            return rows
        if len(mask) != len(rows):
            raise EfxError(
                f"{name} reads {len(rows)} rows of {len(mask)} calibration tokens, and which ones the mask leaves in "
                "cannot be told: calibrate without use_loss_mask and without padding"
            )
        return rows[mask]

    def weights(self, name: str) -> Tensor | None:
        """The router's weights of the rows that `of` picks, [tokens]; None where no router weighs the layer."""
        if (place := self._places.get(name)) is None or place[0] not in self._routing:
            return None
        tokens, weights = self._routed(*place)
        mask = self._token_mask()
        return weights if mask is None else weights[mask.reshape(-1).to(tokens.device)[tokens]]

    def _routed(self, path: str, index: int) -> tuple[Tensor, Tensor]:
        """Tokens of an expert, in the order in which it gets them, and their weights."""
        routing = self._routing[path]
        positions, tokens = torch.where(routing.experts.t() == index)
        return tokens, routing.weights[tokens, positions]


@torch.no_grad()
def expert_weight_sensitivity(layer: LinearLayer, layers: list[LinearLayer]) -> Tensor:
    """c of a layer of an expert that too few tokens reach, from its consumer's weights (paper, eq. 2), fp32 [out].

    Args:
        layer: one of the expert's layers.
        layers: every linear layer of the block, pruned or not.

    Raises:
        EfxError: the expert is not of the form gate_proj, up_proj, down_proj.
    """
    path = layer.name.rpartition(".")[0]
    down = next((other for other in layers if other.name == f"{path}.down_proj"), None)
    if down is layer:
        return torch.ones(layer.base.out_features, device=layer.base.weight.device)
    if down is None or down.base.in_features != layer.base.out_features:
        raise EfxError(
            f"fewer than {MIN_EXPERT_TOKENS} calibration tokens reach {path}, and nothing tells what consumes "
            f"{layer.name}: calibrate on more text or add the expert to ignore"
        )
    return sensitivity.column_energy(effective_weight(down))
