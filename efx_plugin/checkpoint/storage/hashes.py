"""What files hold, in short: hashes that results and interrupted runs are known by."""

import hashlib
from functools import cache
from pathlib import Path


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; read once as long as the file does not change."""
    status = path.stat()
    return _hash(path, status.st_size, status.st_mtime_ns)


@cache
def _hash(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def directory_hash(directory: Path) -> dict[str, str]:
    """Hashes of the files of a folder, by name; hidden files and folders do not count."""
    files = (path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {path.name: file_hash(path) for path in files}
