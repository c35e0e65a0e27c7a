"""`efx`, one sub-command per capability. Exit codes: 0 done, 1 failed (one sentence on stderr), 2 wrong usage.

Nothing here imports torch: each command imports what it runs, so that `efx --help` answers at once.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from efx_plugin.errors import EfxError

app = typer.Typer(
    name="efx",
    help="Sparse domain experts: prune a model with its LoRA adapter, export it, serve it sparsely in vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
StructureOption = Annotated[
    str, typer.Option(help="auto, sparse-bitmask or sparse-24-bitmask (needs 2:4 structure).", show_default=True)
]


@app.callback()
def _root() -> None:
    """Sparse domain experts: prune a model with its LoRA adapter, export it, serve it sparsely in vLLM."""


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="Directory of the model to prune.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    recipe: Annotated[Path, typer.Option(help="llm-compressor recipe (YAML).", exists=True, dir_okay=False)],
    dataset: Annotated[
        Path, typer.Option(help="Calibration text of the domain: .txt, .jsonl (field `text`) or .parquet.")
    ],
    adapter: Annotated[Path | None, typer.Option(help="Directory of a LoRA adapter to merge in.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens per calibration sequence.", min=2)] = 512,
    structure: StructureOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prune MODEL by a recipe, with an adapter merged in, and write a sparse checkpoint.

    Example: efx prune ./SmolLM2 ./expert --adapter ./legal-lora --recipe recipes/expert_50.yaml --dataset legal.jsonl
    """
    # llm-compressor logs to the stdout it finds when it is imported; ours is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        from efx_plugin.pruning import prune_to_checkpoint

        report = prune_to_checkpoint(
            model,
            output,
            recipe=recipe,
            dataset=dataset,
            adapter=adapter,
            samples=samples,
            length=length,
            structure=structure,
        )
    _show(report, as_json, title=str(output))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Directory of a pruned model, stored dense.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    structure: StructureOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Convert a pruned model stored dense into a sparse checkpoint, shard by shard.

    Example: efx export ./pruned ./pruned-sparse
    """
    from efx_plugin.checkpoint import export_checkpoint, linear_bytes

    export_checkpoint(source, output, structure=structure, progress=not as_json)
    _show(linear_bytes(output), as_json, title=str(output))


def _show(report: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(report))
        return
    table = Table(title=title, show_header=False)
    for name, value in report.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except EfxError as error:
        print(f"efx: {error}", file=sys.stderr)
        sys.exit(1)
