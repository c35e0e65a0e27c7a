"""The table says all that a line holds, once."""

import io
from dataclasses import replace

from rich.console import Console

from efx_plugin.evaluate import table as module
from efx_plugin.evaluate.report import build
from efx_plugin.evaluate.speed import Speed
from efx_plugin.evaluate.table import domain_tables, show, tables
from tests.support.findings import domain_finding, finding, some_findings


def test_a_table_for_each_model_and_domain():
    (table,) = tables(build(some_findings(), []), every_corpus=False)
    assert table.title == "tiny, law"
    cells = dict(zip(table.header, table.rows[[row[0] for row in table.rows].index("lora+expert+w8")], strict=True))
    assert cells["sparsity"] == "50 %" and cells["perplexity"] == "22.50" and cells["recovery %"] == "88.89"
    assert cells["bits/stored"] == "5.10" and cells["zeros/%"] == "50.0" and cells["seeds"] == "1"


def test_rows_come_in_the_order_of_the_registry_within_a_sparsity():
    (table,) = tables(build(some_findings(), []), every_corpus=False)
    assert [row[0] for row in table.rows] == [
        "base",
        "lora",
        "lora+w8a16",
        "lora+w4a16",
        "lora+wanda",
        "lora+sparsegpt",
        "lora+expert",
        "lora+expert+w8",
        "lora+sparsegpt",
    ]
    assert next(row for row, ours in zip(table.rows, table.ours, strict=True) if ours)[0] == "lora+expert"


def test_arguments_tell_lines_apart():
    lines = [finding("lora+wanda", 30.0, sparsity=0.5, arguments=(("rate", rate),)) for rate in (1, 2)]
    (table,) = tables(build(lines, []), every_corpus=True)
    assert [row[0] for row in table.rows] == ["lora+wanda (rate=1)", "lora+wanda (rate=2)"]


def test_groups_are_lines_and_rivals_by_name():
    groups = {128: 24.0, 64: 23.0, 32: 22.0}
    found = [finding("lora+w3", perplexity, arguments=(("group", group),)) for group, perplexity in groups.items()]
    found.append(finding("lora+expert+w4", 23.0, sparsity=0.5, noise=0.1))
    (table,) = tables(build(found, []), every_corpus=True)
    assert [row[0] for row in table.rows] == ["lora+w3 g128", "lora+w3 g64", "lora+w3 g32", "lora+expert+w4"]
    assert table.rows[-1][table.header.index("to best rival")].endswith("lora+w3 g32")


def test_a_narrow_terminal_gets_every_figure(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda: Console(file=output, width=60, force_terminal=True))
    show(build(some_findings(), []))
    assert "lora+expert+w8" in output.getvalue() and "…" not in output.getvalue()


def test_a_pipe_gets_the_table_whole(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda: Console(file=output))
    show(build(some_findings(), []))
    text = output.getvalue()
    assert "lora+expert+w8" in text and "…" not in text
    assert "lora+wanda 50 %, lora+sparsegpt 50 %, lora+expert 50 %: seed 1: note of seed 1" in text
    assert "base, lora, lora+w8a16 and 3 more: note of seed 0" in text


def test_speeds_have_columns_where_they_were_measured():
    report = replace(build(some_findings(), []), speeds={"lora+expert 50 %": {8: Speed(120.0, 1.5)}})
    (table,) = tables(report, every_corpus=False)
    assert dict(zip(table.header, table.rows[6], strict=True))["tokens per s/at 8"] == "120.0 (1.50)"
    assert dict(zip(table.header, table.rows[0], strict=True))["tokens per s/at 8"] == ""


def test_masks_of_domains_have_a_table_of_overlaps_and_one_of_perplexities():
    overlaps, cross = domain_tables(build(some_findings(), [], [domain_finding()]))
    assert overlaps.header == ("masks", "pairs", "all layers", "self_attn/q_proj", "mlp/up_proj")
    assert [row[:3] for row in overlaps.rows] == [
        ("law, on halves of its text", "1", "0.800"),
        ("health, on halves of its text", "1", "0.800"),
        ("law and health", "4", "0.600"),
        ("by chance", "4", "0.300"),
    ]
    assert overlaps.notes == ("a note on text",)
    assert cross.header[2] == "mask of/law, half 1"
    assert cross.rows[0] == ("law expert", "law", "20.00", "20.00", "22.00", "22.00", "1.100")
    assert cross.rows[1] == ("health expert", "law", "22.00", "22.00", "20.00", "20.00", "1.100")


def test_without_a_second_domain_there_are_no_such_tables():
    assert domain_tables(build(some_findings(), [])) == []
