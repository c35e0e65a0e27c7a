"""The interval covers the truth about as often as it says, and pairing makes it narrow."""

import numpy as np
import pytest

from efx_plugin.evaluate.statistics import mean_and_spread, paired_bootstrap


def test_mean_and_spread():
    assert mean_and_spread([2.0]) == (2.0, None)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def drawn(generator, documents=60, effect=0.1):
    tokens = generator.integers(20, 200, documents)
    hard = generator.normal(3, 1, documents)  # documents differ much more from each other than the models do
    ours = tokens * (hard + generator.normal(0, 0.1, documents))
    theirs = tokens * (hard + effect + generator.normal(0, 0.1, documents))
    return ours, theirs, tokens


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [paired_bootstrap(*drawn(generator)) for _ in range(100)]
    covered = sum(interval.low <= -0.1 <= interval.high for interval in intervals)
    assert covered >= 85
    assert all(interval.low <= interval.difference <= interval.high for interval in intervals)
    assert all(interval.high - interval.low < 0.15 for interval in intervals)


def test_the_same_seed_draws_the_same_and_equal_models_do_not_differ():
    ours, theirs, tokens = drawn(np.random.default_rng(0))
    assert paired_bootstrap(ours, theirs, tokens, 1) == paired_bootstrap(ours, theirs, tokens, 1)
    assert paired_bootstrap(ours, theirs, tokens, 1) != paired_bootstrap(ours, theirs, tokens, 2)
    same = paired_bootstrap(ours, ours, tokens)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_the_two_sides_are_mirror_images():
    ours, theirs, tokens = drawn(np.random.default_rng(0))
    one, other = paired_bootstrap(ours, theirs, tokens), paired_bootstrap(theirs, ours, tokens)
    assert (one.difference, one.low) == (pytest.approx(-other.difference), pytest.approx(-other.high))
