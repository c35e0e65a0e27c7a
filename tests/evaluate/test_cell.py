"""A cell's key stands for everything that its result depends on, and for nothing else."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from efx_plugin.evaluate import cell as module
from efx_plugin.evaluate.cell import Cell, CellResult, CorpusLosses, Data, HeldOut, sparsity_name


def make_cell(folder: Path, **changes) -> Cell:
    for name in ("model", "adapter"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(name)
    for name in ("calibration", "training", "heldout", "validation"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    data = Data(
        "legal",
        calibration=folder / "calibration.jsonl",
        training=folder / "training.jsonl",
        heldout=(HeldOut("legal", folder / "heldout.jsonl"),),
        validation=folder / "validation.jsonl",
    )
    cell = Cell(folder / "model", folder / "adapter", "lora+wanda", 0.5, 0, data, arguments=(("rate", [1, 2]),))
    return replace(cell, **changes)


def test_the_key_does_not_depend_on_where_files_lie(tmp_path):
    assert make_cell(tmp_path / "a").key() == make_cell(tmp_path / "b").key()


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline": "lora"},
        {"sparsity": 0.6},
        {"mask_structure": "2:4"},
        {"seed": 1},
        {"adapter": None},
        {"tasks": ("clauses",)},
        {"arguments": (("rate", [1, 3]),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_every_argument(tmp_path, change):
    cell = make_cell(tmp_path)
    assert replace(cell, **change).key() != cell.key()


@pytest.mark.parametrize("change", [{"samples": 64}, {"length": 64}, {"training_tokens": 5}, {"heldout_tokens": 5}])
def test_the_key_changes_with_the_amount_of_text(tmp_path, change):
    cell = make_cell(tmp_path)
    assert replace(cell, data=replace(cell.data, **change)).key() != cell.key()


@pytest.mark.parametrize(
    "name",
    ["model/config.json", "adapter/config.json", "calibration.jsonl", "training.jsonl", "heldout.jsonl"],
)
def test_the_key_changes_with_every_file(tmp_path, name):
    cell = make_cell(tmp_path)
    before = cell.key()
    (tmp_path / name).write_text("other")
    assert cell.key() != before


def test_validation_text_counts_where_something_is_trained(tmp_path):
    cells = [make_cell(tmp_path)]
    cells.append(replace(cells[0], pipeline="expert"))
    before = [cell.key() for cell in cells]
    without = [replace(cell, data=replace(cell.data, validation=None)).key() for cell in cells]
    (tmp_path / "validation.jsonl").write_text("other")
    after = [cell.key() for cell in cells]
    assert before[0] == after[0] == without[0]
    assert len({before[1], after[1], without[1]}) == 3


def test_the_key_changes_with_the_versions_of_libraries(tmp_path, monkeypatch):
    cell = make_cell(tmp_path)
    before = cell.key()
    monkeypatch.setattr(module, "versions", lambda: {"torch": "0"})
    assert cell.key() != before


def test_cells_and_results_survive_json(tmp_path):
    cell = make_cell(tmp_path)
    assert Cell.from_json(json.loads(json.dumps(cell.as_json()))) == cell
    result = CellResult(
        {"legal": CorpusLosses([1.5], [3])}, {}, 0.5, 9.0, 9.0, [], ["a note"], 1.0, 2.0, 3.0, 0.0, "float32", "a CPU"
    )
    assert CellResult.from_json(json.loads(json.dumps(result.as_json()))) == result


def test_the_state_of_the_source_is_told():
    assert len(module.source_hash()) == 12 and module.source_hash() == module.source_hash()


def test_sparsities_have_names():
    assert [sparsity_name(0.5), sparsity_name(0.55), sparsity_name(0.5, "2:4")] == ["50 %", "55 %", "2:4"]


def test_cells_and_names_of_pipelines_need_no_torch():
    light = "efx_plugin.evaluate.cell, efx_plugin.evaluate.pipelines.registry"
    code = f"import sys, {light}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
