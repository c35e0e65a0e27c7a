"""Pruning a model block by block on recorded batches, each block on what the pruned ones before it give.

llm-compressor's pipeline does this for one-shot pruning; here the model is in the middle of its training and has to
come back as it was: mode, random numbers, gradients.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.block_pruner import BlockPruner, MaskOf, Store
from efx_plugin.engine.blocks import PlannedBlock, decoder_blocks
from efx_plugin.engine.decide import RunningScores
from efx_plugin.engine.dense_stream import DenseStream
from efx_plugin.engine.report import PrunedLayer
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import inner_model
from efx_plugin.model.hooks import register_hook


@dataclass(frozen=True)
class Batch:
    """A calibration batch.

    Attributes:
        inputs: keyword arguments of the model, without labels.
        mask: the tokens that count, bool [batch, tokens].
    """

    inputs: dict[str, Any]
    mask: Tensor


@dataclass
class _Run:
    """A batch on its way through the blocks: the hidden states before the next one, and the blocks' other arguments."""

    hidden: Tensor
    mask: Tensor
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def prune_in_sequence(
    model: nn.Module,
    plans: Sequence[PlannedBlock],
    arguments: PruningArguments,
    batches: Sequence[Batch],
    *,
    store: Store,
    sparsities: Mapping[str, float] | None = None,
    sensitivities: Mapping[str, Tensor] | None = None,
    running: RunningScores | None = None,
    masks: MaskOf | None = None,
    progress: str | None = None,
) -> list[PrunedLayer]:
    """Calibrate, prune and repair every planned block, in order.

    It holds the hidden states of all batches before one block, with those of the dense model where the repair wants
    its outputs, and one block's statistics. Where there are several processes, each calls it, with the same number of
    batches.

    Args:
        model: a transformers model or a PeftModel around one, as it is called in training.
        plans: what to prune, see `plan_blocks`.
        arguments: how to prune.
        batches: calibration data.
        store: stores the decision for a layer such that the layer then computes as pruned.
        sparsities, sensitivities, running, masks: see `BlockPruner`.
        progress: label of the progress bar; None shows none.

    Returns:
        What became of each layer.

    Raises:
        EfxError: a layer saw no data, or the model changes hidden states between its blocks.
    """
    blocks = decoder_blocks(inner_model(model))
    planned, last = {plan.name: plan for plan in plans}, list(blocks)[-1]
    dense = DenseStream(blocks, planned) if arguments.uses_dense_model else None
    mask: Tensor | None = None
    results = []
    with _undisturbed(model), ExitStack() as outer:
        runs, autocast = _record(model, blocks, batches)
        if dense is not None:
            dense.attach(partial(register_hook, outer))

        def forward(name: str, run: _Run) -> Tensor:
            nonlocal mask
            mask = run.mask
            args, kwargs = run.arguments[name]
            with autocast():
                output = blocks[name](run.hidden, *args, **kwargs)
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            return hidden

        for name in tqdm(blocks, desc=progress, unit="block", disable=progress is None):
            if (plan := planned.get(name)) is not None:
                pruner = BlockPruner(
                    inner_model(model),
                    plan,
                    arguments,
                    sparsities=sparsities,
                    token_mask=lambda: mask,
                    sensitivities=sensitivities,
                    running=running,
                    masks=masks,
                    dense=dense,
                )
                with ExitStack() as hooks:
                    pruner.attach(partial(register_hook, hooks))
                    for run in runs:
                        forward(name, run)
                results += pruner.prune(store=store)
            if name != last:
                for run in runs:
                    run.hidden = forward(name, run)
    return results


def _record(
    model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> tuple[list[_Run], Callable[[], Any]]:
    """Record what every block is called with, in a pass in which blocks return their inputs and so cost nothing."""
    runs: list[_Run] = []
    mask: Tensor
    autocast: Callable[[], Any] = nullcontext
    returns_tuple = False

    def pass_through(name: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        nonlocal autocast, returns_tuple
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        if "past_key_values" in kwargs:  # a cache would be attended to twice
            kwargs["past_key_values"] = None
        if not runs:
            kind = hidden.device.type
            dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            autocast = partial(torch.autocast, kind, dtype=dtype, enabled=enabled)
            returns_tuple = isinstance(forward(hidden, *args, **kwargs), tuple)
        if name == first:
            runs.append(_Run(hidden, mask, {}))
        elif hidden is not runs[-1].hidden and not torch.equal(hidden, runs[-1].hidden):
            raise EfxError(
                f"{type(inner_model(model)).__name__} changes the hidden states before {name}, outside of its decoder "
                "blocks: train it without EfficientXpertCallback and prune it afterwards with EfficientXpertModifier"
            )
        runs[-1].arguments[name] = (args, kwargs)
        return (hidden,) if returns_tuple else hidden

    first = next(iter(blocks))
    with ExitStack() as cleanup:
        for name, block in blocks.items():
            cleanup.enter_context(_replaced_forward(block, partial(pass_through, name, block.forward)))
        for batch in batches:
            mask = batch.mask.to(_device(model))
            _call(model, batch)
    return runs, autocast


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _call(model: nn.Module, batch: Batch) -> None:
    device = _device(model)
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.inputs.items()}
    # Nobody reads the logits: those of one token are the fewest that the model gives.
    if "logits_to_keep" in signature(inner_model(model).forward).parameters:
        inputs["logits_to_keep"] = 1
    model(**inputs, use_cache=False)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; afterwards modes and random number generators are as they were."""
    training = [module for module in model.modules() if module.training]
    device = _device(model)
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        for module in training:
            module.training = True
        random.setstate(python)
        np.random.set_state(numpy)
