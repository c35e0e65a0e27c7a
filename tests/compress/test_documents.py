"""Records come with the place where they stand, and what cannot be read is named by file, line, cause and encoding."""

import csv
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from efx_plugin.compress.documents import read_documents
from efx_plugin.errors import EfxError

TEXTS = ["one", 'two, with "marks"', "drei: für", "四\nlines"]


def write(path, texts=TEXTS):
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({"text": texts}), sink)
        content = sink.getvalue().to_pybytes()
    elif kind == "csv":
        with (path.parent / "plain").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
        content = (path.parent / "plain").read_bytes()
    elif kind == "json":
        content = json.dumps([{"text": text} for text in texts], indent=2).encode()
    else:
        content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, kind, zipped):
    documents = list(read_documents(str(write(tmp_path / f"domain.{kind}{zipped}"))))
    assert [document.fields["text"] for document in documents] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "places", "texts"),
    [
        ("a.txt", "one\n\n  two \r\n", [1, 3], ["one", "  two "]),
        ("a.jsonl", '\n{"text": "one"}\n\n{"text": "two"}', [2, 4], ["one", "two"]),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', [1, 2], ["one", "two"]),
        ("a.json", '{\n "text": "one"\n}\n', [1], ["one"]),
        ("a.json", '[\n {"text": "one"},\n {\n "text": "two"}\n]\n', [2, 3], ["one", "two"]),
        ("a.csv", 'text\n\n"one\nhalf"\ntwo\n', [3, 5], ["one\nhalf", "two"]),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_record_is_placed_by_its_first_line(tmp_path, name, content, places, texts, mark):
    path = tmp_path / name
    path.write_bytes((mark + content).encode())
    documents = list(read_documents(str(path)))
    assert [document.place for document in documents] == [f"line {number} of {path}" for number in places]
    assert [document.fields["text"] for document in documents] == texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "ok\nfür".encode("latin-1"), "line 2 of .*byte 0xfc is not UTF-8.* such as Latin-1: convert"),
        ("a.txt", "ok\nfür –".encode("cp1252"), "line 2 of .* such as Windows-1252: convert"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1 of .*looks like UTF-16: convert"),
        ("a.txt", "abc".encode("utf-32"), "looks like UTF-32: convert"),
        ("a.txt", "abc".encode("utf-16-le"), "looks like UTF-16 or UTF-32"),
        ("a.csv", "text\nfür\n".encode("latin-1"), "line 2 of .*Latin-1"),
        ("a.json", '[{"text":\n "für"}]'.encode("latin-1"), "line 2 of .*Latin-1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 of .* is broken JSON: expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2 of .* is broken JSON"),
        ("a.json", b'[{"text": "a"}\n', "line 2 of .* is broken JSON"),
        ("a.json", b'[{"text": "a"}]\n]', "line 2 of .* is broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 of .* holds a list, not an object"),
        ("a.json", b'["b"]', "line 1 of .* holds text, not an object"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .* is broken JSON"),
        ("a.csv", b"text,more\na,b\nc\n", "line 3 of .* has not the 2 values"),
        ("a.csv", b'text\n"a', "line 2 of .* is broken CSV"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.csv", b"text\n", "is empty"),
        ("a.parquet", b"PAR1", "is no Parquet file that can be read"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"is compressed with gzip: rename it to a\.jsonl\.gz"),
        ("a.jsonl", b'{"text": "cut', "line 1 of .* is broken JSON: unterminated string starting at character 10"),
        ("a.txt.gz", b"plain text", "is no complete gzip file"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-9], "is no complete gzip file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EfxError, match=words) as refused:
        list(read_documents(str(tmp_path / name)))
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_nothing_is_read_behind_what_was_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nbroken')
    assert next(read_documents(str(path))).fields == {"text": "one"}


def test_a_data_set_that_no_hub_gives_is_refused(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub. Try later")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        EfxError, match=r"no file owner/name, .*\(Couldn't reach the hub\): download it and pass a file"
    ):
        list(read_documents("owner/name"))


def test_a_data_set_on_the_hub_gives_its_rows(monkeypatch):
    import datasets

    rows = [{"text": "one"}, {"text": "two"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: iter(rows))
    assert [(one.place, one.fields) for one in read_documents("owner/name")] == [
        ("row 1 of owner/name", rows[0]),
        ("row 2 of owner/name", rows[1]),
    ]
