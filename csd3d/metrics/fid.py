"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

Symbols: a [N,D], b [M,D] features; m their mean, S their covariance (over N − 1), A = (a − m_a) / √(N − 1) with
AᵀA = S_a, B likewise.
"""

import torch
from torch import Tensor

ROUNDING = 1e-12  # share of the traces that float64 rounding can leave of a zero difference


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖m_a − m_b‖² + Tr(S_a + S_b − 2 (S_a^½ S_b S_a^½)^½) of features `[N, D]` and `[M, D]`, in float64.

    The last trace is the sum of singular values of A Bᵀ, since S_a^½ S_b S_a^½ has the eigenvalues of (A Bᵀ)(A Bᵀ)ᵀ.
    This needs no matrix root and no ridge for N < D, and factors nothing larger than min(N, D) × min(M, D). A
    covariance part below rounding counts as 0, so equal sets have distance exactly 0. Biased upwards for few samples:
    compare equal N and M only. Raises ValueError for other shapes, fewer than two samples, or values not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected [N, D] and [M, D] with N, M ≥ 2, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite")
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a, root_b = (_root(x - mean) for x, mean in ((a, mean_a), (b, mean_b)))
    traces = root_a.square().sum() + root_b.square().sum()
    spread = traces - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()
    return float((mean_a - mean_b).square().sum() + torch.where(spread > ROUNDING * traces, spread, 0.0))


def _root(centred: Tensor) -> Tensor:
    """A matrix R `[min(N, D), D]` with RᵀR the covariance of centred samples `[N, D]`."""
    scaled = centred / (len(centred) - 1) ** 0.5
    return torch.linalg.qr(scaled, mode="r").R if len(scaled) > scaled.shape[1] else scaled
