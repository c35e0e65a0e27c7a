"""A comparison's findings without a comparison: stand-ins for cells and their results."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from efx_plugin.evaluate.cell import Cell, CellResult, CorpusLosses, Data, HeldOut
from efx_plugin.evaluate.domains import Domain, DomainCell, DomainFinding, DomainResult
from efx_plugin.evaluate.report import Finding

TOKENS = [10, 20, 30, 40] * 5
DATA = Data("law", Path("c"), Path("t"), (HeldOut("law", Path("h")),))


def finding(pipeline, perplexity, *, seed=0, sparsity=0.0, bits=16.0, masks=Path("none"), noise=0.0, **changes):
    losses = [tokens * (math.log(perplexity) + noise * (-1) ** number) for number, tokens in enumerate(TOKENS)]
    result = CellResult(
        corpora={"law": CorpusLosses(losses, TOKENS)},
        tasks={},
        sparsity=sparsity,
        bits_per_weight_stored=bits,
        bits_per_weight_served=bits,
        layers=[
            {"name": f"layers.{n}.q", "weights": 4, "sparsity": sparsity, "damage": 0.1}
            for n in range(2 if sparsity else 0)
        ],
        notes=[f"note of seed {seed}"],
        seconds=1.0 + seed,
        seconds_evaluation=0.5,
        peak_mb=100.0,
        peak_accelerator_mb=0.0,
        compute_dtype="float32",
        machine="a CPU",
    )
    cell = Cell(Path("models/tiny"), Path("adapters/law"), pipeline, sparsity, seed, DATA)
    return Finding(replace(cell, **changes), result, masks)


def domain_finding() -> DomainFinding:
    """Masks of two domains that agree in .8 within a domain and in .6 across; a foreign mask costs a tenth."""
    masks = [("law", 1), ("law", 2), ("health", 1), ("health", 2)]
    overlaps = []
    for one, other in combinations(masks, 2):
        share = {"iou": 0.8 if one[0] == other[0] else 0.6, "chance": 0.3}
        by_projection = {"self_attn.q_proj": share, "mlp.up_proj": share}
        overlaps.append(
            {"masks": [one, other], **share, "by_projection": by_projection, "by_block": {"0": share, "1": share}}
        )
    cross = [
        {"expert": expert, "mask": mask, "perplexity": 20.0 if expert == mask[0] else 22.0}
        for expert in ("law", "health")
        for mask in masks
    ]
    domains = tuple(Domain(Path(f"adapters/{name}"), replace(DATA, name=name)) for name in ("law", "health"))
    cell = DomainCell(Path("models/tiny"), domains, "lora+expert", 0.5)
    result = DomainResult(overlaps, cross, ["a note on text"], 1.0, 100.0, "a CPU")
    return DomainFinding(cell, DomainResult.from_json(json.loads(json.dumps(result.as_json()))))


def some_findings() -> list[Finding]:
    """One model and domain, a pipeline or two of each family; two seeds of the one-shot ones at 50 %."""
    sparse = {"sparsity": 0.5, "bits": 9.0}
    return [
        *(finding("lora+expert", perplexity, seed=seed, **sparse) for seed, perplexity in enumerate((21.0, 23.0))),
        *(finding("lora+wanda", perplexity, seed=seed, **sparse) for seed, perplexity in enumerate((33.0, 35.0))),
        *(finding("lora+sparsegpt", perplexity, seed=seed, **sparse) for seed, perplexity in enumerate((26.0, 28.0))),
        finding("lora+sparsegpt", 40.0, sparsity=0.6),
        finding("base", 30.0),
        finding("lora", 20.0),
        finding("lora+w8a16", 20.1, bits=8.1),
        finding("lora+w4a16", 22.0, bits=4.125),
        finding("lora+expert+w8", 22.5, sparsity=0.5, bits=5.1),
    ]
