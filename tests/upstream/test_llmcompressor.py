"""What we assume of llm-compressor's private parts."""

import dataclasses
import inspect

import pytest
import torch
from llmcompressor.core import State
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes, repack_moe
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from llmcompressor.utils.pytorch.module import infer_sequential_targets

from tests.support.tiny_models import tiny_model
from tests.upstream.contract import holds, says

HOST = "llmcompressor"
MODIFIER, BLOCKS = "efx_plugin.modifier", "efx_plugin.engine.blocks"
MAPS, EXPERTS, WEIGHTS = (
    "efx_plugin.model.architectures",
    "efx_plugin.model.experts",
    "efx_plugin.checkpoint.model_weights",
)


@pytest.fixture
def model():
    return tiny_model("Mixtral")


def linear_experts(model) -> torch.nn.Module:
    """The first list of experts that llm-compressor has taken apart."""
    found = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and _is_linear(module)]
    holds(found, HOST, "experts taken apart are no ModuleList of a class LinearExperts2D", WEIGHTS)
    return found[0]


def _is_linear(module) -> bool:
    return any(base.__name__ == "LinearExperts2D" for base in type(module).__mro__)


@pytest.mark.parametrize("field", ["loss_masks", "current_batch_idx"])
def test_the_state_has_a_field_that_the_pipeline_sets(field):
    holds(field in {one.name for one in dataclasses.fields(State)}, HOST, f"State has no {field}", MODIFIER)
    says(SequentialPipeline.__call__, [f"session.state.{field} = "], HOST, MODIFIER)


def test_the_modifier_is_told_the_modules_that_were_calibrated():
    says(
        SequentialPipeline.__call__,
        ["LifecycleCallbacks.sequential_epoch_end(subgraph.submodules(model))"],
        HOST,
        MODIFIER,
    )


def test_hooks_of_modifiers_stand_still_where_they_are_told_to():
    module, seen = torch.nn.Linear(2, 2), []
    HooksMixin().register_hook(module, lambda *_: seen.append(True), "forward")
    with HooksMixin.disable_hooks():
        module(torch.ones(1, 2))
        holds(not seen, HOST, "HooksMixin.disable_hooks leaves hooks on", MODIFIER)
    module(torch.ones(1, 2))
    holds(seen, HOST, "HooksMixin.disable_hooks outlasts its context", MODIFIER)


def test_experts_are_told_the_routing_by_name(model):
    experts = linear_experts(model)
    names = list(inspect.signature(experts.forward).parameters)
    expected = ["hidden_states", "top_k_index", "top_k_weights"]
    holds(names == expected, HOST, f"experts are called with {names}", EXPERTS)


def test_an_expert_gates_by_a_function_of_its_own(model):
    expert = linear_experts(model)[0]
    holds(hasattr(expert, "_apply_gate"), HOST, "an expert has no _apply_gate", MAPS)
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    gated = expert._apply_gate(torch.cat([gate, up], dim=-1))
    expected = torch.nn.functional.silu(gate) * up
    holds(torch.allclose(gated, expected), HOST, "_apply_gate does not take gate and up side by side", MAPS)


def test_experts_are_packed_again(model):
    tokens = torch.arange(12)[None]
    expected = model(tokens).logits
    packed = repack_moe(model)
    holds(not any(map(_is_linear, packed.modules())), HOST, "repack_moe leaves experts apart", "efx_plugin.compress")
    same = torch.allclose(packed(tokens).logits, expected, atol=1e-4)
    holds(same, HOST, "repack_moe changes what the model computes", "efx_plugin.compress")


def test_experts_are_found_and_taken_apart_kind_by_kind():
    model, user = tiny_model("Mixtral", linearize=False), "efx_plugin.compress.experts"
    (name, experts), *_ = get_non_linearized_moes(model)
    holds(model.get_submodule(name) is experts, HOST, "get_non_linearized_moes gives no names and modules", user)
    config = getattr(experts, "config", model.config)
    kind = LinearExperts2D.get_linear_experts_cls(type(experts))
    empty, full = kind(config), kind.from_experts_module(experts, config)
    same = [(n, p.shape) for n, p in empty.named_parameters()] == [(n, p.shape) for n, p in full.named_parameters()]
    holds(same, HOST, "experts taken apart are not what their class makes of a config", user)
    back = full.to_experts_module()
    holds(type(back) is type(experts), HOST, "to_experts_module gives another class back", user)


def test_blocks_are_found_by_their_class(model):
    found = infer_sequential_targets(model, None)
    holds(list(found) == ["MixtralDecoderLayer"], HOST, f"infer_sequential_targets gives {found}", BLOCKS)
    named = infer_sequential_targets(model, ["Some"])
    holds(named == ["Some"], HOST, f"infer_sequential_targets changes what the user names to {named}", BLOCKS)
