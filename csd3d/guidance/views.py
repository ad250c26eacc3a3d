"""Random cameras of text to 3D, and what the prompt says at each of them.

Angles in degrees. Azimuth 0 is the object's front (+x), counter-clockwise from above; elevation 90 is straight above.
"""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csd3d.cameras import Cameras, look_at, on_sphere, side_seen, wrap_deg

Range = tuple[float, float]


@dataclass
class ViewsConfig:
    """Where a step's views are: uniform in each range, azimuths stratified over a step's views; lengths in world units.

    The perturbations are standard deviations: of the camera's position, of the point it looks at, of its up vector.
    """

    elevation_deg: Range = (0.0, 60.0)
    azimuth_deg: Range = (0.0, 360.0)
    distance: Range = (3.7, 4.3)
    fov_deg: Range = (31.0, 31.0)
    position_jitter: float = 0.0
    target_jitter: float = 0.03
    up_jitter: float = 0.0
    stratified: bool = True

    def __post_init__(self) -> None:
        for key in ("elevation_deg", "azimuth_deg", "distance", "fov_deg"):
            low, high = getattr(self, key)
            if not low <= high:
                raise ValueError(f"{key} is [{low:g}, {high:g}]: give the lower end first")
        limits = {"elevation_deg": (-90, 90), "fov_deg": (1, 170), "distance": (1e-3, math.inf)}
        for key, (least, most) in limits.items():
            if not (least <= getattr(self, key)[0] and getattr(self, key)[1] <= most):
                raise ValueError(f"{key} is {list(getattr(self, key))}: both ends must be in [{least:g}, {most:g}]")
        if self.azimuth_deg[1] - self.azimuth_deg[0] > 360:
            raise ValueError(f"azimuth_deg is {list(self.azimuth_deg)}: a range of at most 360 degrees")


@dataclass(frozen=True)
class Views:
    """Cameras [B] and where they stand: azimuth, elevation [B] in degrees, azimuth in [−180, 180)."""

    cameras: Cameras
    azimuth_deg: Tensor
    elevation_deg: Tensor

    @property
    def places(self) -> list[tuple[float, float]]:
        """(azimuth, elevation) of each."""
        return list(zip(self.azimuth_deg.tolist(), self.elevation_deg.tolist(), strict=True))

    @property
    def pose(self) -> Tensor:
        """Camera to world [B, 12], row-major 3x4."""
        return self.cameras.camera_to_world.flatten(1)

    @property
    def view(self) -> Tensor:
        """[B, 3]: azimuth, elevation, and the distance from the middle, for priors that know cameras."""
        return torch.stack((self.azimuth_deg, self.elevation_deg, self.cameras.positions.norm(dim=1)), 1)


def sample_views(config: ViewsConfig, count: int, size: int, generator: torch.Generator) -> Views:
    """`count` random views of `size`² pixels; every draw is made whatever the ranges, so a seed means the same."""

    def uniform(limits: Range, strata: int = 1) -> Tensor:
        u = torch.rand(count, generator=generator)
        u = (torch.arange(count) + u) / count if strata > 1 else u
        return limits[0] + (limits[1] - limits[0]) * u

    azimuth = uniform(config.azimuth_deg, count if config.stratified else 1)
    elevation, distance, fov = (uniform(getattr(config, key)) for key in ("elevation_deg", "distance", "fov_deg"))
    position, target, up = torch.randn(3, count, 3, generator=generator)
    direction = on_sphere(torch.deg2rad(azimuth), torch.deg2rad(elevation))
    place = distance[:, None] * direction + config.position_jitter * position
    poses = look_at(place, config.target_jitter * target)
    if config.up_jitter:
        poses = tilt(poses, config.up_jitter * up[:, 0])
    focal = 0.5 * size / torch.deg2rad(fov / 2).tan()
    middle = torch.full((count,), size / 2)
    return Views(Cameras(poses, focal, focal, middle, middle, size, size), wrap_deg(azimuth), elevation)


