"""What a scene or an asset may be made of: the protocol that every representation follows.

Symbols: B views of H × W pixels; rgb in [0, 1]; positions [S, 3] in world units, directions [S, 3] of unit length;
sigma [S], density per world unit. A new representation is one file of this folder:

    @register("representation", "splats", title="Gaussian splats")
    @dataclass(frozen=True)
    class Splats:
        count: int = 10_000  # Gaussians at the start

        def open(self, aabb, generator, unbounded=False, background="learned") -> SceneModel: ...

It need not have rays: it renders whole views. The number of its parameters may change while it is fitted, as long as
the `Parameter` objects stay the same and only their `.data` is exchanged, by `load_state_dict` too, because optimisers
and checkpoints refer to the objects.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.rendering import Rendered, Shading

if TYPE_CHECKING:
    from csd3d.representations.fit import Features, FitConfig, Pictures

ALBEDO = Shading()
OPAQUE = 0.5  # opacity from which a pixel's depth is taken for a surface

BackgroundKind = str | tuple[float, float, float]  # "learned", "white", "black", or a colour, rgb in [0, 1]


class Representation(Protocol):
    """The settings of a representation: a frozen dataclass, registered as "representation"."""

    def open(
        self, aabb: Tensor, generator: torch.Generator, unbounded: bool = False, background: BackgroundKind = "learned"
    ) -> "SceneModel":
        """A new scene in the box `aabb` [6] (min, max). InputError for settings or a background that it cannot have."""


class SceneModel(Protocol):
    """A scene, as an `nn.Module` whose state_dict holds all that a resumed run needs of it."""

    # ------------------------------------------------------------------------------------------------------ rendering

    def render_views(self, cameras: Cameras, indices: Tensor, shading: Shading = ALBEDO) -> Rendered:
        """The views `indices` [B] of the cameras, without a graph: rgb [B, H, W, 3], depth and opacity [B, H, W]."""

    def render(
        self,
        cameras: Cameras,
        jitter: Tensor | None = None,
        shading: Shading = ALBEDO,
        background: Callable[[Tensor], Tensor] | None = None,
        distortion: bool = False,
    ) -> Rendered:
        """All the cameras' views with a graph, shaped as those of `render_views`.

        jitter [B, H, W] in [0, 1) shifts the samples along each ray, where there are any.  background(directions) [R,
        3] stands in for the scene's own.  distortion: also report each ray's distortion loss, where there is one.
        """

    # --------------------------------------------------------------------------------------------------- optimisation

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, each in one group: "scene", and "background" where that is learned."""

    def set_levels(self, levels: int) -> None:
        """How many levels of detail count, coarse ones first; does nothing where there are none."""

    def keep_up(self, step: int, generator: torch.Generator) -> None:
        """What has to be done before step `step` of an optimisation, such as looking again where the scene is empty."""

    def start_fit(self, config: "FitConfig") -> torch.optim.Optimizer:
        """The optimiser of a new fit. What an earlier fit has learned about its own steps is forgotten."""

    def fit_step(
        self,
        optimiser: torch.optim.Optimizer,
        pictures: "Pictures",
        config: "FitConfig",
        step: int,
        generator: torch.Generator,
        features: "Features | None" = None,
    ) -> dict[str, float]:
        """Step `step` of a fit to pictures, `keep_up` included: its losses, "psnr", and "skipped".

        features: maps images [B, 3, h, w] to feature maps for the perceptual term.  skipped: 1.0 where the loss or a
        gradient was not finite; then nothing but the generator has changed.
        """

    # ---------------------------------------------------------------------------------------------------------- shape

    def density(self, positions: Tensor) -> Tensor:
        """sigma [S], of which a mesh is the iso-surface."""

    def radiance(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """rgb [S, 3] as seen along the directions, and sigma [S]: what colours a mesh."""

    # -------------------------------------------------------------------------------------------------- as nn.Module

    def to(self, device: torch.device | str) -> "SceneModel": ...

    def parameters(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def surface_depth(views: Rendered) -> Tensor:
    """Depth [B, H, W] of whole views, infinite where there is no surface."""
    return torch.where(views.opacity > OPAQUE, views.depth, torch.inf)
