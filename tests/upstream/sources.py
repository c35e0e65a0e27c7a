"""What a package defines, read off its source files: nothing is imported, so that it need not run here."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Sources:
    """A package and its modules.

    Args:
        package: its name.
        root: the folder that it lies in; by default where it is installed.
    """

    def __init__(self, package: str, root: Path | None = None) -> None:
        spec = None if root is not None else find_spec(package)
        self.root = Path(spec.origin).parents[1] if root is None else root
        described = next(self.root.glob(f"{package}*.dist-info/METADATA")).read_text()
        self.release = next(line for line in described.splitlines() if line.startswith("Version: ")).split()[1]
        self.tree = cache(self.tree)

    def tree(self, module: str) -> ast.Module:
        """The syntax tree of a module; an empty one if there is none of that name."""
        path = self.root.joinpath(*module.split("."))
        files = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
        return ast.parse(files[0].read_text() if files else "")

    def names(self, module: str) -> set[str]:
        """What can be imported from a module: what it defines or imports outside of functions and classes."""
        found, todo = set(), list(self.tree(module).body)
        while todo:
            node = todo.pop()
            if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
                found.add(node.name)
                continue
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            todo += ast.iter_child_nodes(node)
        return found

    def classes(self, module: str, name: str) -> list[ast.ClassDef]:
        """A class and those of its base classes that the same module defines, nearest first."""
        defined = {node.name: node for node in ast.walk(self.tree(module)) if isinstance(node, ast.ClassDef)}
        found, todo = [], [name]
        while todo:
            one = defined.get(todo.pop(0))
            if one is not None and one not in found:
                found.append(one)
                todo += [ast.unparse(base) for base in one.bases]
        return found

    def function(self, module: str, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """A function, or a method as "Class.method", inherited perhaps; None if there is none."""
        owner, _, function = name.rpartition(".")
        places = self.classes(module, owner) if owner else [self.tree(module)]
        found = [node for place in places for node in place.body if isinstance(node, _FUNCTIONS)]
        return next((node for node in found if node.name == function), None)

    def parameters(self, module: str, name: str) -> list[str]:
        """The parameters of a function in order; none if there is no such function."""
        function = self.function(module, name)
        if function is None:
            return []
        arguments = function.args
        return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]

    def attributes(self, module: str, name: str) -> set[str]:
        """What the instances of a class have: methods, fields, and what methods assign to `self`."""
        found = set()
        for node in (node for one in self.classes(module, name) for node in ast.walk(one)):
            if isinstance(node, _FUNCTIONS):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
        return found

    def text(self, module: str, name: str = "") -> str:
        """The source of a function or method, or of the whole module, without comments and in one way of writing."""
        node = self.function(module, name) if name else self.tree(module)
        return "" if node is None else ast.unparse(node)
