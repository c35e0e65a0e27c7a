"""Does a domain have a structure of its own? Masks of one method, of several domains, side by side.

Two masks of one domain, chosen on different halves of its text, say how much of a difference is chance. The cross table
says what a foreign mask costs: each domain's dense expert under each mask, repaired on the expert's own text alike.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efx_plugin.checkpoint.summary import place
from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.block_pruner import store_in_base
from efx_plugin.engine.blocks import linears_in_blocks, plan_blocks
from efx_plugin.engine.sequential import prune_in_sequence
from efx_plugin.errors import EfxError
from efx_plugin.evaluate.pipelines.draft import Draft
from efx_plugin.evaluate.pipelines.protocol import Pipeline, PipelineTask

# bool [out, in] by name of the layer, True where a weight is kept.
Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerOverlap:
    """How far two masks of a layer agree.

    Attributes:
        name: of the layer.
        common, together: number of weights that both keep, and that at least one keeps.
        common_by_chance: what `common` would be of random masks that keep as many.
    """

    name: str
    common: int
    together: int
    common_by_chance: float


def analyse(
    tasks: Mapping[str, PipelineTask], pipeline: Pipeline, perplexity: Callable[[str, PreTrainedModel], float]
) -> dict[str, Any]:
    """Compare the masks of several domains. Memory holds one model; masks wait in files.

    Args:
        tasks: by name of the domain: one model and one sparsity, an adapter and calibration sequences of each domain,
            and a folder for each.
        pipeline: what chooses the masks, such as `lora+expert`, on each half of a domain's calibration sequences.
        perplexity: on held-out text of the named domain.

    Returns:
        `overlaps`, of every two masks: `masks`, two pairs of domain and half (1 or 2), and what `summarize` tells.
        `cross`, of every expert under every mask, repaired on the expert's calibration sequences: `expert`, `mask`
        and `perplexity`, the expert's on its own domain.

    Raises:
        EfxError: a domain has a single calibration sequence.
    """
    masks = dict[tuple[str, int], Path]()
    for domain, task in tasks.items():
        if len(task.calibration) < 2:
            raise EfxError(f"{domain} has a single calibration sequence, and masks are chosen on two halves: pass more")
        halves: Any = task.calibration.chunk(2)
        for half, calibration in enumerate(halves, start=1):
            output = task.output / f"half-{half}"
            output.mkdir()
            masks[domain, half] = output.with_suffix(".pt")
            pruned = pipeline.run(replace(task, calibration=calibration, output=output)).model
            torch.save(masks_of(pruned), masks[domain, half])
            del pruned
            shutil.rmtree(output)  # a checkpoint that nobody asks for
    return {
        "overlaps": [
            {"masks": [one, other], **summarize(overlap(_read(masks[one]), _read(masks[other])))}
            for one, other in combinations(masks, 2)
        ],
        "cross": [
            {"expert": domain, "mask": mask, "perplexity": perplexity(domain, repaired(task, _read(masks[mask])))}
            for domain, task in tasks.items()
            for mask in masks
        ],
    }


def _read(path: Path) -> Masks:
    masks: Masks = torch.load(path, mmap=True, weights_only=True)
    return masks


def masks_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Which weights of the linear layers in its decoder blocks a sparse model keeps."""
    return {layer.name: layer.base.weight != 0 for layer in linears_in_blocks(model)}


def repaired(task: PipelineTask, masks: Masks) -> PreTrainedModel:
    """The dense expert of a task under given masks, the kept weights of each matrix repaired by least squares on the
    task's calibration sequences, block by block."""
    draft = Draft.load(task, adapted=True)
    arguments = PruningArguments(ignore=draft.ignored(), saliency="wanda", propagation="none", repair="weights")
    prune_in_sequence(
        draft.network,
        plan_blocks(draft.network, arguments),
        arguments,
        draft.batches(),
        store=store_in_base,
        masks=lambda layer: masks[layer.name],
    )
    return draft.round()


def overlap(one: Masks, other: Masks) -> list[LayerOverlap]:
    """How far masks of one architecture agree, layer by layer.

    Raises:
        EfxError: the masks are of different layers.
    """
    if {name: keep.shape for name, keep in one.items()} != {name: keep.shape for name, keep in other.items()}:
        raise EfxError("masks of different layers cannot be compared: pass experts of one base model")
    found = []
    for name, keep in one.items():
        kept, kept_by_other = int(keep.count_nonzero()), int(other[name].count_nonzero())
        common = int((keep & other[name]).count_nonzero())
        found.append(
            LayerOverlap(name, common, kept + kept_by_other - common, kept * kept_by_other / max(1, keep.numel()))
        )
    return found


def summarize(layers: Iterable[LayerOverlap]) -> dict[str, Any]:
    """Intersection over union, `iou`, and what it would be of random masks, `chance`: of all layers, and for each in
    `by_projection`, such as `self_attn.q_proj`, and in `by_block`, number of the decoder block."""
    layers = list(layers)
    by_projection, by_block = defaultdict[str, list[LayerOverlap]](list), defaultdict[str, list[LayerOverlap]](list)
    for layer in layers:
        block, projection = place(layer.name)
        by_projection[projection].append(layer)
        by_block[str(block)].append(layer)
    return {
        **_shares(layers),
        "by_projection": {name: _shares(some) for name, some in by_projection.items()},
        "by_block": {name: _shares(some) for name, some in by_block.items()},
    }


def _shares(layers: list[LayerOverlap]) -> dict[str, float]:
    common, together = sum(layer.common for layer in layers), sum(layer.together for layer in layers)
    by_chance = sum(layer.common_by_chance for layer in layers)
    return {
        "iou": common / together if together else 0.0,
        "chance": by_chance / (common + together - by_chance) if together else 0.0,
    }
