"""Assets appear complete or not at all, and once: interruptions, full disks, concurrent builders, no network."""

import errno
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from efx_plugin.errors import EfxError
from integration.packages import make_once, wheel

ROOT = Path(__file__).resolve().parents[1]


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def half(partial):
    partial.mkdir()
    (partial / "first").write_text("half")


def test_a_directory_is_built_once(tmp_path):
    calls = []

    def build(partial):
        calls.append(partial)
        half(partial)

    assert make_once(tmp_path / "new" / "made", build) == tmp_path / "new" / "made"
    assert make_once(tmp_path / "new" / "made", build) == tmp_path / "new" / "made"
    assert len(calls) == 1
    assert visible(tmp_path / "new") == ["made"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, EfxError])
def test_an_interrupted_build_leaves_nothing(tmp_path, interruption):
    def build(partial):
        half(partial)
        raise interruption

    with pytest.raises(interruption):
        make_once(tmp_path / "made", build)
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, error):
    def build(partial):
        half(partial)
        raise error

    with pytest.raises(EfxError, match=r"cannot make .*/made \(.*No space left on device.*\); check .* disk"):
        make_once(tmp_path / "made", build)
    assert visible(tmp_path) == []


PROGRAM = """
import os, sys, time
from pathlib import Path
from integration.packages import make_once

def build(partial):
    partial.mkdir()
    (partial / "first").write_text("half")
    print("started", flush=True)
    time.sleep(float(sys.argv[2]))
    (partial / "second").write_text("whole")

make_once(Path(sys.argv[1]), build)
print("there" if (Path(sys.argv[1]) / "second").exists() else "missing", flush=True)
"""


def start(final, seconds):
    command = [sys.executable, "-c", PROGRAM, str(final), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_build_left_is_never_taken_for_the_whole(tmp_path):
    process = start(tmp_path / "made", 600)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "made").exists()
    make_once(tmp_path / "made", half)
    assert visible(tmp_path) == ["made"]
    assert visible(tmp_path / "made") == ["first"]


def test_concurrent_processes_share_one_build(tmp_path):
    one, other = start(tmp_path / "made", 2), start(tmp_path / "made", 2)
    said = sorted(one.communicate()[0].split() + other.communicate()[0].split())
    assert said == ["started", "there", "there"]
    assert one.returncode == other.returncode == 0


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of wheels that pip looks in, and nowhere else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_fetched_from_the_configured_place_and_only_once(tmp_path, shelf):
    source = shelf / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("some_data/text", "payload")
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    root = tmp_path / "assets"
    path = wheel("some-data==1.0", root)
    assert zipfile.ZipFile(path).read("some_data/text") == b"payload"
    assert visible(root) == [path.name]
    source.unlink()
    assert wheel("some-data==1.0", root) == path


def test_a_wheel_that_pip_cannot_find_is_one_sentence_and_leaves_nothing(tmp_path, shelf):
    root = tmp_path / "assets"
    with pytest.raises(EfxError, match=r"pip could not download some-data==1.0 \(No matching .*\); check the network"):
        wheel("some-data==1.0", root)
    assert visible(root) == []
