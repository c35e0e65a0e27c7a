"""Releases of compressed-tensors that still have the sparse compressors, to compare and to exchange files with."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "build" / "readers"


def install(version: str) -> Path:
    """A release of compressed-tensors in a folder of its own, to be put first on a subprocess's path."""
    folder = FOLDER / f"compressed-tensors-{version}"
    if not (folder / "compressed_tensors").is_dir():
        partial = FOLDER / f"{folder.name}.{os.getpid()}"
        command = ["pip", "install", "--quiet", "--no-deps", "--target", partial, f"compressed-tensors=={version}"]
        subprocess.run([sys.executable, "-m", *command], check=True)
        partial.rename(folder)
    return folder
