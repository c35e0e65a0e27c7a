"""`efx`, one sub-command per capability. Exit codes: 0 done, 1 failed (one sentence on stderr), 2 wrong usage.

Nothing here imports torch: each command imports what it runs, so that `efx --help` answers at once.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from efx_plugin import __version__, failures
from efx_plugin.compress.request import HealRequest, PruneRequest, QuantizeRequest
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from efx_plugin.recipe_files import builtin_recipes

if TYPE_CHECKING:
    from efx_plugin.checkpoint.summary import Summary
    from efx_plugin.compress.recipe import RecipeText

app = typer.Typer(
    name="efx",
    help="Sparse domain experts: prune a model with its LoRA adapter, export it, serve it sparsely in vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@dataclass
class Options:
    """What holds for every command.

    Attributes:
        debug: show the traceback of an error.
    """

    debug: bool = False


def _show_version(value: bool) -> None:
    if value:
        print(f"efx-plugin {__version__}")
        raise typer.Exit


@app.callback()
def efx(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _set_debug(context: typer.Context, value: bool) -> None:
    if isinstance(context.obj, Options):
        context.obj.debug |= value


DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error too.", callback=_set_debug, is_eager=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log, no table; errors still show.")]
DeviceOption = Annotated[str, typer.Option(help="Where to calibrate: auto, cpu, cuda or cuda:N.")]
StructureOption = Annotated[
    str, typer.Option(help="auto, sparse-bitmask or sparse-24-bitmask (needs 2:4 structure).", show_default=True)
]


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="Directory of the model to prune, or its name on the hub.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    dataset: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="Calibration text of the domain: .txt, .jsonl, .json, .csv or .parquet, perhaps with .gz, or a data "
            "set on the hub. Taken are the field `text`; `messages`, through the chat template; or `prompt` and "
            "`completion`.",
        ),
    ],
    text_field: Annotated[
        str | None, typer.Option(help="The field of the calibration data to take in place of those.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help=f"llm-compressor recipe: one of {', '.join(builtin_recipes())}, or a YAML file. "
            "Without: the default method, with the three options below.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of the weights to prune, without --recipe.  [default: 0.5]")
    ] = None,
    mask_structure: Annotated[
        str | None,
        typer.Option(
            metavar="N:M", help="Prune N of every M weights, without --recipe; 0:0 is unstructured.  [default: 0:0]"
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="Quantize each layer once it is pruned, without --recipe: W8A8, W8A16 or W4A16.  [default: none]",
        ),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Directory or hub name of a LoRA adapter to merge in.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens per calibration sequence.", min=2)] = 512,
    generate: Annotated[
        int,
        typer.Option(
            help="Tokens that MODEL, with the adapter, writes in the manner of the text, to calibrate on as well.",
            min=0,
        ),
    ] = PruneRequest.generate,
    structure: StructureOption = "auto",
    compute_dtype: Annotated[
        str,
        typer.Option(
            help="What to calibrate and prune in: float32; checkpoint, the dtype of MODEL; or auto, float32 on a CPU "
            "that cannot multiply in the latter. Weights are stored in the dtype of MODEL."
        ),
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with MODEL; read it first.")
    ] = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune MODEL by a recipe, with an adapter merged in, and write a sparse checkpoint.

    Example: efx prune ./SmolLM2 ./expert --adapter ./legal-lora --recipe expert_50 --dataset legal.jsonl
    """
    request = PruneRequest(
        model,
        output,
        _choose_recipe(recipe, sparsity, mask_structure, quantization),
        dataset,
        adapter=adapter,
        text_field=text_field,
        samples=samples,
        length=length,
        generate=generate,
        structure=structure,
        compute_dtype=compute_dtype,
        trust_remote_code=trust_remote_code,
        progress=not quiet,
    )
    request = request.checked()
    started = time.monotonic()
    with _computing(device, quiet):
        from efx_plugin.compress.log import show_missing_accelerator_once

        show_missing_accelerator_once()
        from efx_plugin.compress.prune import prune_to_checkpoint

        report = prune_to_checkpoint(request)
    _show(report | {"seconds": time.monotonic() - started}, as_json, quiet)


