"""SHA-256 sums of the weight files, in a file that `sha256sum --check` understands."""

import hashlib
import os
from pathlib import Path

from efx_plugin.errors import SparseCheckpointError

FILE = "SHA256SUMS"


def write(directory: str | os.PathLike[str], sums: dict[str, str]) -> None:
    """Write the sums, file name -> hexadecimal digest."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (Path(directory) / FILE).write_text("".join(lines))


def status(directory: str | os.PathLike[str]) -> str:
    """ "not checked" where there are sums, else "absent"."""
    return "not checked" if (Path(directory) / FILE).is_file() else "absent"


def check(directory: str | os.PathLike[str]) -> str:
    """Compare every file that has a sum with it: "match", or "absent" where there are no sums.

    Raises:
        SparseCheckpointError: a file is missing or differs, or the list is malformed or points outside the directory.
    """
    directory = Path(directory)
    if status(directory) == "absent":
        return "absent"
    for number, line in enumerate((directory / FILE).read_text(errors="replace").splitlines(), start=1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or Path(name).name != name:
            raise SparseCheckpointError(f"{FILE}, line {number}, is malformed: download the checkpoint again")
        try:
            with open(directory / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise SparseCheckpointError(f"{name} is listed in {FILE} but cannot be read: {error.strerror}") from error
        if found != digest:
            raise SparseCheckpointError(f"{name} is not what {FILE} says: download the checkpoint again")
    return "match"
