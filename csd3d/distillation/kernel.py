"""The kernel of SVGD: how alike particles are, by plain distances or along a correspondence of their pixels.

Symbols: features [N, ...] of the particles compared, K [N, N] with ones on its diagonal, γ its inverse squared width.
"""

import math

import torch
from torch import Tensor

from csd3d.distillation.correspondence import Correspondence

KERNELS = ("rbf", "imq")
MEDIANS = ("median", "median_all")
MIN_RMS_DISTANCE = 1e-3  # per coordinate, latent units: below it two particles count as one and gamma stops growing
MIN_RELATIVE_MEDIAN = 1e-4  # of the mean squared distance: over half the pairs coincide, the others must stay in range


def kernel_matrix(
    features: Tensor,
    kernel: str = "rbf",
    bandwidth: str | float = "median",
    bandwidth_scale: float = 1.0,
    correspondence: Correspondence | None = None,
) -> tuple[Tensor, Tensor]:
    """K [N, N], and its slope −dk/d‖·‖² [N, N], between rows of `features` [N, ...].

    "rbf": k = exp(−γ d²). "imq": k = (1 + γ d²)^(−1/2), whose heavy tail still shares at several median distances.

    With a `correspondence` (features [N, C, h, w]) row i compares z_i with every particle brought to i's pixels, over
    the content they have in common, scaled to the whole so that one γ serves all pairs:

        d²_ij = h w / Σ_p v_ij(p) · Σ_p v_ij(p) ‖z_i(p) − z_j(x_ij(p))‖²

    and both results are 0 where there is none. What i sees of j is not what j sees of i: K need not be symmetric.
    """
    check_choice("kernel", kernel, KERNELS)
    flat = as_rows(features)
    if correspondence is None:
        squared = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()  # exact 0 where equal
        common = None
    else:
        squared, common = _brought_distances(flat.view_as(features), correspondence)
    gamma = _gamma(squared, flat.shape[1], bandwidth, common) / bandwidth_scale
    if kernel == "rbf":
        K = torch.exp(-gamma * squared)
        slope = gamma * K
    else:
        K = torch.rsqrt(1 + gamma * squared)
        slope = 0.5 * gamma * K**3
    return (K, slope) if common is None else (K * common, slope * common)


def _gamma(squared: Tensor, dimensions: int, bandwidth: str | float, common: Tensor | None = None) -> Tensor | float:
    """γ = ln(N+1) / median of the squared distances, floored so that coinciding particles leave it finite.

    `common` [N, N] bool: which of them are known.
    """
    if not isinstance(bandwidth, str):
        return bandwidth
    N = len(squared)
    check_choice("bandwidth", bandwidth, MEDIANS)
    if common is None:
        i, j = torch.triu_indices(N, N, offset=1, device=squared.device)
        pairs = squared[i, j]
    else:
        pairs, squared = squared[common & ~torch.eye(N, dtype=torch.bool, device=squared.device)], squared[common]
        pairs = pairs if len(pairs) else squared
    median = pairs.median() if bandwidth == "median" else squared.median()
    floor = (MIN_RELATIVE_MEDIAN * pairs.mean()).clamp_min(MIN_RMS_DISTANCE**2 * dimensions)
    return math.log(N + 1) / torch.maximum(median, floor)


def _brought_distances(z: Tensor, correspondence: Correspondence) -> tuple[Tensor, Tensor]:
    """d² [N, N] of `kernel_matrix` between z [N, C, h, w], and which pairs have anything in common [N, N]."""
    shown = correspondence.validity.sum((2, 3))
    rows = []
    for i in range(len(z)):
        difference = z[i] - correspondence.sample(z, i)
        rows.append((correspondence.validity[i, :, None] * difference.square()).sum((1, 2, 3)))
    scale = z[0, 0].numel() / torch.where(shown > 0, shown, 1.0)
    return torch.stack(rows) * scale.to(z), shown > 0


def as_rows(x: Tensor) -> Tensor:
    """[N, ...] as [N, D], in float32 or better."""
    return x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32))


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError naming the choices where a setting is none of them."""
    if value not in choices:
        raise ValueError(f"{key} is {value!r}: choose one of {', '.join(choices)}")
