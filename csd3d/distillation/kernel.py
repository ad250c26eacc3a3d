"""The kernel of SVGD: the similarity of particles.

Symbols: features [N, ...] of the particles, D coordinates each; K [N, N] with ones on its diagonal; γ its inverse
squared width. Distances are d² = ‖a − b‖²/D, the *mean* squared difference over coordinates, so that γ means the same
for latents of 4×16×16 and of 16×128×128.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KERNELS = ("rbf", "imq")
MEDIANS = ("median", "median_all")
OF_MODEL = "model"  # the model's own γ, which `suits.suited` puts in its place
NORMALIZATIONS = ("mean", "row")
SPACES = ("noisy", "scaled", "clean", "coarse", "features")
MIN_RMS_DISTANCE = 1e-3  # latent units; gamma does not grow for particles closer than this
MIN_RELATIVE_MEDIAN = 1e-4  # least median as a share of the mean d², for when more than half of the pairs coincide


@dataclass
class SVGDConfig:
    """How particles collaborate (`svgd`). Defaults: the paper's SVGD with the sign of its repulsion corrected."""

    kernel: str = "rbf"  # rbf: exp(−γ d²); imq: (1 + γ d²)^(−1/2), with a heavier tail
    # γ: median, ln(N+1)/median of d² over i≠j; median_all, over all N²; model, what suits the model; or a number >= 0
    bandwidth: str | float = "median"
    bandwidth_scale: float = 1.0  # divides γ: 4 makes the kernel twice as wide
    share: bool = True  # false: particles keep their own directions and only repel one another (RSD)
    repulsion: float = 1.0  # λ, 1 in SVGD; 0: none (SDS's random noise already repels once in expectation)
    normalize: str = "mean"  # mean: divide sums by N; row: by Σ_j k_ij, so that a step size holds for any N
    # what d² compares: noisy z_t; scaled, √ᾱ z, which is z_t without its noise (the same where noise is shared);
    # clean z; coarse 4×4 means of z; or features of the pictures
    space: str = "noisy"
    compat: str = "corrected"  # official: as the authors' code: 1 for σ_t, median over N², condition scaled and sampled

    def __post_init__(self) -> None:
        check_choice("svgd.kernel", self.kernel, KERNELS)
        check_choice("svgd.normalize", self.normalize, NORMALIZATIONS)
        check_choice("svgd.space", self.space, SPACES)
        check_choice("svgd.compat", self.compat, ("corrected", "official"))
        if isinstance(self.bandwidth, str):
            check_choice("svgd.bandwidth", self.bandwidth, (*MEDIANS, OF_MODEL))
        elif not 0 <= self.bandwidth < math.inf:
            raise ValueError(f"svgd.bandwidth is {self.bandwidth}: give 'median', 'median_all', 'model' or gamma >= 0")
        if not 0 < self.bandwidth_scale < math.inf:
            raise ValueError(f"svgd.bandwidth_scale is {self.bandwidth_scale}: give a number above 0")
        if not math.isfinite(self.repulsion):
            raise ValueError(f"svgd.repulsion is {self.repulsion}: give a finite number, 1 for SVGD or 0 for none")

    @property
    def official(self) -> bool:
        """Whether to follow the authors' code.

        For editors it also means that the image condition is `scaling_factor` times a *sample* of the posterior, where
        our default is the unscaled mode.
        """
        return self.compat == "official"


def kernel_matrix(features: Tensor, config: SVGDConfig) -> tuple[Tensor, Tensor]:
    """K [N, N] between rows of `features` [N, ...], and its slope −dk/d‖a − b‖² [N, N] (of the sum, not the mean)."""
    flat = as_rows(features)
    squared = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()  # exact 0 where equal
    N, dimensions = flat.shape
    i, j = torch.triu_indices(N, N, offset=1, device=flat.device)
    squared = squared / dimensions
    gamma = _gamma(squared, squared[i, j], config)
    if config.kernel == "rbf":
        K = torch.exp(-gamma * squared)
        slope = gamma * K
    else:
        K = torch.rsqrt(1 + gamma * squared)
        slope = 0.5 * gamma * K**3
    return K, slope / dimensions


def _gamma(squared: Tensor, between: Tensor, config: SVGDConfig) -> Tensor | float:
    """γ = ln(N+1) / median of d², of `squared` [N, N] or of `between`, its pairs i < j.

    A least median keeps it finite for equal particles.
    """
    if not isinstance(config.bandwidth, str):
        return config.bandwidth / config.bandwidth_scale
    if config.bandwidth == OF_MODEL:
        raise ValueError('svgd.bandwidth is "model": give a number, or see distillation.suits')
    over_all = config.official or config.bandwidth == "median_all"
    median = (squared if over_all else between).median()
    floor = (MIN_RELATIVE_MEDIAN * between.mean()).clamp_min(MIN_RMS_DISTANCE**2)
    return math.log(len(squared) + 1) / (torch.maximum(median, floor) * config.bandwidth_scale)


def as_rows(x: Tensor) -> Tensor:
    """[N, ...] as [N, D], in float32 or better."""
    return x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32))


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError naming the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{key} is {value!r}: choose one of {', '.join(choices)}")
