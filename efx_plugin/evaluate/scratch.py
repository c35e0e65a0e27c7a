"""Folders for a cell's temporary files, which hold whole checkpoints: they go with the cell, killed or not. Unix."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".cell-"
_NEW = 60.0  # seconds within which a folder is perhaps not locked yet


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent`, locked by this process and removed at the end."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=_PREFIX) as folder:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(handle)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that were killed: nobody locks them."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its process has just ended
            continue
        try:
            if time.time() - os.fstat(handle).st_mtime > _NEW:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # another comparison's cell is at work
            continue
        finally:
            os.close(handle)
