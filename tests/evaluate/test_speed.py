"""Engines take turns, and what goes wrong in one is a sentence."""

import sys
from pathlib import Path

import pytest

from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate import speed
from efx_plugin.evaluate.speed import measure, refuse_python

# Stands in for vLLM: the dense model takes a second for 8 requests, the sparse one half, and each call is noted.
ENGINE = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
if folder.name == "broken":
    sys.exit("no such architecture")
print("ready", flush=True)
for line in sys.stdin:
    with open(folder.parent / "calls", "a") as calls:
        print(folder.name, line.strip(), file=calls)
    print(int(line) / 8 / (1 if folder.name == "dense" else 2), flush=True)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "efx_stand_in_engine.py").write_text(ENGINE)
    monkeypatch.setattr(speed, "_SERVER", "efx_stand_in_engine")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_engines_take_turns_and_go_first_as_often(folder):
    found = measure(sys.executable, folder / "dense", {"expert": folder / "sparse"}, folder)
    assert {name: set(line) for name, line in found.items()} == {"lora": {1, 8}, "expert": {1, 8}}
    assert found["lora"][8] == speed.Speed(8 * 32, 1.0) and found["expert"][8] == speed.Speed(2 * 8 * 32, 2.0)
    calls = (folder / "calls").read_text().splitlines()
    assert calls[:4] == ["dense 1", "sparse 1", "sparse 1", "dense 1"] and len(calls) == 24
    assert all(len({one.split()[0] for one in calls[number : number + 2]}) == 2 for number in range(0, 24, 2))


def test_an_engine_that_does_not_start_is_named_with_its_log(folder):
    with pytest.raises(EfxError, match=r"vLLM did not serve .*broken: its log is (.*)") as raised:
        measure(sys.executable, folder / "dense", {"expert": folder / "broken"}, folder)
    assert "no such architecture" in Path(str(raised.value).rpartition("its log is ")[2]).read_text()


def test_a_python_that_cannot_serve_is_refused_before_the_work(tmp_path):
    with pytest.raises(UsageError, match="none cannot be run"):
        refuse_python(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="has not both vLLM and efx-plugin"):
        refuse_python(sys.executable)
