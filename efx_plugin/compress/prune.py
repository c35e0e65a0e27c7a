"""From a model on disk to a pruned sparse checkpoint: what `efx prune` runs."""

import math
import time
from dataclasses import asdict
from typing import Any

import datasets
import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import repack_moe
from llmcompressor.recipe import Recipe
from loguru import logger
from peft import PeftModel
from torch import nn

from efx_plugin.checkpoint import save_sparse
from efx_plugin.checkpoint.provenance import public_name
from efx_plugin.checkpoint.reader import sizes
from efx_plugin.compress.calibration import as_dataset, start_of_text
from efx_plugin.compress.preflight import Prepared, preflight
from efx_plugin.compress.request import PruneRequest
from efx_plugin.compress.zeros import Zeros, prunes
from efx_plugin.engine.compute_dtype import convert, restore
from efx_plugin.engine.memory import return_freed_memory
from efx_plugin.model.adapters import merge_adapters
from efx_plugin.modifier import EfficientXpertModifier
from efx_plugin.training.generation import write_sequences


def prune_to_checkpoint(request: PruneRequest) -> dict[str, Any]:
    """Look, load, calibrate, prune, merge and store; the output appears only when complete.

    Returns:
        What `sizes` says of the output, and `layers`: for each layer that `EfficientXpertModifier` pruned, what
        became of it.

    Raises:
        EfxError: any input is unfit; nothing is written then.
    """
    request = request.checked()
    prepared = preflight(request)
    sources, recipe, calibration = prepared.sources, prepared.recipe, prepared.calibration
    used = f"{len(calibration)} sequences of {request.length} tokens from {request.dataset_name}"
    if request.generate:
        written = _written(prepared, request)
        calibration = datasets.concatenate_datasets([calibration, written])
        used += f" and {len(written)} that the dense model wrote"
    network = sources.load()
    zeros = None if any(map(prunes, recipe.modifiers)) else Zeros(network, recipe)
    dtypes = convert(network, prepared.compute.dtype)
    if isinstance(network, PeftModel) and not all(
        isinstance(modifier, EfficientXpertModifier) for modifier in recipe.modifiers
    ):
        network = merge_adapters(network)  # the other modifiers know nothing of adapters
    beside = any(isinstance(one, EfficientXpertModifier) and one.uses_dense_model for one in recipe.modifiers)
    _say_time(network, calibration, passes=3 if beside else 2)
    oneshot(
        model=network.base_model.model if isinstance(network, PeftModel) else network,
        processor=prepared.tokenizer,
        recipe=recipe,
        dataset=calibration,
        num_calibration_samples=len(calibration),
        max_seq_length=request.length,
        trust_remote_code_model=request.trust_remote_code,
    )
    if isinstance(network, PeftModel):
        network = merge_adapters(network)
    if zeros is not None:
        zeros.restore(network)
    network = repack_moe(network)  # oneshot takes experts apart to calibrate them
    restore(network, dtypes)
    metadata = {"calibration": used}
    if request.adapter is not None:
        metadata["adapter"] = public_name(request.adapter.resolve())
    save_sparse(
        network,
        request.output,
        structure=request.structure,
        companions=sources.companions,
        recipe=request.recipe.text,
        metadata=metadata,
        progress=request.progress,
    )
    return {"output": str(request.output), **sizes(request.output), "layers": layers_of(recipe)}


def _written(prepared: Prepared, request: PruneRequest) -> datasets.Dataset:
    """Calibration sequences that the model with its adapter writes; it is gone from memory afterwards."""
    text = torch.tensor(prepared.calibration["input_ids"])
    ids = write_sequences(
        prepared.sources.load_merged(),
        text,
        math.ceil(request.generate / request.length),
        start=start_of_text(prepared.tokenizer),
        seed=0,
        progress=request.progress,
    )
    return_freed_memory()
    return as_dataset(ids)


def layers_of(recipe: Recipe) -> list[dict[str, Any]]:
    """What became of each layer of the EfficientXpertModifiers of a recipe, once it was carried out."""
    return [
        asdict(layer) | {"sparsity": layer.sparsity}
        for modifier in recipe.modifiers
        if isinstance(modifier, EfficientXpertModifier)
        for layer in modifier.report
    ]


def _say_time(network: nn.Module, calibration: datasets.Dataset, passes: int) -> None:
    """Say how long calibration is going to take, by the time of its first sequence.

    Every sequence passes each decoder block before and after the block is pruned, and once more where the dense model
    computes beside the pruned one. On an accelerator, to which the blocks are brought one by one, the first sequence
    would say nothing of the others.
    """
    amount = f"calibration: {len(calibration)} sequences of {len(calibration[0]['input_ids'])} tokens"
    if torch.accelerator.is_available():
        logger.info(amount)
        return
    first = {name: torch.tensor([values]) for name, values in calibration[0].items()}
    started = time.monotonic()
    with torch.no_grad():
        network(**first)
    seconds = time.monotonic() - started
    logger.info(
        f"{amount}, about {duration(passes * seconds * len(calibration))}: the first took {seconds:.1f} s and each "
        f"passes {passes} times; the time to prune comes on top"
    )


def duration(seconds: float) -> str:
    """A span of time for people, such as "40 seconds", "12 minutes" or "3.5 hours"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
