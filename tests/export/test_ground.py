"""An object is separated from what it stands on, and only from that."""

import dataclasses

import numpy as np
import pytest
import torch

from csd3d.export import MeshConfig, extract_mesh

AABB = [-1.0, -1, -1, 1, 1, 1]
AUTO = MeshConfig(resolution=56, face_budget=4000)
BOX = dataclasses.replace(AUTO, crop="box")


def solid(distance):
    return 300 * torch.sigmoid(-distance / 0.01)


def ball(x, radius=0.35, z=0.0):
    return solid((x - torch.tensor([0.0, 0, z])).norm(dim=1) - radius)


def slab(x, top, thickness=0.1, side=2.0):
    half = torch.tensor([side, side, thickness / 2])
    return solid(((x - torch.tensor([0.0, 0, top - thickness / 2])).abs() - half).max(1).values)


def disc(x, top, radius, thickness=0.1):
    return solid(torch.maximum(x[:, :2].norm(dim=1) - radius, (x[:, 2] - top + thickness / 2).abs() - thickness / 2))


@pytest.mark.parametrize("tilt_deg", [0.0, 8.0])
@pytest.mark.parametrize("ground", ["floor", "plate", "earth"])
def test_a_ball_is_taken_off_what_it_stands_on(ground, tilt_deg):
    """The floor reaches the walls of the box, the plate ends before them, and the earth is solid down to its bottom."""
    a = np.radians(tilt_deg)
    turn = torch.tensor([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]], dtype=torch.float32)
    below = {
        "floor": lambda x: slab(x, -0.33),
        "plate": lambda x: disc(x, -0.33, 0.8),
        "earth": lambda x: slab(x, -0.33, thickness=2.0),
    }[ground]

    def density(x):
        return torch.maximum(ball(x @ turn), below(x @ turn))

    whole, cropped = (extract_mesh(density, AABB, config) for config in (BOX, AUTO))
    assert (whole.metadata["left_out"], cropped.metadata["left_out"]) == (None, "ground")
    assert np.ptp(whole.bounds, axis=0)[0] > 1.5
    size = np.ptp(cropped.bounds, axis=0)
    assert (size[:2] < 0.8).all()
    assert 0.6 < size[2] < 0.75
    assert cropped.is_watertight
    assert np.abs(cropped.bounds.mean(0)[:2]).max() < 0.05


def chair(x):
    legs = [torch.maximum((x[:, :2] - torch.tensor(p)).abs().max(1).values - 0.05, (x[:, 2] + 0.45).abs() - 0.35)
            for p in ([0.3, 0.3], [-0.3, 0.3], [0.3, -0.3], [-0.3, -0.3])]  # fmt: skip
    back = ((x - torch.tensor([-0.35, 0.0, 0.3])).abs() - torch.tensor([0.05, 0.35, 0.3])).max(1).values
    seat = ((x - torch.tensor([0.0, 0.0, -0.05])).abs() - torch.tensor([0.4, 0.4, 0.06])).max(1).values
    return solid(torch.stack([*legs, back, seat]).min(0).values)


@pytest.mark.parametrize("density", [chair, ball, lambda x: slab(x, -0.33)], ids=["chair", "ball", "floor alone"])
def test_what_stands_on_nothing_stays_whole(density):
    whole, cropped = (extract_mesh(density, AABB, config) for config in (BOX, AUTO))
    np.testing.assert_array_equal(cropped.vertices, whole.vertices)


def test_a_chair_is_taken_off_the_floor_with_its_legs():
    cropped = extract_mesh(lambda x: torch.maximum(chair(x), slab(x, -0.78)), AABB, AUTO)
    assert cropped.bounds[0, 2] == pytest.approx(-0.78, abs=0.13)
    assert cropped.bounds[1, 2] == pytest.approx(0.6, abs=0.03)
    assert np.ptp(cropped.bounds, axis=0)[0] < 0.9
