"""The engine: one decoder block from calibration hooks to pruned and repaired weights.

The modifier and the training callback drive it; they differ in who runs the model and in where a decision is stored,
not in what happens to a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.utils import is_match
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.distributed import all_reduce_sum, broadcast, gather_objects, world
from efx_plugin.engine.memory import return_freed_memory
from efx_plugin.errors import EfxError
from efx_plugin.method.masks import allocate, n_of_m_mask, pooled_masks, row_mask
from efx_plugin.method.obs import obs_mask
from efx_plugin.method.repair import adapter_update, output_error, paper_update, repair_weights, updated_weight
from efx_plugin.method.scores import foresight_scores, magnitude_saliency, update_average, wanda_saliency
from efx_plugin.method.statistics import InputStatistics
from efx_plugin.model.adapters import LinearLayer, absorb, effective_weight, stacked_adapter
from efx_plugin.model.propagation import (
    MIN_EXPERT_TOKENS,
    ActivationPropagation,
    BlockPropagation,
    CountedRows,
    NoPropagation,
    RegisterHook,
    TokenMask,
    WeightPropagation,
    every_token,
    expert_weight_sensitivity,
)

# Errors of a layer are reported from this many of its rows, or a few more: each row costs a product with the Gram.
MEASURED_ROWS = 256


@dataclass(frozen=True)
class Decision:
    """What is to become of one linear layer.

    Attributes:
        keep: mask, bool [out, in], True where a weight is kept.
        weight: the pruned and repaired effective weight, fp32 [out, in], zero where `keep` is False.
        update: what repair "paper" or "adapter" adds to B, fp32 [out, rank of all adapters]; None for other repairs.
    """

    keep: Tensor
    weight: Tensor
    update: Tensor | None


# Stores a decision in the model.
Store = Callable[[LinearLayer, Decision], None]


def store_in_base(layer: LinearLayer, decision: Decision) -> None:
    """The pruned weight into the base layer, and nothing left in its adapters."""
    absorb(layer, decision.weight)


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one linear layer.

    Attributes:
        name: its name.
        size: number of weights.
        zeros: number of weights that were pruned.
        relative_error: calibration error of its output relative to the energy of the output, over rows spread evenly;
            None where only input energies were kept.
        gain: fraction of the masked layer's error that the repair took away, None where nothing was repaired or
            only input energies were kept.
    """

    name: str
    size: int
    zeros: int
    relative_error: float | None
    gain: float | None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size


def layer_sparsities(layers: list[LinearLayer], arguments: PruningArguments) -> dict[str, float]:
    """The sparsity that the arguments give to each layer by name.

    Raises:
        EfxError: a layer matches no key of a mapping.
    """
    if not isinstance(arguments.sparsity, dict):
        return {layer.name: arguments.sparsity for layer in layers}
    found = {}
    for layer in layers:
        matches = (value for key, value in arguments.sparsity.items() if is_match(layer.name, layer.base, key))
        if (value := next(matches, None)) is None:
            raise EfxError(
                f"no key of sparsity {arguments.sparsity} matches {layer.name}: add one, or ignore the layer"
            )
        found[layer.name] = value
    return found


