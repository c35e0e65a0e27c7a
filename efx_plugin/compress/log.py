"""The log of `efx prune`, which is llm-compressor's."""

from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record


def show_missing_accelerator_once() -> None:
    """Mark llm-compressor's warning that there is no accelerator as a line that its log shows once.

    It warns at every look, four times in a run and first when it is imported: call this before.
    """
    logger.configure(patcher=_mark)


def _mark(record: "Record") -> None:
    if record["name"] == "llmcompressor.utils.dev":
        record["extra"]["log_once"] = True
