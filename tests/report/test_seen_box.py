"""The box of what the photos of a room or a street see."""

from types import SimpleNamespace

import pytest
import torch

from csd3d.cameras import Cameras
from csd3d.report.models import SEEN_REACH, seen_box

BOX = torch.tensor([-1.0, -1, -1, 1, 1, 1])


def cameras(count=8, side=64):
    """On a line along x, all looking along +y."""
    poses = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0]]).repeat(count, 1, 1)
    poses[:, 0, 3] = torch.linspace(-1, 1, count)
    half = torch.full((count,), side / 2)
    return Cameras(poses, half, half, half, half, width=side, height=side)


def wall(distance):
    """A model that shows a wall at y = `distance`, seen through half of each picture; None: nothing."""

    def render_views(small, indices):
        rays = [small.image_rays(int(i))[1].reshape(small.height, small.width, 3) for i in indices]
        depth = distance / torch.stack(rays)[..., 1]
        opacity = torch.zeros_like(depth)
        opacity[:, :, small.width // 2 :] = 1.0
        return SimpleNamespace(depth=depth, opacity=opacity)

    return SimpleNamespace(render_views=render_views)


def test_it_holds_what_is_seen_and_no_more():
    low, high = seen_box(wall(4.0), cameras(), BOX).reshape(2, 3)
    assert low[1] < 4 < high[1]
    assert (high - low)[1] < 1
    assert low.tolist() == pytest.approx([-1.2, 3.6, -4.2], abs=0.4)  # the right half of each picture, to 45 degrees
    assert high.tolist() == pytest.approx([5.2, 4.4, 4.2], abs=0.4)


def test_it_is_the_capture_s_own_where_nothing_is_seen():
    assert seen_box(wall(2 * SEEN_REACH), cameras(), BOX) is BOX
