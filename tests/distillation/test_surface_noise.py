"""Noise that lies on surfaces: white in each view, and the same noise wherever two views see the same surface."""

import math

import pytest
import torch

from csd3d.distillation.surface_noise import LAYERS, surface_noise, texel_count, texel_of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sphere(turn_deg: float, side: int = 64, radius: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """What a distant camera at an azimuth sees of a sphere: points [1, side, side, 3], seen."""
    v, u = torch.meshgrid(*[(torch.arange(side) + 0.5) / side * 2 - 1] * 2, indexing="ij")
    seen = u.square() + v.square() < radius**2
    depth = (radius**2 - u.square() - v.square()).clamp_min(0).sqrt()
    turn = math.radians(turn_deg)
    x, y = depth * math.cos(turn) - u * math.sin(turn), depth * math.sin(turn) + u * math.cos(turn)
    return torch.stack([x, y, -v], -1)[None], seen[None]


def noise(turns, size=(16, 16), channels=8, seed=0, radius=0.7):
    maps = torch.randn(texel_count(size), channels, generator=seeded(seed))
    behind = torch.randn(channels, *size, generator=seeded(seed + 1))
    views = [sphere(turn, radius=radius) for turn in turns]
    points, seen = (torch.cat(part) for part in zip(*views, strict=True))
    return surface_noise(maps, behind, points, seen), behind


def test_texels_have_equal_areas_and_no_direction_is_left_out():
    texels = LAYERS * 2 * 8**2
    points = torch.randn(400_000, 3, generator=seeded())
    points = points / points.norm(dim=1, keepdim=True)
    found = torch.bincount(texel_of(points * 0.999, texels), minlength=texels)
    shell, last = found[: texels // LAYERS * (LAYERS - 1)], found[texels // LAYERS * (LAYERS - 1) :]
    assert not shell.any()
    mean = 400_000 / len(last)
    assert (last - mean).abs().max() < 5 * mean**0.5


def test_near_points_share_a_texel_and_shells_have_their_own():
    texels = texel_count((16, 16))
    points = torch.randn(1000, 3, generator=seeded(1))
    points = 0.6 * points / points.norm(dim=1, keepdim=True)
    same = texel_of(points, texels) == texel_of(points + 1e-4, texels)
    assert same.float().mean() > 0.98
    assert not (texel_of(points, texels) == texel_of(points * 0.7, texels)).any()  # .42: the shell below


@pytest.mark.parametrize("where", [(0.0, 0.0, 0.0), (5.0, -3.0, 9.0), (0.0, 0.0, 0.5), (-0.5, 0.0, 0.0)])
def test_every_point_has_a_texel(where):
    texels = texel_count((4, 6))
    assert 0 <= int(texel_of(torch.tensor(where), texels)) < texels


def test_noise_is_white_with_unit_variance():
    views = torch.cat([noise([20.0], channels=64, seed=2 * seed)[0] for seed in range(8)]).movedim(1, 0).flatten(0, 1)
    pixels = views.flatten(1)  # 512 draws of 256 latent pixels
    assert pixels.mean().abs() < 0.02
    assert pixels.var() == pytest.approx(1, abs=0.02)
    together = pixels.T @ pixels / len(pixels) - torch.eye(256)
    assert together.abs().max() < 5.5 / len(pixels) ** 0.5


def test_two_cameras_see_the_same_noise_on_the_same_surface():
    """Of a sphere that turns by a latent pixel at its middle, noise has moved by a pixel there."""
    size, radius = 16, 0.7
    turn = math.degrees(2 / size / radius)
    (first, second), behind = noise([0.0, turn], channels=256, radius=radius)
    middle = slice(6, 10)

    def alike(a, b):
        return float((a * b).mean())

    moved = alike(first[:, middle, middle], second[:, middle, 5:9])  # the camera went to the right
    back = alike(first[:, middle, middle], second[:, middle, 7:11])
    assert moved > 0.6
    assert abs(back) < 0.1
    assert alike(first[:, middle, middle], noise([180.0], channels=256)[0][0][:, middle, middle]) < 0.1
    assert torch.equal(first[:, 0], behind[:, 0])  # where nothing is seen
    assert torch.equal(first, noise([0.0], channels=256)[0][0])


def test_where_nothing_is_seen_the_noise_is_that_behind():
    behind = torch.randn(4, 8, 8, generator=seeded())
    nothing = surface_noise(
        torch.randn(texel_count((8, 8)), 4), behind, torch.zeros(2, 16, 16, 3), torch.zeros(2, 16, 16, dtype=torch.bool)
    )
    assert torch.equal(nothing, behind.expand(2, 4, 8, 8))


def test_the_number_of_threads_changes_nothing():
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(noise([10.0, 50.0])[0])
    assert torch.equal(*found)
