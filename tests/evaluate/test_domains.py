"""A comparison of domains is a cell: its key stands for what its result depends on, and its result for whole masks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from efx_plugin.evaluate.data import Corpus, write_data
from efx_plugin.evaluate.domains import Domain, DomainCell, DomainResult, halves_and_domains
from efx_plugin.evaluate.run_cell import compare_masks
from tests.support.findings import domain_finding
from tests.support.pipeline_task import tiny_task


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> DomainCell:
    """Two domains with one adapter: counting, forwards and backwards."""
    folder = tmp_path_factory.mktemp("domains")
    task = tiny_task(folder)
    domains = []
    for name, step in (("forwards", 1), ("backwards", -1)):
        texts = [" ".join(f"t{3 + (begin + step * n) % 61}" for n in range(32)) for begin in range(24)]
        parts = texts[:12], texts[12:18], [Corpus(name, texts[18:])]
        domains.append(Domain(task.adapter, write_data(folder / "data", name, *parts, samples=8, length=32)))
    return DomainCell(task.model, tuple(domains), "lora+wanda", 0.5)


def test_a_cell_survives_json_and_says_what_it_compares(cell):
    assert DomainCell.from_json(json.loads(json.dumps(cell.as_json()))) == cell
    assert cell.label == "masks of forwards and backwards by lora+wanda 50 %, seed 0"


@pytest.mark.parametrize(
    "change", [{"sparsity": 0.6}, {"mask_structure": "2:4"}, {"seed": 1}, {"pipeline": "lora+expert"}]
)
def test_the_key_changes_with_every_argument(cell, change):
    assert replace(cell, **change).key() != cell.key()


def test_the_key_changes_with_the_text_that_is_used_and_with_no_other(cell, tmp_path):
    def changed(**parts: Path) -> DomainCell:
        first, second = cell.domains
        return replace(cell, domains=(replace(first, data=replace(first.data, **parts)), second))

    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "t3"}))
    assert changed(calibration=other).key() != cell.key()
    assert changed(training=other).key() == cell.key()
    assert replace(cell, domains=cell.domains[::-1]).key() != cell.key()


def test_masks_are_compared_in_halves_and_crosswise(cell, tmp_path):
    found = compare_masks(cell, tmp_path)
    assert DomainResult.from_json(json.loads(json.dumps(found.as_json()))).cross[0]["mask"] == ["forwards", 1]
    assert len(found.overlaps) == 6 and len(found.cross) == 8 and not list(tmp_path.iterdir())
    assert all(
        0 < one["iou"] <= 1 and len(one["by_block"]) == 2 and len(one["by_projection"]) == 7 for one in found.overlaps
    )
    assert all(row["perplexity"] > 1 for row in found.cross)


def test_pairs_are_told_apart_by_domain():
    within, across = halves_and_domains(domain_finding().result.overlaps)
    assert {name: len(pairs) for name, pairs in within.items()} == {"law": 1, "health": 1}
    assert {names: len(pairs) for names, pairs in across.items()} == {("law", "health"): 4}


def test_a_report_says_what_a_foreign_mask_costs():
    assert domain_finding().as_json()["foreign_over_own"] == {"law": pytest.approx(1.1), "health": pytest.approx(1.1)}
