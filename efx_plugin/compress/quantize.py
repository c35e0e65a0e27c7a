"""From a sparse checkpoint to a quantized one with the same zeros: what `efx quantize` runs."""

from pathlib import Path
from typing import Any

from llmcompressor import oneshot
from loguru import logger
from transformers import AutoTokenizer

from efx_plugin.checkpoint import load_sparse, read_sparsity_config, save_sparse
from efx_plugin.checkpoint.quantized import of_config
from efx_plugin.checkpoint.reader import read_config, sizes
from efx_plugin.checkpoint.storage import shards
from efx_plugin.checkpoint.storage.atomic import refuse_full
from efx_plugin.compress.calibration import calibration_set
from efx_plugin.compress.preflight import leave_alone
from efx_plugin.compress.prune import layers_of
from efx_plugin.compress.request import QuantizeRequest
from efx_plugin.engine.blocks import linears_outside_blocks
from efx_plugin.engine.compute_dtype import choose_for, convert, restore
from efx_plugin.errors import EfxError
from efx_plugin.model.loading import vocabulary_size


def quantize_to_checkpoint(request: QuantizeRequest) -> dict[str, Any]:
    """Load, calibrate, quantize the kept weights and store; the output appears only when complete.

    Returns:
        What `sizes` says of the output, and `layers`: for each layer its zeros, and the error of its output.

    Raises:
        EfxError: any input is unfit; nothing is written then.
    """
    request = request.checked()
    if of_config(read_config(request.model), request.model) is not None:
        raise EfxError(f"{request.model} is quantized already: quantize the checkpoint that it was made of")
    read_sparsity_config(request.model)
    refuse_full(request.output, _least_bytes(request.model))
    recipe = request.recipe.instantiate()
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    model = load_sparse(request.model)
    compute = choose_for(model, request.compute_dtype)
    logger.info(compute.reason)
    calibration = calibration_set(
        request.dataset,
        tokenizer,
        samples=request.samples,
        length=request.length,
        vocabulary=vocabulary_size(model),
        text_field=request.text_field,
    )
    leave_alone(recipe, linears_outside_blocks(model))
    dtypes = convert(model, compute.dtype)
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=recipe,
        dataset=calibration,
        num_calibration_samples=request.samples,
        max_seq_length=request.length,
    )
    restore(model, dtypes)
    save_sparse(
        model,
        request.output,
        companions=shards.companions(request.model),
        recipe=request.recipe.text,
        metadata={
            "calibration": f"{len(calibration)} sequences of {request.length} tokens from {request.dataset_name}"
        },
        progress=request.progress,
    )
    return {"output": str(request.output), **sizes(request.output), "layers": layers_of(recipe)}


def _least_bytes(directory: Path) -> int:
    """Bytes that the quantized model takes at least: a quarter of the sparse weights, and the others as they are."""
    found = sizes(directory)
    return int(found["bytes_on_disk"] - 0.75 * found["linear_bytes_sparse"])
