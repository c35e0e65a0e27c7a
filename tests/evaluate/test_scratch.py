"""Temporary files go with their process, whichever way it ends, and nobody else's are touched."""

import os
import signal
import subprocess
import sys
import time

import pytest

from efx_plugin.evaluate.scratch import remove_abandoned, scratch_folder

HOLD = """
import pathlib, sys, time
from efx_plugin.evaluate.scratch import scratch_folder
with scratch_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "checkpoint").write_text("large")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A folder of a process that is at work, as old as a folder must be to be looked at, and that process."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    folder = tmp_path / process.stdout.readline().strip().rpartition("/")[2]
    os.utime(folder, (time.time() - 3600,) * 2)
    yield folder, process
    process.kill()
    process.wait()


def test_the_folder_is_gone_at_the_end(tmp_path):
    with scratch_folder(tmp_path) as folder:
        assert folder.is_dir() and not list(folder.iterdir())
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(held, tmp_path):
    folder, process = held
    (tmp_path / "result.json").write_text("{}")
    remove_abandoned(tmp_path)
    assert (folder / "checkpoint").is_file()
    process.send_signal(signal.SIGKILL)
    process.wait()
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_that_was_made_just_now_is_left_alone(tmp_path):
    (tmp_path / ".cell-new").mkdir()
    remove_abandoned(tmp_path)
    assert (tmp_path / ".cell-new").is_dir()