@app.command()
def heal(
    model: Annotated[Path, typer.Argument(help="Directory of a sparse model, as `efx prune` writes it.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    dataset: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="Text of the domain, as `efx prune` takes it; best such as the adapter was not trained on.",
        ),
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(help="Directory of the dense expert, or of the base model with --adapter: to learn from it too."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter that makes the teacher an expert.")] = None,
    text_field: Annotated[str | None, typer.Option(help="The field of the data that holds the text.")] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to train on, once; a tenth as many more are held out as a check.", min=2)
    ] = HealRequest.tokens,
    generate: Annotated[
        int,
        typer.Option(
            help="Tokens that the teacher writes in the manner of the text, to train on as well; with --adapter "
            "half of them without it, on anything, so that less is forgotten.",
            min=0,
        ),
    ] = HealRequest.generate,
    length: Annotated[int, typer.Option(help="Tokens per sequence.", min=2)] = HealRequest.length,
    learning_rate: Annotated[float, typer.Option(help="At its peak.", min=0)] = HealRequest.learning_rate,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = HealRequest.batch_size,
    seed: Annotated[int, typer.Option(help="Of the order of the sequences.")] = HealRequest.seed,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a sparse model on plain text of its domain: its zeros stay, its quality comes back.

    The same command goes on with a run that was interrupted. Nothing is written where the text held out is predicted no
    better than before.

    Example: efx heal ./expert ./healed --dataset legal.jsonl --teacher ./SmolLM2 --adapter ./legal-lora
    """
    request = HealRequest(
        model,
        output,
        dataset,
        text_field=text_field,
        tokens=tokens,
        generate=generate,
        length=length,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        teacher=teacher,
        adapter=adapter,
        progress=not quiet,
    )
    request = request.checked()
    started = time.monotonic()
    with _computing(device, quiet):
        from efx_plugin.compress.heal import heal_to_checkpoint

        report = heal_to_checkpoint(request)
    _show(report | {"seconds": time.monotonic() - started}, as_json, quiet)


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Directory of a sparse model, as `efx prune` or `efx heal` writes it.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    dataset: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="Calibration text of the domain, as `efx prune` takes it.")
    ],
    quantization: Annotated[str, typer.Option(metavar="SCHEME", help="W8A8, W8A16 or W4A16.")],
    text_field: Annotated[str | None, typer.Option(help="The field of the data that holds the text.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = QuantizeRequest.samples,
    length: Annotated[int, typer.Option(help="Tokens per calibration sequence.", min=2)] = QuantizeRequest.length,
    compute_dtype: Annotated[
        str, typer.Option(help="What to calibrate and quantize in, as `efx prune` takes it.")
    ] = QuantizeRequest.compute_dtype,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Quantize the kept weights of a sparse model, after training or healing: its zeros stay.

    Pruning and quantization in one pass is `efx prune --quantization`.

    Example: efx quantize ./healed ./small --quantization W4A16 --dataset legal.jsonl
    """
    from efx_plugin.compress.recipe import quantizing_recipe

    request = QuantizeRequest(
        model,
        output,
        quantizing_recipe(quantization),
        dataset,
        text_field=text_field,
        samples=samples,
        length=length,
        compute_dtype=compute_dtype,
        progress=not quiet,
    )
    request = request.checked()
    started = time.monotonic()
    with _computing(device, quiet):
        from efx_plugin.compress.quantize import quantize_to_checkpoint

        report = quantize_to_checkpoint(request)
    _show(report | {"seconds": time.monotonic() - started}, as_json, quiet)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Directory of a pruned model.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    structure: Annotated[
        str,
        typer.Option(help="auto, sparse-bitmask, sparse-24-bitmask; or dense, from a sparse SOURCE."),
    ] = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a pruned model stored dense into a sparse checkpoint, or back, shard by shard.

    Example: efx export ./pruned ./pruned-sparse
    """
    from efx_plugin.checkpoint.storage.atomic import refuse_existing

    refuse_existing(output)  # torch is imported next
    started = time.monotonic()
    from efx_plugin.checkpoint import export_checkpoint, read_index
    from efx_plugin.checkpoint.reader import sizes

    export_checkpoint(source, output, structure=structure, progress=not quiet)
    report = {"output": str(output), **sizes(source if structure == "dense" else output)}
    if structure == "dense":
        report["bytes_on_disk"] = sum(stored.nbytes for stored in read_index(output).values())
    _show(report | {"seconds": time.monotonic() - started}, as_json, quiet)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Directory of a checkpoint.", exists=True, file_okay=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every byte, checksums included.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a heat map, layers by projections, to this picture.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a checkpoint of pruned weights holds: format, sizes, sparsity by projection and layer, 2:4 compliance.

    Example: efx inspect ./expert --verify --plot expert.png
    """
    from efx_plugin.checkpoint.summary import summarize

    summary = summarize(directory, verify=verify)
    if as_json:
        print(json.dumps(summary.as_json()))
    elif not quiet:
        _show_summary(summary, verify)
    if plot is not None:
        try:
            from efx_plugin.plots import sparsity_heat_map
        except ImportError as error:
            raise EfxError("--plot needs matplotlib: pip install 'efx-plugin[plot]'") from error
        sparsity_heat_map(summary, plot)


class ManyValues(TyperCommand):
    """A command without positional arguments whose options take one value or several: `--sparsity .4 .5 2:4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the option before each of its values, which is how click knows it."""
        several = {name for one in self.params if one.multiple for name in one.opts}
        spread, current = [], None
        for argument in args:
            if argument.startswith("-"):
                current, first = (argument if argument in several else None), True
            elif current is not None and not first:
                spread.append(current)
            else:
                first = False
            spread.append(argument)
        return super().parse_args(ctx, spread)


@app.command(cls=ManyValues)
def compare(
    model: Annotated[Path, typer.Option(help="Directory of the base model, or its name on the hub.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE...",
            help="Text of the domain, a document a record, as `efx prune` takes it. Of each file 15 % of the documents "
            "are held out; if the adapter was trained on them, pass --heldout.",
        ),
    ],
    adapter: Annotated[Path | None, typer.Option(help="Directory or hub name of the LoRA adapter.")] = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE...", help="Text to evaluate on that nothing was trained on, a corpus a file."),
    ] = None,
    pipelines: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help=f"Any of {', '.join(PIPELINES)}.", show_default="all that train nothing"),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="S...", help="Fractions of the weights to prune, or structures such as 2:4.", show_default=".5"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds for each pipeline that depends on one.", min=1)] = 1,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens per calibration, training and evaluation sequence.", min=2)] = 512,
    training_tokens: Annotated[int, typer.Option(help="Tokens that a trained pipeline trains on.", min=2)] = 100_000,
    heldout_tokens: Annotated[int, typer.Option(help="Tokens of each corpus to evaluate on.", min=2)] = 50_000,
    text_field: Annotated[str | None, typer.Option(help="The field of the data that holds the text.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks to score too, as `efx eval` takes them.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder with the files of our tasks, see docs/evaluation.md.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of results; what is there is not run again.", show_default="~/.cache/efx/compare"),
    ] = None,
    other_adapter: Annotated[
        Path | None,
        typer.Option(help="Adapter of a second domain: masks of the two are compared, at the first sparsity."),
    ] = None,
    other_data: Annotated[list[str] | None, typer.Option(metavar="FILE...", help="Text of the second domain.")] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="PYTHON", help="Time lora and our experts in vLLM, in turn, by this python, which has it."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write tables and plots to this file.")] = None,
    jobs: Annotated[
        int,
        typer.Option(
            help="Cells at a time, which share processors and accelerator. Small models are compared sooner so; their "
            "seconds are those of cells beside each other.",
            min=1,
        ),
    ] = 1,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare ways to make an expert, on your data: held-out perplexity, recovery, bits per weight, seconds, memory.

    Example: efx compare --model ./SmolLM2 --adapter ./legal-lora --data legal.jsonl --sparsity .5 2:4 --html out.html
    """
    from efx_plugin.evaluate.html import refuse_html, write_html
    from efx_plugin.evaluate.request import CompareRequest

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    request = CompareRequest(
        model,
        adapter,
        tuple(data),
        cache or base / "efx" / "compare",
        heldout=tuple(heldout or ()),
        pipelines=tuple(pipelines or ()),
        sparsities=tuple(sparsity or (".5",)),
        seeds=seeds,
        tasks=_names(tasks),
        task_data=task_data,
        text_field=text_field,
        other_adapter=other_adapter,
        other_data=tuple(other_data or ()),
        serve=serve,
        samples=samples,
        length=length,
        training_tokens=training_tokens,
        heldout_tokens=heldout_tokens,
    ).checked()
    if html is not None:
        refuse_html(html)
    split = request.split()
    other = request.split_other(split.data)
    console = Console(stderr=True, quiet=quiet)
    for notice in (*split.notices, *(other.notices if other else ())):
        console.print(notice, highlight=False, markup=False)
    _choose_device(device)
    from efx_plugin.evaluate.grid import model_folder, run_grid, unfinished
    from efx_plugin.evaluate.speed import REFERENCE, measure

    # llm-compressor tells the stdout that it finds when it is imported of its device, and it computes nothing here.
    with contextlib.redirect_stdout(io.StringIO()):
        cells = request.cells(split.data)
    domains = request.domain_cells(split.data, other.data if other else None)
    if unfinished([*cells, *domains], request.cache):  # every cell would fail of an adapter that does not fit
        from efx_plugin.model.loading import inspect_sources

        inspect_sources(request.model, request.adapter)
        if domains:
            inspect_sources(request.model, request.other_adapter)
        if request.tasks:
            from efx_plugin.evaluate.tasks import check

            check(request.tasks, data=request.task_data)
    served = request.served(cells)
    report = run_grid(cells, request.cache, progress=not quiet, keep=tuple(served.values()), domains=domains, jobs=jobs)
    unserved: EfxError | None = None
    if serve is not None and not report.failures:
        console.print("timing in vLLM", highlight=False)
        folders = {name: model_folder(request.cache, cell) for name, cell in served.items()}
        try:
            report = replace(report, speeds=measure(serve, folders.pop(REFERENCE), folders, request.cache))
        except EfxError as error:  # what was found before is shown first
            unserved = error
    if as_json:
        print(json.dumps(report.as_json()))
    elif not quiet:
        from efx_plugin.evaluate.table import show

        show(report)
    if html is not None:
        write_html(report, html)
    if report.failures:
        first = report.failures[0]
        raise EfxError(
            f"{len(report.failures)} of {len(report.failures) + report.cells} cells failed, first {first.label}: "
            f"{first.reason}; its log is {first.log}"
        )
    if unserved is not None:
        raise unserved


@app.command()
def serve(
    directory: Annotated[Path, typer.Argument(help="Directory of the model to serve, sparse or dense.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="-- ARGUMENTS", help="Further arguments of `vllm serve`, after --.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks to split the model over.", min=1)] = 1,
    kv_cache: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="KV cache per rank. On CPU by default a quarter of what the weights leave free, 1 to 32 GiB.",
            min=0.01,
        ),
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="Do not compile the model: starts sooner, runs slower.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Serve DIRECTORY with vLLM's OpenAI-compatible server, set up for this machine.

    Example: efx serve ./expert --port 8000 -- --served-model-name expert
    """
    from efx_plugin.serving import launch

    launch.serve(
        directory,
        host=host,
        port=port,
        tensor_parallel_size=tensor_parallel_size,
        kv_cache=kv_cache,
        eager=eager,
        arguments=arguments or [],
    )


