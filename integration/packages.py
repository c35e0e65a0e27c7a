"""Packages from a package index, downloaded once and read where they lie; and files that are made once.

Packages are downloaded with pip from whatever index the user has configured. Nothing is installed. What is made
appears only when it is complete.
"""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from efx_plugin.errors import EfxError

ASSETS = Path(__file__).resolve().parents[1] / "build" / "assets"


def make_once(final: Path, build: Callable[[Path], None]) -> Path:
    """Return `final`, calling `build(partial)` first if it does not exist yet.

    `build` writes a file or directory at the path it is given, which is renamed when it returns; whatever
    interrupts it, `final` is complete or absent. A lock lets concurrent processes share one build.

    Raises:
        EfxError: the disk is full or the directory cannot be written to.
    """
    if final.exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.with_name(f".{final.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if final.exists():
                return final
            partial = final.with_name(f".{final.name}.partial")
            _remove(partial)  # what a killed process left; the lock says that nobody is writing it
            try:
                build(partial)
                partial.rename(final)
            finally:
                _remove(partial)
    except (OSError, SafetensorError) as error:
        message = f"cannot make {final} ({error}); check its permissions and the free disk space"
        raise EfxError(message) from error
    return final


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def wheel(requirement: str, root: Path = ASSETS) -> Path:
    """Path of the wheel of `requirement` ("name==version"), downloaded by pip if it is not there yet.

    Raises:
        EfxError: pip could not download it (no network, unknown index, no such version).
    """
    return _package(requirement, ".whl", "--only-binary", root)


def sdist(requirement: str, root: Path = ASSETS) -> Path:
    """Path of the source archive of `requirement`, a .tar.gz; else as `wheel`. pip runs its setup.py to read its name.

    Raises:
        EfxError: as `wheel`.
    """
    return _package(requirement, ".tar.gz", "--no-binary", root)


def _package(requirement: str, suffix: str, kind: str, root: Path) -> Path:
    name, version = requirement.split("==")

    def download(partial: Path) -> None:
        # The folder is left for make_once to judge: a file is moved out of it only if pip succeeded.
        folder = partial.with_name(partial.name + ".pip")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, ":all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
        try:
            # Standard output belongs to whoever called us and may be JSON: progress goes to descriptor 2.
            done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
            found = sorted(folder.glob(f"*{suffix}"))
            if done.returncode or len(found) != 1:
                errors = [line for line in done.stderr.splitlines() if "WARNING" not in line and line.strip()]
                reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
                raise EfxError(
                    f"pip could not download {requirement} ({reason}); check the network and pip's index "
                    "settings, then run the same command again"
                )
            found[0].rename(partial)
        finally:
            _remove(folder)

    return make_once(root / f"{name}-{version}{suffix}", download)
