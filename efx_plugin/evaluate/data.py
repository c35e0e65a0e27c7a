"""The text of a domain for a comparison, in parts that share no document: calibration, training, validation, held-out.

A part is a file with a JSON record a line, called by the hash of its content, so that the same text is the same file.
Nothing here imports torch.
"""

import hashlib
import json
import math
import os
import random
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efx_plugin.compress.documents import content_of, read_documents
from efx_plugin.errors import EfxError
from efx_plugin.evaluate.cell import Data, HeldOut

# A record that `content_of` understands: {"text": ...} or {"messages": [...]}.
Record = Mapping[str, Any]

# Parts of the documents of a file; training gets what is left, but for a part of it.
_HELDOUT, _CALIBRATION = 0.15, 0.25
_VALIDATION = 0.1
# With fewer documents than this in a file, three of them would be held out, and no interval over those says anything.
_FEWEST = 20


@dataclass(frozen=True)
class Corpus:
    """Documents under a name."""

    name: str
    documents: list[str]


@dataclass(frozen=True)
class Split:
    """What became of a user's files: the parts, and sentences about what is not as one might expect."""

    data: Data
    notices: tuple[str, ...]


def write_data(
    folder: Path,
    name: str,
    calibration: Sequence[str],
    training: Sequence[str],
    heldout: Sequence[Corpus],
    validation: Sequence[str] = (),
    **amounts: int,
) -> Data:
    """Write the parts of a domain.

    Args:
        folder: where the files go.
        name: what tables call the domain.
        calibration, training: documents.
        heldout: corpora to evaluate on, that of the domain first.
        validation: documents; without, nothing can be trained.
        amounts: `samples`, `length`, `training_tokens`, `heldout_tokens` of `Data`.

    Raises:
        EfxError: a part is empty, or a held-out or validation document is in another part as well, up to blanks.
    """
    seen = {_identity({"text": text}) for text in (*calibration, *training)}
    for text in validation:
        if _identity({"text": text}) in seen:
            raise EfxError(
                f"a validation document of {name} is among its calibration or training documents ({text[:60]!r}): "
                "leave it out of one of them"
            )
    seen |= {_identity({"text": text}) for text in validation}
    for corpus in heldout:
        for text in corpus.documents:
            if _identity({"text": text}) in seen:
                raise EfxError(
                    f"a held-out document of {corpus.name} is among the calibration, training or validation documents "
                    f"of {name} ({text[:60]!r}): leave it out of one of them"
                )
    parts = {"calibration": calibration, "training": training} | {one.name: one.documents for one in heldout}
    if empty := [part for part, documents in parts.items() if not documents]:
        raise EfxError(f"the part {empty[0]} of {name} has no documents: pass some")
    return Data(
        name,
        calibration=_write(folder, [{"text": text} for text in calibration]),
        training=_write(folder, [{"text": text} for text in training]),
        heldout=tuple(HeldOut(one.name, _write(folder, [{"text": text} for text in one.documents])) for one in heldout),
        validation=_write(folder, [{"text": text} for text in validation]) if validation else None,
        **amounts,
    )


def split_files(
    folder: Path,
    files: Sequence[str],
    heldout: Sequence[str] = (),
    *,
    text_field: str | None = None,
    heldout_option: str | None = "--heldout",
    **amounts: int,
) -> Split:
    """Split a user's files by document, always in the same way.

    Of each file 15 % of the different documents are held out and make a corpus. Where `heldout` names files of their
    own, these are the corpora and nothing of `files` is held out. Of the other documents a quarter (of all) is for
    calibration, the rest for training, but for a tenth of it, one document at least, that is for validation. Of a
    single document for training there is no validation part.

    Args:
        folder: where the parts go.
        files, heldout: files or data sets, see `read_documents`.
        text_field: the field to take of each record, see `content_of`.
        heldout_option: what gives `heldout` to the user; None where nothing does.
        amounts: see `write_data`.

    Raises:
        EfxError: a file cannot be read, or has too few documents to hold any out.
    """
    notices: list[str] = []
    names = _names([*files, *heldout])
    rest: list[Record] = []
    corpora: list[tuple[str, list[Record]]] = []
    for file in files:
        records = _different(file, text_field, notices)
        if not heldout and len(records) < _FEWEST:
            other = f", or {heldout_option} FILE with text that nothing was trained on" if heldout_option else ""
            raise EfxError(
                f"{file} has {len(records)} different documents, too few to hold any out ({_FEWEST} at least): pass "
                f"more of them, one a record{other}"
            )
        random.Random(0).shuffle(records)
        held = 0 if heldout else math.ceil(_HELDOUT * len(records))
        if held:
            corpora.append((names[file], records[:held]))
        rest += records[held:]
    known = {_identity(record) for record in rest}
    for file in heldout:
        every = _different(file, text_field, notices)
        records = [record for record in every if _identity(record) not in known]
        if known_ones := len(every) - len(records):
            notices.append(f"{known_ones} of the {len(every)} documents of {file} are in --data as well and left out")
        if not records:
            raise EfxError(f"every document of {file} is in --data as well: pass --heldout text of its own")
        random.Random(0).shuffle(records)
        corpora.append((names[file], records))
    random.Random(0).shuffle(rest)
    if len(rest) < 2:
        raise EfxError(f"{files[0]} has one document, and calibration and training need one each: pass more of them")
    calibration = max(1, round(_CALIBRATION * len(rest) / (1 - (0 if heldout else _HELDOUT))))
    training = rest[calibration:]
    kept = max(1, round(_VALIDATION * len(training))) if len(training) > 1 else 0
    data = Data(
        "+".join(names[file] for file in files),
        calibration=_write(folder, rest[:calibration]),
        training=_write(folder, training[kept:]),
        heldout=tuple(HeldOut(name, _write(folder, records)) for name, records in corpora),
        validation=_write(folder, training[:kept]) if kept else None,
        **amounts,
    )
    return Split(data, tuple(notices))


def _names(files: Sequence[str]) -> dict[str, str]:
    """What tables call each file: its name up to the first dot, or all of it where two would share that."""
    short = {file: Path(file).name.partition(".")[0] or file for file in files}
    times = Counter(short.values())
    return {file: name if times[name] == 1 else file for file, name in short.items()}


def _different(file: str, text_field: str | None, notices: list[str]) -> list[Record]:
    """The documents of a file, each once."""
    records: dict[str, Record] = {}
    count = 0
    for document in read_documents(file):
        content = content_of(document, text_field)
        record: dict[str, Any] = {"text": content}
        if isinstance(content, list):
            record = {"messages": content}
            if tools := document.fields.get("tools"):
                record["tools"] = tools
        if identity := _identity(record):
            count += 1
            records.setdefault(identity, record)
    if len(records) < count:
        notices.append(f"{count - len(records)} of the {count} documents of {file} are copies of others and left out")
    return list(records.values())


def _identity(record: Record) -> str:
    """What makes two documents the same: all but blanks. Empty for one without text."""
    text = record.get("text")
    return " ".join((text if isinstance(text, str) else json.dumps(record, sort_keys=True)).split())


def _write(folder: Path, records: Iterable[Record]) -> Path:
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(
        "utf-8", "surrogatepass"
    )
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.jsonl"
    write_atomically(path, content)
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
