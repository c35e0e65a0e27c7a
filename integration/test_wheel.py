"""What is published: the sdist is whole, and the wheel that is built of it works far from the source tree."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

from tests.support.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
CLEAN = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(*command, cwd: Path) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def files(folder: Path) -> set[Path]:
    """The files below a folder that are kept in a source tree, with paths from it."""
    kept = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in kept if path.suffix not in (".pyc", ".so")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the tree's source files, without what environments, builds and tools leave there."""
    copy = tmp_path_factory.mktemp("tree") / "efx-plugin"
    copy.mkdir()
    for path in ROOT.glob("[!.]*"):
        if path.is_file():
            shutil.copy2(path, copy)
    for name in ("docs", "efx_plugin", "integration", "recipes", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


@pytest.fixture(scope="module")
def unpacked(sources, tmp_path_factory):
    """The sdist of those files, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", BUILD_SDIST, folder, cwd=sources)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def python(unpacked, tmp_path_factory):
    """The interpreter of an environment that has the wheel and, of this one, all but the package itself.

    The codec is compiled of the sdist. The kernels, two minutes of compilation, are the tree's where these are up to
    date: the build takes a library that is newer than its sources.
    """
    kernels = Path("efx_plugin", "kernels", "native")
    for library in (ROOT / kernels).glob("_linear*.so"):
        shutil.copy2(library, unpacked / kernels)
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, unpacked, cwd=folder)
    (wheel,) = folder.glob("*-cp311-abi3-*.whl")
    venv.create(folder / "environment", symlinks=True)
    python = folder / "environment" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # A folder that is named in a .pth file has its own .pth files ignored, and so the editable install of the package.
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_sdist_holds_every_source_file(sources, unpacked):
    assert files(sources) - files(unpacked) == set()


def test_the_installed_package_has_its_recipes_libraries_and_types(python, tmp_path):
    look = """
import json
from importlib.metadata import metadata, version
from pathlib import Path
import efx_plugin
from efx_plugin.checkpoint.codec import native as codec
from efx_plugin.kernels import native as kernels
from efx_plugin.recipe_files import builtin_recipes
package = Path(efx_plugin.__file__).parent
print(json.dumps({
    "package": str(package),
    "versions": [efx_plugin.__version__, version("efx-plugin")],
    "recipes": {name: str(path) for name, path in builtin_recipes().items()},
    "libraries": [codec.library() is not None, kernels.library() is not None],
    "typed": (package / "py.typed").is_file(),
    "sources": [path.name for path in package.rglob("*.?pp")],
    "urls": metadata("efx-plugin").get_all("Project-URL"),
    "classifiers": metadata("efx-plugin").get_all("Classifier"),
}))
"""
    found = json.loads(run(python, "-c", look, cwd=tmp_path))
    assert Path(found["package"]).is_relative_to(python.parents[1])
    assert found["versions"][0] == found["versions"][1]
    assert set(found["recipes"]) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert all(Path(path).is_relative_to(found["package"]) for path in found["recipes"].values())
    assert found["libraries"] == [True, True]
    assert found["typed"]
    assert found["sources"] == []
    assert "Paper, https://arxiv.org/abs/2511.19935" in found["urls"]
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(found["classifiers"])


def test_prune_inspect_and_export_run_from_the_wheel(python, tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    ids = torch.randint(3, 128, (12, 40), generator=torch.Generator().manual_seed(0)).tolist()
    text = tmp_path / "domain.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(f"t{i}" for i in row)}) for row in ids))
    efx = python.parent / "efx"
    options = ["--dataset", text, "--samples", 4, "--length", 32]
    run(efx, "prune", model, tmp_path / "expert", "--recipe", "expert_50", *options, cwd=tmp_path)
    summary = json.loads(run(efx, "inspect", tmp_path / "expert", "--verify", "--json", cwd=tmp_path))
    assert summary["sparsity"] == pytest.approx(0.5, abs=0.01)
    run(efx, "export", tmp_path / "expert", tmp_path / "dense", "--structure", "dense", cwd=tmp_path)
    assert (tmp_path / "dense" / "model.safetensors").is_file()
