"""`python -m efx_plugin.evaluate.cell_server RUNNER`: forks a process for each cell from one that has the imports done.

Importing torch and llm-compressor takes longer than many a cell of a small model. The server imports what a cell asks
for before it forks, and computes nothing itself: neither threads nor an accelerator would survive the fork.

It reads a job a line on stdin, `{"request": FILE, "result": FILE, "kept": FOLDER or null, "log": FILE}`, and writes a
line on stdout for each process that has ended, `{"request": FILE, "code": its exit code}`, negative for a signal. It
ends, and its processes with it, when stdin does. RUNNER is a module with the functions `prepare` and `main` of
`run_cell`.
"""

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from efx_plugin.errors import EfxError

_POLL = 0.05  # seconds between two looks at the processes
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)
# Bars and logs of a cell go to its log file. Asking the driver alone whether there is a GPU leaves CUDA to the forks.
_ENVIRONMENT = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class CellServer:
    """The server, from the side of who has cells to run; it ends with the `with` block."""

    def __init__(self, runner: str, log: Path, environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            runner: name of a module, see above.
            log: file for what the server itself writes.
            environment: variables of the server and its processes, besides those of this process.
        """
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, runner],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, **_ENVIRONMENT, **environment},
            )

    def __enter__(self) -> "CellServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def start(self, request: Path, result: Path, kept: Path | None, log: Path) -> None:
        """Start a process.

        Args:
            request, result, kept: arguments of the runner's `main`.
            log: file for what it writes.

        Raises:
            EfxError: the server is gone.
        """
        job = {"request": str(request), "result": str(result), "kept": kept and str(kept), "log": str(log)}
        assert self._process.stdin is not None
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._gone() from error

    def next_ended(self) -> tuple[Path, int]:
        """Wait until a process ends: its request and its exit code, negative for a signal.

        Raises:
            EfxError: the server is gone.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        ended = json.loads(line)
        return Path(ended["request"]), ended["code"]

    def _gone(self) -> EfxError:
        return EfxError(
            f"the process that starts the cells has ended with exit code {self._process.wait()}; its log is "
            f"{self._log}: the same command goes on from there"
        )


def main() -> None:
    """Entry point of the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    end_with_parent()
    runner = import_module(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports say is no answer
    running: dict[int, str] = {}
    pending, more = b"", True
    while more:
        if select.select([0], [], [], _POLL if running else None)[0]:
            read = os.read(0, 1 << 16)
            more = bool(read)
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                job = json.loads(line)
                running[_fork(runner, job)] = job["request"]
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            answer = {"request": running.pop(ended[0]), "code": os.waitstatus_to_exitcode(ended[1])}
            os.write(answers, f"{json.dumps(answer)}\n".encode())
    for process in running:
        os.kill(process, signal.SIGKILL)


def end_with_parent() -> None:
    """Have the system end this process when its parent is gone: a killed comparison leaves nothing running. Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _fork(runner: ModuleType, job: dict[str, Any]) -> int:
    with contextlib.suppress(Exception):  # the cell itself meets it again, and says so
        runner.prepare(Path(job["request"]))
    gc.collect()
    gc.freeze()  # pages that the collector leaves alone stay shared
    process = os.fork()
    return process or _run(runner, job)


def _run(runner: ModuleType, job: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end_with_parent()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, theirs in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(ours, theirs)
        code = runner.main(Path(job["request"]), Path(job["result"]), job["kept"] and Path(job["kept"]))
    except BaseException as error:
        traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what is to be done at the end of the server is not done here


if __name__ == "__main__":
    main()
