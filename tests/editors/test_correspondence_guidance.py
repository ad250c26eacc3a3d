"""Correspondence guidance: the matches, the loss and its gradient, and what guides which step."""

import pytest
import torch
import torch.nn.functional as F
from balls import Ball, ball_depths

from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation.ddim import ddim_sample, ddim_timesteps
from csd3d.distillation.noise import draw_noise
from csd3d.editors.correspondence_guidance import CorrespondenceGuidance, view_predictor
from csd3d.editors.matches import Matches, bilinear_taps, match_views, places_seen
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.errors import InputError
from csd3d.metrics.consistency import view_pairs
from csd3d.priors import PriorConfig, load_prior

QUIET = {"steps": 2, "text_scale": 2.0, "image_scale": 1.0}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_matches(views=3, size=(3, 4)) -> Matches:
    """Of all pairs, anywhere in each other, some of them nowhere."""
    pairs = torch.tensor([(a, b) for a in range(views) for b in range(views) if a != b])
    pixels = size[0] * size[1]
    uniform = torch.rand(len(pairs), pixels, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    place = uniform[..., :2] * torch.tensor([size[1] - 1, size[0] - 1])
    return Matches(views, pairs, *bilinear_taps(place, size), uniform[..., 2] * (uniform[..., 2] > 0.3))


@pytest.fixture(scope="module")
def source(tiny_capture, tiny_prior):
    prior, capture = load_prior(PriorConfig(model=str(tiny_prior))), load_capture(SceneConfig(path=str(tiny_capture)))
    return SceneSource(prior, capture, "paint it red")


def new_edit(source, seed=0):
    return SceneEdit(source, Ball(), source.capture.images.clone(), torch.Generator().manual_seed(seed))


def edited(source, **keys):
    edit, reports = new_edit(source), []
    CorrespondenceGuidance(**QUIET | keys).update(edit, 0, reports.append)
    return edit.images, reports


def test_the_gradient_is_autograds_and_the_loss_is_the_sum_written_out():
    matches, z = some_matches(), normal(3, 2, 3, 4).requires_grad_()
    loss, found = matches.loss(z)
    (expected,) = torch.autograd.grad(loss * z.numel(), z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    total = 0.0
    for k, (a, b) in enumerate(matches.pairs.tolist()):
        read = torch.stack(
            [z[b].flatten(1)[:, i] @ w for i, w in zip(matches.index[k], matches.weight[k], strict=True)]
        )
        total += (matches.omega[k] * (z[a].flatten(1) - read.T).square()).sum() / 4
    torch.testing.assert_close(loss * z.numel(), total, rtol=1e-12, atol=1e-12)


def test_one_step_takes_views_that_match_everywhere_to_their_mean():
    views, pairs = 4, torch.tensor([(a, b) for a in range(4) for b in range(4) if a != b])
    index, weight = bilinear_taps(torch.tensor([(x, y) for y in range(2) for x in range(3)]).double(), (2, 3))
    each = [part.expand(len(pairs), -1, -1) for part in (index, weight)]
    matches = Matches(views, pairs, *each, torch.full((len(pairs), 6), 0.5, dtype=torch.float64))
    z = normal(views, 2, 2, 3)
    mean = z.mean(0, keepdim=True)
    torch.testing.assert_close(z - matches.loss(z)[1], mean - (z - mean) / (views - 1), rtol=1e-12, atol=1e-12)
    assert matches.loss(mean.expand_as(z))[1].abs().max() < 1e-12


def test_a_match_reads_the_other_view_bilinearly_where_it_shows_the_surface(source):
    edit, z = new_edit(source), normal(5, 4, 16, 16, dtype=torch.float32)
    depths, pairs = ball_depths(edit.cameras), view_pairs(edit.cameras, neighbours=5, long_neighbours=0)["short"]
    found = match_views(edit.cameras, depths, pairs, (16, 16), 2)
    places, shares = places_seen(edit.cameras, depths, pairs, (16, 16), 2, depth_tolerance=0.02)
    assert len(pairs) == 5 * 4
    assert shares.max() > 0.5
    assert torch.equal(found.share, shares.flatten(1))
    for k, (_, b) in enumerate(pairs.tolist()):
        read = (z[b].flatten(1)[:, found.index[k]] * found.weight[k]).sum(-1).view(4, 16, 16)
        grid = places[k][None] / 7.5 - 1
        expected = F.grid_sample(z[b][None], grid, padding_mode="border", align_corners=True)[0]
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)


def test_without_strength_it_is_instruct_pix2pix_of_all_views(source):
    edit = new_edit(source)
    z_t = draw_noise(source.z, "shared", torch.Generator().manual_seed(0))
    timesteps = ddim_timesteps(999, 2)
    expected = ddim_sample(view_predictor(edit, torch.arange(5), 2.0, 1.0), z_t, source.prior.alphas_cumprod, timesteps)
    edit.replace(torch.arange(5), expected)
    found, reports = edited(source, strength=0.0)
    torch.testing.assert_close(found, edit.images, atol=1e-4, rtol=1e-4)
    assert [report["t"] for report in reports] == timesteps


def test_guidance_lowers_the_loss_and_keeps_to_its_steps(source):
    plain, unguided = edited(source, noise="independent", guide_from=1.0)
    guided, reports = edited(source, noise="independent", guide_until=0.5)
    assert ["consistency_loss" in report for report in (*unguided, *reports)] == [False, False, True, False]
    assert (guided - plain).abs().max() > 1e-3
    early, late = (report["consistency_loss"] for report in edited(source, noise="independent", iterations=3)[1])
    assert late < early / 4


def test_views_in_turn_are_each_guided_by_those_before(source):
    """Without strength it is the same as together; no view guides the first."""
    together, in_turn = ({"noise": "independent", "order": order} for order in ("together", "in turn"))
    plain, unguided = (edited(source, **keys, strength=0.0)[0] for keys in (together, in_turn))
    torch.testing.assert_close(unguided, plain, atol=1e-4, rtol=1e-4)
    guided = edited(source, **in_turn)[0]
    changed = (guided - plain).flatten(1).abs().amax(1)[source.capture.train]
    assert changed[0] < 1e-4
    assert (changed[1:] > 1e-3).sum() >= 3


def test_the_next_view_is_the_one_of_which_those_before_show_most():
    pairs = torch.tensor([(a, b) for a in range(4) for b in range(4) if a != b])
    near = {(0, 2): 3.0, (2, 0): 3.0, (2, 3): 2.0, (3, 2): 2.0, (1, 3): 1.0, (3, 1): 1.0}
    share = torch.tensor([[near.get((a, b), 0.0)] for a, b in pairs.tolist()]) / 3
    matches = Matches(4, pairs, torch.zeros(12, 1, 4, dtype=torch.long), torch.zeros(12, 1, 4), share)
    assert list(matches.in_turn()) == [(0, []), (2, [0]), (3, [0, 2]), (1, [0, 2, 3])]
    assert matches.of(3, [0, 2]).pairs.tolist() == [[0, 3], [2, 3], [3, 0], [3, 2]]
    assert matches.of(3, [0, 2]).omega[3] == 1.0


def test_views_are_edited_once_and_held_out_ones_never(source):
    edit, held_out = new_edit(source), source.capture.test
    CorrespondenceGuidance(**QUIET).update(edit, 1, lambda report: None)
    assert torch.equal(edit.images, source.capture.images)
    CorrespondenceGuidance(**QUIET).update(edit, 0, lambda report: None)
    changed = (edit.images - source.capture.images).flatten(1).abs().amax(1) > 0
    assert changed[source.capture.train].all()
    assert not changed[held_out].any()


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"agree": "colour"}, "choose one of picture, change"), ({"guide_until": 1.5}, r"give a number in \[0, 1\]")],
)
def test_bad_keys_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        CorrespondenceGuidance(**keys)


def test_more_pairs_than_fit_in_memory_are_refused_before_any_work(source, monkeypatch):
    monkeypatch.setattr("csd3d.memory.memory_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"compare\.correspondence_guidance\.pairs to fewer"):
        CorrespondenceGuidance().check(source, "compare.correspondence_guidance")
