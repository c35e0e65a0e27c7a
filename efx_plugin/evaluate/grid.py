"""The cells of a comparison, each in a process of its own (see `cell_server`) and each kept under its key.

What is in the cache is not run again, so an interrupted comparison goes on where it was. A cell that fails is named at
the end and costs none of the others.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from efx_plugin.errors import EfxError
from efx_plugin.evaluate.cell import Cell, CellResult
from efx_plugin.evaluate.cell_server import CellServer
from efx_plugin.evaluate.data import write_atomically
from efx_plugin.evaluate.domains import DomainCell, DomainFinding, DomainResult
from efx_plugin.evaluate.report import Failure, Finding, Report, build
from efx_plugin.evaluate.scratch import remove_abandoned

_RUNNER = "efx_plugin.evaluate.run_cell"


def run_grid(
    cells: Sequence[Cell],
    cache: Path,
    progress: bool = True,
    keep: Collection[Cell] = (),
    domains: Sequence[DomainCell] = (),
    jobs: int = 1,
) -> Report:
    """Run every cell that the cache does not hold, and report on all of them.

    Args:
        cells: in the order to run them.
        cache: folder of results, `KEY.json` each; it is made where it is missing.
        progress: show a bar with the time that is left, and a line for each cell, on stderr.
        keep: of the cells, those whose model is kept in `model_folder`; they run again where it is missing.
        domains: comparisons of the masks of domains, which take longest and run first.
        jobs: cells at a time, which share the processors; above one, their seconds are of cells beside each other.

    Raises:
        EfxError: interrupted from the keyboard, or the cache cannot be written to.
    """
    cache.mkdir(parents=True, exist_ok=True)
    remove_abandoned(cache)
    everything: list[Cell | DomainCell] = [*domains, *cells]
    wanted = {cell.key(): cell for cell in everything}
    kept = {key: model_folder(cache, cell) for key, cell in wanted.items() if cell in keep and isinstance(cell, Cell)}
    again = {key for key, folder in kept.items() if not folder.is_dir()}
    found = {
        key: result
        for key, cell in wanted.items()
        if key not in again and (result := _read(cache, key, cell)) is not None
    }
    todo = {key: cell for key, cell in wanted.items() if key not in found}
    clock = _Clock(jobs, list(todo.values()))
    clock.measured += [
        (wanted[key], one.seconds + getattr(one, "seconds_evaluation", 0.0)) for key, one in found.items()
    ]
    failed: list[Failure] = []
    with _bar(clock, progress) as bar:
        if found:
            bar.console.print(f"{len(found)} of {len(wanted)} cells are in {cache} already", highlight=False)
        task = bar.add_task("", total=len(todo))
        outcomes = _run_all(todo, cache, kept, jobs, clock, lambda running: bar.update(task, description=running))
        try:
            for key, outcome in outcomes:
                cell = wanted[key]
                if isinstance(outcome, Failure):
                    failed.append(outcome)
                    bar.console.print(f"{cell.label}: failed, {outcome.reason}", highlight=False, markup=False)
                else:
                    found[key] = outcome
                    seconds = clock.measured[-1][1]
                    bar.console.print(f"{_say(cell, outcome)} ({seconds:.0f} s)", highlight=False, markup=False)
                bar.advance(task)
        except KeyboardInterrupt as error:
            left = len(wanted) - len(found) - len(failed)
            raise EfxError(
                f"interrupted; {left} of {len(wanted)} cells are left: the same command goes on from there"
            ) from error
        finally:
            outcomes.close()
    findings, masks = list[Finding](), list[DomainFinding]()
    for key, cell in wanted.items():  # in the order that was asked for, whatever ended first
        result = found.get(key)
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


def _request(cache: Path, key: str) -> Path:
    return cache / f"{key}.request.json"


def _log(cache: Path, key: str) -> Path:
    return cache / f"{key}.log"


def _read(cache: Path, key: str, cell: Cell | DomainCell) -> CellResult | DomainResult | None:
    path = _result(cache, key)
    if not path.is_file():
        return None
    value = json.loads(path.read_text())["result"]
    return CellResult.from_json(value) if isinstance(cell, Cell) else DomainResult.from_json(value)


def _run_all(
    todo: Mapping[str, Cell | DomainCell],
    cache: Path,
    kept: Mapping[str, Path],
    jobs: int,
    clock: "_Clock",
    tell: Callable[[str], None],
) -> Generator[tuple[str, CellResult | DomainResult | Failure], None, None]:
    """Run cells, and hand out what became of each as it ends; `tell` is told which are running."""
    if not todo:
        return
    keys = {cell: key for key, cell in todo.items()}
    with CellServer(_RUNNER, cache / "server.log", _threads(jobs)) as server:
        while clock.waiting or clock.running:
            while clock.waiting and len(clock.running) < jobs:
                cell = clock.start()
                key = keys[cell]
                write_atomically(_request(cache, key), json.dumps(cell.as_json()).encode())
                server.start(_request(cache, key), _result(cache, key), kept.get(key), _log(cache, key))
                tell("; ".join(one.label for one, _ in clock.running))
            request, code = server.next_ended()
            request.unlink()
            key = request.name.partition(".")[0]
            result = _read(cache, key, todo[key]) if code == 0 else None
            clock.end(todo[key], counts=result is not None)
            yield key, result or Failure(todo[key].label, _reason(code, _log(cache, key)), str(_log(cache, key)))


def _threads(jobs: int) -> dict[str, str]:
    """Environment in which that many processes have as many threads together as one would have."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    import torch

    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}


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
    """How long the remaining cells are going to take, by those of the same kind, else by all that were measured.

    Attributes:
        measured: cells and their seconds.
        waiting: cells that are to run, in their order.
        running: cells, and when they started.
    """

    def __init__(self, jobs: int, waiting: list[Cell | DomainCell]) -> None:
        self._jobs = jobs
        self.waiting = waiting
        self.measured: list[tuple[Cell | DomainCell, float]] = []
        self.running: list[tuple[Cell | DomainCell, float]] = []

    def start(self) -> Cell | DomainCell:
        """The first that waits, which is running now."""
        cell = self.waiting.pop(0)
        self.running.append((cell, time.monotonic()))
        return cell

    def end(self, cell: Cell | DomainCell, *, counts: bool) -> None:
        """A cell has ended; its time tells of others where it `counts`."""
        ended = next(one for one in self.running if one[0] == cell)
        self.running.remove(ended)
        if counts:
            self.measured.append((cell, time.monotonic() - ended[1]))

    def left(self) -> float | None:
        """Seconds; None where nothing is known yet."""
        if not self.measured:
            return None
        now = time.monotonic()
        running = [max(0.0, self._expected(cell) - (now - started)) for cell, started in self.running]
        return (sum(running) + sum(map(self._expected, self.waiting))) / self._jobs

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
