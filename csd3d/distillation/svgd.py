"""Stein variational gradient descent on latents: particles share their directions and repel one another.

Symbols, as in CSD (arXiv 2307.04787): particles z [N, ...] (noised latents z_t, unit scale), directions Δ [N, ...]
(minus σ_t times a score, plus a baseline), kernel matrix K [N, N] with ones on its diagonal. Sums are in float32
(float64 for float64 input) and returned in the directions' dtype. Directions are shared at equal pixel addresses.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.distillation.kernel import SVGDConfig, as_rows, kernel_matrix
from csd3d.waits import to_host

COARSE = 4  # side, in latent pixels, of the squares that space "coarse" averages


@dataclass(frozen=True, eq=False)
class Sums:
    """SVGD's two sums for every particle, before normalisation.

    score: Σ_j k_ij Δ_j [N, D].  force: Σ_j ∇_{z_j} k(z_j, z_i) [N, D].  total [N, 1]: the divisor, N or Σ_j k_ij.
    coefficient: λ σ_t, the weight of the force.  acts: false where the force acts on features instead of z.
    """

    K: Tensor
    score: Tensor
    force: Tensor
    total: Tensor
    coefficient: float
    acts: bool = True

    def gradient(self) -> Tensor:
        """G [N, D], to be *descended*."""
        force = self.coefficient * self.force if self.acts else 0.0
        return (self.score - force) / self.total

    def diagnostics(self) -> dict[str, float | Tensor]:
        """The report of `combine` for these sums; tensors are left on the device, to be read together."""
        others = off_diagonal(self.K)
        ratio = abs(self.coefficient) * self.force.norm() / self.score.norm().clamp_min(1e-12)
        return {
            "kernel_mean": others.mean(),
            "kernel_spread": others.std(correction=0),
            "repulsion_ratio": ratio,
        }


def off_diagonal(square: Tensor) -> Tensor:
    """The entries [N (N − 1), ...] of [N, N, ...] with i ≠ j, row by row; a mask would make the host wait."""
    count = len(square)
    return square.flatten(0, 1)[1:].unflatten(0, (count - 1, count + 1))[:, :-1].flatten(0, 1)


def svgd_combine(
    directions: Tensor,
    particles: Tensor,
    *,
    sigma: float,
    kernel: str = "rbf",
    bandwidth: str | float = "median",
    bandwidth_scale: float = 1.0,
    repulsion: float = 1.0,
    normalize: str = "mean",
) -> Tensor:
    """Combine N directions into N gradients to *descend*; a single direction is returned unchanged.

        G_i = 1/N Σ_j [ k(z_j, z_i) Δ_j − λ σ_t ∇_{z_j} k(z_j, z_i) ]

    CSD (arXiv 2307.04787) Eq. 8 without w(t) and with the sign of its repulsion corrected: as printed, +∇k in a
    descended gradient attracts.

    `directions`, `particles` [N, ...] have the same shape. `sigma` = σ_t, the noise level of the particles.
    `bandwidth`: "median" (γ = ln(N+1) / lower median over i≠j of the mean squared difference of z_i and z_j),
    "median_all" (over all N², zeros included) or γ ≥ 0 (0: a constant kernel, which averages). γ is divided by
    `bandwidth_scale`. `repulsion` = λ; a random-noise baseline already repels once, in expectation. `normalize`: "mean"
    divides by N; "row" by Σ_j k(z_j, z_i), so that weights sum to one and a step size holds for any N.

    For a kernel on clean latents pass clean `particles` and `sigma` = σ_t / √ᾱ_t, because z_t = √ᾱ_t z + σ_t ε gives
    ∇_{z_t} = ∇_z / √ᾱ_t.

    Returns [N, ...] in the directions' dtype, in O(N² + N D) memory. Raises ValueError for shapes that differ or
    unknown settings.
    """
    config = SVGDConfig(kernel, bandwidth, bandwidth_scale, repulsion=repulsion, normalize=normalize)
    if directions.shape != particles.shape or directions.ndim < 2 or len(directions) == 0:
        shapes = f"{tuple(directions.shape)} and {tuple(particles.shape)}"
        raise ValueError(f"directions and particles must both be [N, ...] of one shape with N >= 1, got {shapes}")
    if len(directions) == 1:
        return directions.clone()
    return _as(directions, stein_sums(directions, particles, repulsion * sigma, config).gradient())


def combine(
    directions: Tensor,
    noisy: Tensor,
    clean: Tensor,
    *,
    alpha_bar: float,
    config: SVGDConfig | None,
    features: Tensor | None = None,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """G [N, ...] without w(t), and a report for the log, to be read by `waits.to_host`.

    With config None each particle keeps its own direction. `noisy` (z_t), `clean` (z) [N, ...]; `alpha_bar` = ᾱ_t.
    `features` [N, ...]: what the kernel of space "features" compares (ValueError without them); `feature_force` then
    computes the repulsion.

    The report has kernel_mean and kernel_spread, mean and standard deviation of the off-diagonal k (spread 0: the
    kernel only averages), and repulsion_ratio, |λ σ Σ_j ∇k| / |Σ_j k Δ_j| over all particles (with space "features",
    per unit of features). All are 0 for one particle and without SVGD.
    """
    if config is None or len(directions) == 1:
        return directions.clone(), {"kernel_mean": 0.0, "kernel_spread": 0.0, "repulsion_ratio": 0.0}
    sums = _sums(directions, noisy, clean, alpha_bar, config, features)
    return _as(directions, sums.gradient()), sums.diagnostics()


def feature_force(features: Tensor, *, alpha_bar: float, config: SVGDConfig) -> Tensor:
    """The repulsion in space "features": a gradient for the particles' features φ [N, ...] to *descend*.

        −λ σ_t/N Σ_j ∇_{φ_j} k(φ_j, φ_i) = λ σ_t/N Σ_j ∇_{φ_i} k(φ_i, φ_j)

    The paper's −∇_{x_j} k and +∇_{x_i} k are equal only for φ(x) = x. The second repels particle i through its own
    Jacobian, so backpropagate this from φ. γ counts as a constant. The force on a single particle is 0.
    """
    if len(features) == 1:
        return torch.zeros_like(features)
    sums = stein_sums(torch.zeros_like(features), features, _coefficient(config, alpha_bar), config)
    return _as(features, sums.gradient())


def svgd_diagnostics(directions: Tensor, noisy: Tensor, clean: Tensor, **options) -> dict[str, float]:
    """The report of `combine` in numbers; it takes the same arguments."""
    return to_host(combine(directions, noisy, clean, **options)[1])


def stein_sums(directions: Tensor, particles: Tensor, coefficient: float, config: SVGDConfig) -> Sums:
    """Σ_j k_ij Δ_j and Σ_j ∇_{z_j} k_ij = Σ_j 2 s_ij (z_i − z_j) with s the slope, never an [N, N, D] tensor."""
    K, slope = kernel_matrix(particles, config)
    delta, z = as_rows(directions), as_rows(particles)
    z = z - z.mean(dim=0)  # reduces rounding errors
    force = 2 * (slope.sum(dim=1, keepdim=True) * z - slope @ z)
    total = K.sum(dim=1, keepdim=True) if config.normalize == "row" else torch.full_like(K[:, :1], len(K))
    total = total.to(delta.dtype)
    score = K.to(delta.dtype) @ delta if config.share else total * delta
    return Sums(K, score, force, total, coefficient)


def _sums(
    directions: Tensor,
    noisy: Tensor,
    clean: Tensor,
    alpha_bar: float,
    config: SVGDConfig,
    features: Tensor | None,
) -> Sums:
    """`stein_sums` of what config.space compares, with the force in z_t's coordinates."""
    coefficient, by_chain_rule = _coefficient(config, alpha_bar), 1 / math.sqrt(alpha_bar)
    if config.space == "features":
        if features is None:
            raise ValueError('svgd.space is "features": it needs features, [N, ...] of the particles')
        return replace(stein_sums(directions, features, coefficient, config), acts=False)
    if config.space == "coarse":
        means = F.avg_pool2d(clean, COARSE)
        sums = stein_sums(directions, means, coefficient * by_chain_rule, config)
        return replace(sums, force=_spread(sums.force.view_as(means), clean).flatten(1))
    particles = {"noisy": noisy, "scaled": math.sqrt(alpha_bar) * clean, "clean": clean}[config.space]
    coefficient = coefficient * by_chain_rule if config.space == "clean" else coefficient
    return stein_sums(directions, particles, coefficient, config)


def _spread(force: Tensor, z: Tensor) -> Tensor:
    """The force on pixels of z [N, C, h, w] for a `force` on their 4×4 means: a sixteenth each, by the chain rule.

    It is 0 on rows and columns that fill no 4×4 square.
    """
    spread = F.interpolate(force, scale_factor=COARSE) / COARSE**2
    return F.pad(spread, (0, z.shape[3] - spread.shape[3], 0, z.shape[2] - spread.shape[2]))


def _coefficient(config: SVGDConfig, alpha_bar: float) -> float:
    """λ σ_t; the authors' code has 1 in place of σ_t."""
    return config.repulsion * (1.0 if config.official else math.sqrt(1 - alpha_bar))


def _as(like: Tensor, rows: Tensor) -> Tensor:
    return rows.view_as(like).to(like.dtype)
