"""`efx eval`: a model directory, sparse or not, on tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efx_plugin.evaluate.tasks.harness import score

if TYPE_CHECKING:
    from efx_plugin.evaluate.tasks.harness import Score


def score_directory(directory: Path | str, tasks: Sequence[str], **options: Any) -> "dict[str, Score]":
    """What a model is worth that is stored in a directory, or on the hub.

    Args:
        directory: of the model and its tokenizer; sparse checkpoints are expanded.
        tasks, options: see `score`.

    Raises:
        EfxError: as `score`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from efx_plugin.machine import to_accelerator

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    to_accelerator(model)
    return score(model, tokenizer, tasks, **options)
