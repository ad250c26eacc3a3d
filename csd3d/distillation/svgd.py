"""Stein variational gradient descent on latents: how particles share their directions and repel one another.

Symbols, as in CSD (arXiv 2307.04787): particles `z [N, ...]` (noised latents z_t, unit scale), directions `Δ [N,
...]` (minus sigma_t times a score, plus a baseline), kernel matrix `K [N, N]` with ones on its diagonal, `gamma` its
inverse squared width. Everything is accumulated in float32 (float64 for float64 input) and returned in the
directions' dtype.

Plain SVGD shares directions at the same pixel address. Given a `Correspondence`, particle j is first brought to i's
pixels, and i shares with what shows the same content (`_brought`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.distillation.correspondence import Correspondence
from csd3d.distillation.kernel import KERNELS, MEDIANS, as_rows, check_choice, kernel_matrix

NORMALIZATIONS = ("mean", "row")
SPACES = ("noisy", "clean", "coarse", "features")
COARSE = 4  # latent pixels a side that space "coarse" averages


@dataclass
class SVGDConfig:
    """Settings of `combine`; `bandwidth` is "median", "median_all" or gamma itself (1 / squared latent units).

    `bandwidth_scale` = s divides gamma by s: with the median rule this is the rule applied to s times the median
    squared distance, a kernel whose width (a length) is sqrt(s) times larger. `repulsion` = lambda: SVGD has 1, but a
    random-noise baseline inside the direction already repels once in expectation (Stein's lemma), so 0 with SDS and
    independent noise is consistent too. `space`: distances between "noisy" latents z_t or the "clean" ones (the same
    thing when the noise is shared), or of "coarse" ones, means of 4 × 4 pixels [N, C, h, w]: there particles repel one
    another by their layout and colours, where in all coordinates the way apart is noise; or of "features" that whoever
    made the particles has of them, as the paper's text-to-3D has LPIPS: there they repel one another by
    `feature_force`. `compat` = "official" is the authors' code: 1 in place of sigma_t, median over all N² distances.
    """

    kernel: str = "rbf"
    bandwidth: str | float = "median"
    bandwidth_scale: float = 1.0
    repulsion: float = 1.0
    normalize: str = "mean"
    space: str = "noisy"
    compat: str = "corrected"

    def __post_init__(self):
        check_choice("svgd.kernel", self.kernel, KERNELS)
        check_choice("svgd.normalize", self.normalize, NORMALIZATIONS)
        check_choice("svgd.space", self.space, SPACES)
        check_choice("svgd.compat", self.compat, ("corrected", "official"))
        _check_bandwidth(self.bandwidth, self.bandwidth_scale)
        if not math.isfinite(self.repulsion):
            raise ValueError(f"svgd.repulsion is {self.repulsion}: give a finite number, 1 for SVGD or 0 for none")


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
    correspondence: Correspondence | None = None,
) -> Tensor:
    """Combine N directions into the N gradients to *descend*; one particle gets its direction back unchanged.

    G_i = 1/N Σ_j [ k(z_j, z_i) Δ_j − λ σ_t ∇_{z_j} k(z_j, z_i) ], CSD (arXiv 2307.04787) Eq. 8 without w(t) and with
    the sign of its repulsion corrected: as printed, +∇k in a descended gradient attracts.

    Args: `directions`, `particles` [N, ...] of one shape. `sigma` = σ_t, noise level of the particles. `bandwidth`:
    "median" (γ = ln(N+1) / lower median over i≠j of ‖z_i − z_j‖²), "median_all" (over all N², zeros included) or γ ≥
    0 itself (0: a constant kernel, which averages). γ is then divided by `bandwidth_scale`. `repulsion` = λ;
    directions with a random-noise baseline hold one repulsion already, in expectation. `normalize`: "mean" has 1/N;
    "row" divides by Σ_j k(z_j, z_i), so that the weights sum to one and a step size carries across N.

    Kernel on clean latents: pass the clean `particles` and `sigma` = σ_t / √ᾱ_t, for z_t = √ᾱ_t z + σ_t ε has ∇_{z_t}
    = ∇_z / √ᾱ_t.

    `correspondence`: share between corresponding pixels of particles [N, C, h, w]; identities give the plain form.

    Returns [N, ...] in the directions' dtype. O(N² + N D) memory. Raises ValueError on shapes that differ or unknown
    settings.
    """
    _check_particles(directions, particles)
    check_choice("normalize", normalize, NORMALIZATIONS)
    if len(directions) == 1:
        return directions.clone()
    K, slope = kernel_matrix(particles, kernel, bandwidth, bandwidth_scale, correspondence)
    score, force = _score_and_force(K, slope, directions, particles, normalize, correspondence)
    return (score - repulsion * sigma * force).view_as(directions).to(directions.dtype)


def feature_force(features: Tensor, *, alpha_bar: float, config: SVGDConfig) -> Tensor:
    """What features φ [N, ...] of particles are to *descend* in space "features", beside what `combine` shares.

        −λ σ_t/N Σ_j ∇_{φ_j} k(φ_j, φ_i) = λ σ_t/N Σ_j ∇_{φ_i} k(φ_i, φ_j)

    The paper's −∇_{x_j} k and +∇_{x_i} k agree for φ(x) = x only; the second is what repels particle i, through its own
    Jacobian: push this back from φ to what made the particle. γ is a constant in it. One particle feels nothing.
    """
    if len(features) == 1:
        return torch.zeros_like(features)
    K, slope = _feature_kernel(features, config)
    force = _kernel_gradient(K, slope, features, config.normalize).view_as(features)
    return (-_coefficient(config, math.sqrt(1 - alpha_bar)) * force).to(features.dtype)


def combine(
    directions: Tensor,
    noisy: Tensor,
    clean: Tensor,
    *,
    alpha_bar: float,
    config: SVGDConfig | None,
    correspondence: Correspondence | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """G without w(t) as `config` says; None is no collaboration: each particle keeps its own direction.

    `directions`, `noisy` (z_t), `clean` (z): [N, ...]; `alpha_bar` = ᾱ_t of the noised latents. `correspondence`: see
    `svgd_combine`; noise shared by address is then to be left out of `noisy` (`kernel_latents`). `features` [N, ...]:
    what the kernel of space "features" compares, ValueError without; repulsion is then left to `feature_force`.
    """
    if config is None:
        return directions
    if config.space in ("coarse", "features") and correspondence is not None:
        raise ValueError(f'svgd.space is "{config.space}", which shares by address: leave correspondence out')
    if config.space == "features":
        if len(directions) == 1:
            return directions.clone()
        K, _ = _feature_kernel(features, config)
        return _shared_score(K, directions, config.normalize).view_as(directions).to(directions.dtype)
    particles, options = _options(noisy, clean, alpha_bar, config)
    return svgd_combine(directions, particles, normalize=config.normalize, correspondence=correspondence, **options)


def kernel_latents(
    noisy: Tensor, clean: Tensor, alpha_bar: float, noise: str, correspondence: Correspondence | None
) -> Tensor:
    """z_t [N, ...] as the kernel is to see it, for `combine`'s `noisy`: without noise that plain distances are free of.

    `noise` "shared" cancels in ‖z_{t,i} − z_{t,j}‖² = ᾱ_t ‖z_i − z_j‖² address by address; z_{t,j} brought to i's
    pixels has other noise there, which would drown the content. √ᾱ_t z has the distances meant.
    """
    return alpha_bar**0.5 * clean if noise == "shared" and correspondence is not None else noisy


def svgd_diagnostics(
    directions: Tensor,
    noisy: Tensor,
    clean: Tensor,
    *,
    alpha_bar: float,
    config: SVGDConfig | None,
    correspondence: Correspondence | None = None,
    features: Tensor | None = None,
) -> dict[str, float]:
    """What the kernel sees at this step, to be logged: all are 0 for one particle or without SVGD.

    kernel_mean and kernel_spread: mean and standard deviation of the off-diagonal k (spread 0: the kernel is blind to
    content and only averages), with a correspondence only of pairs that have content in common; repulsion_ratio:
    |λ σ Σ_j ∇k| / |Σ_j k Δ_j| over all particles (of "features", per unit of those); with a correspondence also
    shared_pixels, the mean share of a particle's pixels that another shows.
    """
    report = dict.fromkeys(("kernel_mean", "kernel_spread", "repulsion_ratio"), 0.0)
    if correspondence is not None:
        report["shared_pixels"] = 0.0
    if config is None or len(directions) == 1:
        return report
    if config.space == "features":
        particles, coefficient = features, _coefficient(config, math.sqrt(1 - alpha_bar))
        K, slope = _feature_kernel(features, config)
    else:
        particles, options = _options(noisy, clean, alpha_bar, config)
        coefficient = options.pop("repulsion") * options.pop("sigma")
        K, slope = kernel_matrix(particles, **options, correspondence=correspondence)
    terms = _score_and_force(K, slope, directions, particles, "mean", correspondence)
    score, force = (term.norm() for term in terms)
    report["repulsion_ratio"] = (abs(coefficient) * force / score.clamp_min(1e-12)).item()
    counted = ~torch.eye(len(K), dtype=torch.bool, device=K.device)
    if correspondence is not None:
        report["shared_pixels"] = correspondence.validity[counted].mean().item()
        counted &= correspondence.validity.sum((2, 3)) > 0
    if counted.any():
        report["kernel_mean"] = K[counted].mean().item()
        report["kernel_spread"] = K[counted].std(correction=0).item()
    return report


def _shared_score(K: Tensor, directions: Tensor, normalize: str) -> Tensor:
    """Σ_j k_ij Δ_j / N (or / Σ_j k_ij), [N, D]."""
    flat = as_rows(directions)
    return (K.to(flat.dtype) @ flat) / _denominator(K, normalize)


def _kernel_gradient(K: Tensor, slope: Tensor, features: Tensor, normalize: str) -> Tensor:
    """Σ_j ∇_{φ_j} k(φ_j, φ_i) / N = 2 (rowsum(S) φ_i − Σ_j S_ij φ_j) / N with S the slope, [N, D]."""
    centred = as_rows(features) - as_rows(features).mean(dim=0)  # changes nothing but the rounding
    force = 2 * (slope.sum(dim=1, keepdim=True) * centred - slope @ centred)
    return force / _denominator(K, normalize)


def _score_and_force(
    K: Tensor,
    slope: Tensor,
    directions: Tensor,
    particles: Tensor,
    normalize: str,
    correspondence: Correspondence | None,
) -> tuple[Tensor, Tensor]:
    """Σ_j k_ij Δ_j and Σ_j ∇_j k_ij, normalised, [N, D] both."""
    if correspondence is not None:
        return _brought(K, slope, directions, particles, normalize, correspondence)
    return _shared_score(K, directions, normalize), _kernel_gradient(K, slope, particles, normalize)


def _brought(
    K: Tensor, slope: Tensor, directions: Tensor, particles: Tensor, normalize: str, correspondence: Correspondence
) -> tuple[Tensor, Tensor]:
    """SVGD's two sums for particle i among the others as they look from i, y_j = z_j(x_ij(·)); [N, D] both.

        score_i(p) = Σ_j k_ij [v_ij Δ_i + A_ij (Δ_j − B_ji Δ_i)](p) / n_i(p)
        force_i(p) = Σ_j 2 s_ij v_ij(p) (z_i − y_j)(p) / n_i(p),   s the slope

    Scores. Brought is how j's direction differs from i's, on j's pixels (0 where i does not show them), not the
    direction itself: interpolation then blurs disagreement alone, and directions that agree come out as sharp as they
    are. Where positions are whole numbers, as windows on one canvas have them, it is Σ_j k_ij A_ij Δ_j.

    Repulsion. With B_ij the bilinear rows alone, A_ij = v_ij B_ij, k depends on z_j through y_j = B_ij z_j, so that
    ∇_{z_j} k = B_ijᵀ ∇_{y_j} k: on j's pixels, spread there by the adjoint. A gradient, unlike a direction, comes back
    to i by the inverse of that adjoint, not by A_ij (A_ij B_ijᵀ would blur it), and what is back is ∇_{y_j} k itself,
    as from SVGD among the y_j: 2 s_ij v_ij (z_i − y_j). d² is Σ_p v ‖z_i − y_j‖² and, for what is not shown, a
    guess in proportion to it. The guess is no coordinate of y_j and is held fixed: the force on a pixel that is shared
    does not grow as fewer are.

    Normalisation. Where j does not show p, its weight k_ij goes to those who do, i itself always among them:

        n_i(p) = n_i Σ_j k_ij v_ij(p) / Σ_j k_ij,   n_i = N ("mean") or Σ_j k_ij ("row")

    With "row" the weights at every pixel sum to one. With "mean" they sum to what they do in the plain form,
    Σ_j k_ij / N, at all pixels of i, so that agreeing directions move the whole of i alike and the ends of an overlap
    do not show; an i that shares nothing with anyone gets Δ_i / N, as plain SVGD gives one infinitely far from all.
    """
    z, delta = (as_rows(x).view_as(x) for x in (particles, directions))
    plain = _denominator(K, normalize)
    score, force = torch.empty_like(delta), torch.empty_like(z)
    for i in range(len(z)):
        validity = correspondence.validity[i].to(z)
        weight, pull = (factor[i, :, None, None] * validity for factor in (K, slope))
        total = weight.sum(0)
        count = total / K[i].sum() * (plain if normalize == "mean" else plain[i])
        seen = (correspondence.validity[:, i] > 0)[:, None]
        differs = torch.where(seen, delta - correspondence.sample_back(delta[i], i), 0.0)
        differs, y_j = correspondence.sample(torch.cat([differs, z], 1), i).chunk(2, dim=1)
        score[i] = (total * delta[i] + (weight[:, None] * differs).sum(0)) / count
        force[i] = 2 * (pull[:, None] * (z[i] - y_j)).sum(0) / count
    return score.flatten(1), force.flatten(1)


def _denominator(K: Tensor, normalize: str) -> Tensor | int:
    return len(K) if normalize == "mean" else K.sum(dim=1, keepdim=True)


def _options(noisy: Tensor, clean: Tensor, alpha_bar: float, config: SVGDConfig) -> tuple[Tensor, dict]:
    """The particles whose distances count, and svgd_combine's keywords for them."""
    sigma = math.sqrt(1 - alpha_bar)
    particles, chain_rule = (noisy, 1.0) if config.space == "noisy" else (clean, 1 / math.sqrt(alpha_bar))
    if config.space == "coarse":
        particles, chain_rule = _coarse(clean), chain_rule / COARSE
    return particles, {
        "sigma": 1.0,
        "repulsion": _coefficient(config, sigma) * chain_rule,
        **_kernel_options(config),
    }


def _kernel_options(config: SVGDConfig) -> dict:
    """`kernel_matrix`'s keywords."""
    official = config.compat == "official" and config.bandwidth == "median"
    bandwidth = "median_all" if official else config.bandwidth
    return {"kernel": config.kernel, "bandwidth": bandwidth, "bandwidth_scale": config.bandwidth_scale}


def _feature_kernel(features: Tensor | None, config: SVGDConfig) -> tuple[Tensor, Tensor]:
    """`kernel_matrix` of features."""
    if features is None:
        raise ValueError('svgd.space is "features": it needs features, [N, ...] of the particles')
    return kernel_matrix(features, **_kernel_options(config))


def _coarse(z: Tensor) -> Tensor:
    """Means of 4 × 4 pixels of z [N, C, h, w], a quarter of each at all of its pixels: as far apart as the means are.

    By the chain rule z feels a quarter of the force. Rows and columns that fill no 4 × 4 count for nothing.
    """
    spread = F.interpolate(F.avg_pool2d(z, COARSE), scale_factor=COARSE) / COARSE
    return F.pad(spread, (0, z.shape[3] - spread.shape[3], 0, z.shape[2] - spread.shape[2]))


def _coefficient(config: SVGDConfig, sigma: float) -> float:
    return config.repulsion * (1.0 if config.compat == "official" else sigma)


def _check_particles(directions: Tensor, particles: Tensor) -> None:
    if directions.shape != particles.shape or directions.ndim < 2 or len(directions) == 0:
        shapes = f"{tuple(directions.shape)} and {tuple(particles.shape)}"
        raise ValueError(f"directions and particles must both be [N, ...] of one shape with N >= 1, got {shapes}")


def _check_bandwidth(bandwidth: str | float, scale: float) -> None:
    if isinstance(bandwidth, str):
        check_choice("svgd.bandwidth", bandwidth, MEDIANS)
    elif not 0 <= bandwidth < math.inf:
        raise ValueError(f"svgd.bandwidth is {bandwidth}: give 'median', 'median_all' or gamma >= 0")
    if not 0 < scale < math.inf:
        raise ValueError(f"svgd.bandwidth_scale is {scale}: give a number above 0")