def tilt(poses: Tensor, angle: Tensor) -> Tensor:
    """Poses [B,3,4] rolled about their viewing axes by `angle` [B] radians."""
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    right, up = poses[:, :, 0], poses[:, :, 1]
    return torch.stack((c * right + s * up, c * up - s * right, poses[:, :, 2], poses[:, :, 3]), -1)


# --- what the prompt says ---


@dataclass
class PromptConfig:
    """How the prompt is said of a view: `template` with {prompt} and {view}, the view's word from `words`.

    `backdrops`: colours, rgb in [0, 1], by name, as {backdrop} in the template. All views of a step stand before one
    of them, drawn anew each step, and are told which, so that nothing empty can be filled in its colour; the finished
    asset stands before the first.

    Front and back reach `front_deg` and `back_deg` to either side of theirs; overhead starts at `overhead_deg` of
    elevation.
    """

    template: str = "{prompt}, {view}"
    words: dict[str, str] = field(
        default_factory=lambda: {
            "front": "front view",
            "left": "side view",
            "right": "side view",
            "back": "back view",
            "overhead": "overhead view",
        }
    )
    front_deg: float = 45.0
    back_deg: float = 45.0
    overhead_deg: float = 60.0
    backdrops: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f'template is {self.template!r}: it must hold {{prompt}}, as "{{prompt}}, {{view}}" does')
        if missing := {"front", "left", "right", "back", "overhead"} - self.words.keys():
            raise ValueError(f"words lacks {', '.join(sorted(missing))}")
        if bool(self.backdrops) != ("{backdrop}" in self.template):
            raise ValueError("backdrops and {backdrop} in the template go together: give both, or neither")
        for name, colour in self.backdrops.items():
            if not all(0 <= part <= 1 for part in colour):
                raise ValueError(f"backdrops.{name} is {list(colour)}: give red, green and blue in [0, 1]")
        for key in ("front_deg", "back_deg"):
            if not 0 <= getattr(self, key) <= 180:
                raise ValueError(f"{key} is {getattr(self, key):g}: give degrees to either side, 0 to 180")
        if self.front_deg + self.back_deg > 180:
            raise ValueError(
                f"front_deg {self.front_deg:g} and back_deg {self.back_deg:g} overlap: at most 180 together"
            )

    def text(self, prompt: str, view: str, backdrop: str | None = None) -> str:
        """The prompt as said of a view ("front", "left", "right", "back", "overhead") before a backdrop, the first."""
        backdrop = backdrop or next(iter(self.backdrops), "")
        said = {"{view}": self.words[view], "{backdrop}": backdrop, "{prompt}": prompt}
        return re.sub("{view}|{backdrop}|{prompt}", lambda found: said[found[0]], self.template)

    def texts(self, prompt: str) -> list[str]:
        """Everything `text` may say of a prompt."""
        return [self.text(prompt, view, name) for view in self.words for name in self.backdrops or ("",)]


def view_of(azimuth_deg: float, elevation_deg: float, config: PromptConfig) -> str:
    """ "overhead" above `overhead_deg`, else what `side_seen` says: "front", "left", "right" or "back"."""
    above = elevation_deg > config.overhead_deg
    return "overhead" if above else side_seen(azimuth_deg, config.front_deg, config.back_deg)


def away_views(
    azimuth_deg: float, elevation_deg: float, overhead_deg: float = 60.0
) -> tuple[tuple[str, str], tuple[float, float]]:
    """The two views that a particle is held away from by Perp-Neg, and their weights (arXiv 2304.04968, section 4.2).

    Between front and side, r = 1 − |azimuth|/90 is how much of a front it is: away from the side by r and from the
    back fully; between side and back: away from the front fully, and from the side by −r. Linear, and on predictions
    at one prompt a view: the paper's interpolated prompts and fitted exponentials are for Stable Diffusion's bias.
    Nothing is held away from above.
    """
    if elevation_deg > overhead_deg:
        return ("front", "back"), (0.0, 0.0)
    turn = wrap_deg(azimuth_deg)
    side, off = "left" if turn > 0 else "right", abs(turn) / 90
    return ((side, "back"), (max(1 - off, 0.0), 1.0)) if off < 1 else ((side, "front"), (off - 1, 1.0))
