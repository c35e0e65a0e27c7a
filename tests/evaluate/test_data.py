"""The parts of a domain share no document, hold every other one, and are the same every time."""

import json
from pathlib import Path

import pytest

from efx_plugin.errors import EfxError
from efx_plugin.evaluate.data import Corpus, split_files, write_data


def write(path: Path, documents: list) -> str:
    path.write_text("".join(json.dumps(one if isinstance(one, dict) else {"text": one}) + "\n" for one in documents))
    return str(path)


def texts(path: Path) -> list:
    return [json.loads(line).get("text") or json.loads(line)["messages"] for line in path.read_text().splitlines()]


@pytest.fixture
def documents():
    return [f"document number {number}" for number in range(100)]


def test_a_file_is_split_by_document(tmp_path, documents):
    split = split_files(tmp_path / "parts", [write(tmp_path / "legal.jsonl", documents)], length=64)
    (heldout,) = split.data.heldout
    data = split.data
    parts = [texts(part) for part in (heldout.path, data.calibration, data.training, data.validation)]
    assert [len(part) for part in parts] == [15, 25, 54, 6]
    assert sorted(text for part in parts for text in part) == sorted(documents)
    assert (split.data.name, heldout.name, split.data.length, split.notices) == ("legal", "legal", 64, ())


def test_the_split_is_the_same_every_time(tmp_path, documents):
    file = write(tmp_path / "legal.jsonl", documents)
    again = [split_files(tmp_path / "parts", [file]).data for _ in range(2)]
    assert again[0] == again[1]


def test_copies_of_a_document_do_not_get_into_two_parts(tmp_path, documents):
    copies = [f"  {document}\n" for document in documents]
    split = split_files(tmp_path / "parts", [write(tmp_path / "legal.jsonl", documents + copies)])
    data = split.data
    parts = [texts(part) for part in (data.heldout[0].path, data.calibration, data.training, data.validation)]
    assert len({" ".join(text.split()) for part in parts for text in part}) == sum(map(len, parts)) == 100
    assert "100 of the 200 documents" in split.notices[0]


def test_every_file_is_a_corpus(tmp_path, documents):
    files = [write(tmp_path / f"{name}.jsonl", [f"{name} {one}" for one in documents]) for name in ("law", "care")]
    data = split_files(tmp_path / "parts", files).data
    assert data.name == "law+care"
    assert [(one.name, len(texts(one.path))) for one in data.heldout] == [("law", 15), ("care", 15)]
    assert len(texts(data.calibration)) == 50


def test_held_out_files_of_their_own_are_corpora_without_what_is_in_the_data(tmp_path, documents):
    held = write(tmp_path / "general.jsonl", ["something else", documents[3]])
    split = split_files(tmp_path / "parts", [write(tmp_path / "law.jsonl", documents[:5])], [held])
    assert texts(split.data.heldout[0].path) == ["something else"] and split.data.heldout[0].name == "general"
    parts = (split.data.calibration, split.data.training, split.data.validation)
    assert sorted(text for part in parts for text in texts(part)) == documents[:5]
    assert "1 of the 2 documents" in split.notices[0]


def test_of_a_single_training_document_none_is_kept_for_validation(tmp_path, documents):
    held = write(tmp_path / "general.jsonl", ["something else"])
    data = split_files(tmp_path / "parts", [write(tmp_path / "law.jsonl", documents[:2])], [held]).data
    assert data.validation is None and len(texts(data.training)) == 1


def test_messages_stay_messages(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"question {number}"}]} for number in range(30)]
    data = split_files(tmp_path / "parts", [write(tmp_path / "chat.jsonl", records)]).data
    assert texts(data.training)[0][0]["role"] == "user"


@pytest.mark.parametrize(
    ("documents", "heldout", "said"),
    [
        (["one", "two"], None, r"has 2 different documents, too few to hold any out .* or --heldout FILE"),
        (["one"] * 100, None, r"has 1 different documents"),
        (["one", "two"], ["two", "one"], "every document of .* is in --data as well"),
        (["one"], ["two"], "has one document"),
        ([{"body": "text"}] * 30, None, "--text-field"),
    ],
)
def test_data_that_cannot_be_split_is_refused(tmp_path, documents, heldout, said):
    file = write(tmp_path / "law.jsonl", documents)
    with pytest.raises(EfxError, match=said):
        split_files(tmp_path / "parts", [file], [write(tmp_path / "held.jsonl", heldout)] if heldout else [])


def test_written_parts_may_not_share_a_document(tmp_path):
    corpora = [Corpus("law", ["c"]), Corpus("general", ["d", "e"])]
    data = write_data(tmp_path, "law", ["a"], ["b"], corpora, ["f"], samples=4)
    assert [texts(one.path) for one in data.heldout] == [["c"], ["d", "e"]] and data.samples == 4
    assert texts(data.validation) == ["f"] and write_data(tmp_path, "law", ["a"], ["b"], corpora).validation is None
    for known in ("a ", " b"):
        with pytest.raises(EfxError, match="validation document of law is among its calibration or training documents"):
            write_data(tmp_path, "law", ["a"], ["b"], corpora, [known])
    with pytest.raises(EfxError, match="held-out document of law is among"):
        write_data(tmp_path, "law", ["a"], ["b"], corpora, ["c"])
    with pytest.raises(EfxError, match="held-out document of general is among"):
        write_data(tmp_path, "law", ["a"], ["b"], [Corpus("general", ["b "])])
    with pytest.raises(EfxError, match="training of law has no documents"):
        write_data(tmp_path, "law", ["a"], [], [Corpus("general", ["c"])])
