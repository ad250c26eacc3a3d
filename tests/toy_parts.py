"""An editor and a representation from outside csd3d, as a plugin brings them: each is one class, found by its name."""

from dataclasses import dataclass

import torch
from torch import nn

from csd3d.registry import register
from csd3d.rendering import Rendered
from csd3d.representations.base import ALBEDO
from csd3d.representations.fit import descend, fit_loss, learning_rate, make_optimiser


@register("scene_editor", "tint", title="Tinted in turn")
@dataclass(frozen=True)
class Tint:
    """Draws one training view after another towards red."""

    every: int = 4  # steps between edits
    amount: float = 0.5  # share of red

    def update(self, edit, step, report):
        number, rest = divmod(step, self.every)
        if rest:
            return
        row = edit.capture.train[number % edit.count]
        edit.images[row] = torch.lerp(edit.images[row], torch.tensor([1.0, 0.0, 0.0]), self.amount)
        report({"row": float(row)})


@register("representation", "blobs", title="Blobs that multiply")
@dataclass(frozen=True)
class Blobs:
    """Soft discs about points: no rays, and a number of parameters that grows, as that of Gaussian splats does."""

    count: int = 16  # blobs at the start
    grow_every: int = 8  # steps after which each blob is doubled, once
    size: float = 0.15  # of a blob, as a share of the picture

    def open(self, aabb, generator, unbounded=False, background="learned"):
        return BlobScene(self, aabb, generator)


class BlobScene(nn.Module):
    def __init__(self, config, aabb, generator):
        super().__init__()
        self.config = config
        low, high = aabb[:3], aabb[3:]
        self.centres = nn.Parameter(low + (high - low) * torch.rand(config.count, 3, generator=generator))
        self.colours = nn.Parameter(torch.randn(config.count, 3, generator=generator))
        self.behind = nn.Parameter(torch.zeros(3))

    def render(self, cameras, jitter=None, shading=ALBEDO, background=None, distortion=False):
        views = [self._view(cameras, i) for i in range(len(cameras))]
        return Rendered(*(torch.stack(parts) for parts in zip(*views, strict=True)), samples=0)

    @torch.no_grad()
    def render_views(self, cameras, indices, shading=ALBEDO):
        return self.render(cameras[indices])

    def _view(self, cameras, index):
        places, depth = cameras.project(self.centres, index)
        y, x = torch.meshgrid(torch.arange(cameras.height), torch.arange(cameras.width), indexing="ij")
        away = (torch.stack((x, y), -1)[:, :, None] + 0.5 - places).square().sum(-1)
        weight = torch.exp(-away / (2 * (self.config.size * cameras.width) ** 2)) + 1e-6
        opacity = 1 - torch.exp(-weight.sum(-1))
        share = weight / weight.sum(-1, keepdim=True)
        rgb = opacity[..., None] * (share @ self.colours.sigmoid()) + (1 - opacity[..., None]) * self.behind.sigmoid()
        return rgb, (share * depth).sum(-1), opacity

    def parameter_groups(self):
        return {"scene": [self.centres, self.colours], "background": [self.behind]}

    def set_levels(self, levels):
        pass

    def keep_up(self, step, generator):
        pass

    def start_fit(self, config):
        return make_optimiser(self.parameters(), config)

    def fit_step(self, optimiser, pictures, config, step, generator, features=None):
        view = pictures.views[torch.randint(len(pictures.views), (1,), generator=generator)]
        shown = self.render(pictures.cameras[view])
        flat = Rendered(shown.rgb.view(-1, 3), shown.depth.flatten(), shown.opacity.flatten(), 0)
        loss, report = fit_loss(flat, pictures.images[view].view(-1, 3), None, config, None)
        finite = descend(self, optimiser, loss, learning_rate(config, step))
        if step == self.config.grow_every:
            self.double()
        return report | {"skipped": float(not finite), "blobs": float(len(self.centres))}

    def double(self):
        for parameter in (self.centres, self.colours):
            parameter.data = torch.cat((parameter.data, parameter.data + 0.01))

    def load_state_dict(self, state):
        for name, parameter in self.named_parameters():
            parameter.data = torch.empty_like(state[name])
        return super().load_state_dict(state)

    @torch.no_grad()
    def density(self, positions):
        return 20 * torch.exp(-torch.cdist(positions, self.centres).square() / 0.02).sum(1)

    @torch.no_grad()
    def radiance(self, positions, directions):
        return self.colours[torch.cdist(positions, self.centres).argmin(1)].sigmoid(), self.density(positions)
