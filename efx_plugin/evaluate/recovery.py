"""How much of a baseline's quality a model keeps, in the form of llm-compressor's own lm-eval tests.

A YAML file says what to ask and how much must be kept; see `RecoveryConfig`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from efx_plugin.errors import EfxError, UsageError, one_line

if TYPE_CHECKING:
    from efx_plugin.evaluate.tasks import Score

DEFAULT_THRESHOLD = 0.95


@dataclass(frozen=True)
class RecoveryConfig:
    """What a file in upstream's form says; what it tells of compressing (`scheme`, `recipe`, ...) is not read.

    Attributes:
        model: the baseline, `model` of the file.
        tasks: `lmeval.task`, names with commas between them.
        fewshot: `lmeval.num_fewshot`.
        limit: `lmeval.limit`.
        chat: `lmeval.apply_chat_template`.
        threshold: `lmeval.recovery_threshold`, one number or one for each metric.
    """

    model: str
    tasks: tuple[str, ...]
    fewshot: int | None
    limit: int | None
    chat: bool
    threshold: float | dict[str, float]


@dataclass(frozen=True)
class Recovery:
    """What is kept of one metric of one task.

    Attributes:
        task, metric: their names.
        base, here: the metric of the baseline and of the model.
        recovery: here / base, or base / here where lower is better, rounded to a hundredth as upstream does.
        threshold: what must be kept.
    """

    task: str
    metric: str
    base: float
    here: float
    recovery: float
    threshold: float

    @property
    def passed(self) -> bool:
        return self.recovery >= self.threshold


def recoveries(
    base: "Mapping[str, Score]", here: "Mapping[str, Score]", threshold: float | Mapping[str, float]
) -> list[Recovery]:
    """Of every metric of every task.

    Args:
        base, here: scores by task, of the same tasks.
        threshold: one for all, or by the name of the metric, 0.95 for those that are not named.
    """
    found = []
    for task, score in here.items():
        for metric, value in score.metrics.items():
            reference = base[task].metrics[metric]
            wanted = threshold.get(metric, DEFAULT_THRESHOLD) if isinstance(threshold, Mapping) else threshold
            part, whole = (reference, value) if metric in score.lower_is_better else (value, reference)
            kept = round(part / whole, 2) if whole else (1.0 if not part else math.inf)
            found.append(Recovery(task, metric, reference, value, kept, wanted))
    return found


def read_config(path: Path) -> RecoveryConfig:
    """Read a file in upstream's form.

    Raises:
        UsageError: it cannot be read, or asks for what lm-eval on transformers is not told here.
    """
    import yaml
    from pydantic import BaseModel, ConfigDict, ValidationError

    class LmEval(BaseModel):
        model_config = ConfigDict(extra="forbid")

        task: str = "gsm8k"
        num_fewshot: int | None = 5
        limit: int | None = 1000
        apply_chat_template: bool = False
        recovery_threshold: float | dict[str, float] = DEFAULT_THRESHOLD
        metrics: dict[str, float] | None = None  # expected values, of which upstream warns

    class File(BaseModel):
        model: str
        lmeval: LmEval = LmEval()

    try:
        read = File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {one_line(error)}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"{path}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}; efx eval takes model and, under lmeval, "
            f"{', '.join(LmEval.model_fields)}"
        ) from error
    asked = read.lmeval
    return RecoveryConfig(
        read.model,
        tuple(name.strip() for name in asked.task.split(",")),
        asked.num_fewshot,
        asked.limit,
        asked.apply_chat_template,
        asked.recovery_threshold,
    )


def require(found: list[Recovery], model: Path, base: str) -> None:
    """Raise where too little is kept.

    Raises:
        EfxError: names every metric that is below its threshold.
    """
    failed = [f"{one.task} {one.metric} {one.recovery:.2f} < {one.threshold:g}" for one in found if not one.passed]
    if failed:
        raise EfxError(f"{model} keeps less of {base} than is asked for: {', '.join(failed)}")
