"""Cells run once, in processes of their own; a failure costs none of the others."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from efx_plugin.errors import EfxError
from efx_plugin.evaluate import grid
from efx_plugin.evaluate.cell import Cell
from efx_plugin.evaluate.data import Corpus, write_data
from efx_plugin.evaluate.grid import run_grid

# Stands in for `run_cell`: it notes each call, and does what the seed says.
RUNNER = """
import json, os, pathlib, signal, sys, time
from efx_plugin.evaluate.cell import Cell, CellResult, CorpusLosses
from efx_plugin.evaluate.data import write_atomically
from efx_plugin.evaluate.run_cell import _end_with_parent

_end_with_parent()
request, result, *kept = map(pathlib.Path, sys.argv[1:])
for folder in kept:
    folder.mkdir()
cell = Cell.from_json(json.loads(request.read_text()))
with open(result.parent / "calls", "a") as calls:
    print(cell.seed, os.getpid(), file=calls, flush=True)
if cell.seed == 1 and "FAIL" in os.environ:
    print("efx: the culprit does not fit: take another", file=sys.stderr)
    print("a warning at exit", file=sys.stderr)
    sys.exit(1)
if cell.seed == 1 and "KILL" in os.environ:
    os.kill(os.getpid(), signal.SIGKILL)
if cell.seed == 1 and "HANG" in os.environ:
    time.sleep(600)
found = CellResult({"law": CorpusLosses([3.0 + cell.seed], [2])}, {}, 0, 16, 16, [], [], 1, 1, 1, 0, "float32", "a CPU")
write_atomically(result, json.dumps({"cell": cell.as_json(), "result": found.as_json()}).encode())
"""


@pytest.fixture
def cells(tmp_path, monkeypatch):
    (tmp_path / "efx_stand_in_runner.py").write_text(RUNNER)
    monkeypatch.setattr(grid, "_RUNNER", "efx_stand_in_runner")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(grid.__file__).parents[2])]))
    (tmp_path / "model").mkdir()
    data = write_data(tmp_path / "data", "law", ["a"], ["b"], [Corpus("law", ["c"])])
    cell = Cell(tmp_path / "model", None, "base", 0.0, 0, data)
    return [replace(cell, seed=seed) for seed in range(3)]


def calls(cache: Path) -> list[int]:
    return [int(line.split()[0]) for line in (cache / "calls").read_text().splitlines()]


def test_every_cell_runs_once_in_a_process_of_its_own(cells, tmp_path):
    cache = tmp_path / "cache"
    report = run_grid([*cells, cells[0]], cache, progress=False)
    assert [row["seed"] for row in report.rows] == [0, 1, 2] and not report.failures
    assert calls(cache) == [0, 1, 2]
    processes = {line.split()[1] for line in (cache / "calls").read_text().splitlines()}
    assert len(processes) == 3 and str(os.getpid()) not in processes
    again = run_grid(cells, cache, progress=False)
    assert calls(cache) == [0, 1, 2] and again.rows == report.rows


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("FAIL", "the culprit does not fit: take another"), ("KILL", "its process was ended by SIGKILL, perhaps")],
)
def test_a_cell_that_fails_costs_none_of_the_others(cells, tmp_path, monkeypatch, fault, reason):
    monkeypatch.setenv(fault, "1")
    report = run_grid(cells, tmp_path / "cache", progress=False)
    assert [row["seed"] for row in report.rows] == [0, 2]
    (failure,) = report.failures
    assert failure.label == "base law, seed 1" and failure.reason.startswith(reason) and Path(failure.log).is_file()
    monkeypatch.delenv(fault)
    assert len(run_grid(cells, tmp_path / "cache", progress=False).rows) == 3
    assert calls(tmp_path / "cache") == [0, 1, 2, 1]


def test_a_killed_comparison_goes_on_and_leaves_nothing_running(cells, tmp_path):
    cache = tmp_path / "cache"
    (tmp_path / "cells.json").write_text(json.dumps([cell.as_json() for cell in cells]))
    code = (
        "import json, pathlib, sys; from efx_plugin.evaluate import grid; from efx_plugin.evaluate.cell import Cell\n"
        "grid._RUNNER, cache = 'efx_stand_in_runner', pathlib.Path(sys.argv[2])\n"
        "cells = [Cell.from_json(cell) for cell in json.loads(pathlib.Path(sys.argv[1]).read_text())]\n"
        "grid.run_grid(cells, cache, progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cells.json"), str(cache)]
    process = subprocess.Popen(command, env=os.environ | {"HANG": "1"})
    deadline = time.monotonic() + 60
    while not (cache / "calls").exists() or len(calls(cache)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = int((cache / "calls").read_text().split()[-1])
    process.send_signal(signal.SIGKILL)
    process.wait()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(run_grid(cells, cache, progress=False).rows) == 3
    assert calls(cache) == [0, 1, 1, 2]


def test_a_cell_whose_model_is_to_be_kept_runs_again_without_it(cells, tmp_path):
    cache = tmp_path / "cache"
    run_grid(cells, cache, progress=False)
    for _ in range(2):
        assert len(run_grid(cells, cache, progress=False, keep=cells[:1]).rows) == 3
        assert grid.model_folder(cache, cells[0]).is_dir()
    assert calls(cache) == [0, 1, 2, 0]


def test_an_interrupt_from_the_keyboard_ends_in_a_sentence(cells, tmp_path, monkeypatch):
    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if self.poll() is None and not getattr(self, "told", False):
                self.told = True
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setenv("HANG", "1")
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(EfxError, match="interrupted; 3 of 3 cells are left: the same command goes on from there"):
        run_grid(cells, tmp_path / "cache", progress=False)


def test_the_time_left_is_that_of_cells_of_the_same_pipeline(cells):
    clock = grid._Clock([])
    assert clock.left() is None
    clock.measured = [(cells[0], 10.0), (replace(cells[0], pipeline="lora"), 100.0)]
    clock.remaining, clock.started = [cells[1], replace(cells[0], pipeline="other")], time.monotonic()
    assert clock.left() == pytest.approx(10 + 55, abs=1)


def test_progress_tells_of_every_cell(cells, tmp_path, capsys):
    run_grid(cells[:2], tmp_path / "cache")
    run_grid(cells[:2], tmp_path / "cache")
    said = capsys.readouterr().err
    assert "base law, seed 1: perplexity law 7.39" in said and "2 of 2 cells are in" in said
