"""What the benchmarks have in common: they run what they compare in turn, and report ratios within each round.

Other work on the machine slows everything in a round alike, so a ratio survives what a time does not.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any, TypeVar

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "bench"

Name = TypeVar("Name")
Timed = dict[Name, Callable[[], float]]  # what -> a function that does it and returns its seconds


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """The seconds that the function takes, its result held until they are counted."""

    def seconds() -> float:
        begin = time.perf_counter()
        result = function()
        end = time.perf_counter()
        del result
        return end - begin

    return seconds


def interleave(functions: Timed[Name], rounds: int) -> dict[Name, list[float]]:
    """Seconds of every function in every round. Every other round goes backwards, so that each goes first as often."""
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    for index in range(rounds):
        for name in list(functions) if index % 2 == 0 else reversed(list(functions)):
            seconds[name].append(functions[name]())
    return seconds


def ratios(ones: list[float], others: list[float]) -> list[float]:
    """How many times longer the second takes, in each round."""
    return [other / one for one, other in zip(ones, others, strict=True)]


def ratio(ones: list[float], others: list[float]) -> float:
    """How many times longer the second takes: the median over the rounds."""
    return median(ratios(ones, others))


def spread(figures: list[float]) -> float:
    """The interquartile range."""
    first, _, third = quantiles(figures, n=4, method="inclusive") if len(figures) > 1 else figures * 3
    return third - first


@contextmanager
def process(
    name: str, command: Sequence[str], environment: Mapping[str, str], stderr: IO | None = None
) -> Iterator[tuple[Callable[[str], str], int]]:
    """A process that works when it is told to, and waits asleep otherwise.

    It writes the line "ready" when it has started, and then a line for each line that it reads; it ends with its input.

    Args:
        name: what it is, for messages.
        stderr: where its stderr goes; by default to ours.

    Yields:
        A function that sends a line and returns the answer, and the process's id.

    Raises:
        RuntimeError: from that function, or at once, if the process has ended.
    """
    where = "above" if stderr is None else f"in {stderr.name}"
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as running:

        def answer() -> str:
            line = running.stdout.readline()
            if not line:
                raise RuntimeError(f"{name} stopped: its message is {where}")
            return line.strip()

        def ask(line: str) -> str:
            with suppress(BrokenPipeError):  # then there is no answer either
                running.stdin.write(f"{line}\n")
                running.stdin.flush()
            return answer()

        try:
            if (first := answer()) != "ready":
                raise RuntimeError(f"{name} said {first!r} instead of ready")
            yield ask, running.pid
        finally:
            with suppress(BrokenPipeError):
                running.stdin.close()


def write_json(path: Path, report: Any) -> None:
    """Write a report under a temporary name and rename it: what is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)
