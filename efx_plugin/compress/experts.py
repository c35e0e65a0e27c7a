"""Mixtures of experts, which llm-compressor takes apart to calibrate them: the way there and back, rehearsed."""

from copy import deepcopy
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from torch import nn
from transformers import PretrainedConfig

from efx_plugin.errors import EfxError, one_line
from efx_plugin.model.adapters import inner_model

# Fields of a config that hold the number of experts.
_NUMBERS = ("num_local_experts", "moe_num_experts", "num_experts", "n_routed_experts")


def rehearse_experts(skeleton: nn.Module) -> None:
    """Take the experts of a model apart as `oneshot` is going to, after a check that they can be put together again.

    Args:
        skeleton: a model or a PeftModel on the meta device, changed in place.

    Raises:
        EfxError: llm-compressor cannot take experts of this kind apart, or what it puts together is something else.
    """
    model: Any = inner_model(skeleton)
    sound = set()
    for name, experts in get_non_linearized_moes(model):
        kind, config = type(experts), getattr(experts, "config", model.config)
        if kind not in sound:
            _refuse_one_way(kind, config)
            sound.add(kind)
        with torch.device("meta"):
            apart = LinearExperts2D.get_linear_experts_cls(kind)(config)
        model.set_submodule(name, apart)


@torch.no_grad()
def _refuse_one_way(kind: type[nn.Module], config: PretrainedConfig) -> None:
    config = deepcopy(config)
    for described in (config, config.get_text_config()):
        for number in _NUMBERS:
            if hasattr(described, number):
                setattr(described, number, 1)
    reason = "other weights come back"
    try:
        experts: Any = kind(config)
        for weight in experts.parameters():
            weight.random_(-99, 99)
        apart = LinearExperts2D.get_linear_experts_cls(kind).from_experts_module(experts, config)
        back = dict(apart.to_experts_module().named_parameters())
        if all(torch.equal(weight, back[name].to(weight.dtype)) for name, weight in experts.named_parameters()):
            return
    except Exception as error:  # each kind is taken apart in its own way
        reason = one_line(error)
    raise EfxError(
        f"llm-compressor cannot take experts of the kind {kind.__name__} apart and put them together again ({reason}): "
        "such a mixture of experts cannot be pruned here"
    )
