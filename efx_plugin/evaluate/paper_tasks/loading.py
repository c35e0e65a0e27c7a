"""Where the questions of the paper's tasks come from."""

from pathlib import Path
from typing import Any

from efx_plugin.errors import EfxError, one_line

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load(
    file: str,
    data: str | None = None,
    hub: str | None = None,
    split: str = "test",
    note: str = "",
    options: dict[str, Any] | None = None,
    **_metadata: Any,
) -> Any:
    """A `datasets.DatasetDict` with the questions as its "test" part, as lm-eval wants it.

    Args:
        file: name of a local file without its ending, which is .jsonl, .json, .parquet or .csv.
        data: the folder that it lies in, if it does.
        hub: the data set's name on the hub; None where it is on none.
        split: its part on the hub.
        note: where to get a file that is on no hub.
        options: further arguments of `datasets.load_dataset` for the hub.
        _metadata: what else lm-eval tells every task.

    Raises:
        EfxError: there is neither such a file nor a hub within reach.
    """
    import datasets

    if data is not None:
        for ending, kind in _KINDS.items():
            if (path := Path(data) / f"{file}{ending}").is_file():
                return datasets.load_dataset(kind, data_files={"test": str(path)})
    local = f"{file}.jsonl with the fields of docs/evaluation.md in a folder that --task-data names"
    if hub is None:
        raise EfxError(f"{note}: put {local}")
    try:
        return datasets.DatasetDict({"test": datasets.load_dataset(hub, split=split, **(options or {}))})
    except Exception as error:  # of the network, the hub or the data set's own code
        raise EfxError(f"{hub} is not to be had from the hub ({one_line(error)}): put {local}") from error
