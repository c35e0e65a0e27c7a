"""Hosts one release ahead of those that the tests run on, and the contract tests of tests/upstream against them.

vLLM's wheel is built for CUDA, so that of it the sources alone are unpacked, and only read. Of transformers and
compressed-tensors it is the newest releases that llm-compressor allows.
"""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "upstream"
VLLM = "vllm==0.33.*"
HOSTS = ("transformers", "compressed-tensors")


def unpack_vllm() -> Path:
    """A folder with vLLM's sources and metadata."""
    wheels, folder = FOLDER / "wheels", FOLDER / "vllm"
    command = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", wheels, VLLM]
    subprocess.run([sys.executable, "-m", *command], check=True)
    wheel = max(wheels.glob("vllm-*.whl"), key=lambda path: path.stat().st_mtime)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith((".py", "/METADATA"))])
    return folder


def install_hosts() -> Path:
    """A folder with the newest transformers and compressed-tensors, to be put first on a subprocess's path."""
    allowed = [one for one in map(Requirement, requires("llmcompressor")) if one.name in HOSTS and one.marker is None]
    folder = FOLDER / "hosts"
    command = ["pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder, *map(str, allowed)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    return folder


def main() -> None:
    vllm, hosts = unpack_vllm(), install_hosts()
    environment = os.environ | {"EFX_UPSTREAM_VLLM": str(vllm), "PYTHONPATH": os.pathsep.join([str(hosts), str(ROOT)])}
    tell = f"from importlib.metadata import version; print(*(f'{{name}} {{version(name)}}' for name in {HOSTS}))"
    newer = subprocess.run([sys.executable, "-c", tell], env=environment, capture_output=True, text=True, check=True)
    print("installed:", *(f"{name} {version(name)}" for name in HOSTS))
    print("tested:   ", newer.stdout.strip(), next(vllm.glob("*.dist-info")).stem.replace("-", " "), flush=True)
    tests = [sys.executable, "-m", "pytest", "-m", "serving or not serving", ROOT / "tests" / "upstream"]
    sys.exit(subprocess.run(tests, env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
