"""lm-eval on a model in memory: what its tasks are worth, with the accuracy of a guess beside them."""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efx_plugin.errors import EfxError, UsageError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OURS = (Path(__file__).parent, Path(__file__).parents[1] / "paper_tasks")
_TRIALS = 100  # bootstrap samples behind the standard error of metrics that are no mean


@dataclass(frozen=True)
class Score:
    """What a model is worth on a task.

    Attributes:
        metric: the first that the task lists, such as "acc_norm,none": its name and lm-eval's name of the filter.
        accuracy: its value.
        standard_error: of it; None where lm-eval gives none.
        chance: accuracy of a guess, of multiple choice alone.
        documents: questions that were asked.
        metrics: all metrics of the task by name.
        lower_is_better: names of those that are.
    """

    metric: str
    accuracy: float
    standard_error: float | None
    chance: float | None
    documents: int
    metrics: dict[str, float]
    lower_is_better: tuple[str, ...] = ()


def check(tasks: Sequence[str], *, data: Path | None = None, include: Sequence[Path] = ()) -> None:
    """Load the tasks, files and all, without a model.

    Args:
        tasks, data, include: see `score`.

    Raises:
        UsageError: a task is unknown.
        EfxError: lm-eval is not installed, or the data of a task are not to be had.
    """
    _load(tasks, data, include)


def score(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    include: Sequence[Path] = (),
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
) -> dict[str, Score]:
    """What a model is worth on tasks, by name; a group of tasks and its members too.

    Args:
        model: computes in the dtype for this machine; its weights are as before afterwards.
        tokenizer: of the model.
        tasks: names that lm-eval knows, or of task files in `include`.
        data: folder with the files that our tasks ask questions of.
        include: folders with further task files.
        limit: questions of each task: its first ones.
        fewshot: examples before each question, where the task does not fix their number.
        batch_size: requests in a forward pass.
        chat: put questions through the tokenizer's chat template.

    Raises:
        UsageError: a task is unknown.
        EfxError: as `check`.
    """
    manager, loaded = _load(tasks, data, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from efx_plugin.engine.compute_dtype import choose_for, computed_in

    with computed_in(model, choose_for(model).dtype):
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(loaded["tasks"].values()),
            num_fewshot=fewshot,
            limit=limit,
            bootstrap_iters=_TRIALS,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            task_manager=manager,
        )
    return {name: _score(name, found) for name in loaded["tasks"]}


def _load(tasks: Sequence[str], data: Path | None, include: Sequence[Path]) -> tuple[Any, Any]:
    """lm-eval's index of tasks, and what it loads of them."""
    if not tasks:
        raise UsageError("no task was named: pass --tasks, for example --tasks arc_easy")
    manager = _manager(data, tuple(include), False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = _manager(data, tuple(include), True)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise UsageError(f"lm-eval knows no task {name}{hint}: `lm_eval ls tasks` shows all of its own")
    try:
        return manager, manager.load(list(tasks))
    except EfxError:
        raise
    except Exception as error:  # of whatever a task does to get its data
        raise EfxError(
            f"the data of {', '.join(tasks)} are not to be had ({one_line(error)}): run where the hub is reached, or "
            "give local files with --task-data"
        ) from error


@cache
def _manager(data: Path | None, include: tuple[Path, ...], defaults: bool) -> Any:
    """lm-eval's index of tasks; reading that of its own takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EfxError("tasks are scored by lm-eval: pip install 'efx-plugin[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what we do on purpose
    metadata: dict[str, Any] = {} if data is None else {"data": str(data)}
    return TaskManager(include_path=[*_OURS, *include], include_defaults=defaults, metadata=metadata)


def _score(name: str, found: Any) -> Score:
    results, config, samples = found["results"][name], found["configs"][name], found["samples"][name]
    metrics = {key: float(value) for key, value in results.items() if "," in key and "_stderr," not in key}
    first = config["metric_list"][0]["metric"]
    metric = next(key for key in metrics if key.startswith(f"{first},"))
    lower = [name for name, higher in found["higher_is_better"][name].items() if higher is False]
    error = results.get(metric.replace(",", "_stderr,"))
    chance = None
    if config["output_type"] == "multiple_choice":
        asked = {sample["doc_id"]: len(sample["arguments"]) for sample in samples}
        if any(one.get("metric") == "acc_mutual_info" for one in config["metric_list"]):
            asked = {document: count // 2 for document, count in asked.items()}  # each answer without its question too
        chance = sum(1 / count for count in asked.values()) / len(asked)
    return Score(
        metric=metric,
        accuracy=metrics[metric],
        standard_error=float(error) if isinstance(error, int | float) else None,
        chance=chance,
        documents=found["n-samples"][name]["effective"],
        metrics=metrics,
        lower_is_better=tuple(key for key in metrics if key.partition(",")[0] in lower),
    )
