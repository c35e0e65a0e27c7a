"""The files that our tasks ask questions of."""

import json
from pathlib import Path
from typing import Any

from efx_plugin.errors import EfxError


def choices(file: str, data: str | None = None, **_metadata: Any) -> Any:
    """A `datasets.DatasetDict` with the questions of a file as its "test" part, as lm-eval wants it.

    Args:
        file: its name: JSON, a record a line, with `text`, `choices` and `gold`.
        data: the folder that it lies in.
        _metadata: what else lm-eval tells every task.

    Raises:
        EfxError: there is no such file, or a record is no question.
    """
    from datasets import Dataset, DatasetDict

    if data is None:
        raise EfxError(f"the task asks questions of {file}: say where it lies, with --task-data DIR")
    path = Path(data) / file
    if not path.is_file():
        raise EfxError(f"there is no {path}, which the task asks questions of: pass its folder as --task-data")
    records = [_question(line, f"{path}, line {number}") for number, line in enumerate(path.open(), 1) if line.strip()]
    if not records:
        raise EfxError(f"{path} holds no question")
    return DatasetDict({"test": Dataset.from_list(records)})


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        text, answers, gold = str(record["text"]), [str(answer) for answer in record["choices"]], int(record["gold"])
    except (ValueError, TypeError, KeyError) as error:
        raise EfxError(f"{where}: a question is a JSON object with text, choices and gold ({error!r})") from error
    if not 0 <= gold < len(answers):
        raise EfxError(f"{where}: gold is {gold}, and the {len(answers)} choices are numbered from 0")
    return {"text": text, "choices": answers, "gold": gold}
