"""A directory appears complete or not at all, and nothing is left beside it."""

import errno
import subprocess
import sys

import pytest

from efx_plugin.checkpoint.storage import atomic
from efx_plugin.errors import EfxError


def names(path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def test_the_destination_appears_only_at_the_end(tmp_path):
    with atomic.new_directory(tmp_path / "new", 10) as temporary:
        (temporary / "file").write_text("x")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("y")
        assert not (tmp_path / "new").exists()
        assert temporary.parent == tmp_path
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new" / "sub" / "file").read_text() == "y"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic.new_directory(tmp_path / "new", 10) as temporary:
        (temporary / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_whatever_exists_is_refused_and_left_alone(tmp_path, kind):
    path = tmp_path / "there"
    {"directory": path.mkdir, "file": path.touch, "dangling link": lambda: path.symlink_to("nowhere")}[kind]()
    with (
        pytest.raises(EfxError, match="there exists already and nothing is overwritten"),
        atomic.new_directory(path, 10),
    ):
        pytest.fail("the body ran")
    assert names(tmp_path) == ["there"]


def test_a_destination_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(EfxError, match="exists already"), atomic.new_directory(tmp_path / "new", 10):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").touch()
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["theirs"]


def test_missing_parents_are_made(tmp_path):
    atomic.refuse_existing(tmp_path / "a" / "b" / "new")
    assert names(tmp_path) == []
    with atomic.new_directory(tmp_path / "a" / "b" / "new", 10) as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "new" / "file").read_text() == "x"


def test_parents_that_were_made_for_nothing_are_removed(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), atomic.new_directory(tmp_path / "a" / "b" / "c" / "new", 10):
        (tmp_path / "a" / "b" / "theirs").touch()
        raise RuntimeError
    assert names(tmp_path / "a" / "b") == ["theirs"]
    with pytest.raises(EfxError), atomic.new_directory(tmp_path / "x" / "new", 10**18):
        pytest.fail("the body ran")
    assert names(tmp_path) == ["a"]


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EfxError, match="file, in which new is to be written, is no directory"):
        atomic.refuse_existing(tmp_path / "file" / "new")


def test_a_name_that_the_disk_does_not_take_is_refused(tmp_path):
    with pytest.raises(EfxError, match="choose a shorter one"):
        atomic.refuse_existing(tmp_path / ("é" * 125))
    with atomic.new_directory(tmp_path / ("é" * 115), 0):
        pass


def test_too_little_room_is_refused_before_anything_is_written(tmp_path):
    message = r"needs 1,000,000,000,000,000,000 bytes and its disk has [\d,]+ left"
    with pytest.raises(EfxError, match=message), atomic.new_directory(tmp_path / "new", 10**18):
        pytest.fail("the body ran")
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way(tmp_path, code):
    message = r"needs 10 bytes and its disk has [\d,]+ left: make room"
    with pytest.raises(EfxError, match=message), atomic.new_directory(tmp_path / "new", 10) as temporary:
        (temporary / "file").write_text("x")
        raise OSError(code, "disk")
    assert names(tmp_path) == []


def test_another_error_of_the_system_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), atomic.new_directory(tmp_path / "new", 10):
        raise PermissionError(errno.EACCES, "no")
    assert names(tmp_path) == []


WORKER = """
import sys, time
from efx_plugin.checkpoint.storage import atomic
with atomic.new_directory(sys.argv[1], 10) as temporary:
    (temporary / "file").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "new")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        assert len(names(tmp_path)) == 2
        workers[0].kill()
        workers[0].wait()
        assert len(names(tmp_path)) == 2
        with atomic.new_directory(tmp_path / "new", 10):
            hidden = [name for name in names(tmp_path) if name.endswith(".incomplete")]
            assert len(hidden) == 2  # the live worker's and this one
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert "new" in names(tmp_path)
