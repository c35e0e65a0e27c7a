"""Recovery, rivals and intervals are those that the report says they are."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from efx_plugin.evaluate import report as module
from efx_plugin.evaluate.cell import CorpusLosses
from efx_plugin.evaluate.report import Failure, build
from tests.support.findings import domain_finding, finding, some_findings


@pytest.fixture
def findings():
    return some_findings()


def lines(findings):
    return {(line.pipeline, line.sparsity): line for line in build(findings, []).lines}


def test_recovery_is_that_of_the_dense_expert(findings):
    found = lines(findings)
    assert found["lora", ""].corpora["law"].recovery == pytest.approx(100)
    assert found["base", ""].corpora["law"].recovery == pytest.approx(100 * 20 / 30)
    assert found["lora+expert", "50 %"].corpora["law"].recovery == pytest.approx((2000 / 21 + 2000 / 23) / 2)


def test_without_the_dense_expert_there_is_no_recovery(findings):
    without = [one for one in findings if one.cell.pipeline != "lora"]
    assert lines(without)["base", ""].corpora["law"].recovery is None


def test_the_dense_expert_of_the_same_seed_is_the_reference():
    adapters = [{"adapter": Path(f"adapters/{seed}"), "seed": seed} for seed in (0, 1)]
    found = [finding("lora", 10.0 * (1 + one["seed"]), **one) for one in adapters]
    found += [finding("lora+expert", 40.0, sparsity=0.5, **one) for one in adapters]
    recoveries = {row["seed"]: row["recovery"] for row in build(found, []).rows if row["pipeline"] == "lora+expert"}
    assert recoveries == {0: pytest.approx(25), 1: pytest.approx(50)}


@pytest.mark.parametrize(
    ("pipeline", "sparsity", "rival"),
    [
        ("lora+expert", "50 %", "lora+sparsegpt"),
        ("lora+wanda", "50 %", "lora+sparsegpt"),
        ("lora+sparsegpt", "50 %", "lora+sparsegpt"),
        ("lora+sparsegpt", "60 %", "lora+sparsegpt"),
        ("lora+expert+w8", "50 %", "lora+w4a16"),
        ("lora+w8a16", "", None),
        ("lora", "", None),
    ],
)
def test_the_best_rival_is_of_the_same_family_and_sparsity(findings, pipeline, sparsity, rival):
    found = lines(findings)[pipeline, sparsity].corpora["law"].rival
    assert (found and found.name) == rival


def test_the_difference_is_that_of_the_log_perplexities(findings):
    interval = lines(findings)["lora+expert", "50 %"].corpora["law"].rival.interval
    assert interval.difference == pytest.approx((math.log(21 / 26) + math.log(23 / 28)) / 2)
    assert interval.low <= interval.difference <= interval.high < 0
    assert lines(findings)["lora+sparsegpt", "50 %"].corpora["law"].rival.interval is None


def test_without_the_same_documents_there_is_no_interval(findings):
    other = next(one for one in findings if one.cell.pipeline == "lora+sparsegpt" and one.cell.seed == 1)
    result = replace(other.result, corpora={"law": CorpusLosses([5.0], [2])})
    found = [one for one in findings if one.cell.pipeline != "lora+wanda"]
    found[found.index(other)] = replace(other, result=result)
    rival = lines(found)["lora+expert", "50 %"].corpora["law"].rival
    assert rival.name == "lora+sparsegpt" and rival.interval is None


def test_lines_are_means_over_seeds_with_their_spread(findings):
    line = lines(findings)["lora+expert", "50 %"]
    assert (line.seeds, line.seconds, line.notes) == (2, 1.5, ("seed 0: note of seed 0", "seed 1: note of seed 1"))
    assert (line.corpora["law"].perplexity, line.corpora["law"].spread) == (pytest.approx(22), pytest.approx(2**0.5))


def test_the_report_is_json_with_the_keys_that_readers_expect(findings):
    report = json.loads(json.dumps(build(findings, [Failure("a cell", "a reason", "a log")]).as_json()))
    assert set(report) == {"rows", "summary"} and len(report["rows"]) == len(findings)
    keys = "model pipeline sparsity corpus seed perplexity recovery accuracy bits_per_weight seconds peak_mb"
    assert set(keys.split()) <= report["rows"][0].keys()
    assert report["summary"]["failures"] == [{"label": "a cell", "reason": "a reason", "log": "a log"}]
    assert "best rival" in report["summary"]["definitions"]


def test_masks_of_one_sparsity_are_compared(findings, tmp_path):
    bits = np.array([[0b11110000]], np.uint8)
    np.savez(tmp_path / "a.npz", q=bits)
    np.savez(tmp_path / "b.npz", q=np.array([[0b11000011]], np.uint8))
    found = [
        finding("lora+wanda", 30.0, sparsity=0.5, masks=tmp_path / "a.npz"),
        finding("lora+expert", 20.0, sparsity=0.5, masks=tmp_path / "b.npz"),
        finding("lora+sparsegpt", 20.0, sparsity=0.6, masks=tmp_path / "b.npz"),
    ]
    (pair,) = build(found, []).overlaps
    assert (pair["of"], pair["and"]) == ("lora+wanda 50 %", "lora+expert 50 %")
    assert pair["layers"] == {"q": pytest.approx(2 / 6)}


def test_masks_of_domains_are_in_the_summary(findings):
    report = build(findings, [], [domain_finding()])
    (found,) = json.loads(json.dumps(report.as_json()))["summary"]["domains"]
    assert (found["domains"], found["pipeline"], found["sparsity"]) == (["law", "health"], "lora+expert", "50 %")
    assert len(found["overlaps"]) == 6 and len(found["cross"]) == 8
    assert report.cells == len(findings) + 1 and "masks of domains" in module.DEFINITIONS


def test_a_report_on_nothing_is_empty():
    assert build([], []).rows == [] and module.DEFINITIONS
