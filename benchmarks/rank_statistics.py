"""How well a proxy orders results as a true score does: rank correlation, pairwise accuracy, bootstrap over clusters.

Symbols: N results; both values of a result are better when higher.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 1000


def spearman(proxy: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rank correlation of [N] and [N], ties at their mean rank; NaN if one of them is constant."""
    if len(proxy) < 2:
        return float("nan")
    a, b = (rankdata(x) - (len(x) + 1) / 2 for x in (proxy, truth))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def pair_counts(proxy: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """Pairs that the proxy orders like the truth (a tie of the proxy is half a pair), and all pairs with an order."""
    i, j = np.triu_indices(len(proxy), 1)
    order, said = np.sign(truth[i] - truth[j]), np.sign(proxy[i] - proxy[j])
    total = int(np.count_nonzero(order))
    return float(0.5 * total + 0.5 * (order * said).sum()), total


def pairwise_accuracy(proxy: np.ndarray, truth: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Share of the pairs of one group that the proxy orders like the truth; .5 is chance, NaN: no pairs."""
    counts = _counts(proxy, truth, groups)
    total = sum(n for _, n in counts.values())
    return sum(r for r, _ in counts.values()) / total if total else float("nan")


def _counts(proxy: np.ndarray, truth: np.ndarray, groups: Sequence[Hashable]) -> dict[Hashable, tuple[float, int]]:
    index: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        index.setdefault(group, []).append(i)
    return {group: pair_counts(proxy[rows], truth[rows]) for group, rows in index.items()}


def spearman_interval(
    proxy: np.ndarray, truth: np.ndarray, clusters: Sequence[Hashable], seed: int = 0, share: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of `spearman`: whole clusters are drawn again, as results of one cluster are alike."""
    rows = [np.flatnonzero([c == cluster for c in clusters]) for cluster in dict.fromkeys(clusters)]

    def statistic(drawn: np.ndarray) -> float:
        picked = np.concatenate([rows[k] for k in drawn])
        return spearman(proxy[picked], truth[picked])

    return _interval(statistic, len(rows), seed, share)


def accuracy_interval(
    proxy: np.ndarray,
    truth: np.ndarray,
    groups: Sequence[Hashable],
    clusters: Sequence[Hashable],
    seed: int = 0,
    share: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of `pairwise_accuracy`; every group lies in one cluster."""
    home = dict(zip(groups, clusters, strict=True))
    names = list(dict.fromkeys(clusters))
    counts = np.zeros((len(names), 2))
    for group, found in _counts(proxy, truth, groups).items():
        counts[names.index(home[group])] += found

    def statistic(drawn: np.ndarray) -> float:
        right, total = counts[drawn].sum(0)
        return right / total if total else float("nan")

    return _interval(statistic, len(names), seed, share)


def _interval(statistic: Callable[[np.ndarray], float], clusters: int, seed: int, share: float) -> tuple[float, float]:
    """Percentiles of a statistic of drawn clusters; NaN with fewer than two clusters."""
    if clusters < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    found = np.array([statistic(rng.integers(clusters, size=clusters)) for _ in range(RESAMPLES)])
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, ((1 - share) / 2, (1 + share) / 2))
    return float(low), float(high)
