"""`efx run`: another Python program, in this process, with the plugin imported first.

A program that calls transformers' `from_pretrained`, such as lm-eval, then reads sparse checkpoints though it knows
nothing of them. Processes that the program starts are its own: have a launcher start
`efx run` in each of them.
"""

import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from efx_plugin.errors import UsageError


def run(command: Sequence[str]) -> NoReturn:
    """Become the program that `command` names, with the words after it as its arguments.

    Args:
        command: the name of a console script of this environment; or `python -m MODULE`; or `python FILE`.

    Raises:
        UsageError: there is no such script, module or file.
        SystemExit: always else; with the program's exit code, 1 if it raised and 130 if it was interrupted.
    """
    program, arguments = _find(list(command))
    sys.argv = arguments
    try:
        status = program()
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    sys.exit(status)


def _find(command: list[str]) -> tuple[Callable[[], str | int | None], list[str]]:
    """What to call, and the `sys.argv` that it expects."""
    name, *arguments = command
    if not _is_python(name):
        scripts = list(entry_points(group="console_scripts", name=name))
        if not scripts:
            raise UsageError(
                f"{name} is no console script of this Python environment ({sys.prefix}): install its package here, or "
                "give `python -m MODULE` or `python FILE`"
            )
        return scripts[0].load(), command
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        module = arguments[1]
        sys.path.insert(0, os.getcwd())  # as python -m does
        if not _exists(module):
            raise UsageError(f"there is no module {module} in this Python environment ({sys.prefix})")

        def run_module() -> None:
            runpy.run_module(module, run_name="__main__", alter_sys=True)

        return run_module, arguments[1:]
    if arguments and not arguments[0].startswith("-"):
        file = Path(arguments[0])
        if not file.exists():
            raise UsageError(f"there is no file {file} to run")
        sys.path.insert(0, str(file.resolve().parent))

        def run_file() -> None:
            runpy.run_path(str(file), run_name="__main__")

        return run_file, arguments
    raise UsageError(f"of {name}, efx run takes `{name} -m MODULE` and `{name} FILE`, with arguments after them")


def _is_python(name: str) -> bool:
    return re.fullmatch(r"python(3(\.\d+)?)?", name) is not None or name == sys.executable


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it is missing
        return False
