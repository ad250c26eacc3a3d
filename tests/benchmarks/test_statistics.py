"""The bootstrap over clusters: its coverage, what a cluster does, and degenerate input."""

import numpy as np
import pytest

from benchmarks import statistics
from benchmarks.statistics import bootstrap


def test_intervals_hold_the_true_mean_about_as_often_as_they_say(monkeypatch):
    """200 samples of 12 clusters of 4 values: the percentile bootstrap of few clusters is a little too narrow."""
    monkeypatch.setattr(statistics, "DRAWS", 400)
    rng, clusters = np.random.default_rng(0), np.repeat(range(12), 4).tolist()
    held = naive = 0
    for _ in range(200):
        values = rng.normal(5, 1, 12).repeat(4) + rng.normal(0, 0.3, 48)
        found = bootstrap(values, clusters)
        held += found.low <= 5 <= found.high
        alone = bootstrap(values, range(48))
        naive += alone.low <= 5 <= alone.high
    assert 0.87 <= held / 200 <= 0.97
    assert naive / 200 < 0.75  # values of one scene are no new scenes


def test_the_width_is_that_of_the_means_of_clusters():
    rng = np.random.default_rng(1)
    scenes = rng.normal(0, 2, 30)
    found = bootstrap(scenes.repeat(5), np.repeat(range(30), 5))
    assert found.mean == pytest.approx(scenes.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * scenes.std() / 30**0.5, rel=0.1)
    assert (found.count, found.clusters) == (150, 30)
    assert bootstrap(scenes, range(30)) == bootstrap(scenes, range(30))  # the seed is fixed
    assert bootstrap(scenes, range(30), seed=1) != bootstrap(scenes, range(30))


def test_clusters_count_by_their_values():
    """Mean of all values, not of clusters; both clusters alone are among the draws."""
    found = bootstrap([0.0, 0.0, 0.0, 4.0], ["a", "a", "a", "b"])
    assert (found.mean, found.low, found.high) == (1.0, 0.0, 4.0)


def test_degenerate_input():
    one = bootstrap([2.5], ["duck"])
    assert (one.mean, one.low, one.high, one.count, one.clusters) == (2.5, 2.5, 2.5, 1, 1)
    assert one.clear_of_zero
    assert not bootstrap([0.0, 0.0], ["a", "b"]).clear_of_zero
    assert bootstrap([-1.0, -2.0], ["a", "b"]).clear_of_zero
    assert not bootstrap([-1.0, 2.0], ["a", "b"]).clear_of_zero
    for values, clusters in (([], []), ([1.0], []), ([1.0], ["a", "b"])):
        with pytest.raises(ValueError, match="give one cluster each"):
            bootstrap(values, clusters)
