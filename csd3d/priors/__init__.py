"""Diffusion models behind one small interface: encode, embed, predict the noise."""

from csd3d.priors.condition import Condition
from csd3d.priors.loading import PriorConfig, load_prior
from csd3d.priors.mixture import GaussianMixturePrior, scaled_linear_alphas
from csd3d.priors.perceptual import load_lpips, perceptual_distance, perceptual_vectors
from csd3d.priors.prior import Defaults, Prior

__all__ = [
    "Condition",
    "Defaults",
    "GaussianMixturePrior",
    "Prior",
    "PriorConfig",
    "load_lpips",
    "load_prior",
    "perceptual_distance",
    "perceptual_vectors",
    "scaled_linear_alphas",
]
