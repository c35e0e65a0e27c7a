"""The HTML file holds everything, asks for nothing from elsewhere, and says what it was given and nothing more."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib import image

from efx_plugin.errors import EfxError
from efx_plugin.evaluate.html import page, refuse_html, write_html
from efx_plugin.evaluate.report import Failure, build
from tests.support.findings import domain_finding, finding, some_findings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


class Reader(HTMLParser):
    """The texts of the table's cells, and the addresses that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "path", "use", "image", "rect"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def report():
    return build(some_findings(), [Failure("a <cell>", "the culprit & the remedy", "log")])


@pytest.fixture(scope="module")
def html(report):
    return page(report)


def test_every_line_is_in_the_table(html, report):
    rows = {(row[0], row[1]): row for row in Reader(html).rows}
    assert {(line.pipeline, line.sparsity) for line in report.lines} == set(rows) - {("pipeline", "sparsity")}
    assert "22.00 ± 1.4" in rows["lora+expert", "50 %"] and "best rival" in rows["lora+sparsegpt", "50 %"]
    assert re.fullmatch(r"-0\.2.. \[-0\..*, -0\..*\]", rows["lora+expert", "50 %"][4])
    assert rows["lora+expert+w8", "50 %"][4].endswith("lora+w4a16")


def test_elements_are_closed_and_nothing_is_fetched(html):
    reader = Reader(html)
    assert not reader.open
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    assert "<script" not in html and "@import" not in html


def test_pictures_are_sound_and_show_every_pipeline(html, report):
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]
    assert len(pictures) == 5
    texts = [{element.text for element in picture.iter() if element.tag.endswith("text")} for picture in pictures]
    assert {line.pipeline for line in report.lines} <= texts[0] and {line.pipeline for line in report.lines} <= texts[1]
    assert re.findall("<figcaption>(.*?)</figcaption>", html)[1].endswith("as stored, sparse and quantized together")


def test_masks_of_domains_are_in_tables_and_a_picture():
    html = page(build(some_findings(), [], [domain_finding()]))
    rows = {row[0]: row for row in Reader(html).rows}
    assert rows["law and health"][2] == "0.600" and rows["law expert"][-1] == "1.100"
    assert html.count("<svg") == 6 and "masks of law and health by lora+expert 50 %, overlap by decoder block" in html


def test_what_users_wrote_is_text_and_not_markup(html):
    assert "a &lt;cell&gt;: the culprit &amp; the remedy" in html and "<cell>" not in html


def test_without_anything_pruned_there_are_no_empty_pictures():
    assert page(build([finding("lora", 20.0)], [])).count("<svg") == 3


def test_what_could_not_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(EfxError, match="is a directory: pass --html FILE"):
        refuse_html(tmp_path)
    with pytest.raises(EfxError, match="there is no directory"):
        refuse_html(tmp_path / "none" / "report.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium-headless-shell")
def test_chromium_shows_table_and_pictures_without_errors(report, tmp_path):
    write_html(report, tmp_path / "report.html")
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1300,3600",
        "--enable-logging=stderr",
    ]
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, *options, f"--screenshot={shot}", (tmp_path / "report.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "CONSOLE" not in result.stderr
    pixels = image.imread(shot)[:, :, :3]
    assert pixels.shape[:2] == (3600, 1300)
    inked = (pixels.min(axis=2) < 0.9).any(axis=1)
    assert inked[:400].sum() > 100  # the table
    assert inked[400:2800].sum() > 1200  # the pictures
    colours = {tuple(colour) for colour in (pixels[400:2800] * 255).astype(int).reshape(-1, 3)[::7].tolist()}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # the first two lines of a picture
    dom = subprocess.run(
        [CHROMIUM, *options[:2], "--dump-dom", (tmp_path / "report.html").as_uri()], capture_output=True
    )
    assert Path(shot).is_file() and dom.stdout.count(b"<svg") == 5 and dom.stdout.count(b"<tr") == len(report.lines) + 1
