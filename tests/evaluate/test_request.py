"""What was typed wrongly is refused in one sentence, and what was typed well becomes the cells that it means."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate.pipelines.protocol import TRAINING_FAMILIES
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from efx_plugin.evaluate.request import CompareRequest, parse_sparsity
from tests.support.tiny_llama import save_tiny_llama


@pytest.fixture
def request_(tmp_path):
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
    lines = [json.dumps({"text": f"document {number}"}) for number in range(40)]
    (tmp_path / "law.jsonl").write_text("\n".join(lines))
    return CompareRequest(
        tmp_path / "model", tmp_path / "adapter", (str(tmp_path / "law.jsonl"),), tmp_path / "cache", samples=4
    )


def test_by_default_everything_runs_that_trains_nothing(request_):
    checked = request_.checked()
    assert checked.pipelines == tuple(name for name, one in PIPELINES.items() if one.family not in TRAINING_FAMILIES)
    assert not {"expert", "lora+expert+heal"} & set(checked.pipelines)
    assert request_.split().data.samples == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"pipelines": ("lora+wnda",)},
            r"no pipeline lora\+wnda: choose among base, lora, .*did you mean lora\+wanda\?",
        ),
        ({"adapter": None}, r"lora starts from an adapter: pass --adapter DIRECTORY, or --pipelines that need none"),
        ({"adapter": Path("adaptr")}, "no directory adaptr: pass the directory of an adapter"),
        ({"model": Path("modl")}, "no directory modl: pass the directory of a model"),
        ({"data": ("none.jsonl",)}, "no file none.jsonl: pass --data a file that ends in"),
        ({"heldout": ("none.jsonl",)}, "no file none.jsonl: pass --heldout a file that ends in"),
        ({"sparsities": ("50",)}, "the sparsity 50 is no fraction between 0 and 1 and no structure: pass .5 or 2:4"),
        ({"task_data": Path("none")}, "no directory none: pass the folder"),
        ({"other_data": ("law.jsonl",)}, "are of one domain: pass both or neither"),
        ({"other_adapter": Path("none")}, "are of one domain: pass both or neither"),
        (
            {"other_adapter": Path("none"), "other_data": ("none.jsonl",)},
            "no file none.jsonl: pass --other-data a file",
        ),
    ],
)
def test_what_was_typed_wrongly_is_refused_at_once(request_, change, said):
    with pytest.raises(UsageError, match=said):
        replace(request_, **change).checked()


def test_data_without_a_held_out_part_is_refused(request_, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(EfxError, match=r"has 2 different documents, too few to hold any out .* or --heldout FILE"):
        replace(request_, data=(str(tmp_path / "few.jsonl"),)).split()


def test_training_without_documents_to_choose_rates_on_is_refused(request_, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    few = replace(request_, data=(str(tmp_path / "few.jsonl"),), heldout=request_.data)
    assert few.checked().split().data.validation is None
    with pytest.raises(EfxError, match=r"expert chooses its learning rate on documents of their own, and .*few\.jsonl"):
        replace(few, pipelines=("lora", "expert")).checked().split()


def test_the_base_model_needs_no_adapter(request_):
    assert replace(request_, adapter=None, pipelines=("base",)).checked().adapter is None


@pytest.mark.parametrize(
    ("text", "parsed"),
    [(".5", (0.5, "0:0")), ("0.45", (0.45, "0:0")), ("2:4", (0.5, "2:4")), ("1:4", (0.25, "1:4"))],
)
def test_sparsities(text, parsed):
    assert parse_sparsity(text) == parsed


@pytest.mark.parametrize("text", ["0", "1", "-.5", "4:2", "half", "2:", "nan"])
def test_what_is_no_sparsity(text):
    with pytest.raises(UsageError, match=f"the sparsity {text} is no fraction"):
        parse_sparsity(text)


def test_dense_cells_run_once_and_the_others_at_every_point(request_):
    request = replace(
        request_, pipelines=("lora", "lora+wanda", "lora+w4a16"), sparsities=(".5", "2:4"), seeds=2
    ).checked()
    cells = request.cells(request.split().data)
    points = [(cell.pipeline, cell.sparsity, cell.mask_structure, cell.seed) for cell in cells]
    assert points == [
        ("lora", 0.0, "0:0", 0),
        ("lora+wanda", 0.5, "0:0", 0),
        ("lora+wanda", 0.5, "2:4", 0),
        ("lora+w4a16", 0.0, "0:0", 0),
        ("lora+wanda", 0.5, "0:0", 1),
        ("lora+wanda", 0.5, "2:4", 1),
        ("lora+w4a16", 0.0, "0:0", 1),
    ]


@pytest.mark.parametrize(
    ("inputs", "groups"), [((128, 256), [128, 64, 32]), ((64, 192), [64, 32]), ((32, 64), [32]), ((32, 48), [None])]
)
def test_every_group_that_divides_the_inputs_of_all_layers_has_a_cell(request_, tmp_path, inputs, groups):
    save_tiny_llama(tmp_path / "model", hidden_size=inputs[0], intermediate_size=inputs[1])
    request = replace(request_, pipelines=("lora+w3", "lora+w4a16"), seeds=2).checked()
    cells = request.cells(request.split().data)
    names = ["lora+w3" if group is None else f"lora+w3 g{group}" for group in groups]
    assert [cell.label for cell in cells] == [
        f"{name} law, seed {n}" for n in (0, 1) for name in [*names, "lora+w4a16"]
    ]


def test_a_second_domain_makes_one_comparison_of_masks_at_the_first_sparsity(request_, tmp_path):
    law, care = tmp_path / "law.jsonl", tmp_path / "care.jsonl"
    care.write_text(law.read_text().replace("document", "case"))
    asked = replace(request_, other_adapter=tmp_path / "adapter", other_data=(str(care),), sparsities=("2:4", ".6"))
    request = asked.checked()
    data = request.split().data
    other = request.split_other(data)
    (cell,) = request.domain_cells(data, other.data)
    assert cell.label == "masks of law and care by lora+expert 2:4, seed 0"
    assert request_.split_other(data) is None and request_.domain_cells(data, None) == []
    with pytest.raises(EfxError, match="both domains are called law after their files: rename a file"):
        replace(asked, other_data=(str(law),)).split_other(data)
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "one"}\n')
    with pytest.raises(EfxError, match=r"too few to hold any out \(20 at least\): pass more of them, one a record$"):
        replace(asked, other_data=(str(few),)).split_other(data)
