import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.method import repair
from efx_plugin.method.masks import n_of_m_mask, row_mask
from efx_plugin.method.repair import output_error, repair_weights
from efx_plugin.method.swaps import swap_pruned

# Fitted to the end, so that errors of masks compare and not those of unfinished fits.
FITTED = {"steps": 300, "dampening_frac": 1e-3}


def _layer(rows, columns, seed, tokens=400):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, inputs, inputs.T @ inputs / tokens


def _error(weight, keep, gram):
    return output_error(weight, repair_weights(weight, keep, gram, **FITTED), gram)


@given(st.integers(1, 6), st.integers(2, 24), st.floats(0, 1), st.integers(0, 6), st.integers(0, 2**31))
def test_each_row_keeps_as_many_weights_as_before(rows, columns, sparsity, rounds, seed):
    weight, _, gram = _layer(rows, columns, seed)
    keep = row_mask(weight.square(), sparsity)
    swapped = swap_pruned(weight, keep, gram, rounds=rounds)
    assert swapped.dtype == torch.bool and swapped.shape == weight.shape
    assert (swapped.sum(1) == keep.sum(1)).all()


@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([(2, 4), (1, 4), (4, 8)]), st.integers(0, 2**31))
def test_swaps_of_an_n_of_m_mask_stay_among_the_m(rows, groups, n_of_m, seed):
    n, m = n_of_m
    weight, _, gram = _layer(rows, groups * m, seed)
    swapped = swap_pruned(weight, n_of_m_mask(weight.square(), n, m), gram, rounds=4, n_of_m=n_of_m)
    assert (swapped.view(rows, groups, m).sum(2) == m - n).all()


@pytest.mark.parametrize("n_of_m", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_errors_fall_and_no_row_is_worse_off(n_of_m, seed):
    weight, _, gram = _layer(48, 96, seed)
    scores = weight.square() * gram.diagonal()
    keep = row_mask(scores, 0.5) if n_of_m is None else n_of_m_mask(scores, *n_of_m)
    before = _error(weight, keep, gram)
    swapped = swap_pruned(weight, keep, gram, rounds=8, n_of_m=n_of_m, dampening_frac=1e-3)
    after = _error(weight, swapped, gram)
    # What a row is accepted by is a fit of four steps, so the last few percent are open.
    assert (after <= 1.05 * before).all()
    assert after.sum() < (0.9 if n_of_m is None else 0.97) * before.sum()
    changed = (swapped != keep).any(dim=1)
    torch.testing.assert_close(after[~changed], before[~changed])


def test_swaps_end_near_the_best_of_all_masks():
    weight, _, gram = _layer(64, 6, 4)
    masks = torch.tensor([[place in kept for place in range(6)] for kept in itertools.combinations(range(6), 3)])
    errors = torch.stack([_error(weight, mask.expand_as(weight), gram) for mask in masks])
    keep = masks[errors.argmax(dim=0)]
    swapped = swap_pruned(weight, keep, gram, rounds=12, dampening_frac=1e-3)
    better = (errors < 0.999 * _error(weight, swapped, gram)).sum(dim=0)
    # They begin at the worst, with 19 better ones.
    assert len(masks) == 20 and better.float().mean() < 5


def test_swaps_fit_to_what_the_dense_model_gives():
    weight, inputs, gram = _layer(48, 96, 7)
    generator = torch.Generator().manual_seed(8)
    others = inputs + 0.5 * inputs @ torch.randn(96, 96, generator=generator) / 96**0.5
    drift = (others - inputs).T @ inputs / len(inputs)
    keep = row_mask(weight.square() * gram.diagonal(), 0.5)

    def error(mask):
        repaired = repair_weights(weight, mask, gram, drift=drift, **FITTED)
        return float((others @ weight.T - inputs @ repaired.T).square().mean(0).sum())

    with_drift = swap_pruned(weight, keep, gram, rounds=8, drift=drift, dampening_frac=1e-3)
    without = swap_pruned(weight, keep, gram, rounds=8, dampening_frac=1e-3)
    assert error(with_drift) < error(without) < error(keep)


def test_chunks_of_rows_change_nothing(monkeypatch):
    weight, _, gram = _layer(40, 32, 3)
    keep = row_mask(weight.square(), 0.5)
    whole = swap_pruned(weight, keep, gram, rounds=4)
    monkeypatch.setattr(repair, "CHUNK", 7 * 32)
    monkeypatch.setattr(repair, "LEAST_ROWS", 7)
    parts = swap_pruned(weight, keep, gram, rounds=4)
    # Rounding can decide between two swaps that are worth the same.
    assert (whole != parts).float().mean() < 0.01


def test_inputs_of_nothing_but_zeros_leave_the_mask():
    weight, _, gram = _layer(4, 8, 0)
    keep = row_mask(weight.square(), 0.5)
    assert torch.equal(swap_pruned(weight, keep, torch.zeros_like(gram), rounds=3), keep)


def test_a_gram_that_is_not_finite_is_refused():
    weight, _, gram = _layer(4, 8, 0)
    gram[2, 2] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        swap_pruned(weight, row_mask(weight.square(), 0.5), gram, rounds=1)
