"""A report as one HTML file that needs nothing else: tables, pictures, and what the numbers mean."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from efx_plugin.errors import EfxError
from efx_plugin.evaluate.data import write_atomically
from efx_plugin.evaluate.report import DEFINITIONS, Report
from efx_plugin.evaluate.table import TextTable, domain_tables, tables

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th { vertical-align: bottom; border-bottom: 2px solid #888 }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
tr.ours { font-weight: 600; background: #eef6ee }
figure { margin: 2rem 0 } svg { max-width: 100%; height: auto } figcaption { font-weight: 600 }
dt { font-weight: 600 } .failed { color: #a00 }
"""


def refuse_html(path: Path) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        EfxError: matplotlib is missing, or the file cannot be where it is to be.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise EfxError("--html draws with matplotlib: pip install 'efx-plugin[plot]'")
    if path.is_dir():
        raise EfxError(f"{path} is a directory: pass --html FILE")
    if not path.absolute().parent.is_dir():
        raise EfxError(f"there is no directory {path.absolute().parent}: make it, or pass --html another FILE")


def write_html(report: Report, path: Path) -> None:
    """Write the file; it appears only when complete.

    Raises:
        EfxError: see `refuse_html`.
    """
    refuse_html(path)
    write_atomically(path, page(report).encode())


def page(report: Report) -> str:
    """The HTML text."""
    from efx_plugin.evaluate.plots import pictures

    body = ["<h1>Sparse experts and their rivals</h1>"]
    body += [_failures(report)] if report.failures else []
    body += [_table(table) for table in [*tables(report, every_corpus=True), *domain_tables(report)]]
    body += [f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in pictures(report).items()]
    body.append("<h2>What the numbers are</h2>" + _definitions(DEFINITIONS.items()))
    conditions = (
        (name, ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in report.conditions.items()
    )
    body.append("<h2>Conditions</h2>" + _definitions((name, str(value)) for name, value in conditions))
    head = f"<meta charset='utf-8'><title>efx compare</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"


def _table(table: TextTable) -> str:
    head = "".join(f"<th>{escape(name).replace('/', '<br>')}</th>" for name in table.header)
    rows = [
        f"<tr{' class=ours' if ours else ''}>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>"
        for row, ours in zip(table.rows, table.ours, strict=True)
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f"<h2>{escape(table.title)}</h2><div class='wide'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>" + (f"<ul>{notes}</ul>" if notes else "")
    )


def _failures(report: Report) -> str:
    items = "".join(f"<li>{escape(one.label)}: {escape(one.reason)}</li>" for one in report.failures)
    return f"<div class='failed'><h2>Failed</h2><ul>{items}</ul></div>"


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs) + "</dl>"
