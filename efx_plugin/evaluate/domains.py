"""Masks of several domains on one model, compared in a cell of its own kind; `masks` says how. No torch here."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from efx_plugin.checkpoint.storage.hashes import directory_hash, file_hash
from efx_plugin.evaluate.cell import Data, data_from_json, key_of, sparsity_name


@dataclass(frozen=True)
class Domain:
    """A domain: the adapter of its dense expert, and its text, whose first held-out corpus is evaluated on."""

    adapter: Path
    data: Data


@dataclass(frozen=True)
class DomainCell:
    """A comparison of the masks of domains.

    Attributes:
        model: directory of the base model.
        domains: two or more, with different names of their data.
        pipeline: what chooses the masks, a key of `PIPELINES`.
        sparsity, mask_structure, seed: see `Cell`.
    """

    model: Path
    domains: tuple[Domain, ...]
    pipeline: str
    sparsity: float
    mask_structure: str = "0:0"
    seed: int = 0

    @property
    def kind(self) -> str:
        """What cells that take about as long have in common."""
        return "masks of domains"

    @property
    def label(self) -> str:
        """What progress and errors call it."""
        names = " and ".join(domain.data.name for domain in self.domains)
        sparsity = sparsity_name(self.sparsity, self.mask_structure)
        return f"masks of {names} by {self.pipeline} {sparsity}, seed {self.seed}"

    def key(self) -> str:
        """As `Cell.key`: what the result depends on, and nothing else."""
        domains = [
            {
                "adapter": directory_hash(one.adapter),
                "name": one.data.name,
                "calibration": file_hash(one.data.calibration),
                "heldout": [one.data.heldout[0].name, file_hash(one.data.heldout[0].path)],
                "amounts": [one.data.samples, one.data.length, one.data.heldout_tokens],
            }
            for one in self.domains
        ]
        inputs = {"pipeline": self.pipeline, "sparsity": self.sparsity, "mask_structure": self.mask_structure}
        return key_of({"model": directory_hash(self.model), "domains": domains, "seed": self.seed, **inputs})

    def as_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`; `from_json` is the way back."""
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DomainCell":
        """The cell that `as_json` has described."""
        domains = tuple(Domain(Path(one["adapter"]), data_from_json(one["data"])) for one in value["domains"])
        return cls(**{**value, "model": Path(value["model"]), "domains": domains})


@dataclass(frozen=True)
class DomainResult:
    """What a comparison of masks found.

    Attributes:
        overlaps, cross: see `masks.analyse`.
        notes: sentences.
        seconds, peak_mb, machine, versions: see `CellResult`; evaluation is in `seconds`.
    """

    overlaps: list[dict[str, Any]]
    cross: list[dict[str, Any]]
    notes: list[str]
    seconds: float
    peak_mb: float
    machine: str
    versions: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`; `from_json` is the way back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DomainResult":
        """The result that `as_json` has described."""
        return cls(**value)


@dataclass(frozen=True)
class DomainFinding:
    """A cell and its result."""

    cell: DomainCell
    result: DomainResult

    def as_json(self) -> dict[str, Any]:
        """What reports hold of it: the cell's names, `overlaps`, `cross`, and by domain `foreign_over_own`: the
        geometric mean of the expert's perplexities under masks of other domains over that under masks of its own."""
        names = [domain.data.name for domain in self.cell.domains]
        return {
            "model": self.cell.model.name,
            "domains": names,
            "corpora": [domain.data.heldout[0].name for domain in self.cell.domains],
            "pipeline": self.cell.pipeline,
            "sparsity": sparsity_name(self.cell.sparsity, self.cell.mask_structure),
            "seed": self.cell.seed,
            "overlaps": self.result.overlaps,
            "cross": self.result.cross,
            "foreign_over_own": {name: self._foreign_over_own(name) for name in names},
            "notes": self.result.notes,
            "seconds": self.result.seconds,
            "peak_mb": self.result.peak_mb,
        }

    def _foreign_over_own(self, name: str) -> float:
        rows = [row for row in self.result.cross if row["expert"] == name]
        own = geometric_mean([row["perplexity"] for row in rows if row["mask"][0] == name])
        return geometric_mean([row["perplexity"] for row in rows if row["mask"][0] != name]) / own


def halves_and_domains(
    overlaps: Iterable[dict[str, Any]],
) -> tuple[dict[str, list[dict[str, Any]]], dict[tuple[str, ...], list[dict[str, Any]]]]:
    """Overlaps of masks of one domain by its name, and those of two domains by theirs."""
    within, across = (
        defaultdict[str, list[dict[str, Any]]](list),
        defaultdict[tuple[str, ...], list[dict[str, Any]]](list),
    )
    for pair in overlaps:
        (one, _), (other, _) = pair["masks"]
        (within[one] if one == other else across[one, other]).append(pair)
    return within, across
