import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.method.statistics import InputStatistics


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 2**31))
def test_batches_and_merges_give_the_moments_of_all_inputs(sizes, features, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(2, size, features, generator=generator) for size in sizes]
    whole = torch.cat([batch.reshape(-1, features) for batch in batches]).double()
    one, left, right = (InputStatistics(features) for _ in range(3))
    for index, batch in enumerate(batches):
        one.update(batch)
        (left if index % 2 else right).update(batch)
    left.merge(right)
    expected = whole.T @ whole / len(whole)
    before = left.gram
    left.finish()
    torch.testing.assert_close(left.gram, before, rtol=0, atol=0)
    for statistics in (one, left):
        assert statistics.count == len(whole)
        torch.testing.assert_close(statistics.gram.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.energy.double(), expected.diagonal(), rtol=1e-4, atol=1e-5)


def test_energies_alone_equal_the_diagonal_of_the_gram():
    inputs = torch.randn(3, 7, 5).bfloat16()
    full, diagonal = InputStatistics(5), InputStatistics(5, full=False)
    full.update(inputs)
    diagonal.update(inputs)
    torch.testing.assert_close(full.energy, diagonal.energy)
    with pytest.raises(ValueError, match="energies only"):
        _ = diagonal.gram


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no calibration input"):
        _ = InputStatistics(4).energy
