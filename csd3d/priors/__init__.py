"""Diffusion models behind one small interface: encode, embed, predict the noise."""

from csd3d.priors.base import Condition, Prior, edit_branches
from csd3d.priors.diffusers_prior import DiffusersPrior
from csd3d.priors.loading import PriorConfig, choose_device, load_prior
from csd3d.priors.mixture import GaussianMixturePrior
from csd3d.priors.perceptual import load_lpips, perceptual_distance, perceptual_vectors

__all__ = [
    "Condition",
    "DiffusersPrior",
    "GaussianMixturePrior",
    "Prior",
    "PriorConfig",
    "choose_device",
    "edit_branches",
    "load_lpips",
    "load_prior",
    "perceptual_distance",
    "perceptual_vectors",
]