class BlockPruner:
    """Calibrates and prunes the targeted linear layers of one decoder block.

    Args:
        model: the transformers model.
        name: name of the block.
        block: the decoder block.
        layers: the targeted linear layers inside it.
        others: its other linear layers, which may consume the targeted ones' outputs.
        arguments: how to prune.
        sparsities: fraction to prune by name of the layer; None takes those of the arguments.
        token_mask: which tokens to calibrate on.
        sensitivities: c by name of the layer where they were measured beforehand, as "fisher" is; None measures them
            here, and "fisher" then falls back to "block".
        averages: running scores, fp32 [out, in] by name of the layer, to average the new ones into; empty at the first
            refresh, and kept by the caller. None takes the new scores alone.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        block: nn.Module,
        layers: list[LinearLayer],
        others: list[LinearLayer],
        arguments: PruningArguments,
        *,
        sparsities: Mapping[str, float] | None = None,
        token_mask: TokenMask = every_token,
        sensitivities: Mapping[str, Tensor] | None = None,
        averages: dict[str, Tensor] | None = None,
    ):
        self.name, self.layers, self.arguments = name, layers, arguments
        self._sparsities = layer_sparsities(layers, arguments) if sparsities is None else sparsities
        self._averages = averages
        self._block_layers = layers + others
        self._rows = CountedRows(block, layers, token_mask)
        self._statistics: dict[str, InputStatistics] = {}
        self._last: tuple[Tensor, tuple[str, int] | None, InputStatistics] | None = None
        self._starved: set[str] = set()
        self._known = sensitivities
        if not arguments.uses_propagation or sensitivities is not None:
            self._propagation = NoPropagation()
        elif arguments.propagation == "weight":
            self._propagation = WeightPropagation(model, name, layers + others)
        elif arguments.propagation == "activation":
            self._propagation = ActivationPropagation(model, name, layers + others, token_mask)
        else:
            self._propagation = BlockPropagation(
                block, layers, tokens=arguments.propagation_tokens, seed=arguments.seed, token_mask=token_mask
            )

    @property
    def calibrated(self) -> bool:
        return bool(self._statistics)

    def attach(self, register: RegisterHook) -> None:
        """Hook the block; `register(module, hook, hook_type, **kwargs)` as llm-compressor's HooksMixin has it."""
        self._rows.attach(register)
        for layer in self.layers:
            register(
                layer.module,
                lambda _module, args, _output, name=layer.name: self._see_input(name, args[0]),
                "forward",
            )
        self._propagation.attach(register)

    @torch.no_grad()
    def _see_input(self, name: str, inputs: Tensor) -> None:
        if self._propagation.measuring:
            return
        # q, k and v read the same tensor, and so do gate and up: one Gram serves them all. Experts may read the same
        # tensor too, but each counts rows of its own.
        expert = self._rows.expert(name)
        if self._last is not None and self._last[0] is inputs and self._last[1] == expert:
            shared = self._last[2]
            if self._statistics.setdefault(name, shared) is shared:
                return
        own = self._statistics.get(name)
        if own is None:
            own = InputStatistics(inputs.shape[-1], full=self.arguments.uses_grams, device=inputs.device)
            self._statistics[name] = own
        own.update(self._rows.of(name, inputs))
        self._last = (inputs, expert, own)

    @torch.no_grad()
    def prune(self, progress: str | None = None, store: Store = store_in_base) -> list[PrunedLayer]:
        """Score, mask, repair and store every layer; the statistics are freed.

        Of several processes each has to call it, at the same point; each decides on some of the layers for all.

        Args:
            progress: label of the progress bar; None shows none.
            store: where decisions go.

        Raises:
            EfxError: a layer saw no calibration data, its statistics are not finite, or it has no adapter to repair.
        """
        self._last = None
        tokens = max((one.count for one in self._statistics.values()), default=0)
        self._reduce_statistics()
        self._starved = self._starved_experts()
        self._require_finite_statistics()
        for one in self._statistics.values():
            one.finish()
        sensitivities = self._sensitivities(tokens)
        masks, sparsities = self._pooled(sensitivities)
        rank, processes = world()
        results = []
        for index, layer in enumerate(self.layers if progress is None else tqdm(self.layers, desc=progress)):
            statistics = self._statistics.pop(layer.name, None)
            weight = effective_weight(layer)
            keep = masks.pop(layer.name, None)
            owner = index % processes
            if rank == owner:
                if keep is None:
                    keep = self._mask(layer, weight, statistics, sparsities[layer.name], sensitivities.get(layer.name))
                decision, errors = self._repair(layer, weight, keep, statistics)
            else:
                decision, errors = self._blank(layer, weight), torch.empty(3)
            self._broadcast(layer, decision, errors, owner)
            del weight, statistics
            store(layer, decision)
            results.append(_result(layer, decision.keep, errors.tolist()))
        return_freed_memory()
        return results

    def _sensitivities(self, tokens: int) -> Mapping[str, Tensor]:
        """Their mean over the tokens of all processes, of which this one saw `tokens`."""
        if self._known is not None:
            return self._known
        device = self.layers[0].base.weight.device
        share = tokens / float(all_reduce_sum(torch.tensor(float(tokens), device=device)))
        return {name: all_reduce_sum(c * share) for name, c in self._propagation.result().items()}

    def _scores(
        self, layer: LinearLayer, weight: Tensor, statistics: InputStatistics | None, sensitivity: Tensor | None
    ) -> Tensor:
        if self.arguments.saliency == "magnitude" or layer.name in self._starved:
            return foresight_scores(magnitude_saliency(weight), sensitivity)
        return foresight_scores(wanda_saliency(weight, statistics.energy), sensitivity)

    def _pooled(self, sensitivities: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Masks where matrices compete for every entry, and sparsities, which they may compete for as well."""
        arguments, masks, sparsities = self.arguments, {}, dict(self._sparsities)
        by_entry = arguments.comparison_group == "block"
        if arguments.n_of_m is not None or (arguments.allocation == "uniform" and not by_entry):
            return masks, sparsities
        for sparsity in dict.fromkeys(self._sparsities.values()):
            layers = [
                layer
                for layer in self.layers
                if self._sparsities[layer.name] == sparsity and layer.name not in self._starved
            ]
            if not layers:
                continue
            scores = [
                self._scores(
                    layer, effective_weight(layer), self._statistics[layer.name], sensitivities.get(layer.name)
                )
                for layer in layers
            ]
            if by_entry:
                self._average_pool(layers, scores)
                for layer, keep in zip(layers, pooled_masks(scores, sparsity, arguments.floor), strict=True):
                    broadcast(keep, 0)
                    masks[layer.name] = keep
            else:
                shares = torch.tensor(allocate(scores, sparsity, arguments.floor), dtype=torch.float64)
                broadcast(shares, 0)
                sparsities |= {layer.name: share for layer, share in zip(layers, shares.tolist(), strict=True)}
        return masks, sparsities

    def _mask(
        self,
        layer: LinearLayer,
        weight: Tensor,
        statistics: InputStatistics,
        sparsity: float,
        sensitivity: Tensor | None,
    ) -> Tensor:
        arguments, starved = self.arguments, layer.name in self._starved
        if starved and arguments.uses_propagation:
            sensitivity = expert_weight_sensitivity(layer, self._block_layers)
        if arguments.saliency == "obs" and not starved:
            try:
                return obs_mask(
                    weight,
                    statistics.gram,
                    sparsity,
                    sensitivity=sensitivity,
                    group=arguments.comparison_group,
                    n_of_m=arguments.n_of_m,
                    dampening_frac=arguments.dampening_frac,
                    **self._average_of(layer, weight),
                )
            except ValueError as error:
                raise EfxError(f"{layer.name}: {error}") from error
        scores = [self._scores(layer, weight, statistics, sensitivity)]
        self._average_pool([layer], scores)
        if arguments.n_of_m is not None:
            return n_of_m_mask(scores[0], *arguments.n_of_m)
        if arguments.comparison_group == "row":
            return row_mask(scores[0], sparsity)
        return pooled_masks(scores, sparsity, arguments.floor)[0]

    def _average_pool(self, layers: list[LinearLayer], scores: list[Tensor]) -> None:
        """Blend scores of matrices that compete into their running averages, each refresh with a mean of one."""
        if self._averages is None:
            return
        mean = sum(float(score.sum()) for score in scores) / sum(score.numel() for score in scores)
        for index, layer in enumerate(layers):
            new = scores[index] / mean if mean > 0 else scores[index]
            old = self._averages.get(layer.name)
            if old is not None:
                new = update_average(old, new, self.arguments.ema)
            scores[index] = self._averages[layer.name] = new

    def _average_of(self, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor | float]:
        """The same for the sweep, which blends as it goes."""
        if self._averages is None:
            return {}
        momentum = self.arguments.ema if layer.name in self._averages else 1.0
        return {
            "average": self._averages.setdefault(layer.name, torch.zeros_like(weight)),
            "momentum": momentum,
        }

    def _repair(
        self, layer: LinearLayer, weight: Tensor, keep: Tensor, statistics: InputStatistics
    ) -> tuple[Decision, Tensor]:
        """The decision, and three errors of the layer's output: with no weight at all, masked, and repaired."""
        arguments, update = self.arguments, None
        if layer.name in self._starved:
            update = self._blank(layer, weight).update
            update = None if update is None else update.zero_()
            return Decision(keep, weight * keep, update), torch.full((3,), torch.nan)
        if arguments.repair == "none":
            pruned = weight * keep
        elif arguments.repair == "weights":
            pruned = repair_weights(
                weight,
                keep,
                statistics.gram,
                steps=arguments.repair_steps,
                dampening_frac=arguments.dampening_frac,
            )
        else:
            adapter = stacked_adapter(layer)
            if adapter is None:
                raise EfxError(
                    f"repair {arguments.repair!r} moves a LoRA adapter and {layer.name} has none: prune the model with "
                    "its adapter not merged yet, or set repair to 'weights'"
                )
            damping = {"dampening_frac": arguments.dampening_frac}
            if arguments.repair == "paper":
                update = paper_update(weight, keep, statistics.energy, adapter, kappa=arguments.kappa, **damping)
            else:
                update = adapter_update(weight, keep, statistics.gram, adapter, steps=arguments.repair_steps, **damping)
            pruned = updated_weight(weight, keep, update, adapter)
        errors = torch.full((3,), torch.nan)
        if statistics.full:
            rows = slice(None, None, max(1, len(weight) // MEASURED_ROWS))
            some, gram = weight[rows], statistics.gram
            for index, other in enumerate((torch.zeros_like(some), some * keep[rows], pruned[rows])):
                errors[index] = output_error(some, other, gram).sum()
        return Decision(keep, pruned, update), errors

    def _blank(self, layer: LinearLayer, weight: Tensor) -> Decision:
        """Where another process's decision goes."""
        update = None
        if self.arguments.repair in ("paper", "adapter"):
            update = weight.new_empty(len(weight), len(stacked_adapter(layer)))
        return Decision(torch.empty_like(weight, dtype=torch.bool), torch.empty_like(weight), update)

    def _broadcast(self, layer: LinearLayer, decision: Decision, errors: Tensor, owner: int) -> None:
        if world()[1] == 1:
            return
        tensors = [decision.keep, decision.weight]
        tensors += [] if decision.update is None else [decision.update]
        if self._averages is not None and self.arguments.comparison_group != "block":
            tensors.append(self._averages.setdefault(layer.name, torch.zeros_like(decision.weight)))
        # nccl sends from the device only.
        errors_there = errors.to(decision.weight.device)
        for tensor in (*tensors, errors_there):
            broadcast(tensor, owner)
        errors.copy_(errors_there)

    def _reduce_statistics(self) -> None:
        """Sums over all processes. Processes that saw nothing of a layer learn from the others which layers share."""
        if world()[1] == 1:
            return
        names = [layer.name for layer in self.layers]
        firsts: dict[int, str] = {}
        here = {name: firsts.setdefault(id(one), name) for name, one in self._statistics.items()}
        shared_with: dict[str, str] = {}
        for there in gather_objects(here):
            shared_with = there | shared_with
        for layer in self.layers:
            if layer.name in shared_with and layer.name not in self._statistics:
                first = self._statistics.get(shared_with[layer.name])
                self._statistics[layer.name] = first or InputStatistics(
                    layer.base.in_features, full=self.arguments.uses_grams, device=layer.base.weight.device
                )
        for name in names:
            if shared_with.get(name) == name:
                self._statistics[name].all_reduce()

    def _starved_experts(self) -> set[str]:
        """Layers of experts that too few tokens of all processes reach; they are scored by their weights alone."""
        places = {layer.name: place for layer in self.layers if (place := self._rows.expert(layer.name)) is not None}
        if not places:
            return set()
        reached, known = self._propagation.reached(), self._known or {}
        counts = torch.tensor(
            [reached.get(name, MIN_EXPERT_TOKENS) for name in places], device=self.layers[0].base.weight.device
        )
        starved = set()
        for (name, place), count in zip(places.items(), all_reduce_sum(counts).tolist(), strict=True):
            seen = self._statistics[name].count if name in self._statistics else 0
            unmeasured = name in known and not known[name].any()  # Fisher, on fewer tokens than the calibration has
            if min(seen, count) < MIN_EXPERT_TOKENS or unmeasured:
                starved.add(place)
        if starved:
            logger.warning(
                f"fewer than {MIN_EXPERT_TOKENS} calibration tokens reach {len(starved)} of the "
                f"{len(set(places.values()))} experts of {self.name}, such as number {min(starved)[1]}: these "
                "are pruned by the norms of their weights and not repaired, calibrate on more text"
            )
        return {name for name, place in places.items() if place in starved}

    def _require_finite_statistics(self) -> None:
        for layer in self.layers:
            if layer.name in self._starved:
                continue
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
        if not self.arguments.uses_grams:
            return
        short = [
            layer
            for layer in self.layers
            if layer.name not in self._starved and self._statistics[layer.name].count < layer.base.in_features
        ]
        if short:
            first = short[0]
            logger.warning(
                f"{first.name} has {first.base.in_features} inputs and saw {self._statistics[first.name].count} "
                f"calibration tokens ({len(short)} layers of {self.name} in all): with fewer tokens than inputs the "
                "repair fits noise, use more calibration data"
            )


def _result(layer: LinearLayer, keep: Tensor, errors: list[float]) -> PrunedLayer:
    energy, masked, repaired = errors
    if energy != energy:
        relative = gain = None
    else:
        relative = repaired / energy if energy > 0 else 0.0
        gain = 1 - repaired / masked if masked > 0 else 0.0
    return PrunedLayer(layer.name, keep.numel(), keep.numel() - int(keep.sum()), relative, gain)
