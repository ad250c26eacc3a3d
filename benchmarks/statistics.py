"""Intervals of means and of paired differences, by the bootstrap over clusters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS, LEVEL = 4000, 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its interval at `LEVEL`; `count` values in `clusters` clusters."""

    mean: float
    low: float
    high: float
    count: int
    clusters: int

    @property
    def clear_of_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def bootstrap(values: Sequence[float], clusters: Sequence[object], seed: int = 0) -> Interval:
    """The mean of `values`, with the percentile interval of a bootstrap that draws whole clusters (scenes).

    Values of one scene are not independent, so scenes are drawn with replacement, each with all of its values. For
    the paired difference of two methods, give differences of the same inputs. ValueError without values.
    """
    if len(values) == 0 or len(values) != len(clusters):
        raise ValueError(f"got {len(values)} values of {len(clusters)} clusters: give one cluster each, at least one")
    names = list(dict.fromkeys(clusters))
    groups = [np.array([v for v, c in zip(values, clusters, strict=True) if c == name]) for name in names]
    sums, counts = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    drawn = np.random.default_rng(seed).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean(values)), float(low), float(high), len(values), len(names))
