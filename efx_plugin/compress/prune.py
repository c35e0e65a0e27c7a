"""From a model on disk to a pruned sparse checkpoint: what `efx prune` runs."""

import math
import re
from typing import Any

from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import repack_moe
from llmcompressor.recipe import Recipe
from loguru import logger
from peft import PeftModel

from efx_plugin.checkpoint import linear_bytes, save_sparse
from efx_plugin.compress.calibration import calibration_set
from efx_plugin.compress.request import PruneRequest
from efx_plugin.engine.blocks import linears_outside_blocks
from efx_plugin.engine.compute_dtype import choose_compute_dtype, convert, restore, stored_dtype
from efx_plugin.model.adapters import merge_adapters
from efx_plugin.model.loading import inspect_sources
from efx_plugin.modifier import EfficientXpertModifier


def prune_to_checkpoint(request: PruneRequest) -> dict[str, Any]:
    """Load, calibrate, prune, merge and store; the output appears only when complete.

    Returns:
        Sparsity of the linear layers, and their bytes dense and on disk.

    Raises:
        EfxError: any input is unfit; nothing is written then.
    """
    request.check_names()
    loaded_recipe = request.recipe.instantiate()
    sources = inspect_sources(request.model, request.adapter, trust_remote_code=request.trust_remote_code)
    for line in sources.describe():
        logger.info(line)
    stored = stored_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in sources.files.index.values())
    chosen = choose_compute_dtype(*stored, request.compute_dtype)
    logger.info(chosen.reason)
    tokenizer = sources.tokenizer()
    calibration = calibration_set(
        request.dataset,
        tokenizer,
        samples=request.samples,
        length=request.length,
        text_field=request.text_field,
    )
    _leave_alone(loaded_recipe, linears_outside_blocks(sources.skeleton))
    network = sources.load()
    dtypes = convert(network, chosen.dtype)
    if isinstance(network, PeftModel) and not all(
        isinstance(modifier, EfficientXpertModifier) for modifier in loaded_recipe.modifiers
    ):
        network = merge_adapters(network)  # the other modifiers know nothing of adapters
    oneshot(
        model=network.base_model.model if isinstance(network, PeftModel) else network,
        processor=tokenizer,
        recipe=loaded_recipe,
        dataset=calibration,
        num_calibration_samples=request.samples,
        max_seq_length=request.length,
    )
    if isinstance(network, PeftModel):
        network = merge_adapters(network)
    network = repack_moe(network)  # oneshot takes experts apart to calibrate them
    restore(network, dtypes)
    metadata = {
        "calibration": f"{len(calibration)} sequences of {request.length} tokens from {request.dataset_name}",
    }
    if request.adapter is not None:
        metadata["adapter"] = request.adapter.resolve().name
    save_sparse(
        network,
        request.output,
        structure=request.structure,
        companions=sources.companions,
        recipe=request.recipe.text,
        metadata=metadata,
        progress=request.progress,
    )
    sizes = linear_bytes(request.output)
    return {"output": str(request.output), "linear_bytes_dense": sizes["dense"], "linear_bytes_sparse": sizes["sparse"]}


def _leave_alone(recipe: Recipe, layers: list[str]) -> None:
    """Have every modifier ignore layers that text does not calibrate or that a few weights decide in."""
    if layers:
        logger.info(f"{len(layers)} linear layers outside the decoder blocks stay as they are, such as {layers[0]}")
    for modifier in recipe.modifiers:
        if hasattr(modifier, "ignore"):
            ignored = modifier.ignore or []
            # SparseGPT and Wanda put a full stop behind the names of layers that are targeted as "Linear".
            names = [rf"re:{re.escape(layer)}\.?$" for layer in layers]
            modifier.ignore = [*([ignored] if isinstance(ignored, str) else ignored), *names]
