"""From a model on disk to a pruned sparse checkpoint: what `efx prune` runs."""

import math
import re
from pathlib import Path
from typing import Any

import datasets
import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import repack_moe
from llmcompressor.recipe import Recipe
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from efx_plugin.checkpoint import linear_bytes, save_sparse
from efx_plugin.compress.request import PruneRequest
from efx_plugin.engine.blocks import linears_outside_blocks
from efx_plugin.engine.compute_dtype import choose_compute_dtype, convert, restore, stored_dtype
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import merge_adapters
from efx_plugin.model.loading import inspect_sources
from efx_plugin.modifier import EfficientXpertModifier

_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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
    calibration = calibration_set(Path(request.dataset), tokenizer, samples=request.samples, length=request.length)
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
        "base_model": request.model.resolve().name,
        "calibration": f"{len(calibration)} sequences of {request.length} tokens from {Path(request.dataset).name}",
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


def calibration_set(path: Path, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int) -> datasets.Dataset:
    """Calibration sequences from a text file: documents joined by the end-of-sequence token and cut to `length`.

    Args:
        path: .txt (a document per line), .json/.jsonl or .parquet with a field `text`.

    Returns:
        Dataset of `input_ids` and `attention_mask`, at most `samples` sequences of exactly `length` tokens.

    Raises:
        EfxError: the file is missing, of another kind, has no field `text` or too little of it.
    """
    if not path.is_file():
        raise EfxError(f"there is no calibration file {path}: pass --dataset a .txt, .jsonl or .parquet file")
    loader = _LOADERS.get(path.suffix)
    if loader is None:
        raise EfxError(f"{path} is no calibration text: pass a file that ends in {', '.join(_LOADERS)}")
    try:
        documents = datasets.load_dataset(loader, data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise EfxError(f"{path} cannot be read as {loader}: {error}") from error
    if "text" not in documents.column_names:
        raise EfxError(f"{path} has no field `text`, only {', '.join(documents.column_names)}: rename the field")
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(tokens) >= samples * length:
            break
    count = min(samples, len(tokens) // length)
    if count == 0:
        raise EfxError(f"{path} has only {len(tokens)} tokens: one calibration sequence takes {length}")
    sequences = torch.tensor(tokens[: count * length]).reshape(count, length).tolist()
    return datasets.Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * length] * count})
