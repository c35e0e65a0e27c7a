"""From a sparse checkpoint to a better one with the same zeros: what `efx heal` runs."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from efx_plugin.checkpoint import load_sparse, read_sparsity_config, save_sparse
from efx_plugin.checkpoint.quantized import of_config
from efx_plugin.checkpoint.reader import read_config, sizes
from efx_plugin.checkpoint.storage import shards
from efx_plugin.checkpoint.storage.atomic import refuse_full
from efx_plugin.checkpoint.storage.hashes import directory_hash, file_hash
from efx_plugin.compress.calibration import calibration_set, start_of_text
from efx_plugin.compress.general_text import write_general
from efx_plugin.compress.request import HealRequest
from efx_plugin.errors import EfxError
from efx_plugin.model.loading import Sources, inspect_sources, vocabulary_size
from efx_plugin.training.generation import write_sequences
from efx_plugin.training.healing import heal

_HELD_OUT = 0.1  # of the training sequences as many more, which say whether healing has helped
_BYTES = 12  # of a weight in a checkpoint: itself in float32, and two averages of AdamW
_REQUEST = "request.json"
_WRITTEN = "written.safetensors"


def heal_to_checkpoint(request: HealRequest) -> dict[str, Any]:
    """Load, train on the kept weights, check on text that was held out, and store; the output appears only when
    complete.

    A run that was interrupted goes on where it was, from `OUTPUT.healing`.

    Returns:
        What `sizes` says of the output, `tokens` that were trained on, and the perplexity of the tokens held out,
        `before` and `after`.

    Raises:
        EfxError: the inputs are unfit, or healing has not helped; nothing is written then.
    """
    request = request.checked()
    if of_config(read_config(request.model), request.model) is not None:
        raise EfxError(f"{request.model} is quantized, and integers cannot be trained: heal it before quantization")
    structure = read_sparsity_config(request.model)["format"]
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    model = load_sparse(request.model)
    if not model.can_generate():
        raise EfxError(
            f"{request.model} holds a {type(model).__name__}, and healing trains language models to predict text: "
            "prune the model that it was made of, heal that, and train the head anew"
        )
    count = max(1, request.tokens // request.length)
    text = calibration_set(
        request.dataset,
        tokenizer,
        samples=count + max(1, round(_HELD_OUT * count)),
        length=request.length,
        vocabulary=vocabulary_size(model),
        text_field=request.text_field,
    )
    ids = torch.tensor(text["input_ids"])
    held_out = max(1, round(len(ids) * _HELD_OUT / (1 + _HELD_OUT)))
    if len(ids) <= held_out:
        raise EfxError(
            f"{request.dataset} has text for one sequence of {request.length} tokens, and healing keeps one to check "
            "itself: pass more text, or a smaller --length"
        )
    dense = None if request.teacher is None else inspect_sources(request.teacher, request.adapter)
    teacher = None if dense is None else _teacher(dense, model)
    refuse_full(request.output, 2 * _BYTES * model.num_parameters())  # the last goes when the next is complete
    folder = _working_folder(request)
    own, validation = ids[:-held_out], ids[-held_out:]
    written = None
    with _removed_without_checkpoint(folder):
        if dense is not None and teacher is not None and request.generate:
            written = _written(dense, teacher, own, request, tokenizer, folder)
        healed = heal(
            model,
            own,
            validation,
            learning_rate=request.learning_rate,
            batch_size=request.batch_size,
            folder=folder,
            seed=request.seed,
            teacher=teacher,
            written=written,
        )
    if not healed.after < healed.before:
        shutil.rmtree(folder)
        raise EfxError(
            f"healing took the perplexity on {held_out * request.length:,} other tokens of {request.dataset} from "
            f"{healed.before:.2f} to {healed.after:.2f}: nothing is written; lower --learning-rate, or pass more text"
        )
    save_sparse(
        model,
        request.output,
        structure=structure,
        companions=shards.companions(request.model),
        metadata={"healing": _provenance(own, written, request)},
        progress=request.progress,
    )
    shutil.rmtree(folder)
    return {"output": str(request.output), **sizes(request.output), **asdict(healed)}


def _written(
    dense: Sources,
    teacher: PreTrainedModel,
    text: torch.Tensor,
    request: HealRequest,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> torch.Tensor:
    """Sequences that the teacher writes, with an adapter half of them without it, int64 [n, length]; kept in `folder`,
    so that a run that goes on finds them."""
    path = folder / _WRITTEN
    if not path.is_file():
        count = math.ceil(request.generate / request.length)
        general = 0 if dense.adapter is None else count // 2
        start, seed, progress = start_of_text(tokenizer), request.seed, request.progress
        ids = write_sequences(teacher, text, count - general, start=start, seed=seed, progress=progress)
        if general:
            others = write_general(dense, text, general, tokenizer=tokenizer, seed=seed, progress=progress)
            ids = torch.cat([ids, others])
        unfinished = path.with_suffix(".unfinished")
        save_file({"input_ids": ids}, unfinished)
        unfinished.replace(path)
    return load_file(path)["input_ids"]


def _provenance(text: torch.Tensor, written: torch.Tensor | None, request: HealRequest) -> str:
    own = f"{text.numel():,} tokens from {request.dataset_name}"
    if written is None:
        return own
    half = "" if request.adapter is None or len(written) == 1 else ", half of them without its adapter"
    return f"{own} and {written.numel():,} that the dense expert wrote{half}"


def _teacher(dense: Sources, model: PreTrainedModel) -> PreTrainedModel:
    """The dense expert.

    Raises:
        EfxError: it cannot be loaded, predicts no text, or has another vocabulary than the model.
    """
    teacher, directory = dense.load_merged(), dense.files.folder
    if not teacher.can_generate():
        raise EfxError(
            f"the teacher {directory} is a {type(teacher).__name__}, which predicts no text: pass the dense expert"
        )
    here, there = vocabulary_size(model), vocabulary_size(teacher)
    if here != there:
        raise EfxError(
            f"the teacher {directory} has {there} tokens and the sparse model {here}: pass the dense expert that "
            "it was pruned from"
        )
    return teacher


def _working_folder(request: HealRequest) -> Path:
    """The folder for checkpoints of this run, which the same request finds again.

    Raises:
        EfxError: that of another request is in its place.
    """
    folder = request.output.with_name(f"{request.output.name}.healing")
    key = _key(request)
    if folder.is_dir():
        if not (folder / _REQUEST).is_file() or json.loads((folder / _REQUEST).read_text()) != key:
            raise EfxError(
                f"{folder} is of an interrupted run on other inputs: remove it, or run the same command as then"
            )
        logger.info(f"healing goes on from {folder}")
        return folder
    folder.mkdir(parents=True)
    (folder / _REQUEST).write_text(json.dumps(key))
    return folder


@contextmanager
def _removed_without_checkpoint(folder: Path) -> Iterator[None]:
    """Remove the folder of a run that fails before it has stored anything to go on from."""
    try:
        yield
    except BaseException:
        if get_last_checkpoint(str(folder)) is None:
            shutil.rmtree(folder)
        raise


def _key(request: HealRequest) -> dict[str, Any]:
    """What a run depends on: the arguments, and the bytes of the files."""
    dataset = Path(request.dataset)
    return {
        "model": directory_hash(request.model),
        "teacher": request.teacher and directory_hash(request.teacher),
        "adapter": request.adapter and directory_hash(request.adapter),
        "dataset": file_hash(dataset) if dataset.is_file() else request.dataset,
        "text_field": request.text_field,
        "tokens": request.tokens,
        "generate": request.generate,
        "length": request.length,
        "learning_rate": request.learning_rate,
        "batch_size": request.batch_size,
        "seed": request.seed,
    }
