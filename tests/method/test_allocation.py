import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.method.allocation import ScoreCounts
from efx_plugin.method.masks import pooled_masks


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(8, 40)), min_size=1, max_size=5),
    st.floats(0.1, 0.7),
    st.floats(1.0, 1.4),
    st.integers(0, 2**31),
)
def test_counts_allocate_what_pooled_masks_prune(shapes, sparsity, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(shape, generator=generator) * 10.0**index for index, shape in enumerate(shapes)]
    counts = ScoreCounts(sparsity, floor)
    for index, matrix in enumerate(scores):
        counts.add(str(index), matrix)
    shares = counts.sparsities()
    total = sum(shares[str(index)] * matrix.numel() for index, matrix in enumerate(scores))
    assert math.isclose(total, round(sparsity * sum(matrix.numel() for matrix in scores)), abs_tol=1e-6)
    for index, keep in enumerate(pooled_masks(scores, sparsity, floor)):
        # Scores within 0.8 % of the threshold may fall on either side.
        assert abs(shares[str(index)] * keep.numel() - int((~keep).sum())) <= max(2, 0.05 * keep.numel())


def test_a_group_whose_scores_are_all_higher_loses_only_what_the_floor_leaves():
    counts = ScoreCounts(0.5, 1.4)
    counts.add("cheap", torch.rand(10, 100))
    counts.add("dear", 100 + torch.rand(10, 100))
    shares = counts.sparsities()
    assert abs(shares["cheap"] - 0.7) < 1e-9
    assert abs(shares["dear"] - 0.3) < 1e-9
