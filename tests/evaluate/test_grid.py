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
import torch

from efx_plugin.errors import EfxError
from efx_plugin.evaluate import grid
from efx_plugin.evaluate.cell import Cell
from efx_plugin.evaluate.cell_server import CellServer
from efx_plugin.evaluate.data import Corpus, write_data
from efx_plugin.evaluate.grid import run_grid

# Stands in for `run_cell`: it notes each call, and does what the seed says.
RUNNER = """
import json, os, signal, sys, time
from efx_plugin.evaluate.cell import Cell, CellResult, CorpusLosses
from efx_plugin.evaluate.data import write_atomically

IMPORTED_BY = os.getpid()

def prepare(request):
    if "UNPREPARED" in os.environ:
        raise ImportError("there is no such module")

def main(request, result, kept):
    if kept is not None:
        kept.mkdir()
    cell = Cell.from_json(json.loads(request.read_text()))
    with open(result.parent / "calls", "a") as calls:
        print(cell.seed, IMPORTED_BY, os.environ.get("OMP_NUM_THREADS"), os.getpid(), file=calls, flush=True)
    if cell.seed == 1 and "FAIL" in os.environ:
        print("efx: the culprit does not fit: take another", file=sys.stderr)
        print("a warning at exit", file=sys.stderr)
        return 1
    if cell.seed == 1 and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.seed == 1 and "KILL_SERVER" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if cell.seed == 1 and "HANG" in os.environ:
        time.sleep(600)
    while cell.seed == 0 and "TOGETHER" in os.environ and not list(result.parent.glob("*.npz")):
        time.sleep(0.02)
    result.with_suffix(".npz").touch()
    losses = {"law": CorpusLosses([3.0 + cell.seed], [2])}
    found = CellResult(losses, {}, 0, 16, 16, [], [], 1, 1, 1, 0, "float32", "a CPU")
    write_atomically(result, json.dumps({"cell": cell.as_json(), "result": found.as_json()}).encode())
    return 0
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


def await_end(process: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_cell_runs_once_in_a_process_of_its_own(cells, tmp_path):
    cache = tmp_path / "cache"
    report = run_grid([*cells, cells[0]], cache, progress=False)
    assert [row["seed"] for row in report.rows] == [0, 1, 2] and not report.failures
    assert calls(cache) == [0, 1, 2]
    lines = [line.split() for line in (cache / "calls").read_text().splitlines()]
    assert len({imported_by for _, imported_by, *_ in lines}) == 1  # once for all of them
    processes = {process for *_, process in lines}
    assert len(processes) == 3 and not processes & {str(os.getpid()), lines[0][1]}
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
    await_end(child)
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
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setenv("HANG", "1")
    monkeypatch.setattr(CellServer, "next_ended", interrupted)
    with pytest.raises(EfxError, match="interrupted; 3 of 3 cells are left: the same command goes on from there"):
        run_grid(cells, tmp_path / "cache", progress=False)


def test_cells_run_beside_each_other_and_share_the_processors(cells, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setenv("TOGETHER", "1")  # the first ends after the second
    report = run_grid(cells, tmp_path / "cache", progress=False, jobs=2)
    assert [row["seed"] for row in report.rows] == [0, 1, 2] and not report.failures
    assert {line.split()[2] for line in (tmp_path / "cache" / "calls").read_text().splitlines()} == {"3"}


def test_an_import_that_fails_is_left_to_the_cell(cells, tmp_path, monkeypatch):
    monkeypatch.setenv("UNPREPARED", "1")
    assert len(run_grid(cells, tmp_path / "cache", progress=False).rows) == 3


def test_the_end_of_the_server_ends_in_a_sentence_and_ends_its_cells(cells, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("KILL_SERVER", "1")
    with pytest.raises(EfxError, match=r"ended with exit code -9; its log is .*server.log: the same command goes on"):
        run_grid(cells, cache, progress=False)
    await_end(int((cache / "calls").read_text().split()[-1]))
    monkeypatch.delenv("KILL_SERVER")
    assert len(run_grid(cells, cache, progress=False).rows) == 3
    assert calls(cache) == [0, 1, 1, 2]


def test_the_time_left_is_that_of_cells_of_the_same_pipeline(cells):
    clock = grid._Clock(2, [cells[1], replace(cells[0], pipeline="other")])
    assert clock.left() is None
    clock.measured = [(cells[0], 10.0), (replace(cells[0], pipeline="lora"), 100.0)]
    assert clock.left() == pytest.approx((10 + 55) / 2)
    clock.start()
    assert clock.left() == pytest.approx((10 + 55) / 2, abs=0.5)
    clock.running = [(cells[1], time.monotonic() - 4)]
    assert clock.left() == pytest.approx((6 + 55) / 2, abs=0.5)
    clock.end(cells[1], counts=False)
    assert clock.left() == pytest.approx(55 / 2) and len(clock.measured) == 2


def test_progress_tells_of_every_cell(cells, tmp_path, capsys):
    run_grid(cells[:2], tmp_path / "cache")
    run_grid(cells[:2], tmp_path / "cache")
    said = capsys.readouterr().err
    assert "base law, seed 1: perplexity law 7.39" in said and "2 of 2 cells are in" in said
