import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.method.masks import allocate, n_of_m_mask, pooled_masks, row_mask

sparsities = st.floats(0.05, 0.95)
# Few distinct values, so that ties at the threshold are the rule.
levels = st.integers(1, 5)


def _scores(rows, columns, distinct, seed):
    return torch.randint(distinct, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@given(st.integers(1, 8), st.integers(1, 24), levels, sparsities, st.integers(0, 2**31))
def test_every_row_loses_its_lowest(rows, columns, distinct, sparsity, seed):
    scores = _scores(rows, columns, distinct, seed)
    keep = row_mask(scores, sparsity)
    assert ((~keep).sum(dim=1) == round(sparsity * columns)).all()
    for row, kept in zip(scores, keep, strict=True):
        if kept.any() and (~kept).any():
            assert row[~kept].max() <= row[kept].min()


@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 5)]), levels, st.integers(0, 99)
)
def test_n_of_m_prunes_the_n_lowest_of_every_group(rows, groups, structure, distinct, seed):
    n, m = structure
    scores = _scores(rows, groups * m, distinct, seed)
    keep = n_of_m_mask(scores, n, m)
    for row in range(rows):
        for group in range(groups):
            part = slice(group * m, (group + 1) * m)
            kept = keep[row, part]
            assert int((~kept).sum()) == n
            assert scores[row, part][~kept].max() <= scores[row, part][kept].min()


def test_n_of_m_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="divisible by 4"):
        n_of_m_mask(torch.rand(2, 6), 2, 4)
    with pytest.raises(ValueError, match="4:4"):
        n_of_m_mask(torch.rand(2, 8), 4, 4)


shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=4)


@given(shapes, levels, sparsities, st.integers(0, 2**31))
def test_a_pool_without_floor_loses_exactly_its_lowest(shapes, distinct, sparsity, seed):
    scores = [_scores(*shape, distinct, seed + index) for index, shape in enumerate(shapes)]
    masks = pooled_masks(scores, sparsity)
    values = torch.cat([score.flatten() for score in scores])
    keep = torch.cat([mask.flatten() for mask in masks])
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    assert int((~keep).sum()) == round(sparsity * values.numel())
    if keep.any() and (~keep).any():
        assert values[~keep].max() <= values[keep].min()


@given(shapes, levels, sparsities, st.floats(1, 2), st.integers(0, 2**31))
def test_the_floor_bounds_every_row_and_keeps_the_total(shapes, distinct, sparsity, floor, seed):
    scores = [_scores(*shape, distinct, seed + index) for index, shape in enumerate(shapes)]
    masks = pooled_masks(scores, sparsity, floor)
    total = sum(score.numel() for score in scores)
    assert sum(int((~mask).sum()) for mask in masks) == round(sparsity * total)
    for score, mask in zip(scores, masks, strict=True):
        most = math.ceil(floor * sparsity * score.shape[1])
        least = math.floor((2 - floor) * (1 - sparsity) * score.shape[1] + 1e-9)
        assert ((~mask).sum(dim=1) <= most).all()
        assert (mask.sum(dim=1) >= least).all()


def test_the_floor_leaves_something_of_every_row_however_worthless_it_looks():
    scores = torch.cat([torch.zeros(1, 100), torch.ones(9, 100)])
    for sparsity in (0.5, 0.75, 0.95):
        (mask,) = pooled_masks([scores], sparsity, 1.4)
        assert int(mask[0].sum()) == pytest.approx(60 * (1 - sparsity), abs=1)


def test_rows_compete_in_a_pool():
    cheap, dear = torch.full((1, 4), 0.1), torch.full((1, 4), 9.0)
    keep = pooled_masks([torch.cat([cheap, dear])], 0.5)[0]
    assert not keep[0].any() and keep[1].all()


@given(shapes, levels, sparsities, st.one_of(st.none(), st.floats(1, 2)), st.integers(0, 2**31))
def test_an_allocation_sums_to_the_count_of_the_pool_and_respects_the_floor(shapes, distinct, sparsity, floor, seed):
    scores = [_scores(*shape, distinct, seed + index) for index, shape in enumerate(shapes)]
    fractions = allocate(scores, sparsity, floor)
    counts = [round(fraction * score.numel()) for fraction, score in zip(fractions, scores, strict=True)]
    assert counts == [int((~mask).sum()) for mask in pooled_masks(scores, sparsity, floor)]
    assert sum(counts) == round(sparsity * sum(score.numel() for score in scores))
    for count, score in zip(counts, scores, strict=True):
        most = score.shape[1] if floor is None else math.ceil(floor * sparsity * score.shape[1])
        assert count <= most * score.shape[0]
