"""A field lit by a lamp beside the camera, as DreamFusion shades it (arXiv 2209.14988, section 3.1).

A shaded field is callable and has density(), like any field that `render_rays` takes. It also returns the orientation
penalty of each sample, which is summed along the ray with the samples' weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.fields import RadianceField

MODES = ("albedo", "lambertian", "textureless", "normal")


@dataclass(frozen=True)
class Shading:
    """`mode`: albedo | lambertian | textureless (white albedo, to show the shape) | normal ((n + 1)/2 as colour).

    `lamp` [3]: offset of the lamp from the camera, world axes, in units of the distance to the surface. `ambient`: the
    share of light from all directions. `normal_step`: see `RadianceField.normals`. `orientation`: return the penalty
    also with mode albedo.
    """

    mode: str = "albedo"
    lamp: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ambient: float = 0.3
    normal_step: float | None = None
    orientation: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"shading is {self.mode!r}: choose one of {', '.join(MODES)}")


class ShadedField:
    """A radiance field under a shading: (positions, directions) -> rgb [S, 3], sigma [S], orientation penalty [S]."""

    def __init__(self, field: RadianceField, shading: Shading) -> None:
        self.field, self.shading = field, shading

    def density(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The density of the field, unshaded."""
        return self.field.density(positions)

    def __call__(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, ...]:
        shading = self.shading
        sigma, features = self.field.density(positions)
        if shading.mode == "albedo" and not shading.orientation:
            return self.field.colour(features, directions), sigma
        normals = self.field.normals(positions, shading.normal_step)
        penalty = (normals * directions).sum(-1).clamp_min(0).square()  # n·d > 0: a visible surface that faces away
        if shading.mode == "normal":
            return (normals + 1) / 2, sigma, penalty
        white = shading.mode == "textureless"
        albedo = torch.ones_like(positions) if white else self.field.colour(features, directions)
        return albedo * lambert(normals, directions, shading), sigma, penalty


def lambert(normals: Tensor, directions: Tensor, shading: Shading) -> Tensor:
    """Light [S, 1] on a surface: ambient + (1 − ambient) max(0, n·l), l towards the lamp; 1 everywhere for albedo."""
    if shading.mode == "albedo":
        return torch.ones_like(normals[:, :1])
    towards = F.normalize(directions.new_tensor(shading.lamp) - directions, dim=-1)
    return shading.ambient + (1 - shading.ambient) * (normals * towards).sum(-1, keepdim=True).clamp_min(0)
