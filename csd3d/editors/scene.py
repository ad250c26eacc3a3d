"""The edit of a scene: an editor replaces training views while the scene is fitted to them.

Symbols: N training views of H × W pixels, M of them at a time, `rows` [M] long; z [M, C, h, w] their latents. An editor
is one file of this folder:

    @register("scene_editor", "mine", title="My editor")
    @dataclass(frozen=True)
    class Mine:
        every: int = 10  # steps between edits

        def update(self, edit: SceneEdit, step: int, report: Report) -> None:
            '''Called before step `step` of the fit; may replace pictures of `edit` and report values to log.'''
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
    """An editor: a frozen dataclass whose fields are its config keys."""

    def update(self, edit: "SceneEdit", step: int, report: Report) -> None:
        """Replace the pictures of `edit` that are due before step `step`; call `report` after each inner step.

        Take all randomness from edit.generator, or seed it by edit.seed if it must be the same each time. A resumed run
        then continues like an uninterrupted one.
        """


@dataclass(eq=False)
class SceneSource:
    """The photos and the instruction, shared by all editors of a run; encoded once, when an editor first asks."""

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
        """The photos after encoding and decoding, [N, H, W, 3]."""
        return self.decode(self.z)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures [M, H, W, 3] of latents, in the capture's size."""
        return self.prior.decode(z, size=tuple(self.capture.images.shape[1:3])).permute(0, 2, 3, 1)


@dataclass(eq=False)
class SceneEdit:
    """The state of one editor's edit: the scene, and the pictures that it is fitted to."""

    source: SceneSource
    model: SceneModel  # the scene as fitted so far
    images: Tensor  # [B, H, W, 3], all frames of the capture; editors replace training views in place
    generator: torch.Generator
    seed: int = 0  # the run's seed

    @property
    def prior(self) -> Prior:
        return self.source.prior

    @property
    def capture(self) -> Capture:
        return self.source.capture

    @property
    def count(self) -> int:
        """N, the number of training views."""
        return len(self.capture.train)

    def render(self, rows: Tensor) -> Rendered:
        """Render the scene as it is now from the training views `rows`."""
        return self.model.render_views(self.capture.cameras, self.capture.train[rows])

    @torch.no_grad()
    def encode(self, views: Rendered) -> Tensor:
        """Latents z of rendered views."""
        return self.prior.encode(views.rgb.clamp(0, 1).permute(0, 3, 1, 2))

    @torch.no_grad()
    def replace(self, rows: Tensor, z: Tensor) -> None:
        """Replace the training views `rows` by the pictures of edited latents."""
        decoded = self.source.decode(z)
        if self.source.keep_detail:
            photos = self.capture.images[self.capture.train[rows]].to(decoded.device)
            decoded = restore_detail(decoded, self.source.decoded[rows], photos)
        self.images[self.capture.train[rows]] = decoded.cpu()

    def query(self, z_t: Tensor, t: int, rows: Tensor, prompt: str | None = None, image: bool = True) -> Query:
        """A query for the views `rows` at z_t, under the instruction or another `prompt`, with their photos or without.

        Pass it to `prior.predict` under any name; equal queries are computed once.
        """
        prompt = self.source.prompt if prompt is None else prompt
        return Query(z_t, t, (prompt,) * len(rows), self.source.image[rows] if image else None)
