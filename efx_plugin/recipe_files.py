"""The recipes that come with the package, by name.

In the source tree, and so in an editable install, they lie in recipes/ beside the package; a wheel carries them inside
of it.
"""

from pathlib import Path


def builtin_recipes() -> dict[str, Path]:
    """The file of each recipe by its name, such as `expert_50`, in the order of the names."""
    package = Path(__file__).parent
    installed = package / "recipes"
    directory = installed if installed.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}
