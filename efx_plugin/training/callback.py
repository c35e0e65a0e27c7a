"""LoRA training that ends sparse: the life cycle of transformers' Trainer onto the engine.

Training starts dense. At each pruning point the training batches before it become calibration data, the scores are
those of the unmasked W + s·B A, and from there on the model computes, and the adapter learns, under the new mask. W
itself stays unmasked, so a later pruning point may take a weight back. After the last one the mask stays, and at the
end of training everything is merged into a plain sparse model.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import wrapt
from loguru import logger
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.blocks import PlannedBlock, allocate_over_blocks, plan_blocks, warn_of_unprunable
from efx_plugin.engine.compute_dtype import warn_of_slow_dtype
from efx_plugin.engine.decide import Decision, RunningScores
from efx_plugin.engine.distributed import gather_objects, world
from efx_plugin.engine.report import measures
from efx_plugin.engine.sequential import prune_in_sequence
from efx_plugin.engine.zeros import pack_mask, unpack_mask
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import (
    LinearLayer,
    absorb,
    active_adapters,
    add_to_adapter,
    effective_weight,
    linear_layers,
    read_parameter,
    refuse_adapters,
    untie_adapted,
    write_parameter,
)
from efx_plugin.model.masked import has_dropout, install_mask, mask_of, remove_mask
from efx_plugin.training.recorder import Recorder, Recording
from efx_plugin.training.schedule import Schedule
from efx_plugin.training.state import link_state, read_state, write_state

# Files in the Trainer's checkpoint: one for all processes, and one for each.
_PRUNED = "efficientxpert.safetensors"
_OWN = "efficientxpert-{}.safetensors"

# Parts of the names of what PEFT adds to a model's state.
_NOT_IN_A_PLAIN_MODEL = (".lora_", ".trainable_tokens_", ".original_module.", ".modules_to_save.")


class EfficientXpertCallback(TrainerCallback):
    """Prunes a model for the domain that its LoRA adapters are being trained on (arXiv 2511.19935).

    For transformers' Trainer and its subclasses, such as TRL's SFTTrainer:

        trainer = SFTTrainer(model, ..., peft_config=LoraConfig(...), callbacks=[EfficientXpertCallback(sparsity=0.5)])
        trainer.train()
        save_sparse(merge_adapters(trainer.model), "expert")

    The model starts dense, is pruned at one or more pruning points, and goes on learning under the mask in between and
    afterwards. At the end the product of every adapter lies in the base weights, B is zero, and so is every pruned
    weight; `Trainer.save_model` then stores the plain model. Each pruning point adds to the Trainer's log, for all its
    reporters: `sparsity`, `mask_iou` with the previous mask, `repair_gain` (the mean fraction of a masked layer's
    error that its repair took away) and `pruning_seconds`.

    A Trainer checkpoint also gets what a run needs to go on from there and end with the same masks.

    Args:
        warmup_fraction: fraction of the training steps before the first pruning point; by default what `final_fraction`
            leaves where that is given and there is one pruning point, else a third. With one pruning point and neither
            given it is 20 steps at least, or all of a shorter training: then the model is pruned after the last step.
        refreshes: number of pruning points, evenly spaced from the end of the warm-up to the start of the final phase.
        final_fraction: fraction of the training steps after the last pruning point, under its mask; by default what
            the warm-up leaves where there is one pruning point, else a third.
        calibration_tokens: tokens of the training batches before a pruning point that calibrate it, over all processes.
            Padding and, where labels leave some tokens out of the loss, those tokens do not count.
        pruning_arguments: those of `PruningArguments`. Propagation "fisher" uses the gradients of training itself.

    Attributes:
        is_in_front: whether the Trainer calls it before all other callbacks, which it does once training begins.
        masks: after training, bool [out, in] by name of the layer in the model without adapters, True where a weight
            was kept.

    Raises:
        EfxError: an argument that does not exist, or arguments that contradict each other.
    """

    def __init__(
        self,
        *,
        warmup_fraction: float | None = None,
        refreshes: int = 1,
        final_fraction: float | None = None,
        calibration_tokens: int = 8192,
        **pruning_arguments: Any,
    ):
        self.schedule = Schedule(warmup_fraction, refreshes, final_fraction)
        if calibration_tokens < 1:
            raise EfxError(f"calibration_tokens {calibration_tokens} must be 1 at least: nothing would be pruned")
        try:
            self.arguments = PruningArguments(**pruning_arguments)
        except ValidationError as error:
            first = error.errors()[0]
            raise EfxError(f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}") from error
        self.calibration_tokens = calibration_tokens
        self.masks: dict[str, Tensor] = {}
        self._pending: dict[str, float] = {}  # measured at a pruning point, and not in the Trainer's log yet
        self.is_in_front = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        _refuse(args, model)
        if not self.is_in_front:
            logger.warning(
                "this release of transformers calls its reporters before EfficientXpertCallback, so that they miss "
                "what pruning points measure, and those that store the model store it unpruned: install a release that "
                "efx-plugin's requirements allow"
            )
        if state.is_world_process_zero:
            warn_of_slow_dtype(model, "load it with dtype=torch.float32, and train with bf16=False")
        vars(model).pop("save_pretrained", None)  # set by an earlier training
        self._steps = self.schedule.steps(state.max_steps)
        self._plans = self._plan(model)
        if state.is_world_process_zero:
            warn_of_unprunable(model)
        self._layers = [layer for plan in self._plans for layer in plan.layers]
        self._pruned = 0  # number of pruning points that are done
        self._running = RunningScores(self.arguments.new_score_weight) if self.schedule.refreshes > 1 else None
        fisher = self.arguments.uses_propagation and self.arguments.propagation == "fisher"
        self._recorder = Recorder(
            model,
            tokens=self.calibration_tokens,
            step=state.global_step,
            fisher_layers=self._layers if fisher else [],
        )
        self._pending = {}
        self._pruned_state: Path | None = None  # a file that holds what the last pruning point has changed
        self.masks = {}
        if state.global_step:
            self._restore(args, state)
        self._record_on()
        if args.save_strategy != "no" and isinstance(model, PeftModel) and len(model.active_adapters) > 1:
            logger.warning(
                f"the Trainer resumes one adapter and {len(model.active_adapters)} are being trained: this run cannot "
                "go on from its checkpoints"
            )
        if any(has_dropout(layer) for layer in self._layers):
            logger.warning(f"lora_dropout has no counterpart under a mask: it is off from step {self._steps[0]} on")

    def _plan(self, model: nn.Module) -> list[PlannedBlock]:
        """What is going to be pruned."""
        return plan_blocks(model, self.arguments)

    # ------------------------------------------------------------------------------------------- pruning points

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._pruned == len(self._steps):
            return
        self._recorder.step = state.global_step
        if state.global_step == self._steps[self._pruned]:
            self._pending = self._prune(kwargs["model"], kwargs["optimizer"], show=state.is_world_process_zero)
            control.should_log = True
        self._record_on()

    def _record_on(self) -> None:
        if self._pruned < len(self._steps):
            self._recorder.watch_before(self._steps[self._pruned])
        else:
            self._recorder.close()

    def _take_recording(self) -> Recording:
        """What calibrates the pruning point that has come."""
        return self._recorder.take()

    def _prune(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, show: bool) -> dict[str, float]:
        started, step = time.perf_counter(), self._steps[self._pruned]
        recording = self._take_recording()
        if recording.tokens < self.calibration_tokens and show:
            logger.warning(
                f"the pruning point at step {step} is calibrated on {recording.tokens} tokens instead of "
                f"{self.calibration_tokens}: training has seen no more since the last one"
            )
        previous = _masks_of(self._layers)
        for layer in self._layers:
            remove_mask(layer)
        fisher, sparsities = recording.fisher, None
        if self.arguments.allocation == "layer":
            assert fisher is not None  # PruningArguments refuses whatever has no use for it
            sparsities = allocate_over_blocks(self._plans, self.arguments, fisher.sensitivities, fisher.energies)
        arguments = self.arguments
        if previous:  # what is pruned comes back beside kept weights that stand in for it: that is no dense expert
            arguments = arguments.model_copy(update={"dense_targets": 0.0})
        results = prune_in_sequence(
            model,
            self._plans,
            arguments,
            recording.batches,
            store=partial(self._store, optimizer),
            sparsities=sparsities,
            sensitivities=None if fisher is None else fisher.sensitivities,
            running=self._running,
            progress=f"Pruning at step {step}" if show else None,
        )
        self._pruned += 1
        self._pruned_state = None
        measured = measures(results)
        if previous:
            measured["mask_iou"] = _intersection_over_union(previous, _masks_of(self._layers))
        measured["pruning_seconds"] = time.perf_counter() - started
        if show:
            logger.info(
                f"pruning point {self._pruned} of {self.schedule.refreshes}, step {step}: "
                + ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            )
        return measured

    def _store(self, optimizer: torch.optim.Optimizer, layer: LinearLayer, decision: Decision) -> None:
        """Add the repair to B or to the kept weights of W; install the mask. Pruned weights of W stay."""
        changed: list[Tensor] = []
        if decision.update is not None:
            add_to_adapter(layer, decision.update)
            changed = [layer.lora.lora_B[adapter].weight for adapter in active_adapters(layer)]
        elif self.arguments.repair == "weights":
            base = read_parameter(layer.base.weight).float()
            repaired = base + decision.weight - effective_weight(layer)
            write_parameter(layer.base, torch.where(decision.keep, repaired, base))
            changed = [layer.base.weight]
        for parameter in changed:  # moments of gradients at another point
            optimizer.state.pop(parameter, None)
        install_mask(layer, decision.keep)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        logs |= self._pending
        if state.log_history:  # the Trainer has copied the logs there already
            state.log_history[-1] |= self._pending
        self._pending = {}

    # ------------------------------------------------------------------------------------------------- the end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        self._recorder.close()
        if self._pruned < len(self._steps):
            raise EfxError(
                f"training has ended after step {state.global_step}, before the pruning point at step "
                f"{self._steps[self._pruned]}: the model is not sparse, let training go on"
            )
        if isinstance(model, PeftModel):
            untie_adapted(model)
        for layer in linear_layers(model):
            keep = mask_of(layer)
            if keep is not None:
                remove_mask(layer)
                absorb(layer, effective_weight(layer) * keep)
                self.masks[layer.name] = keep
            elif active_adapters(layer):
                absorb(layer, effective_weight(layer))
        if isinstance(model, PeftModel):
            for module in model.modules():  # what was trained of embeddings
                if isinstance(module, BaseTunerLayer) and not isinstance(module.get_base_layer(), nn.Linear):
                    module.merge()
            model.save_pretrained = partial(_save_merged, model)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        directory = _checkpoint(args, state)
        if self._pruned:
            self._save_pruned(directory)
        tensors, recorded = self._recorder.state()
        values = {"arguments": self._described(), "pruned": self._pruned} | recorded
        write_state(directory / _OWN.format(world()[0]), tensors, values)

    def _save_pruned(self, directory: Path) -> None:
        """Write masks, repaired weights and averages, which only a pruning point changes.

        They are about as large as the model, so only the first checkpoint after a pruning point writes them; later ones
        link to its file.
        """
        rank, path = world()[0], directory / _PRUNED
        linked = rank == 0 and self._pruned_state is not None and link_state(self._pruned_state, path)
        if not gather_objects(linked)[0]:
            tensors: dict[str, Tensor] = {}
            masks = _masks_of(self._layers)
            for layer in self._layers:
                weight = None
                if self.arguments.repair == "weights" and not layer.base.weight.requires_grad:
                    weight = read_parameter(layer.base.weight)  # by every process, where it is sharded
                if rank == 0:
                    tensors[f"mask.{layer.name}"] = pack_mask(masks[layer.name])
                    if weight is not None:
                        tensors[f"weight.{layer.name}"] = weight
            if rank == 0:
                averages = {} if self._running is None else self._running.averages
                tensors |= {f"average.{name}": average for name, average in averages.items()}
                write_state(path, tensors, {})
        self._pruned_state = path

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        directory = _resumed_from(args, state)
        tensors, values = read_state(directory / _OWN.format(world()[0]))
        for name, value in self._described().items():
            if values["arguments"].get(name) != value:
                raise EfxError(
                    f"{directory} was written with {name} {values['arguments'].get(name)!r} and this run has "
                    f"{value!r}: resume with the same {name}"
                )
        self._pruned = values["pruned"]
        if self._pruned:
            self._restore_pruned(directory / _PRUNED)
        self._recorder.restore(tensors, values)

    def _restore_pruned(self, path: Path) -> None:
        tensors, _ = read_state(path)
        self._pruned_state = path
        for layer in self._layers:
            if (weight := tensors.get(f"weight.{layer.name}")) is not None:
                write_parameter(layer.base, weight.to(layer.base.weight.device))
            install_mask(layer, unpack_mask(tensors[f"mask.{layer.name}"], layer.base.weight.shape))
            if self._running is not None and (average := tensors.get(f"average.{layer.name}")) is not None:
                self._running.averages[layer.name] = average.to(layer.base.weight.device)

    def _described(self) -> dict[str, Any]:
        return {
            **asdict(self.schedule),
            "calibration_tokens": self.calibration_tokens,
            **self.arguments.model_dump(mode="json"),
            "pruning steps": self._steps,
            "number of processes": world()[1],
        }


@wrapt.patch_function_wrapper(CallbackHandler, "on_train_begin")
def _move_to_front(
    on_train_begin: Callable[..., TrainerControl],
    handler: CallbackHandler,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> TrainerControl:
    """Call our callback before all others: a reporter logs what is in the logs when its turn comes, and some reporters
    store the model at the end of training.

    The Trainer itself calls its reporters before a user's callbacks.
    """
    ours = [callback for callback in handler.callbacks if isinstance(callback, EfficientXpertCallback)]
    handler.callbacks[:] = [*ours, *(callback for callback in handler.callbacks if callback not in ours)]
    for callback in ours:
        callback.is_in_front = True
    return on_train_begin(*args, **kwargs)


def _refuse(args: TrainingArguments, model: nn.Module) -> None:
    if args.load_best_model_at_end:
        raise EfxError(
            "load_best_model_at_end would put the adapter of a step before the last pruning point beside the weights "
            "and masks of the last one: set it to False"
        )
    if args.deepspeed is not None:
        raise EfxError("EfficientXpertCallback does not know DeepSpeed's parameters: use DDP or FSDP2 instead")
    if args.n_gpu > 1:
        raise EfxError("EfficientXpertCallback needs a process for each GPU: start training with torchrun")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise EfxError("EfficientXpertCallback needs whole parameters and FSDP1 flattens them: set fsdp_version to 2")
    if isinstance(model, PeftModel):
        refuse_adapters(model)
        for name in model.active_adapters:
            for variant in ("use_dora", "lora_bias"):
                if getattr(model.peft_config[name], variant):
                    raise EfxError(
                        f"adapter {name!r} sets {variant}, which cannot learn under a mask: train plain LoRA"
                    )


def _masks_of(layers: list[LinearLayer]) -> dict[str, Tensor]:
    """The masks that layers compute with, by name; none before the first pruning point."""
    return {layer.name: keep for layer in layers if (keep := mask_of(layer)) is not None}


def _intersection_over_union(previous: dict[str, Tensor], now: dict[str, Tensor]) -> float:
    common = total = 0
    for name, before in previous.items():
        common += int((before & now[name]).sum())
        total += int((before | now[name]).sum())
    return common / total


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts a checkpoint of this step."""
    output: Any = args.output_dir  # the Trainer has one by now, given or not
    return Path(output) / f"checkpoint-{state.global_step}"


def _resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that training goes on from. The Trainer does not pass it, so it is named by its step."""
    usual, named = _checkpoint(args, state), args.resume_from_checkpoint
    return Path(named) if isinstance(named, str) and Path(named).name == usual.name else usual


def _save_merged(
    model: PeftModel, save_directory: str, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
) -> None:
    """What `save_pretrained` does once the adapters add nothing: store the plain model."""
    plain, trained_whole = {}, f".modules_to_save.{model.active_adapters[0]}."
    for name, tensor in (model.state_dict() if state_dict is None else state_dict).items():
        name = name.removeprefix("base_model.model.").replace(".token_adapter.", ".")
        name = name.replace(".base_layer.", ".").replace(trained_whole, ".")
        if not any(part in name for part in _NOT_IN_A_PLAIN_MODEL):
            plain[name] = tensor
    model.get_base_model().save_pretrained(save_directory, state_dict=plain, **kwargs)
