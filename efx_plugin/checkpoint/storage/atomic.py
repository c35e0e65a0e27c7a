"""A directory that appears complete or not at all."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from efx_plugin.errors import EfxError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_existing(directory: str | os.PathLike[str]) -> None:
    """Refuse a destination that is there already, or that cannot be created. Parents may be missing.

    Raises:
        EfxError: naming it.
    """
    directory = Path(directory)
    if os.path.lexists(directory):
        raise EfxError(f"{directory} exists already and nothing is overwritten: remove it or choose another directory")
    above = _above(directory)
    if not above.is_dir():
        raise EfxError(f"{above}, in which {directory.name} is to be written, is no directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise EfxError(f"{above}, in which {directory.name} is to be written, may not be written to")
    if len(os.fsencode(_temporary(directory))) > os.pathconf(above, "PC_NAME_MAX"):
        raise EfxError(f"{directory.name} is longer than names in {above} may be: choose a shorter one")


def refuse_full(directory: str | os.PathLike[str], needed: int) -> None:
    """Refuse a destination whose disk has less room than that.

    Args:
        directory: the destination; it and its parents may be missing.
        needed: bytes that are going to be written.

    Raises:
        EfxError: naming both.
    """
    free = shutil.disk_usage(_above(Path(directory))).free
    if free < needed:
        raise _full(Path(directory), needed, free)


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str], needed: int) -> Iterator[Path]:
    """Yield a temporary sibling to fill; on success it is synced and takes its name, on any exception it is removed.

    Parents that are missing are made, and removed again where nothing comes to lie in them.

    What a killed process left behind is removed when the same destination is written again; a lock tells it from the
    work of a process that is still alive.

    Args:
        directory: the destination; it must not exist.
        needed: bytes that are going to be written.

    Raises:
        EfxError: there is not enough room, beforehand or on the way, or the destination has appeared meanwhile.
    """
    directory = Path(directory).absolute()
    refuse_existing(directory)
    refuse_full(directory, needed)
    _remove_leftovers(directory)
    temporary = directory.parent / _temporary(directory)
    with _explained(directory, needed), _parents(directory):
        temporary.mkdir()
        lock = _lock(temporary)
        try:
            yield temporary
            for path in sorted(temporary.rglob("*"), reverse=True):
                sync(path)
            sync(temporary)
            refuse_existing(directory)
            temporary.rename(directory)
            sync(directory.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def _temporary(directory: Path) -> str:
    return f".{directory.name}.{secrets.token_hex(4)}.incomplete"


def _above(directory: Path) -> Path:
    """The nearest parent that is there."""
    return next(parent for parent in directory.absolute().parents if os.path.lexists(parent))


@contextlib.contextmanager
def _parents(directory: Path) -> Iterator[None]:
    missing = [parent for parent in directory.parents if not os.path.lexists(parent)]
    try:
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            sync(parent.parent)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # somebody else has written to it
                parent.rmdir()
        raise


@contextlib.contextmanager
def _explained(directory: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(directory, needed, shutil.disk_usage(_above(directory)).free) from error


def _full(directory: Path, needed: int, free: int) -> EfxError:
    return EfxError(f"{directory} needs {needed:,} bytes and its disk has {free:,} left: make room or write elsewhere")


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.parent.glob(f".{directory.name}.*.incomplete"):
        try:
            lock = _lock(leftover)
        except OSError:  # somebody is at work in it
            continue
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
