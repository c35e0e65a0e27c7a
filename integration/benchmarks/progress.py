"""Progress of a benchmark: bars on a terminal, and a line every half minute where the output is none."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS = 30.0  # between two lines


@contextmanager
def progress_on(console: Console, seconds: float = SECONDS) -> Iterator[Progress]:
    """rich's Progress on a console. Where that is no terminal, which shows no bars, unfinished tasks are printed."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    ended = threading.Event()

    def report(progress: Progress) -> None:
        while not ended.wait(seconds):
            for task in progress.tasks:
                if task.started and not task.finished:
                    left = "" if task.time_remaining is None else f", about {task.time_remaining / 60:.1f} minutes left"
                    done = f"{task.completed:.0f} of {task.total:.0f}" if task.total else "under way"
                    console.print(f"{task.description.strip()}: {done} after {task.elapsed / 60:.1f} minutes{left}")

    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        if console.is_terminal:
            yield progress
            return
        thread = threading.Thread(target=report, args=(progress,), daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            ended.set()
            thread.join()
