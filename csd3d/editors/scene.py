"""The edit of a scene: its training views are replaced, by an editor, while the scene is fitted to them.

Symbols: N training views of H × W pixels, M of them at a time, `rows` [M] long; z [M, C, h, w] their latents. An editor
is one file of this folder:

    @register("scene_editor", "mine", title="My editor")
    @dataclass(frozen=True)
    class Mine:
        every: int = 10  # steps between edits

        def update(self, edit: SceneEdit, step: int, report: Report) -> None:
            '''Called before step `step` of the fit; may replace pictures of `edit`, and reports what it did.'''
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from csd3d.canvas.detail import restore_detail
from csd3d.datasets import Capture
from csd3d.distillation.method import Query
from csd3d.priors import Prior
from csd3d.rendering import Rendered
from csd3d.representations.base import SceneModel

Report = Callable[[dict[str, float]], None]


class SceneEditor(Protocol):
    """An editor: a frozen dataclass whose fields are its keys in a config."""

    def update(self, edit: "SceneEdit", step: int, report: Report) -> None:
        """Replaces pictures of `edit` where some are due before step `step`; `report` after every step of its own.

        All that is random comes from edit.generator, or from edit.seed where it is to be the same each time: then a
        resumed run goes on as an unbroken one.
        """


@dataclass(eq=False)
class SceneSource:
    """What all editors of a run have in common: the photos, the words, and the photos as the prior has them.

    The photos are encoded once for all editors, when one first asks.
    """

    prior: Prior  # an editing model
    capture: Capture
    prompt: str  # the instruction
    keep_detail: bool = True  # see `restore_detail`

    @cached_property
    def photos(self) -> Tensor:
        """The training photos [N, 3, H, W]."""
        return self.capture.images[self.capture.train].permute(0, 3, 1, 2)

    @cached_property
    @torch.no_grad()
    def z(self) -> Tensor:
        """Their latents [N, C, h, w]."""
        return self.prior.encode(self.photos)

    @cached_property
    @torch.no_grad()
    def image(self) -> Tensor:
        """The photos as an editing model takes them, [N, ...]: `Prior.encode_condition`."""
        return self.prior.encode_condition(self.photos)

    @cached_property
    @torch.no_grad()
    def decoded(self) -> Tensor:
        """What the autoencoder makes of the photos, [N, H, W, 3]."""
        return self.decode(self.z)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures [M, H, W, 3] of latents, in the capture's size."""
        return self.prior.decode(z, size=tuple(self.capture.images.shape[1:3])).permute(0, 2, 3, 1)


@dataclass(eq=False)
class SceneEdit:
    """One editor's edit as it stands: the scene, and the pictures that it is being fitted to."""

    source: SceneSource
    model: SceneModel  # the scene as fitted so far
    images: Tensor  # [B, H, W, 3], all frames of the capture; editors replace training views in place
    generator: torch.Generator
    seed: int = 0  # the run's

    @property
    def prior(self) -> Prior:
        return self.source.prior

    @property
    def capture(self) -> Capture:
        return self.source.capture

    @property
    def count(self) -> int:
        """N, how many training views there are."""
        return len(self.capture.train)

    def render(self, rows: Tensor) -> Rendered:
        """What the scene looks like now from the training views `rows`."""
        return self.model.render_views(self.capture.cameras, self.capture.train[rows])

    @torch.no_grad()
    def encode(self, views: Rendered) -> Tensor:
        """Latents z of rendered views."""
        return self.prior.encode(views.rgb.clamp(0, 1).permute(0, 3, 1, 2))

    @torch.no_grad()
    def replace(self, rows: Tensor, z: Tensor) -> None:
        """Puts the pictures of edited latents in the place of the training views `rows`."""
        decoded = self.source.decode(z)
        if self.source.keep_detail:
            photos = self.capture.images[self.capture.train[rows]].to(decoded.device)
            decoded = restore_detail(decoded, self.source.decoded[rows], photos)
        self.images[self.capture.train[rows]] = decoded.cpu()

    def query(self, z_t: Tensor, t: int, rows: Tensor, prompt: str | None = None, image: bool = True) -> Query:
        """The prediction of the views `rows` at z_t, under the instruction or another prompt, their photos seen or not.

        Hand it to `prior.predict` by a name of your own; equal queries are computed once.
        """
        prompt = self.source.prompt if prompt is None else prompt
        return Query(z_t, t, (prompt,) * len(rows), self.source.image[rows] if image else None)
