"""One cell of a comparison: a pipeline on exact inputs, the key that it is cached under, and what it found.

Nothing here imports torch.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from efx_plugin.checkpoint.storage.hashes import directory_hash, file_hash
from efx_plugin.evaluate.pipelines.registry import PIPELINES

# Distributions whose release may change a result.
_LIBRARIES = (
    "efx-plugin",
    "torch",
    "transformers",
    "peft",
    "llmcompressor",
    "compressed-tensors",
    "tokenizers",
    "lm_eval",
)

# Raised whenever a result comes to mean something else, so that older ones in a cache are not taken for it.
_REVISION = 7


@dataclass(frozen=True)
class HeldOut:
    """Text that nothing was trained or calibrated on.

    Attributes:
        name: what tables call the corpus.
        path: its documents, a JSON record a line.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Data:
    """The text of a domain, in files with a JSON record a line; `efx_plugin.evaluate.data` writes them.

    Attributes:
        name: what tables call the domain.
        calibration, training: no document of theirs is in `heldout`.
        heldout: corpora to evaluate on; the first is that of the domain.
        validation: what trained pipelines choose their learning rate on; no document of it is in another part. None
            where there is too little text for one, and then nothing can be trained.
        samples: calibration sequences.
        length: tokens of a calibration, training or evaluation sequence.
        training_tokens: tokens that a pipeline trains on; a tenth as many of `validation` choose its learning rate.
        heldout_tokens: tokens at most that a corpus is evaluated on, see `first_tokens`.
    """

    name: str
    calibration: Path
    training: Path
    heldout: tuple[HeldOut, ...]
    validation: Path | None = None
    samples: int = 128
    length: int = 512
    training_tokens: int = 100_000
    heldout_tokens: int = 50_000