@app.command("eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(help="Directory of the model, sparse or dense.", exists=True)],
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="lm-eval's tasks, or ours: efx_legal_clause, efx_casehold, ..."),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Folder with the files of our tasks, see docs/evaluation.md.", exists=True, file_okay=False),
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="Folder with further task files.", exists=True, file_okay=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task: its first ones.", min=1)] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each question.", min=0)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put questions through the chat template.")] = False,
    baseline: Annotated[
        str | None, typer.Option(metavar="DIR", help="Model to compare with: shows how much of its quality is kept.")
    ] = None,
    recovery_threshold: Annotated[
        float | None, typer.Option(help="Part of the quality of --baseline to keep, else exit code 1.  [default: 0.95]")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML in the form of llm-compressor's tests/lmeval, in place of these."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests in a forward pass.", min=1)] = 8,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score a model on tasks with lm-eval, beside chance, and say how much of a baseline's quality it keeps.

    Example: efx eval ./expert --tasks arc_easy,efx_health_term --task-data ./questions --baseline ./lora-merged
    """
    from efx_plugin.evaluate.recovery import DEFAULT_THRESHOLD, read_config, recoveries, require

    threshold: float | dict[str, float] = DEFAULT_THRESHOLD if recovery_threshold is None else recovery_threshold
    if config is not None:
        given: dict[str, Any] = {"--tasks": tasks, "--limit": limit, "--fewshot": fewshot, "--baseline": baseline}
        given |= {"--recovery-threshold": recovery_threshold, "--chat": chat or None}
        if twice := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{twice[0]} and --config say the same: pass one of the two")
        read = read_config(config)
        names, baseline, threshold = read.tasks, read.model, read.threshold
        limit, fewshot, chat = read.limit, read.fewshot, read.chat
    elif tasks is None:
        raise UsageError("nothing to ask: pass --tasks or --config")
    else:
        names = _names(tasks)
    if recovery_threshold is not None and baseline is None:
        raise UsageError("--recovery-threshold is about a --baseline: pass one")
    with _computing(device, quiet):
        from efx_plugin.evaluate.tasks import check
        from efx_plugin.evaluate.tasks.directory import score_directory

        check(names, data=task_data, include=include or ())
        options: dict[str, Any] = {"data": task_data, "include": include or (), "limit": limit, "fewshot": fewshot}
        options |= {"chat": chat, "batch_size": batch_size}
        scores = score_directory(directory, names, **options)
        found = recoveries(score_directory(baseline, names, **options), scores, threshold) if baseline else []
    report = {
        "model": str(directory),
        "tasks": {name: asdict(score) for name, score in scores.items()},
        "baseline": baseline,
        "recovery": [asdict(one) | {"passed": one.passed} for one in found],
    }
    if as_json:
        print(json.dumps(report))
    elif not quiet:
        _show_scores(report)
    require(found, directory, baseline or "")


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="A console script, `python -m MODULE` or `python FILE`."),
    ],
    debug: DebugOption = False,
) -> None:
    """Run another Python program with the plugin imported first, so that it reads sparse checkpoints.

    Example: efx run -- lm_eval --model hf --model_args pretrained=./expert --tasks arc_easy
    """
    from efx_plugin.run import run

    run(command)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _show_scores(report: dict[str, Any]) -> None:
    table = Table("task", "metric", title=report["model"])
    for column in ("score", "chance", "questions"):
        table.add_column(column, justify="right")
    for name, score in report["tasks"].items():
        error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
        chance = "" if score["chance"] is None else f"{score['chance']:.3f}"
        table.add_row(name, score["metric"], f"{score['accuracy']:.3f}{error}", chance, str(score["documents"]))
    console = Console()
    console.print(table)
    if not report["recovery"]:
        return
    table = Table("task", "metric", title=f"kept of {report['baseline']}")
    for column in ("base", "here", "recovery", "threshold", ""):
        table.add_column(column, justify="right")
    for one in report["recovery"]:
        values = [f"{one['base']:.4f}", f"{one['here']:.4f}", f"{one['recovery']:.0%}", f"≥ {one['threshold']:.0%}"]
        table.add_row(one["task"], one["metric"], *values, "passed" if one["passed"] else "FAILED")
    console.print(table)


def _show_summary(summary: "Summary", verified: bool) -> None:
    table = Table(title=summary.directory, show_header=False)
    for name, value in (
        ("format", summary.format),
        ("dtype", summary.dtype),
        ("parameters", f"{summary.parameters:,}"),
        ("bytes, stored dense", f"{summary.bytes_dense:,}"),
        ("bytes on disk", f"{summary.bytes_on_disk:,} ({summary.bytes_on_disk / summary.bytes_dense:.3f} of dense)"),
        (
            "compressed weights",
            f"{len(summary.weights)}, {summary.bits_per_weight:.2f} bits each on disk, zeros counted",
        ),
        ("sparsity", f"{summary.sparsity:.4f}"),
        ("2:4 structure", "yes" if summary.two_of_four else "no"),
        ("checksums", summary.checksums),
        ("contents", "verified" if verified else "not verified (--verify does)"),
    ):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    _bars(console, "sparsity by projection", summary.by_projection)
    _bars(console, "sparsity by decoder block", {str(layer): value for layer, value in summary.by_layer.items()})


def _bars(console: Console, title: str, fractions: dict[str, float]) -> None:
    chart = Table(title=title, show_header=False, box=None)
    for name, fraction in fractions.items():
        chart.add_row(name, "█" * round(40 * fraction) + "░" * (40 - round(40 * fraction)), f"{fraction:.3f}")
    console.print(chart)


def _choose_recipe(
    recipe: str | None, sparsity: float | None, mask_structure: str | None, quantization: str | None
) -> "RecipeText":
    from efx_plugin.compress.recipe import default_recipe, find_recipe

    if recipe is None:
        return default_recipe(sparsity, mask_structure, quantization)
    options = {"--quantization": quantization, "--mask-structure": mask_structure, "--sparsity": sparsity}
    if given := next((option for option, value in options.items() if value is not None), None):
        raise UsageError(f"{given} is for the default recipe and {recipe} has its own: pass one of the two")
    return find_recipe(recipe)


@contextlib.contextmanager
def _computing(device: str, quiet: bool) -> Iterator[None]:
    """Around the imports and the work of a command: the device that was asked for, silence where it was, and a stdout
    that is kept for the result."""
    if quiet:  # before anything is imported that reads it
        os.environ |= {"TQDM_DISABLE": "1", "LLM_COMPRESSOR_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    _choose_device(device)
    with contextlib.redirect_stdout(sys.stderr):  # llm-compressor logs to the one that it finds when it is imported
        yield


def _choose_device(device: str) -> None:
    """Let torch see that device alone; llm-compressor calibrates on the first accelerator that it sees."""
    if device == "auto":
        return
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda, cuda:N", param_hint="--device")
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise EfxError(f"--device {device}: torch finds no such GPU; use --device cpu or auto")


def _show(report: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        print(json.dumps(report))
    if as_json or quiet:
        return
    table = Table("", "dense", "here", "ratio", title=report["output"])
    whole = (report["bytes_dense"], report["bytes_on_disk"])
    linears = (report["linear_bytes_dense"], report["linear_bytes_sparse"])
    if whole[0] == whole[1]:  # written dense
        linears = (linears[0], linears[0])
    for name, (dense, here) in (("bytes of compressed linear layers", linears), ("bytes of all weights", whole)):
        table.add_row(name, f"{dense:,}", f"{here:,}", f"{here / dense:.3f}")
    table.add_row("sparsity of these linear layers", "", f"{report['sparsity']:.4f}", "")
    if "before" in report:
        before, after = report["before"], report["after"]
        table.add_row(
            "perplexity of the text held out, before and now", f"{before:.2f}", f"{after:.2f}", f"{after / before:.3f}"
        )
    table.add_row("seconds", "", f"{report['seconds']:.1f}", "")
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; `arguments` without the program's name, by default those of the process."""
    options = Options()
    try:
        app(args=arguments, prog_name="efx", obj=options)
    except Exception as error:
        if options.debug:
            traceback.print_exception(error)
        print(f"efx: {failures.sentence(error)}", file=sys.stderr)
        sys.exit(failures.exit_code(error))
