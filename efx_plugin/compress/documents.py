"""The records of a file or a data set, each with the place where it stands. Nothing here imports torch.

Files are read by hand rather than with `datasets`, which names neither line nor encoding of what it cannot read and
parses a whole file before it gives the first record.
"""

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from efx_plugin.compress.request import is_hub_name, kind_of_data
from efx_plugin.errors import EfxError, one_line

_GZIP = b"\x1f\x8b"
_BLANKS = " \t\r\n"
_BYTE_ORDER_MARKS = {  # the longer first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Document:
    """One record.

    Attributes:
        place: where it stands, such as "line 3 of legal.jsonl".
        fields: its values by name.
    """

    place: str
    fields: dict[str, Any]


def read_documents(named: str) -> Iterator[Document]:
    """The records of a file, or of the split `train` of a data set on the hub, one after the other.

    Args:
        named: a path that ends in .txt (a document per line, as field `text`), .jsonl or .json (an object per line, or
            a list of objects), .csv (with a header) or .parquet, each perhaps followed by .gz; or OWNER/NAME on the
            hub.

    Raises:
        EfxError: naming file, line and cause, once reading comes to what cannot be read.
    """
    if is_hub_name(named):
        return _hub(named)
    path = Path(named)
    readers: dict[str | None, Callable[[BufferedIOBase, Path], Iterator[Document]]] = {
        ".txt": _text,
        ".json": _json,
        ".jsonl": _json_lines,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    return _explained(path, readers[kind_of_data(path)])


def content_of(document: Document, text_field: str | None = None) -> str | list[dict[str, Any]]:
    """The text of a record, or its messages.

    Of each record the field `text` is taken; else `messages`, a conversation; else `prompt` and `completion`, both
    text, which are joined, or both messages.

    Args:
        text_field: the field to take in place of those, text or messages.

    Raises:
        EfxError: the record has no such field, or something else in it.
    """
    content: Any = _field(document, text_field)
    if isinstance(content, list) and content and all(isinstance(one, dict) for one in content):
        _check_messages(content, document)
    elif not isinstance(content, str):
        raise EfxError(f"the text in {document.place} is {describe(content)}: make it text, or leave the record out")
    result: str | list[dict[str, Any]] = content
    return result


def _field(document: Document, text_field: str | None) -> Any:
    fields = document.fields
    if text_field is not None:
        if text_field not in fields:
            raise EfxError(f"{document.place} has no field `{text_field}`, only {_names(fields)}: name one of these")
        return fields[text_field]
    if "text" in fields:
        return fields["text"]
    if "messages" in fields:
        return fields["messages"]
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if type(prompt) is not type(completion) or not isinstance(prompt, str | list):
            raise EfxError(
                f"prompt and completion in {document.place} are {describe(prompt)} and {describe(completion)}: "
                "make both of them text, or lists of messages"
            )
        return prompt + completion
    raise EfxError(
        f"{document.place} has no field `text`, `messages` or `prompt` and `completion`, only {_names(fields)}: name "
        "the one that holds the text with --text-field"
    )


def _check_messages(messages: list[dict[str, Any]], document: Document) -> None:
    for message in messages:
        if not isinstance(message.get("role"), str) or not (
            isinstance(message.get("content"), str | list) or message.get("tool_calls")
        ):
            raise EfxError(
                f"a message in {document.place} has no role and content, only {_names(message)}: write it as "
                '{"role": "user", "content": "..."}'
            )


def _names(fields: dict[str, Any]) -> str:
    """The names of the fields that hold anything."""
    return ", ".join(str(name) for name, value in fields.items() if value is not None) or "none at all"


def _explained(path: Path, read: Callable[[BufferedIOBase, Path], Iterator[Document]]) -> Iterator[Document]:
    empty = True
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            if stream.peek(2)[:2] == _GZIP:
                raise EfxError(f"{path} is compressed with gzip: rename it to {path.name}.gz")
            for document in read(stream, path):
                empty = False
                yield document
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise EfxError(f"{path} is no complete gzip file ({one_line(error)}): compress it anew") from error
    except OSError as error:
        raise EfxError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    if empty:
        raise EfxError(f"{path} is empty: pass a file with text of the domain")


def _lines(stream: BufferedIOBase, path: Path) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, 1):
        yield number, _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, number, path)


