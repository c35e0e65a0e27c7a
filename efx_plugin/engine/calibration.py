"""What is measured in a decoder block while it sees calibration data, and how processes add it up."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.blocks import PlannedBlock
from efx_plugin.engine.decide import Evidence
from efx_plugin.engine.dense_stream import DenseStream
from efx_plugin.engine.distributed import all_reduce_statistics, all_reduce_sum, gather_objects, world
from efx_plugin.errors import EfxError
from efx_plugin.method.statistics import InputStatistics
from efx_plugin.model.adapters import LinearLayer
from efx_plugin.model.experts import MIN_EXPERT_TOKENS, CountedRows, expert_weight_sensitivity
from efx_plugin.model.hooks import RegisterHook, TokenMask
from efx_plugin.model.propagation import (
    ActivationPropagation,
    BlockPropagation,
    NoPropagation,
    Propagation,
    WeightPropagation,
)


@dataclass(frozen=True)
class _LastInput:
    """The input that a layer has just read. Layers that read the same tensor share one Gram."""

    tensor: Tensor
    expert: tuple[str, int] | None
    statistics: InputStatistics


class BlockCalibration:
    """Hooks on one decoder block, and what they have seen.

    Args:
        model: the transformers model.
        plan: the block.
        arguments: how it is going to be pruned.
        token_mask: which tokens to calibrate on.
        sensitivities: c, fp32 [out], by name of the layer where they were measured beforehand, as "fisher" is; None
            measures them here, and "fisher" then falls back to "block".
        dense: the dense model's hidden states, where the drift of inputs from its own is wanted; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PlannedBlock,
        arguments: PruningArguments,
        *,
        token_mask: TokenMask,
        sensitivities: Mapping[str, Tensor] | None,
        dense: DenseStream | None,
    ):
        self._plan, self._arguments = plan, arguments
        self._rows = CountedRows(plan.block, plan.layers, token_mask)
        self._statistics: dict[str, InputStatistics] = {}
        self._last: _LastInput | None = None
        self._dense = dense
        # What layers read straight from the residual stream in this batch, and the rows of it that the dense model
        # computes next, by name of the layer that counted them.
        self._streams: list[object] = []
        self._drifting: defaultdict[str, deque[Tensor]] = defaultdict(deque)
        self._measured_before = sensitivities
        self._propagation = self._choose_propagation(model, token_mask)

    def _choose_propagation(self, model: nn.Module, token_mask: TokenMask) -> Propagation:
        plan, arguments = self._plan, self._arguments
        every = plan.layers + plan.others
        if not arguments.uses_propagation or self._measured_before is not None:
            return NoPropagation()
        if arguments.propagation == "weight":
            return WeightPropagation(model, plan.name, every)
        if arguments.propagation == "activation":
            return ActivationPropagation(model, plan.name, every, token_mask)
        return BlockPropagation(
            plan.block, plan.layers, tokens=arguments.propagation_tokens, seed=arguments.seed, token_mask=token_mask
        )

    @property
    def has_data(self) -> bool:
        return bool(self._statistics)

    def attach(self, register: RegisterHook) -> None:
        """Hook the block; `register(module, hook, hook_type, **kwargs)` as llm-compressor's HooksMixin has it."""
        of_pruned_model = register if self._dense is None else self._dense.unseen_by(register)
        self._rows.attach(of_pruned_model)
        for layer in self._plan.layers:
            of_pruned_model(
                layer.module,
                lambda _module, args, _output, name=layer.name: self._see_input(name, args[0]),
                "forward",
            )
        self._propagation.attach(of_pruned_model)
        if self._dense is not None:
            of_pruned_model(self._plan.block, self._see_stream, "forward_pre", with_kwargs=True)
            inside = {layer.base for layer in self._plan.layers + self._plan.others}
            for child in self._plan.block.children():
                if inside.isdisjoint(child.modules()):  # a norm
                    of_pruned_model(child, lambda _module, _args, output: self._streams.append(output), "forward")
            of_pruned_model(self._plan.block, self._see_block, "forward", with_kwargs=True)

    @torch.no_grad()
    def _see_input(self, name: str, inputs: Tensor) -> None:
        if self._propagation.measuring:
            return
        # q, k and v read the same tensor, and so do gate and up: one Gram serves them all. Experts may read the same
        # tensor too, but each counts rows of its own.
        expert, last = self._rows.expert(name), self._last
        same = last if last is not None and last.tensor is inputs and last.expert == expert else None
        if same is not None and self._statistics.setdefault(name, same.statistics) is same.statistics:
            return
        own = self._statistics.get(name)
        if own is None:
            own = self._statistics[name] = InputStatistics(
                inputs.shape[-1],
                full=self._arguments.uses_grams,
                drift=self._drifts(name, inputs),
                device=inputs.device,
            )
        rows = self._rows.of(name, inputs)
        own.update(rows)
        if own.drift_sum is not None:
            self._drifting[name].append(rows)
        self._last = _LastInput(inputs, expert, own)

    def _drifts(self, name: str, inputs: Tensor) -> bool:
        """Whether a layer is to make up for the drift of its input.

        That is so where it reads the residual stream, which the blocks before have changed. What other layers of this
        block have computed drifts less once they are repaired: to make up for it as well would overshoot. And the dense
        model sends other tokens to an expert, so that its inputs have no counterparts there.
        """
        if self._dense is None or not self._dense.parted or self._rows.expert(name) is not None:
            return False
        return any(inputs is stream for stream in self._streams)

    def _see_stream(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._streams = [args[0] if args else kwargs["hidden_states"]]

    def _see_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._propagation.measuring:
            return
        assert self._dense is not None
        self._last, self._streams = None, []
        self._dense.advance(self._plan.name, block, args, kwargs, output, self._attach_to_dense)

    def _attach_to_dense(self, register: RegisterHook) -> None:
        for layer in self._plan.layers:
            register(
                layer.module,
                lambda _module, args, _output, name=layer.name: self._see_dense_input(name, args[0]),
                "forward",
            )

    def _see_dense_input(self, name: str, inputs: Tensor) -> None:
        if waiting := self._drifting[name]:
            self._statistics[name].update_drift(waiting.popleft(), self._rows.of(name, inputs))

    def finish(self) -> dict[str, Evidence]:
        """What was found out about every layer, over all processes, by name in the plan's order.

        The statistics are handed over, so that they are freed with what holds the result.

        Raises:
            EfxError: a layer saw no calibration data, or its statistics are not finite.
        """
        self._last = None
        tokens = max((one.count for one in self._statistics.values()), default=0)
        self._reduce_statistics()
        starved = self._starved_experts()
        self._require_data(starved)
        for one in self._statistics.values():
            one.finish()
        sensitivities = self._sensitivities(tokens)
        every = self._plan.layers + self._plan.others
        found = {}
        for layer in self._plan.layers:
            sensitivity = sensitivities.get(layer.name)
            if layer.name in starved and self._arguments.uses_propagation:
                sensitivity = expert_weight_sensitivity(layer, every)
            statistics = self._statistics.pop(layer.name, None)
            found[layer.name] = Evidence(statistics, sensitivity, layer.name in starved)
        return found

    def _sensitivities(self, tokens: int) -> Mapping[str, Tensor]:
        """Their mean over the tokens of all processes, of which this one saw `tokens`."""
        if self._measured_before is not None:
            return self._measured_before
        device = self._plan.layers[0].base.weight.device
        share = tokens / float(all_reduce_sum(torch.tensor(float(tokens), device=device)))
        return {name: all_reduce_sum(c * share) for name, c in self._propagation.result().items()}

    def _reduce_statistics(self) -> None:
        """Sums over all processes. Processes that saw nothing of a layer learn from the others which layers share."""
        if world()[1] == 1:
            return
        firsts: dict[int, str] = {}
        here = {name: firsts.setdefault(id(one), name) for name, one in self._statistics.items()}
        shared_with: dict[str, str] = {}
        for there in gather_objects(here):
            shared_with = there | shared_with
        for layer in self._plan.layers:
            if layer.name in shared_with and layer.name not in self._statistics:
                first = self._statistics.get(shared_with[layer.name])
                self._statistics[layer.name] = first or InputStatistics(
                    layer.base.in_features, full=self._arguments.uses_grams, device=layer.base.weight.device
                )
        for layer in self._plan.layers:
            if shared_with.get(layer.name) == layer.name:
                all_reduce_statistics(self._statistics[layer.name])

    def _starved_experts(self) -> set[str]:
        """Layers of experts that too few tokens of all processes reach."""
        layers = self._plan.layers
        places = {layer.name: place for layer in layers if (place := self._rows.expert(layer.name)) is not None}
        if not places:
            return set()
        reached, known = self._propagation.reached(), self._measured_before or {}
        counts = torch.tensor(
            [reached.get(name, MIN_EXPERT_TOKENS) for name in places], device=layers[0].base.weight.device
        )
        starved: set[tuple[str, int]] = set()
        for (name, place), count in zip(places.items(), all_reduce_sum(counts).tolist(), strict=True):
            seen = self._statistics[name].count if name in self._statistics else 0
            unmeasured = name in known and not known[name].any()  # Fisher, on fewer tokens than the calibration has
            if min(seen, count) < MIN_EXPERT_TOKENS or unmeasured:
                starved.add(place)
        if starved:
            logger.warning(
                f"fewer than {MIN_EXPERT_TOKENS} calibration tokens reach {len(starved)} of the "
                f"{len(set(places.values()))} experts of {self._plan.name}, such as number {min(starved)[1]}: these "
                "are pruned by the norms of their weights and not repaired, calibrate on more text"
            )
        return {name for name, place in places.items() if place in starved}

    def _require_data(self, starved: set[str]) -> None:
        fed = [layer for layer in self._plan.layers if layer.name not in starved]
        for layer in fed:
            statistics = self._statistics.get(layer.name)
            if statistics is None or statistics.count == 0:
                raise EfxError(
                    f"{layer.name} saw no calibration data: check that the dataset is not empty and that the model "
                    "calls this layer"
                )
            if not statistics.energy.isfinite().all():
                raise EfxError(
                    f"the calibration inputs of {layer.name} contain NaN or infinity: check the model's weights and "
                    "calibrate in bfloat16 or float32"
                )
        if self._arguments.uses_grams:
            self._warn_of_few_tokens(fed)

    def _warn_of_few_tokens(self, fed: list[LinearLayer]) -> None:
        short = [layer for layer in fed if self._statistics[layer.name].count < layer.base.in_features]
        if short:
            first = short[0]
            logger.warning(
                f"{first.name} has {first.base.in_features} inputs and saw {self._statistics[first.name].count} "
                f"calibration tokens ({len(short)} layers of {self._plan.name} in all): with fewer tokens than inputs "
                "the repair fits noise, use more calibration data"
            )
