"""`efx run`: another program in this process, found as a shell and Python find it, its exit code kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from efx_plugin.cli import main

ROOT = Path(__file__).parents[1]
# What a program sees of where it is run.
SHOW = (
    "import json, sys\n"
    "print(json.dumps([sys.argv, __name__, 'efx_plugin' in sys.modules, sys.path[0], "
    "sys.modules['__main__'].__dict__.get('HERE')]))\n"
)


def efx(*arguments, folder):
    """In a process of its own: what runs there may change anything."""
    code = "import sys; from efx_plugin.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder / 'site'}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path):
    """A module, a file, and an installed console script."""
    (tmp_path / "module.py").write_text(f"HERE = 1\n{SHOW}")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "file.py").write_text(SHOW)
    (tmp_path / "ends.py").write_text(
        "import sys\nwhat = sys.argv[1]\n"
        "if what == 'raise': raise ValueError('of the program')\n"
        "if what == 'interrupt': raise KeyboardInterrupt\n"
        "if what != 'fall off': sys.exit(int(what) if what.isdecimal() else what)\n"
    )
    installed = tmp_path / "site" / "some_tool-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: some-tool\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[console_scripts]\nsome-tool = some_tool:command\n")
    (tmp_path / "site" / "some_tool.py").write_text(
        "import json, sys\n"
        "def command():\n    print(json.dumps([sys.argv, 'efx_plugin' in sys.modules]))\n    return 7\n"
    )
    return tmp_path


def test_a_console_script_gets_its_arguments_and_keeps_its_exit_code(folder):
    done = efx("run", "--", "some-tool", "--help", "-x", "1", "--", "--debug", folder=folder)
    assert json.loads(done.stdout) == [["some-tool", "--help", "-x", "1", "--", "--debug"], True]
    assert done.returncode == 7


def test_the_dashes_before_the_command_may_be_left_out(folder):
    done = efx("run", "some-tool", "--help", folder=folder)
    assert json.loads(done.stdout)[0] == ["some-tool", "--help"]


@pytest.mark.parametrize("python", ["python", "python3", f"python3.{sys.version_info.minor}", sys.executable])
def test_a_module_runs_as_main_in_the_working_folder(folder, python):
    done = efx("run", "--", python, "-m", "module", "-a", folder=folder)
    argv, name, plugin, path, here = json.loads(done.stdout)
    assert argv == [str(folder / "module.py"), "-a"]
    assert (name, plugin, here) == ("__main__", True, 1)
    assert Path(path) == folder
    assert done.returncode == 0


def test_a_file_runs_as_main_beside_its_neighbours(folder):
    done = efx("run", "--", "python", "scripts/file.py", "-a", folder=folder)
    argv, name, plugin, path, _ = json.loads(done.stdout)
    assert argv == ["scripts/file.py", "-a"]
    assert (name, plugin) == ("__main__", True)
    assert Path(path) == folder / "scripts"


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("0", 0, ""),
        ("3", 3, ""),
        ("fall off", 0, ""),
        ("a reason", 1, "a reason\n"),
        ("raise", 1, "ValueError: of the program\n"),
        ("interrupt", 130, "KeyboardInterrupt\n"),
    ],
)
def test_a_program_ends_as_it_would_alone(folder, how, code, said):
    done = efx("run", "--", "python", "-m", "ends", how, folder=folder)
    assert done.returncode == code
    assert done.stderr.endswith(said)
    assert "efx:" not in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["no-such-tool"], "no-such-tool is no console script of this Python environment"),
        (["python", "-m", "no_such_module"], "there is no module no_such_module in this Python environment"),
        (["python", "-m", "no_such_package.module"], "there is no module no_such_package.module in this"),
        (["python", "no_such_file.py"], "there is no file no_such_file.py to run"),
        (["python"], "of python, efx run takes `python -m MODULE` and `python FILE`"),
        (["python", "-c", "1"], "of python, efx run takes `python -m MODULE` and `python FILE`"),
    ],
)
def test_an_unknown_command_is_one_sentence(capsys, command, message):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--", *command])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"efx: {message}")
