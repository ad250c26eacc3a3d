"""A textured ball (and a wall behind or before it) in closed form, seen from an orbit."""

import math

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.metrics import view_pairs, warp_view, warped_error

SIZE = 64


def ball_hit(rays_o, rays_d, centre, radius):
    """Distance to the first intersection with a ball, inf where there is none."""
    offset = rays_o - centre
    half_b = (offset * rays_d).sum(-1)
    discriminant = half_b**2 - (offset.square().sum(-1) - radius**2)
    return torch.where(discriminant > 0, -half_b - discriminant.clamp_min(0).sqrt(), torch.inf)


def texture(points):
    return 0.5 + 0.35 * torch.sin(4.0 * points + torch.tensor([0.0, 1.0, 2.0]))


def render(cameras, balls):
    """Images, depths and masks of balls (centre, radius) whose colour is a function of the surface point alone."""
    images, depths = [], []
    for index in range(len(cameras)):
        rays_o, rays_d = cameras.image_rays(index)
        distance = torch.stack([ball_hit(rays_o, rays_d, torch.tensor(c), r) for c, r in balls]).amin(0)
        hit = distance.isfinite()
        points = rays_o + rays_d * torch.where(hit, distance, 0.0)[:, None]
        images.append(torch.where(hit[:, None], texture(points), 1.0).reshape(SIZE, SIZE, 3))
        depths.append(distance.reshape(SIZE, SIZE))
    depths = torch.stack(depths)
    return torch.stack(images), depths, depths.isfinite()


@pytest.fixture(scope="module")
def cameras():
    return orbit(12, radius=3.0, elevation_deg=20.0, fov_deg=40.0, width=SIZE, height=SIZE)


@pytest.fixture(scope="module")
def ball(cameras):
    return render(cameras, [((0.0, 0.0, 0.0), 0.8)])


def test_a_consistent_scene_leaves_only_interpolation_error(cameras, ball):
    error = warped_error(*ball[:2], cameras, ball[2])
    assert error["short"] < 0.004
    assert error["long"] < 0.006
    assert error["short_pixels"] > 12 * 2 * 500


def test_each_seen_pixel_is_the_colour_of_its_own_surface_point(cameras, ball):
    warped, seen = warp_view(*ball[:2], cameras, 0, 1)
    assert 0.6 < seen.sum() / ball[2][0].sum() < 0.95  # 30 degrees apart: most of the ball, not all
    assert (warped - ball[0][0])[
        seen
    ].abs().max() < 0.04  # at the rim, where a pixel is long; wrong pixels differ by up to 0.7


def test_a_recoloured_view_gives_the_known_error(cameras, ball):
    images = ball[0].clone()
    images[0] += 0.2
    pairs = {"both": torch.tensor([[0, 1], [1, 0]]), "half": torch.tensor([[0, 1], [3, 4], [4, 3], [5, 6]])}
    error = warped_error(images, ball[1], cameras, ball[2], pairs)
    assert error["both"] == pytest.approx(0.2, abs=0.003)
    counts = [int(warp_view(*ball[:2], cameras, a, b)[1].sum()) for a, b in pairs["half"].tolist()]
    assert error["half"] == pytest.approx(0.2 * math.sqrt(counts[0] / sum(counts)), abs=0.003)


def test_what_another_ball_hides_is_left_out(cameras):
    """A small ball hovers before the large one; untested, its colour would pass for the large one's."""
    images, depths, masks = render(cameras, [((0.0, 0.0, 0.0), 0.6), ((0.9, 0.0, 0.3), 0.25)])
    assert warped_error(images, depths, cameras, masks)["short"] < 0.006
    blind = warped_error(images, depths, cameras, masks, depth_tolerance=10.0)
    assert blind["short"] > 0.05


def test_background_without_depth_is_left_out(cameras, ball):
    no_mask = warped_error(*ball[:2], cameras)
    masked = warped_error(*ball[:2], cameras, ball[2])
    assert no_mask["short_pixels"] == pytest.approx(masked["short_pixels"], rel=0.02)
    zero_depth = torch.where(ball[2], ball[1], 0.0)
    assert warped_error(ball[0], zero_depth, cameras)["short"] == no_mask["short"]


def test_weights_shift_the_error_towards_the_weighted_pixels(cameras, ball):
    images = ball[0].clone()
    images[0, : SIZE // 2] += 0.3  # wrong in the upper half of view 0
    weights = torch.ones(ball[1].shape)
    weights[0, : SIZE // 2] = 9.0
    pairs = {"one": torch.tensor([[0, 1]])}
    seen = warp_view(*ball[:2], cameras, 0, 1)[1]
    upper, lower = seen[: SIZE // 2].sum().item(), seen[SIZE // 2 :].sum().item()
    expected = 0.3 * math.sqrt(9 * upper / (9 * upper + lower))
    assert warped_error(images, ball[1], cameras, weights, pairs)["one"] == pytest.approx(expected, abs=0.003)


def test_views_that_share_nothing_report_none(cameras, ball):
    error = warped_error(*ball[:2], cameras, torch.zeros_like(ball[2]), {"far": torch.tensor([[0, 6]])})
    assert error == {"far": None, "far_pixels": 0, "far_pairs": 1}


def test_pairs_on_an_orbit_are_the_neighbours(cameras):
    pairs = view_pairs(cameras, neighbours=2, long_angle_deg=55.0, long_neighbours=2)
    steps = {name: {(b - a) % 12 for a, b in chosen.tolist()} for name, chosen in pairs.items()}
    assert steps == {"short": {1, 11}, "long": {2, 10}}
    assert len(pairs["short"]) == len(pairs["long"]) == 24
    assert torch.equal(view_pairs(cameras)["short"], pairs["short"])


def test_few_views_use_up_their_pairs_once(cameras):
    pairs = view_pairs(cameras[torch.tensor([0, 1, 2])])
    assert len(pairs["short"]) == 6
    assert len(pairs["long"]) == 0


def test_shapes_are_checked(cameras, ball):
    with pytest.raises(ValueError, match="disagree"):
        warped_error(ball[0], ball[1][:, 1:], cameras)
