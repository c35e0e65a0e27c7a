"""Masks of domains side by side: how far they agree, and what a foreign one costs."""

from dataclasses import replace

import pytest
import torch

from efx_plugin.errors import EfxError
from efx_plugin.evaluate.masks import analyse, masks_of, overlap, repaired, summarize
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from efx_plugin.evaluate.pipelines.training import validation_loss
from tests.support.pipeline_task import run, tiny_task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny_task(tmp_path_factory.mktemp("masks"))


def random_masks(seed: int, kept: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{block}.{name}" for block in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]
    return {name: torch.rand(200, 100, generator=generator) < kept for name in names}


def test_a_mask_agrees_with_itself_and_not_with_its_complement():
    masks = random_masks(0, 0.5)
    assert summarize(overlap(masks, masks))["iou"] == 1
    assert summarize(overlap(masks, {name: ~keep for name, keep in masks.items()}))["iou"] == 0


@pytest.mark.parametrize("kept", [(0.5, 0.5), (0.4, 0.6)])
def test_random_masks_agree_by_chance(kept):
    one, other = random_masks(0, kept[0]), random_masks(1, kept[1])
    found = summarize(overlap(one, other))
    both = kept[0] * kept[1]
    assert found["chance"] == pytest.approx(both / (sum(kept) - both), abs=0.01)
    assert set(found["by_projection"]) == {"self_attn.q_proj", "mlp.up_proj"}
    assert set(found["by_block"]) == {"0", "1"}
    for part in (found, *found["by_projection"].values(), *found["by_block"].values()):
        assert part["iou"] == pytest.approx(part["chance"], abs=0.02)


def test_masks_of_other_layers_are_refused():
    masks = random_masks(0, 0.5)
    with pytest.raises(EfxError, match="one base model"):
        overlap(masks, {name: keep[:5] for name, keep in masks.items()})


def test_a_repair_keeps_the_mask_and_helps(task):
    pruned = run(task, "lora+random")
    masks = masks_of(pruned.model)
    model = repaired(task, masks)
    for name, keep in masks_of(model).items():
        assert not (keep & ~masks[name]).any()
        assert (keep == masks[name]).float().mean() > 0.999
    dense = run(task, "lora").model
    errors = [
        (one(task.calibration).logits - dense(task.calibration).logits).float().norm() for one in (model, pruned.model)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_domains_are_compared_in_halves_and_crosswise(task, tmp_path):
    other = tiny_task(tmp_path)
    other = replace(other, calibration=other.calibration.flip(1))
    found = analyse(
        {"counting": task, "backwards": other},
        PIPELINES["lora+wanda"],
        lambda domain, model: validation_loss(model, {"counting": task, "backwards": other}[domain].calibration),
    )
    masks = [("counting", 1), ("counting", 2), ("backwards", 1), ("backwards", 2)]
    assert len(found["overlaps"]) == 6 and all(one["chance"] < one["iou"] < 1 for one in found["overlaps"])
    assert [(one["expert"], one["mask"]) for one in found["cross"]] == [
        (domain, mask) for domain in ("counting", "backwards") for mask in masks
    ]
    with pytest.raises(EfxError, match="counting has a single calibration sequence"):
        analyse({"counting": replace(task, calibration=task.calibration[:1])}, PIPELINES["lora+wanda"], None)
