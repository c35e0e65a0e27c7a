"""Pruned at once and healed: zeros stay, kept weights learn, and no text but the calibration text is needed."""

import pytest
import torch

from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate.pipelines import healed
from tests.support.pipeline_task import run, tiny_task

PAIRS = {"lora+expert+heal": "lora+expert", "lora+sparsegpt+heal": "lora+sparsegpt"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny_task(tmp_path_factory.mktemp("healed"))


@pytest.fixture
def texts(monkeypatch):
    """What the dense experts have written."""
    seen = []
    original = healed.write_sequences

    def write_sequences(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(healed, "write_sequences", write_sequences)
    return seen


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_the_mask_is_that_of_pruning_on_all_the_text_and_its_weights_have_learned(task, name, structure, texts):
    result = run(task, name, mask_structure=structure, arguments={"learning_rate": 1e-3})
    text = torch.cat([task.calibration, *texts])
    plain = run(task, PAIRS[name], mask_structure=structure, calibration=text)
    assert len(text) == 5 * len(task.calibration)
    assert result.sparsity == plain.sparsity
    assert result.bits_per_weight_stored == pytest.approx(plain.bits_per_weight_stored, rel=0.01)
    for one, other in zip(linears_in_blocks(result.model), linears_in_blocks(plain.model), strict=True):
        assert one.base.weight.dtype == torch.bfloat16
        assert torch.equal(one.base.weight == 0, other.base.weight == 0), one.name
        assert not torch.equal(one.base.weight, other.base.weight), one.name
    assert result.notes[-1].startswith(
        "healed on 224 calibration tokens and 1,024 that the dense expert wrote, half of "
    )


def test_arguments_of_healing_and_of_the_modifier_are_told_apart(task):
    result = run(task, "lora+expert+heal", arguments={"repair": "none", "written": 1, "batch_size": 2})
    assert "and 256 that the dense expert wrote" in result.notes[-1]
    with pytest.raises(EfxError, match="no argument 'repairs'"):
        run(task, "lora+expert+heal", arguments={"repairs": "none"})
    with pytest.raises(UsageError, match="no argument 'repair'"):
        run(task, "lora+sparsegpt+heal", arguments={"repair": "none"})


def test_the_dense_expert_writes_by_the_seed_of_the_task(task, texts):
    for name, seed in (("lora+expert+heal", 0), ("lora+sparsegpt+heal", 0), ("lora+expert+heal", 1)):
        run(task, name, seed=seed)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
