"""What may be said of a few runs on a few documents: mean and spread, and an interval for a difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_LEVEL = 0.95
_CHUNK = 2_000_000  # resampled documents at a time


@dataclass(frozen=True)
class Interval:
    """A difference of log perplexities and where it lies with a probability of 95 %, over the choice of documents."""

    difference: float
    low: float
    high: float


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation of a single value (n - 1 in the denominator); None for one value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def paired_bootstrap(ours: Sequence[float], theirs: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Interval:
    """Log perplexity of ours minus theirs on the same documents, and its interval: documents are drawn anew with
    replacement 10,000 times, the same for both, and the outer 5 % of the differences cut off (percentile bootstrap,
    Efron 1979).

    Args:
        ours, theirs: summed loss of each document, in nats.
        tokens: predicted tokens of each document.
        seed: of the draws.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    counts = np.asarray(tokens, dtype=np.float64)
    generator, documents = np.random.default_rng(seed), len(counts)
    chunk = max(1, _CHUNK // documents)
    drawn = []
    for begin in range(0, _RESAMPLES, chunk):
        size = (min(chunk, _RESAMPLES - begin), documents)
        chosen = generator.integers(documents, size=size)
        drawn.append(difference[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(math.fsum(difference) / math.fsum(counts), float(low), float(high))
