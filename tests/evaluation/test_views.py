"""Measures of edited views: planted edits of a ball with known depth, a moving texture, and formulas by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from balls import ball_depths

from csd3d.cameras import orbit
from csd3d.evaluation.overlap import Overlaps, by_depth, by_flow, neighbours_of
from csd3d.evaluation.views import judge_views, met3r, nearest_answer, prepare_views
from csd3d.metrics import warped_error
from csd3d.metrics.clip import ClipModel
from csd3d.priors import perceptual_distance

SIZE, VIEWS = 32, 8
PAIR = "short", "long"


def maps_of(images):
    """Two maps of features that are not linear in the picture."""
    return [torch.cat([images + 0.1, images**2], 1), F.avg_pool2d(torch.cat([images, 1 - images], 1), 4)]


def tower():
    """A CLIP of random linear towers on pictures of any size, and texts by their length."""
    weight = torch.randn(3 * 16, 12, generator=torch.Generator().manual_seed(0))
    images = lambda x: F.normalize(F.adaptive_avg_pool2d(x, 4).flatten(1) @ weight, dim=1)  # noqa: E731
    texts = lambda words: F.normalize(torch.tensor([[len(w) ** 0.1 * (i + 1) % 3 for i in range(12)] for w in words]))  # noqa: E731
    return ClipModel("CLIP (toy)", images, texts)


@pytest.fixture(scope="module")
def ball():
    """Views of a ball whose colour is a function of the surface point, their depths, and the cameras."""
    cameras = orbit(VIEWS, 3.0, 20.0, 40.0, SIZE, SIZE)
    depths = ball_depths(cameras)
    views = []
    for i in range(VIEWS):
        origin, direction = cameras.image_rays(i)
        distance = depths[i].reshape(-1, 1)
        points = origin + direction * torch.where(distance.isfinite(), distance, 0.0)
        colour = 0.5 + 0.2 * torch.sin(2 * points + torch.tensor([0.0, 1.0, 2.0]))
        views.append(torch.where(distance.isfinite(), colour, 1.0).reshape(SIZE, SIZE, 3))
    return torch.stack(views), depths, cameras


@pytest.fixture(scope="module")
def source(ball):
    before, depths, cameras = ball
    options = {"clip": tower(), "features": maps_of, "captions": ("a ball", "a coloured ball")}
    return prepare_views(before, cameras=cameras, depths=depths, **options)


# ------------------------------------------------------------------------------------------------------- planted edits


def test_views_that_did_not_change(ball, source):
    found = judge_views(source, ball[0])
    assert found["warped_error"] == found["warped_error_before"] < 0.01
    assert found["agreement"] == 1
    assert found["psnr_source"] == 100
    assert found["clip_similarity"] == pytest.approx(1)
    assert found["lpips_like"] == 0
    assert found["clip_directional"] == 0
    assert found["clip_direction_consistency"] is None  # no change has no direction
    assert found["met3r"] < 0.02


def test_one_shift_of_colour_in_all_views(ball, source):
    found = judge_views(source, ball[0] + 0.2)
    assert found["psnr_source"] == pytest.approx(-20 * math.log10(0.2), abs=1e-4)
    assert found["warped_error"] == pytest.approx(found["warped_error_before"], abs=1e-5)
    assert found["agreement"] == 1


def test_views_edited_to_different_answers_disagree(ball, source):
    """Every other view gets another colour, so that all neighbours differ by 0.3 and all views two apart agree."""
    shift = torch.where(torch.arange(VIEWS) % 2 == 1, 0.3, 0.0)[:, None, None, None]
    mixed, one = judge_views(source, ball[0] + shift), judge_views(source, ball[0] + 0.3)
    assert mixed["warped_error_short"] == pytest.approx(0.3, abs=0.01)
    assert mixed["warped_error_long"] == pytest.approx(one["warped_error_long"], rel=1e-4)
    weights = [source.overlaps.weight[source.overlaps.ranges[name]].sum().item() for name in PAIR]
    assert mixed["agreement"] == pytest.approx(weights[1] / sum(weights), abs=0.01)
    for name in ("met3r", "lpips_warped"):
        assert mixed[name] > 2 * one[name]
    for name in ("clip_consistency", "clip_direction_consistency"):
        assert mixed[name] < one[name]


def test_the_error_is_that_of_metrics_warped_error(ball, source):
    before, depths, cameras = ball
    after = before + 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    masks = (before[..., 0] < 0.6).float()
    for given in (None, masks):
        told = warped_error(after, depths, cameras, given)
        found = judge_views(prepare_views(before, cameras=cameras, depths=depths, masks=given), after)
        for name in PAIR:
            assert found[f"warped_error_{name}"] == pytest.approx(told[name], rel=1e-5)
        assert found["met3r"] is found["clip_consistency"] is None


def test_a_moving_texture_is_followed_by_flow():
    """Frames of a still texture seen through a moving window; noise of 0.1 in each differs by 0.1 √2 between two."""
    generator = torch.Generator().manual_seed(0)
    world = F.interpolate(torch.rand(1, 3, 20, 20, generator=generator), (96, 96), mode="bicubic")[0].clamp(0, 1)
    world = world.movedim(0, -1)
    frames = torch.stack([world[8:72, 2 * i : 2 * i + 64] for i in range(6)])
    after = 0.5 + 0.1 * torch.randn(frames.shape, generator=generator)
    found = judge_views(frames, after)
    assert found["warped_error_before"] < 0.01
    assert found["overlap"] > 0.8
    assert found["warped_error_short"] == pytest.approx(0.1 * 2**0.5, rel=0.1)
    moved = prepare_views(frames).overlaps
    row = moved.ranges["long"][0]
    assert moved.pairs[row].tolist() == [0, 4]
    middle = moved.grid[row, 32, 32]  # of what is at x = 32.5 + 4 * 2 fewer pixels in frame 4
    assert ((middle + 1) * 32).tolist() == pytest.approx([24.5, 32.5], abs=0.2)


def test_flow_between_cameras_goes_to_the_nearest_by_angle(ball):
    overlaps = by_flow(ball[0], ball[2])
    assert {tuple(pair) for pair in overlaps.pairs.tolist()} == {(a, (a + s) % VIEWS) for a in range(8) for s in (1, 7)}
    assert len(overlaps.ranges["long"]) == 0


def test_one_view_has_nothing_to_agree_with(ball):
    found = judge_views(ball[0][:1], ball[0][:1] + 0.1, clip=tower(), features=maps_of)
    known = {name for name, value in found.items() if value is not None}
    assert known == {"psnr_source", "clip_similarity", "lpips_like"}


# ------------------------------------------------------------------------------------------------- formulas, in float64


def by_hand(pictures, grid):
    """Values [V, C, h, w] at grid [h, w, 2] of one of them, bilinear, with the border value outside, in float64."""
    height, width = pictures.shape[-2:]
    found = np.empty((len(pictures), height, width))
    for i, j in np.ndindex(height, width):
        x = np.clip((grid[i, j, 0] + 1) * width / 2 - 0.5, 0, width - 1)
        y = np.clip((grid[i, j, 1] + 1) * height / 2 - 0.5, 0, height - 1)
        x0, y0 = int(min(x, width - 2)), int(min(y, height - 2))
        u, v = x - x0, y - y0
        corners = pictures[:, y0 : y0 + 2, x0 : x0 + 2]
        found[:, i, j] = np.einsum("cyx,y,x->c", corners, [1 - v, v], [1 - u, u])
    return found


def planted(count=2, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = 1.6 * torch.rand(2, size, size, 2, generator=generator) - 0.8
    weight = (torch.rand(2, size, size, generator=generator) - 0.3).clamp_min(0)
    pairs, rows = torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1])
    overlaps = Overlaps(pairs, grid, weight, {"short": rows[:1], "long": rows[1:]}, rows)
    return torch.rand(2, 3, size, size, generator=generator), overlaps


def test_met3r_by_hand():
    maps, overlaps = planted()
    x, grid, weight = (each.double().numpy() for each in (maps, overlaps.grid, overlaps.weight))
    scores = []
    for a in (0, 1):
        other = by_hand(x[1 - a], grid[a])
        cosine = (x[a] * other).sum(0) / np.sqrt((x[a] ** 2).sum(0) * (other**2).sum(0))
        scores.append((weight[a] * cosine).sum() / weight[a].sum())
    assert met3r(maps, overlaps) == pytest.approx(1 - sum(scores) / 2, abs=1e-6)


def test_met3r_of_equal_and_of_opposite_features():
    maps, overlaps = planted()
    same = torch.ones(2, 3, 6, 6)
    assert met3r(same, overlaps) == pytest.approx(0, abs=1e-6)
    assert met3r(same * torch.tensor([1.0, -1.0])[:, None, None, None], overlaps) == pytest.approx(2, abs=1e-6)
    nothing = Overlaps(overlaps.pairs, overlaps.grid, 0 * overlaps.weight, overlaps.ranges, overlaps.both_ways)
    assert met3r(maps, nothing) is None


def test_error_and_agreement_by_hand():
    from csd3d.evaluation.views import agreement

    images, overlaps = planted(seed=3)
    x, grid, weight = (each.double().numpy() for each in (images, overlaps.grid, overlaps.weight))
    squared = [((x[a] - by_hand(x[1 - a], grid[a])) ** 2).mean(0) for a in (0, 1)]
    errors = [math.sqrt((weight[a] * squared[a]).sum() / weight[a].sum()) for a in (0, 1)]
    alike = sum((weight[a] * (squared[a] <= 0.01)).sum() for a in (0, 1)) / weight.sum()
    found = agreement(images, overlaps)
    assert [found[f"warped_error_{name}"] for name in PAIR] == pytest.approx(errors, abs=1e-6)
    assert found["warped_error"] == pytest.approx(sum(errors) / 2, abs=1e-6)
    assert found["agreement"] == pytest.approx(alike, abs=1e-6)


def test_clip_figures_by_hand(ball, source):
    generator = torch.Generator().manual_seed(2)
    before, after = ball[0], (ball[0] + 0.2 * torch.rand(ball[0].shape, generator=generator)).clamp(0, 1)
    clip = tower()
    E = [clip.embed_images(x.permute(0, 3, 1, 2)).double().numpy() for x in (before, after)]
    T = clip.embed_texts(["a ball", "a coloured ball"]).double().numpy()
    cos = lambda p, q: (p * q).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(q, axis=-1)  # noqa: E731
    a, b = neighbours_of(VIEWS, ball[2]).T.numpy()
    change = E[1] - E[0]
    found = judge_views(source, after)
    assert found["clip_consistency"] == pytest.approx(cos(E[1][a], E[1][b]).mean(), abs=1e-5)
    assert found["clip_direction_consistency"] == pytest.approx(cos(change[a], change[b]).mean(), abs=1e-4)
    assert found["clip_directional"] == pytest.approx(cos(change, T[1] - T[0]).mean(), abs=1e-4)
    assert found["clip_similarity"] == pytest.approx(cos(*E).mean(), abs=1e-5)


def test_an_unchanged_view_counts_against_its_neighbours_directions(ball, source):
    after = ball[0] + 0.3 * torch.linspace(0, 1, SIZE)[:, None, None]
    after[0] = ball[0][0]
    found = judge_views(source, after)["clip_direction_consistency"]
    whole = judge_views(source, ball[0] + 0.3 * torch.linspace(0, 1, SIZE)[:, None, None])
    assert 0 < found < whole["clip_direction_consistency"]


def test_lpips_like_is_the_perceptual_distance(ball, source):
    after = (ball[0] * 0.7).roll(1, 0)
    told = perceptual_distance(*(maps_of(x.permute(0, 3, 1, 2)) for x in (ball[0], after)))
    assert judge_views(source, after)["lpips_like"] == pytest.approx(told.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- answers


def test_the_answer_is_chosen_once_for_all_views():
    """Two views of three are nearest to blue, but red is nearer on the whole."""
    red, blue = torch.zeros(3, 4, 4, 3), torch.ones(3, 4, 4, 3)
    after = torch.tensor([0.0, 0.51, 0.51])[:, None, None, None] * torch.ones(3, 4, 4, 3)
    found = nearest_answer(after, {"blue": blue, "red": red})
    assert found["answer"] == "red"
    assert found["answer_agreement"] == pytest.approx(2 / 3)
    assert found["psnr_truth"] == pytest.approx((100 + 2 * -20 * math.log10(0.51)) / 3, abs=1e-4)
    assert nearest_answer(after * 0, {"blue": blue, "red": red})["answer_agreement"] == 1


# ----------------------------------------------------------------------------------------------------- what is refused


def test_shapes_are_checked(ball, source):
    before, depths, cameras = ball
    with pytest.raises(ValueError, match="depths say nothing"):
        prepare_views(before, depths=depths)
    with pytest.raises(ValueError, match="depths are"):
        prepare_views(before, cameras=cameras, depths=depths[1:])
    with pytest.raises(ValueError, match="7 cameras"):
        prepare_views(before, cameras=cameras[:7], depths=depths)
    with pytest.raises(ValueError, match="after"):
        judge_views(source, before[1:])
    with pytest.raises(ValueError, match="already settled"):
        judge_views(source, before, clip=None)


def test_coarser_weights_are_shares(ball):
    overlaps = by_depth(ball[1], ball[2])
    grid, weight = overlaps.at((8, 8))
    assert weight[0, 4, 4].item() == pytest.approx(overlaps.weight[0, 16:20, 16:20].mean().item())
    cell = overlaps.weight[0, 16:20, 16:20] > 0
    assert torch.allclose(grid[0, 4, 4], overlaps.grid[0, 16:20, 16:20][cell].mean(0), atol=1e-5)
