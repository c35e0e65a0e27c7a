"""Samples say of masks what the whole masks would."""

import pytest
import torch

from efx_plugin.evaluate import mask_samples
from efx_plugin.evaluate.mask_samples import overlap, sample
from tests.support.tiny_llama import tiny_llama


def masked(seed, sparsity=0.5, **overrides):
    model = tiny_llama(**overrides)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data *= torch.rand(parameter.shape, generator=generator) >= sparsity
    return model


def test_equal_masks_overlap_and_independent_ones_as_chance_has_it():
    one, other = sample(masked(0)), sample(masked(1))
    assert set(overlap(one, one).values()) == {1.0}
    assert overlap(one, other).keys() == one.keys() and len(one) == 14
    assert sum(overlap(one, other).values()) / 14 == pytest.approx(1 / 3, abs=0.02)


def test_a_sample_of_rows_tells_the_overlap_of_all(monkeypatch):
    models = [masked(seed, sparsity=0.7, hidden_size=128) for seed in (0, 1)]
    whole = overlap(*map(sample, models))
    monkeypatch.setattr(mask_samples, "_WEIGHTS", 4096)
    some = [sample(model) for model in models]
    assert {len(bits) for bits in some[0].values()} <= {32, 42}
    assert overlap(*some) == pytest.approx(whole, abs=0.05)