def _decode(raw: bytes, number: int, path: Path) -> str:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if number == 1 and raw.startswith(mark)), None)
    if encoding is None and b"\0" in raw:
        encoding = "UTF-16 or UTF-32"
    if encoding is None:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{raw[error.start]:02x} is not UTF-8"
            encoding = f"an encoding of one byte per letter, such as {_one_byte_encoding(raw)}"
    else:
        wrong = "this is not UTF-8"
    raise EfxError(f"line {number} of {path}: {wrong}, it looks like {encoding}: convert the file to UTF-8")


def _one_byte_encoding(raw: bytes) -> str:
    """Latin-1 has control characters from 0x80 to 0x9f, where Windows-1252 has quotation marks and dashes."""
    return "Windows-1252" if any(0x80 <= byte < 0xA0 for byte in raw) else "Latin-1"


def _text(stream: BufferedIOBase, path: Path) -> Iterator[Document]:
    for number, line in _lines(stream, path):
        if line.strip():
            yield Document(f"line {number} of {path}", {"text": line.rstrip("\r\n")})


def _json_lines(stream: BufferedIOBase, path: Path) -> Iterator[Document]:
    for number, line in _lines(stream, path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EfxError(f"line {number} of {path} is broken JSON: {_reason(error)}; correct it") from error
        yield _record(value, f"line {number} of {path}")


def _json(stream: BufferedIOBase, path: Path) -> Iterator[Document]:
    """Objects one after the other, or in a list, each with the line that it starts in."""
    text = "".join(line for _, line in _lines(stream, path))
    decoder = json.JSONDecoder()
    position = _skip(text, 0, _BLANKS)
    listed = text.startswith("[", position)
    line, counted = 1, 0
    position += listed
    while (position := _skip(text, position, _BLANKS + "," * listed)) < len(text) or listed:
        if listed and text.startswith("]", position):
            position, listed = position + 1, False
            continue
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise EfxError(f"line {error.lineno} of {path} is broken JSON: {_reason(error)}; correct it") from error
        except (ValueError, RecursionError) as error:
            raise EfxError(f"line {line} of {path} is broken JSON: {_reason(error)}; correct it") from error
        yield _record(value, f"line {line} of {path}")


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:].removesuffix(' at')} at character {error.colno}"
    return one_line(error)


def _record(value: Any, place: str) -> Document:
    if not isinstance(value, dict):
        raise EfxError(f'{place} holds {describe(value)}, not an object: write it as {{"text": "..."}}')
    return Document(place, value)


def describe(value: Any) -> str:
    """What a value is, in words."""
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing (null)" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _csv(stream: BufferedIOBase, path: Path) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)
    decoded = (_decode(raw.removeprefix(codecs.BOM_UTF8), number, path) for number, raw in enumerate(stream, 1))
    rows = csv.DictReader(decoded, strict=True)
    last = 1  # the line that the record before ended in
    try:
        for row in rows:
            last = rows.line_num
            if None in row or None in row.values():
                raise EfxError(
                    f"line {last} of {path} has not the {len(rows.fieldnames or ())} values that the header names: put "
                    "texts in quotes"
                )
            yield Document(f"line {last - sum(value.count(chr(10)) for value in row.values())} of {path}", dict(row))
    except csv.Error as error:
        raise EfxError(f"line {last + 1} of {path} is broken CSV: {one_line(error)}; correct it") from error


def _parquet(stream: BufferedIOBase, path: Path) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield Document(f"row {number} of {path}", record)
    except (pyarrow.ArrowException, OSError) as error:
        raise EfxError(f"{path} is no Parquet file that can be read ({one_line(error)}): copy it anew") from error


def _hub(name: str) -> Iterator[Document]:
    import datasets

    with _hub_errors(name):
        records = iter(datasets.load_dataset(name, split="train", streaming=True))
    number = 0
    while True:
        with _hub_errors(name):
            record = next(records, None)
        if record is None:
            return
        number += 1
        yield Document(f"row {number} of {name}", dict(record))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no network, no such data set, several configurations, a script, ...
        raise EfxError(
            f"there is no file {name}, and as a data set on the hub it cannot be read ({one_line(error)}): download it "
            "and pass a file"
        ) from error
