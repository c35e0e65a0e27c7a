"""Tokens per second in vLLM of what a comparison has made: dense and sparse engines in turn, in the user's environment.

Nothing here imports torch: vLLM wants another environment than the pipelines, and runs in processes of its python.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from efx_plugin.errors import EfxError, UsageError

_SERVER = "efx_plugin.serving.speed"
_TOKENS = 32  # that `efx_plugin.serving.speed` generates for each request
REFERENCE = "lora"
BATCHES = (1, 8)
_ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Generated tokens per second at a number of requests, and how many times the dense model's, both medians."""

    tokens_per_second: float
    over_dense: float


def refuse_python(python: str) -> None:
    """Refuse before the work a python that cannot serve.

    Raises:
        UsageError: it cannot be run, or cannot import vLLM and efx-plugin.
    """
    try:
        code = "import importlib.util as u, sys; sys.exit(not (u.find_spec('vllm') and u.find_spec('efx_plugin')))"
        known = subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError as error:
        raise UsageError(f"--serve {python} cannot be run ({error.strerror}): pass the python that has vLLM") from error
    if not known:
        raise UsageError(
            f"the python --serve {python} has not both vLLM and efx-plugin: pip install 'efx-plugin[serve]' there"
        )


def measure(python: str, dense: Path, others: Mapping[str, Path], logs: Path) -> dict[str, dict[int, Speed]]:
    """Time models beside the dense one: of each both engines are up, and take turns at every number of requests.

    Args:
        python: of the environment with vLLM and efx-plugin.
        dense: directory of the dense model.
        others: directories of the others by name.
        logs: folder for what the engines print.

    Returns:
        By name, `REFERENCE` too, and number of requests.

    Raises:
        EfxError: an engine did not start or stopped.
    """
    found: dict[str, dict[int, Speed]] = {}
    with _engine(python, dense, logs / f"{dense.name}.serve.log") as reference:
        for name, directory in others.items():
            with _engine(python, directory, logs / f"{directory.name}.serve.log") as engine:
                for batch in BATCHES:
                    reference.ask(batch), engine.ask(batch)  # the first time does not count
                    pairs = []
                    for number in range(_ROUNDS):
                        one, other = (reference, engine) if number % 2 else (engine, reference)
                        seconds = {id(who): who.ask(batch) for who in (one, other)}
                        pairs.append((seconds[id(reference)], seconds[id(engine)]))
                    tokens = batch * _TOKENS
                    ratio = median(first / second for first, second in pairs)
                    found.setdefault(REFERENCE, {})[batch] = Speed(tokens / median(first for first, _ in pairs), 1.0)
                    found.setdefault(name, {})[batch] = Speed(tokens / median(other for _, other in pairs), ratio)
    return found


@dataclass(frozen=True)
class _Engine:
    process: "subprocess.Popen[str]"
    directory: Path
    log: Path

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise EfxError(f"vLLM did not serve {self.directory}: its log is {self.log}")
        return line

    def ask(self, batch: int) -> float:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{batch}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EfxError(f"vLLM stopped serving {self.directory}: its log is {self.log}") from None
        return float(self.read())


@contextmanager
def _engine(python: str, directory: Path, log: Path) -> Iterator[_Engine]:
    command = [python, "-P", "-m", _SERVER, str(directory)]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (
        log.open("w") as stream,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment
        ) as process,
    ):
        try:
            engine = _Engine(process, directory, log)
            engine.read()
            yield engine
        finally:
            process.kill()
