"""A scene without a field, for tests of editors."""

import torch

from csd3d.rendering import Rendered


class Ball:
    """A scene that is a ball about the origin, more or less opaque."""

    def __init__(self, opacity=1.0):
        self.opacity, self.rendered = opacity, 0

    def render_views(self, cameras, indices):
        self.rendered += 1
        depth = ball_depths(cameras[indices])
        views = self.opacity * depth.isfinite().float()
        return Rendered(torch.full((*depth.shape, 3), 0.5), torch.where(views > 0, depth, 9.0), views, 0)


def ball_depths(cameras):
    squared = cameras.positions.square().sum(1).mean() / 9  # of its radius
    rays = (cameras.image_rays(i) for i in range(len(cameras)))
    along = [(-(o * d).sum(-1), (o * d).sum(-1).square() - o.square().sum(-1) + squared) for o, d in rays]
    found = [torch.where(rest > 0, middle - rest.clamp_min(0).sqrt(), torch.inf) for middle, rest in along]
    return torch.stack(found).reshape(-1, cameras.height, cameras.width)
