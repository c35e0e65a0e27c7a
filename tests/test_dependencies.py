"""What a part of the package imports is declared for those who install that part."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The extras that a part needs besides the dependencies of all; every other part makes do with those.
EXTRAS = {
    "compress": "compress",
    "engine": "compress",
    "evaluate": "compress,eval,plot",
    "method": "compress",
    "model": "compress",
    "modifier": "compress",
    "optimum_cli": "dev",
    "plots": "plot",
    "serving": "serve",
    "training": "compress",
}
PROJECTS_OF_MODULES = {
    "yaml": "pyyaml",
    "cuda": "torch",
    "sklearn": "scikit-learn",
}  # torch for CUDA requires cuda-bindings
PARTS = sorted(path for path in (ROOT / "efx_plugin").iterdir() if path.suffix == ".py" or path.is_dir())


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"efx_plugin"}


def declared(extra: str | None) -> set[str]:
    extras = PROJECT["optional-dependencies"]
    requirements = PROJECT["dependencies"] + [one for name in (extra or "").split(",") for one in extras.get(name, [])]
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.stem)
def test_every_import_is_declared(part):
    files = part.rglob("*.py") if part.is_dir() else [part]
    modules = set().union(*map(imported, files))
    projects = {PROJECTS_OF_MODULES.get(module, module.replace("_", "-")) for module in modules}
    assert projects <= declared(EXTRAS.get(part.stem))
