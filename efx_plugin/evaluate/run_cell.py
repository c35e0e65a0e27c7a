"""One cell, in a process of its own: from the file that asks for it to the file with what it found."""

import contextlib
import io
import json
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from efx_plugin import failures
from efx_plugin.errors import EfxError
from efx_plugin.evaluate.cell import Cell, CellResult, CorpusLosses, Data, HeldOut, source_hash, versions
from efx_plugin.evaluate.data import write_atomically
from efx_plugin.evaluate.domains import DomainCell, DomainResult
from efx_plugin.evaluate.pipelines.protocol import PipelineResult, PipelineTask
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from efx_plugin.evaluate.scratch import scratch_folder

_FEW = 20  # documents
_VALIDATION = 0.1  # of the number of training sequences


def prepare(request: Path) -> None:
    """Import what a cell needs: of what stays the same from cell to cell, that is what takes long.

    Args:
        request: see `main`.
    """
    cell = _asked(request)
    PIPELINES[cell.pipeline].prepare()
    modules = ["torch", "transformers", "peft", "efx_plugin.engine.compute_dtype", "efx_plugin.evaluate.perplexity"]
    if isinstance(cell, DomainCell):
        modules.append("efx_plugin.evaluate.masks")
    elif cell.tasks:
        modules += ["efx_plugin.evaluate.tasks", "lm_eval.models.huggingface"]
    for name in modules:
        import_module(name)


def main(request: Path, result: Path, kept: Path | None) -> int:
    """Run a cell.

    Args:
        request: file with a `Cell`, or a `DomainCell`.
        result: file that appears only when complete, with the cell and its `CellResult` or `DomainResult`; of a `Cell`
            there is one with the ending .npz beside it, a sample of the masks.
        kept: folder to keep what the pipeline made in, as it would be served.

    Returns:
        An exit code of `efx`; other than 0, one sentence is the last line on stderr.
    """
    try:
        cell = _asked(request)
        found: CellResult | DomainResult
        if isinstance(cell, DomainCell):
            found = compare_masks(cell, result.parent)
        else:
            found, masks = run(cell, result.parent, kept)
            write_atomically(result.with_suffix(".npz"), masks)
        write_atomically(result, json.dumps({"cell": cell.as_json(), "result": found.as_json()}).encode())
    except Exception as error:
        traceback.print_exception(error)
        print(f"efx: {failures.sentence(error)}", file=sys.stderr)
        return failures.exit_code(error)
    return 0


def _asked(request: Path) -> Cell | DomainCell:
    asked = json.loads(request.read_text())
    return DomainCell.from_json(asked) if "domains" in asked else Cell.from_json(asked)


def run(cell: Cell, scratch: Path, kept: Path | None = None) -> tuple[CellResult, bytes]:
    """Run the pipeline of a cell and evaluate what it made.

    Args:
        scratch: folder for a folder of temporary files.
        kept: folder to keep the checkpoint in.

    Returns:
        The result, and a sample of the masks as an .npz file.

    Raises:
        EfxError: the pipeline cannot run on these inputs, or what it made cannot be evaluated.
    """
    import numpy as np
    import torch
    import transformers

    from efx_plugin.engine.compute_dtype import choose_for, computed_in
    from efx_plugin.evaluate.mask_samples import sample
    from efx_plugin.machine import cpu_name, to_accelerator
    from efx_plugin.model.loading import inspect_sources

    tokenizer = inspect_sources(cell.model, cell.adapter).tokenizer()
    notes: list[str] = []
    data, pipeline = cell.data, PIPELINES[cell.pipeline]
    calibration: Any = torch.empty(0, data.length, dtype=torch.int64)
    training = validation = calibration
    if pipeline.family != "dense":
        calibration = _sequences(
            data.calibration, tokenizer, data.samples, data.length, cell.seed, "calibration", notes
        )
    if pipeline.needs_training:
        count = max(1, data.training_tokens // data.length)
        training = _sequences(data.training, tokenizer, count, data.length, cell.seed, "training", notes)
        if data.validation is None:
            raise EfxError(f"{data.name} has no documents to choose the learning rate on: pass more of them")
        count = max(1, round(_VALIDATION * len(training)))
        validation = _sequences(data.validation, tokenizer, count, data.length, cell.seed, "validation", notes)
    transformers.set_seed(cell.seed)
    with scratch_folder(scratch) as output:
        task = PipelineTask(
            cell.model,
            cell.adapter,
            calibration,
            training,
            validation,
            cell.sparsity,
            cell.mask_structure,
            cell.seed,
            output,
            dict(cell.arguments),
        )
        started = time.monotonic()
        made = pipeline.run(task)
        seconds = time.monotonic() - started
        if kept is not None:
            _keep(made, output, kept)
    peak, peak_accelerator = _peak_memory(), 0.0
    machine = cpu_name()
    model: Any = made.model.eval()
    to_accelerator(model)
    if torch.accelerator.is_available():
        peak_accelerator = torch.accelerator.max_memory_allocated() / 1e6
        machine = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
        )
    masks = io.BytesIO()
    np.savez(masks, allow_pickle=False, **(sample(model) if made.sparsity else {}))
    started = time.monotonic()
    dtype = choose_for(model).dtype
    with computed_in(model, dtype):
        corpora = dict(_losses(model, tokenizer, cell))
    notes += [
        f"{name} has {len(losses.tokens)} documents, over which an interval says little"
        for name, losses in corpora.items()
        if len(losses.tokens) < _FEW
    ]
    tasks = {}
    if cell.tasks:
        from efx_plugin.evaluate.tasks import score

        tasks = {name: asdict(one) for name, one in score(model, tokenizer, cell.tasks, data=cell.task_data).items()}
    result = CellResult(
        corpora=corpora,
        tasks=tasks,
        sparsity=made.sparsity,
        bits_per_weight_stored=made.bits_per_weight_stored,
        bits_per_weight_served=made.bits_per_weight_served,
        layers=_layers(model, made),
        notes=[*notes, *made.notes],
        seconds=seconds,
        seconds_evaluation=time.monotonic() - started,
        peak_mb=peak,
        peak_accelerator_mb=peak_accelerator,
        compute_dtype=str(dtype).removeprefix("torch."),
        machine=machine,
        versions=versions() | {"source": source_hash()},
        threads=torch.get_num_threads(),
    )
    return result, masks.getvalue()


