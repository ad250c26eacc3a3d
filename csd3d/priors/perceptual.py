"""Perceptual distances between images: on any feature maps, such as a prior's, and LPIPS where it is installed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.errors import InputError

INSTALL = 'pip install -c constraints.txt -e ".[metrics]"'


def perceptual_distance(features_a: list[Tensor], features_b: list[Tensor]) -> Tensor:
    """LPIPS without learned weights (arXiv 1801.03924, Eq. 1 with w = 1): a scalar in [0, 4], 0 for equal features.

        d = mean over maps, images and positions of ‖a/‖a‖ − b/‖b‖‖², norms over channels

    Both lists hold maps [B, C_l, h_l, w_l] of the same shapes (ValueError otherwise). LPIPS sums over maps instead.
    """
    shapes_a, shapes_b = ([tuple(f.shape) for f in features] for features in (features_a, features_b))
    if not shapes_a or shapes_a != shapes_b:
        raise ValueError(
            f"give two lists of feature maps of the same shapes, at least one map each, got {shapes_a} and {shapes_b}"
        )
    return (perceptual_vectors(features_a) - perceptual_vectors(features_b)).square().sum(1).mean()


def perceptual_vectors(features: list[Tensor]) -> Tensor:
    """φ [B, F] of B images' maps [B, C_l, h_l, w_l]: ‖φ_i − φ_j‖² is `perceptual_distance` of images i and j."""
    scales = [(len(features) * f.shape[2] * f.shape[3]) ** -0.5 for f in features]
    unit = [scale * F.normalize(f, dim=1).flatten(1) for f, scale in zip(features, scales, strict=True)]
    return torch.cat(unit, dim=1)


def load_lpips(network: str = "vgg", device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (extra `metrics`): a function of two batches [B, 3, H, W] in [0, 1] that returns the mean distance.

    Raises InputError where the package is not installed, or its weights cannot be downloaded.
    """
    try:
        import lpips

        model = lpips.LPIPS(net=network, verbose=False).to(device).eval().requires_grad_(False)
    except ImportError as error:
        raise InputError(f"LPIPS needs packages that are not installed ({error}): {INSTALL}") from None
    except OSError as error:  # urllib's and torch.hub's failures
        raise InputError(
            f"LPIPS could not fetch the weights of {network!r} ({error}): run once with a network"
        ) from None
    return lambda a, b: model(a.to(device), b.to(device), normalize=True).mean()
