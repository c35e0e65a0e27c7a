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


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 2**31))
def test_drifts_of_batches_and_merges_are_that_of_all_inputs(sizes, features, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(2, 2, size, features, generator=generator) for size in sizes]
    left, right = (InputStatistics(features, drift=True) for _ in range(2))
    for index, (inputs, others) in enumerate(batches):
        one = left if index % 2 else right
        one.update(inputs)
        one.update_drift(inputs, others)
    left.merge(right)
    inputs, others = torch.cat([batch.reshape(2, -1, features) for batch in batches], dim=1).double()
    before = left.drift
    left.finish()
    torch.testing.assert_close(left.drift, before, rtol=0, atol=0)
    torch.testing.assert_close(left.drift.double(), (others - inputs).T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)


def test_a_drift_that_was_not_asked_for_is_not_kept():
    statistics = InputStatistics(5)
    statistics.update(torch.randn(3, 5))
    assert statistics.drift is None
    with pytest.raises(ValueError, match="construct them with drift=True"):
        statistics.update_drift(torch.randn(3, 5), torch.randn(3, 5))


def test_energies_alone_equal_the_diagonal_of_the_gram():
    inputs = torch.randn(3, 7, 5).bfloat16()
    full, diagonal = InputStatistics(5), InputStatistics(5, full=False)
    full.update(inputs)
    diagonal.update(inputs)
    torch.testing.assert_close(full.energy, diagonal.energy)
    with pytest.raises(ValueError, match="energies only"):
        _ = diagonal.gram


def test_statistics_of_nothing_are_refused():
    for name in ("energy", "drift"):
        with pytest.raises(ValueError, match="no calibration input"):
            getattr(InputStatistics(4, drift=True), name)


@given(st.integers(1, 12), st.booleans(), st.integers(0, 2**31))
def test_reordered_moments_are_those_of_reordered_inputs(features, full, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, others = torch.randn(2, 9, features, generator=generator)
    order = torch.randperm(features, generator=generator)
    before, after = (InputStatistics(features, full=full, drift=True) for _ in range(2))
    for statistics, chosen in ((before, slice(None)), (after, order)):
        statistics.update(inputs[:, chosen])
        statistics.update_drift(inputs[:, chosen], others[:, chosen])
    with pytest.raises(ValueError, match="once they are finished"):
        before.reorder(order)
    for statistics in (before, after):
        statistics.finish()
    before.reorder(order)
    torch.testing.assert_close(before.sum, after.sum, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before.drift, after.drift, rtol=1e-4, atol=1e-5)
