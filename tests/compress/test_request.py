"""What was typed wrongly is refused from a look at the file system, before torch is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from efx_plugin.compress.recipe import default_recipe
from efx_plugin.compress.request import PruneRequest, is_hub_name, kind_of_data

HEAVY = ("torch", "transformers", "llmcompressor", "peft", "datasets")
# Runs `efx` and prints what was imported.
SCRIPT = f"""
import sys
from efx_plugin.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print([name for name in {HEAVY} if name in sys.modules])
    raise
"""
ARGUMENTS = {"model": "model", "output": "out", "--recipe": "wanda_50", "--dataset": "text.jsonl", "--adapter": "lora"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "t5"}))
    (tmp_path / "there").mkdir()
    (tmp_path / "notes.docx").touch()
    return tmp_path


def efx(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"output": "there"}, 1, "there exists already"),
        ({"output": "text.jsonl/out"}, 1, "text.jsonl, in which out is to be written, is no directory"),
        ({"model": "modell"}, 2, "there is no directory modell: pass the directory of a model; did you mean model?"),
        ({"model": "owner/model"}, 2, "hf download owner/model --local-dir DIRECTORY where"),
        ({"model": "text.jsonl"}, 2, "text.jsonl is a file: pass the directory of a model"),
        ({"--adapter": "lara"}, 2, "there is no directory lara: pass the directory of an adapter; did you mean lora?"),
        ({"--dataset": "test.jsonl"}, 2, "there is no file test.jsonl: pass --dataset a file that ends in .txt, "),
        ({"--dataset": "notes.docx"}, 2, "notes.docx holds no text that can be read"),
        ({"--dataset": "model"}, 2, "model is a directory: pass --dataset a file"),
        ({"--recipe": "wonda_50"}, 2, "there is no recipe wonda_50"),
    ],
)
def test_a_wrong_name_is_refused_in_one_sentence_before_torch_is_imported(folder, changed, code, said):
    arguments = ARGUMENTS | changed
    options = [word for name, value in arguments.items() if name.startswith("--") for word in (name, value)]
    result = efx(folder, "prune", arguments["model"], arguments["output"], *options)
    assert result.returncode == code, result.stderr
    assert result.stdout.strip() == "[]"
    (line,) = result.stderr.splitlines()
    assert line.startswith("efx: ") and said in line


def test_export_refuses_its_output_before_torch_is_imported(folder):
    result = efx(folder, "export", "model", "there")
    assert (result.returncode, result.stdout.strip()) == (1, "[]")
    assert "there exists already" in result.stderr


def test_what_is_there_passes(folder):
    request = PruneRequest(folder / "model", folder / "new" / "out", default_recipe(), str(folder / "text.jsonl"))
    assert request.checked() == request
    assert not (folder / "new").exists()


def test_a_model_and_an_adapter_come_from_the_hub(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder / name.partition("/")[2]))
    request = PruneRequest(
        Path("owner/model"), folder / "out", default_recipe(), str(folder / "text.jsonl"), Path("owner/lora")
    )
    checked = request.checked()
    assert (checked.model, checked.adapter) == (folder / "model", folder / "lora")


def test_a_name_on_the_hub_is_no_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert is_hub_name("owner/name")
    for path in ("text.jsonl", "./owner/name", "/owner/name", "model/name", "a/b/c", "name"):
        assert not is_hub_name(path), path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", ".txt"), ("a.JSONL.gz", ".jsonl"), ("a.json", ".json"), ("a.csv.gz", ".csv"), ("a.gz", None)],
)
def test_the_ending_says_what_a_file_holds(tmp_path, name, kind):
    assert kind_of_data(tmp_path / name) == kind