def compare_masks(cell: DomainCell, scratch: Path) -> DomainResult:
    """Compare the masks of domains.

    Args:
        scratch: folder for a folder of temporary files.

    Raises:
        EfxError: an adapter does not fit the model, or there is too little text.
    """
    import torch
    import transformers

    from efx_plugin.engine.compute_dtype import choose_for, computed_in
    from efx_plugin.evaluate.masks import analyse
    from efx_plugin.machine import cpu_name, to_accelerator
    from efx_plugin.model.loading import inspect_sources

    started, notes = time.monotonic(), list[str]()
    domains = {domain.data.name: domain for domain in cell.domains}
    tokenizers = {name: inspect_sources(cell.model, one.adapter).tokenizer() for name, one in domains.items()}

    def perplexity(name: str, model: Any) -> float:
        to_accelerator(model)
        data = domains[name].data
        with computed_in(model, choose_for(model).dtype):
            return _corpus_losses(model, tokenizers[name], data, data.heldout[0]).perplexity

    transformers.set_seed(cell.seed)
    none: Any = torch.empty(0, 0, dtype=torch.int64)
    with scratch_folder(scratch) as output:
        tasks = {}
        for number, (name, domain) in enumerate(domains.items()):
            folder = output / str(number)
            folder.mkdir()
            data = domain.data
            calibration = _sequences(
                data.calibration, tokenizers[name], data.samples, data.length, cell.seed, "calibration", notes
            )
            tasks[name] = PipelineTask(
                cell.model,
                domain.adapter,
                calibration,
                none,
                none,
                cell.sparsity,
                cell.mask_structure,
                cell.seed,
                folder,
            )
        found = analyse(tasks, PIPELINES[cell.pipeline], perplexity)
    return DomainResult(
        found["overlaps"],
        found["cross"],
        notes,
        seconds=time.monotonic() - started,
        peak_mb=_peak_memory(),
        machine=cpu_name(),
        versions=versions() | {"source": source_hash()},
    )


def _sequences(path: Path, tokenizer: Any, samples: int, length: int, seed: int, purpose: str, notes: list[str]) -> Any:
    """Token ids [sequences, length] of documents in an order that the seed decides; a note where they are fewer."""
    from efx_plugin.compress.calibration import sequences, start_of_text, tokens_of
    from efx_plugin.compress.documents import read_documents

    documents = list(read_documents(str(path)))
    random.Random(seed).shuffle(documents)
    tokens, start = (tokens_of(one, tokenizer) for one in documents), start_of_text(tokenizer)
    ids = sequences(tokens, samples, length, f"the {purpose} part", start=start, purpose=purpose)
    if len(ids) < samples:
        notes.append(f"the {purpose} part has text for {len(ids)} sequences of {length} tokens, not {samples}")
    return ids


def _keep(made: PipelineResult, output: Path, kept: Path) -> None:
    """Move the checkpoint that the pipeline has left to `kept`; a dense pipeline leaves none."""
    checkpoint = output / "checkpoint"
    if not checkpoint.is_dir():
        made.model.save_pretrained(checkpoint)
    shutil.rmtree(kept, ignore_errors=True)
    checkpoint.rename(kept)


def _layers(model: Any, made: PipelineResult) -> list[dict[str, Any]]:
    """What the pipeline says of each target layer, and the number of its weights."""
    from efx_plugin.engine.blocks import linears_in_blocks

    weights = {layer.name: layer.base.weight.numel() for layer in linears_in_blocks(model)}
    return [layer | {"weights": weights[layer["name"]]} for layer in made.layers]


def _losses(model: Any, tokenizer: Any, cell: Cell) -> Iterator[tuple[str, CorpusLosses]]:
    for corpus in cell.data.heldout:
        yield corpus.name, _corpus_losses(model, tokenizer, cell.data, corpus)


def _corpus_losses(model: Any, tokenizer: Any, data: Data, corpus: HeldOut) -> CorpusLosses:
    from efx_plugin.compress.calibration import start_of_text, tokens_of
    from efx_plugin.compress.documents import read_documents
    from efx_plugin.evaluate.perplexity import corpus_losses, first_tokens

    documents = (tokens_of(one, tokenizer) for one in read_documents(str(corpus.path)))
    taken = first_tokens(documents, data.heldout_tokens, data.length)
    return corpus_losses(model, taken, data.length, start_of_text(tokenizer))


def _peak_memory() -> float:
    """Largest resident memory of this process so far, in MB. That of getrusage would count what the parent had."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
