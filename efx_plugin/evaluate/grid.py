"""The cells of a comparison, each in a process of its own and each kept under its key.

What is in the cache is not run again, so an interrupted comparison goes on where it was. A cell that fails is named at
the end and costs none of the others.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from efx_plugin.errors import EfxError
from efx_plugin.evaluate.cell import Cell, CellResult
from efx_plugin.evaluate.data import write_atomically
from efx_plugin.evaluate.domains import DomainCell, DomainFinding, DomainResult
from efx_plugin.evaluate.report import Failure, Finding, Report, build
from efx_plugin.evaluate.scratch import remove_abandoned

_RUNNER = "efx_plugin.evaluate.run_cell"
# Bars and logs of a cell go to its log file.
_ENVIRONMENT = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run_grid(
    cells: Sequence[Cell],
    cache: Path,
    progress: bool = True,
    keep: Collection[Cell] = (),
    domains: Sequence[DomainCell] = (),
) -> Report:
    """Run every cell that the cache does not hold, one after the other, and report on all of them.

    Args:
        cells: in the order to run them.
        cache: folder of results, `KEY.json` each; it is made where it is missing.
        progress: show a bar with the time that is left, and a line for each cell, on stderr.
        keep: of the cells, those whose model is kept in `model_folder`; they run again where it is missing.
        domains: comparisons of the masks of domains, which run last.

    Raises:
        EfxError: interrupted from the keyboard, or the cache cannot be written to.
    """
    cache.mkdir(parents=True, exist_ok=True)
    remove_abandoned(cache)
    everything: list[Cell | DomainCell] = [*cells, *domains]
    wanted = {cell.key(): cell for cell in everything}
    kept = {key: model_folder(cache, cell) for key, cell in wanted.items() if cell in keep and isinstance(cell, Cell)}
    again = {key for key, folder in kept.items() if not folder.is_dir()}
    found = {
        key: result
        for key, cell in wanted.items()
        if key not in again and (result := _read(cache, key, cell)) is not None
    }
    todo = {key: cell for key, cell in wanted.items() if key not in found}
    clock = _Clock([(wanted[key], one.seconds + getattr(one, "seconds_evaluation", 0.0)) for key, one in found.items()])
    failed: list[Failure] = []
    with _bar(clock, progress) as bar:
        if found:
            bar.console.print(f"{len(found)} of {len(wanted)} cells are in {cache} already", highlight=False)
        task = bar.add_task("", total=len(todo))
        for number, (key, cell) in enumerate(todo.items()):
            clock.remaining = list(todo.values())[number:]
            bar.update(task, description=cell.label)
            started = clock.started = time.monotonic()
            outcome = _run(cell, key, cache, kept.get(key), f"{len(todo) - number} of {len(wanted)} cells are left")
            seconds = time.monotonic() - started
            if isinstance(outcome, Failure):
                failed.append(outcome)
                bar.console.print(f"{cell.label}: failed, {outcome.reason}", highlight=False, markup=False)
            else:
                found[key] = outcome
                clock.measured.append((cell, seconds))
                bar.console.print(f"{_say(cell, outcome)} ({seconds:.0f} s)", highlight=False, markup=False)
            bar.advance(task)
    findings, masks = list[Finding](), list[DomainFinding]()
    for key, result in found.items():
        cell = wanted[key]
        if isinstance(cell, Cell) and isinstance(result, CellResult):
            findings.append(Finding(cell, result, cache / f"{key}.npz"))
        elif isinstance(cell, DomainCell) and isinstance(result, DomainResult):
            masks.append(DomainFinding(cell, result))
    return build(findings, failed, masks)


def unfinished(cells: Sequence[Cell | DomainCell], cache: Path) -> list[Cell | DomainCell]:
    """The cells that `run_grid` would run."""
    return [cell for cell in cells if not _result(cache, cell.key()).is_file()]


def model_folder(cache: Path, cell: Cell) -> Path:
    """Where the model of a cell is kept, as it would be served."""
    return cache / f"{cell.key()}.model"


def _result(cache: Path, key: str) -> Path:
    return cache / f"{key}.json"


def _read(cache: Path, key: str, cell: Cell | DomainCell) -> CellResult | DomainResult | None:
    path = _result(cache, key)
    if not path.is_file():
        return None
    value = json.loads(path.read_text())["result"]
    return CellResult.from_json(value) if isinstance(cell, Cell) else DomainResult.from_json(value)


def _run(
    cell: Cell | DomainCell, key: str, cache: Path, kept: Path | None, left: str
) -> CellResult | DomainResult | Failure:
    request, log = cache / f"{key}.request.json", cache / f"{key}.log"
    write_atomically(request, json.dumps(cell.as_json()).encode())
    command = [sys.executable, "-m", _RUNNER, str(request), str(_result(cache, key))]
    command += [] if kept is None else [str(kept)]
    with log.open("w") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | _ENVIRONMENT)
        try:
            code = child.wait()
        except KeyboardInterrupt as error:
            child.kill()
            child.wait()
            raise EfxError(f"interrupted; {left}: the same command goes on from there") from error
    request.unlink()
    if code == 0 and (result := _read(cache, key, cell)) is not None:
        return result
    return Failure(cell.label, _reason(code, log), str(log))


def _reason(code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    lines = log.read_text(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("efx: ")), "efx: it ended without a word")
    return said.removeprefix("efx: ")


def _say(cell: Cell | DomainCell, result: CellResult | DomainResult) -> str:
    if isinstance(result, DomainResult):
        return f"{cell.label}: {len(result.overlaps)} pairs of masks, {len(result.cross)} repaired experts"
    perplexities = ", ".join(f"{name} {losses.perplexity:.2f}" for name, losses in result.corpora.items())
    return f"{cell.label}: perplexity {perplexities}"


class _Clock:
    """How long the remaining cells are going to take, by those of the same kind, else by all that were measured."""

    def __init__(self, measured: list[tuple[Cell | DomainCell, float]]) -> None:
        self.measured = measured
        self.remaining: list[Cell | DomainCell] = []
        self.started = 0.0

    def left(self) -> float | None:
        """Seconds; None where nothing is known yet."""
        if not self.measured:
            return None
        expected = [self._expected(cell) for cell in self.remaining]
        running = max(0.0, expected[0] - (time.monotonic() - self.started)) if expected else 0.0
        return running + sum(expected[1:])

    def _expected(self, cell: Cell | DomainCell) -> float:
        alike = [seconds for other, seconds in self.measured if other.kind == cell.kind]
        seconds = alike or [seconds for _, seconds in self.measured]
        return sum(seconds) / len(seconds)


class _TimeLeft(ProgressColumn):
    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        left = self._clock.left()
        if left is None:
            return Text("")
        minutes, seconds = divmod(round(left), 60)
        return Text(f"about {minutes // 60}:{minutes % 60:02}:{seconds:02} left")


def _bar(clock: _Clock, progress: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _TimeLeft(clock),
        console=Console(stderr=True, quiet=not progress),
        transient=True,
    )