@dataclass(frozen=True)
class Cell:
    """One pipeline on exact inputs.

    Attributes:
        model: directory of the base model.
        adapter: directory of its LoRA adapter; None where there is none.
        pipeline: a key of `PIPELINES`.
        sparsity: fraction of the weights to prune, 0 for pipelines that do not prune.
        mask_structure: "N:M", or "0:0" for unstructured.
        seed: of the choice of calibration sequences and of all that is random in the pipeline.
        data: the text.
        tasks: names of lm-eval tasks to score.
        task_data: folder with the data of those that read local files; None where none does.
        arguments: further arguments of the pipeline, as pairs sorted by name; values are those of JSON.
    """

    model: Path
    adapter: Path | None
    pipeline: str
    sparsity: float
    seed: int
    data: Data
    mask_structure: str = "0:0"
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def kind(self) -> str:
        """What cells that take about as long have in common."""
        return self.pipeline

    @property
    def label(self) -> str:
        """What progress and errors call it."""
        parts = [pipeline_name(self.pipeline, self.arguments), self.data.name]
        if self.sparsity:
            parts.insert(1, sparsity_name(self.sparsity, self.mask_structure))
        return f"{' '.join(parts)}, seed {self.seed}"

    def key(self) -> str:
        """64 hexadecimal digits that change whenever anything does that the result depends on: the bytes of every
        file, the arguments, the versions of the libraries. Where the files lie does not matter."""
        data = asdict(self.data) | {
            "calibration": file_hash(self.data.calibration),
            "training": file_hash(self.data.training),
            "heldout": [[one.name, file_hash(one.path)] for one in self.data.heldout],
        }
        validation = data.pop("validation")
        if PIPELINES[self.pipeline].needs_training:
            data["validation"] = None if validation is None else file_hash(validation)
        inputs = {
            "model": directory_hash(self.model),
            "adapter": None if self.adapter is None else directory_hash(self.adapter),
            "pipeline": self.pipeline,
            "sparsity": self.sparsity,
            "mask_structure": self.mask_structure,
            "seed": self.seed,
            "data": data,
            "tasks": self.tasks,
            "task_data": None if self.task_data is None else directory_hash(self.task_data),
            "arguments": self.arguments,
        }
        return key_of(inputs)

    def as_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`; `from_json` is the way back."""
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Cell":
        """The cell that `as_json` has described."""
        return cls(
            **{
                **value,
                "model": Path(value["model"]),
                "adapter": None if value["adapter"] is None else Path(value["adapter"]),
                "data": data_from_json(value["data"]),
                "tasks": tuple(value["tasks"]),
                "task_data": None if value["task_data"] is None else Path(value["task_data"]),
                "arguments": tuple((name, argument) for name, argument in value["arguments"]),
            }
        )


@dataclass(frozen=True)
class CorpusLosses:
    """How well a model predicts a corpus, document by document.

    Attributes:
        losses: summed negative log-likelihood of each document's predicted tokens, in nats.
        tokens: number of those tokens.
    """

    losses: list[float]
    tokens: list[int]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over all tokens."""
        return math.exp(math.fsum(self.losses) / sum(self.tokens))


@dataclass(frozen=True)
class CellResult:
    """What a cell found.

    Attributes:
        corpora: losses by the name of the held-out corpus.
        tasks: scores by the name of the task: `accuracy`, `chance` and what else the task tells.
        sparsity: achieved over the target layers.
        bits_per_weight_stored, bits_per_weight_served: over the target layers, zeros counted as weights; see `bits`.
        layers: of each target layer `name`, `weights` (their number), `sparsity` and `damage`; see `PipelineResult`.
        notes: sentences.
        seconds: of the pipeline, loading included; evaluation is in `seconds_evaluation`.
        peak_mb: largest resident memory of the cell's process, in MB (1e6 bytes).
        peak_accelerator_mb: largest memory that torch had on the accelerator; 0 without one.
        compute_dtype: what perplexity was computed in.
        machine: name of the processor, or of the accelerator.
        versions: of the libraries, and `source`, see `source_hash`.
        threads: that torch computed with; 0 where it was not noted.
    """

    corpora: dict[str, CorpusLosses]
    tasks: dict[str, dict[str, Any]]
    sparsity: float
    bits_per_weight_stored: float
    bits_per_weight_served: float
    layers: list[dict[str, Any]]
    notes: list[str]
    seconds: float
    seconds_evaluation: float
    peak_mb: float
    peak_accelerator_mb: float
    compute_dtype: str
    machine: str
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 0

    def as_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`; `from_json` is the way back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CellResult":
        """The result that `as_json` has described."""
        return cls(**{**value, "corpora": {name: CorpusLosses(**losses) for name, losses in value["corpora"].items()}})


def sparsity_name(sparsity: float, mask_structure: str = "0:0") -> str:
    """A sparsity for people: "50 %", or the structure where there is one, "2:4"."""
    return f"{100 * sparsity:g} %" if mask_structure == "0:0" else mask_structure


def pipeline_name(pipeline: str, arguments: Sequence[tuple[str, Any]]) -> str:
    """A pipeline for people, with its arguments: "lora+w3 g64" for a group of 64, others in brackets."""
    others = ", ".join(f"{name}={value}" for name, value in arguments if name != "group")
    parts = [pipeline, *(f"g{value}" for name, value in arguments if name == "group"), f"({others})" if others else ""]
    return " ".join(filter(None, parts))


def key_of(inputs: Mapping[str, Any]) -> str:
    """64 hexadecimal digits of what a result depends on: inputs ready for `json.dumps`, the versions of the libraries,
    and what results mean in this state of the source."""
    everything = {**inputs, "versions": versions(), "revision": _REVISION}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def data_from_json(value: Mapping[str, Any]) -> Data:
    """The data that `as_json` of a cell has described."""
    data = Data(**value)
    return replace(
        data,
        calibration=Path(data.calibration),
        training=Path(data.training),
        validation=None if data.validation is None else Path(data.validation),
        heldout=tuple(HeldOut(one["name"], Path(one["path"])) for one in value["heldout"]),
    )


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on, as far as they are installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source_hash() -> str:
    """12 hexadecimal digits of this package's Python files, which tell states of it apart within a version."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
