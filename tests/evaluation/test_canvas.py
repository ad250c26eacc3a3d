"""Figures of edited pictures and videos: planted edits whose figures are known, by a judge that sees mean colours."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from csd3d.canvas.clip import Captions, Clip, DemoConfig
from csd3d.canvas.latents import EditedFrame
from csd3d.canvas.windows import Cover
from csd3d.evaluation.canvas import Metrics, parts, window_borders
from csd3d.evaluation.text import Judge
from csd3d.metrics import ClipModel, WarpedError, seam_visibility
from csd3d.priors import perceptual_distance
from csd3d.world.language import caption
from csd3d.world.plugin import world_orbit, world_strip
from csd3d.world.scroll import wide_strip

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


def by_colour(texts):
    return F.normalize(torch.tensor([COLOURS[text] for text in texts]), dim=-1)


JUDGE = Judge(ClipModel("colours", lambda images: F.normalize(images.mean((2, 3)), dim=-1), by_colour))


def of_colours(*names, side=8):
    """A picture [3, side, n side] of squares."""
    return torch.cat([torch.tensor(COLOURS[n])[:, None, None].expand(3, side, side) for n in names], 2)


def clip_of(count=1, size=(8, 32), fps=None, **known):
    return Clip("x", count, *size, None, fps=fps, **known)


def latents_of(clip, size):
    """Of a clip worked on at `size`, whose latents are 8 times smaller."""
    return SimpleNamespace(clip=clip, size=size, codec=SimpleNamespace(unit=8))


def metrics_of(clip, judge=None, captions=None, **known):
    return Metrics(clip, judge, captions, size=clip.size, **known)


def measured(metrics, edited, source):
    for number, (picture, before) in enumerate(zip(edited, source, strict=True)):
        metrics.add_source(number, before)
        metrics.add("method", number, EditedFrame(picture, picture, before))
    return metrics.figures("method")


def test_pictures_are_judged_part_by_part_and_where_the_caption_changes():
    """Three objects: the first becomes what is said, the second something else, of the third nothing is said."""
    captions = Captions(["red", "red", "green"], [["blue", "blue", "green"]])
    source, edited = of_colours("red", "red", "green"), of_colours("blue", "green", "red")
    clip = clip_of(size=(8, 24))
    figures = measured(metrics_of(clip, JUDGE, captions), [edited], [source])
    assert figures["clip_directional"] == pytest.approx((1.0 + 0.5) / 2)
    assert figures["clip_image"] == pytest.approx(0.0)
    assert figures["clip_consistency"] == pytest.approx(0.0)
    same = measured(metrics_of(clip, JUDGE, captions), [source], [source])
    assert (same["clip_directional"], same["clip_image"]) == (0.0, pytest.approx(1.0))


def test_the_answer_that_suits_best_says_what_should_be_seen():
    answers = torch.stack([of_colours("green"), of_colours("blue")]).permute(0, 2, 3, 1)[:, None].numpy()
    clip = clip_of(count=2, size=(8, 8), fps=12.0, answers=answers.repeat(2, 1))
    captions = Captions(["red"], [["green"], ["blue"]])
    metrics = metrics_of(clip, JUDGE, captions, flow=still, features=features)
    figures = measured(metrics, [of_colours("blue")] * 2, [of_colours("red")] * 2)
    assert figures["answer"] == 1
    assert figures["psnr_truth"] > 60
    assert figures["clip_directional"] == pytest.approx(1.0)
    assert figures["clip_consistency"] == pytest.approx(1.0)


def test_sources_are_embedded_once_for_all_methods_and_without_captions_nothing_is_directed():
    seen, blue, red = [], of_colours("blue"), of_colours("red")
    clip = ClipModel("counts", lambda images: seen.append(1) or JUDGE.clip.image_tower(images), by_colour)
    metrics = metrics_of(clip_of(size=(8, 8)), Judge(clip))
    metrics.add_source(0, red)
    for name in ("a", "b", "c"):
        metrics.add(name, 0, EditedFrame(blue, blue, red))
        assert set(metrics.figures(name)) == {"clip_image"}
    assert len(seen) == 3 + 1


def still(a, b):
    return torch.zeros(8, 8, 2), torch.ones(8, 8, dtype=torch.bool)


def features(images):
    return [images, images[..., ::2, ::2]]


def test_videos_are_followed_without_keeping_their_frames():
    frames = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    clip = clip_of(count=7, size=(8, 8), fps=12.0)
    figures = measured(metrics_of(clip, flow=still, features=features), frames, frames)
    whole, error = frames.permute(0, 2, 3, 1), WarpedError(still)
    for frame in whole:
        error.add(frame)
    expected = error.report()
    steps = [perceptual_distance(features(a[None]), features(b[None])).item() for a, b in pairwise(frames)]
    assert figures["flow_warped_error"] == pytest.approx((expected["short"] + expected["long"]) / 2)
    assert figures["flow_warped_error_long"] == pytest.approx(expected["long"])
    assert figures["neighbour_distance"] == pytest.approx(sum(steps) / 6)
    mean = metrics_of(clip, flow=still, features=features, lpips=lambda a, b: (a - b).abs().mean())
    steps = [(a - b).abs().mean().item() for a, b in pairwise(frames)]
    assert measured(mean, frames, frames) == pytest.approx(figures | {"lpips": sum(steps) / 6})
    alone = measured(metrics_of(clip, flow=still, features=features), frames[:1], frames[:1])
    assert alone == {"flow_warped_error": None, "flow_warped_error_short": None, "flow_warped_error_long": None}


def test_flow_is_that_of_the_sources_given_which_are_not_read_again_or_kept():
    frames = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    metrics = metrics_of(clip_of(count=20, size=(32, 32), fps=12.0), features=features)
    figures = measured(metrics, frames, frames)
    assert figures["flow_warped_error_short"] is not None
    assert sorted(metrics.recent) == list(range(12, 20))


def test_outside_is_measured_beyond_the_rims_of_what_may_be_edited():
    source = torch.rand(3, 8, 32, generator=torch.Generator().manual_seed(0))
    inside, edited = torch.zeros(8, 32), source.clone()
    inside[:, 20:] = 1
    edited[..., 20:] = 0.0
    metrics = metrics_of(clip_of(), inside=inside)
    metrics.add_source(0, source)
    metrics.add("method", 0, EditedFrame(edited, source + 0.1, source))
    figures = metrics.figures("method")
    assert figures["psnr_outside"] == pytest.approx(100.0)
    assert figures["psnr_outside_vae"] == pytest.approx(20.0, abs=1e-3)


def test_seams_are_seen_where_windows_end_and_beside_the_sources_own():
    source = torch.rand(3, 8, 32, generator=torch.Generator().manual_seed(0))
    edited = source.clone()
    edited[..., 16:] += 1.0
    figures = measured(metrics_of(clip_of(), borders=([], [16])), [edited], [source])
    own, before = (seam_visibility(x.permute(1, 2, 0), columns=[16]) for x in (edited, source))
    assert figures["seam_visibility"] == pytest.approx(own)
    assert figures["seam_visibility_relative"] == pytest.approx(own / before)
    assert own > 3


def test_borders_are_those_of_evenly_spaced_windows_in_the_clips_pixels():
    work = latents_of(clip_of(size=(32, 128)), (32, 128))
    assert window_borders(Cover((1, 4, 16), (4, 4), overlap=0.0), work) == ([], [32, 64, 96])
    assert window_borders(Cover((1, 4, 16), (4, 6), overlap=0.0), work) == ([], [40, 48, 80, 88])
    assert window_borders(Cover((1, 4, 16), (4, 4), overlap=0.0, wrap=True), work) == ([], [0, 32, 64, 96])
    assert window_borders(Cover((1, 4, 16), (4, 16)), work) == ([], [])
    half = latents_of(clip_of(size=(16, 64)), (32, 128))
    assert window_borders(Cover((1, 4, 16), (4, 4), overlap=0.0), half) == ([], [16, 32, 48])


def test_parts_are_of_one_width():
    assert [part.shape for part in parts(torch.zeros(3, 5, 17), 3)] == [(3, 5, 5)] * 3


def test_the_world_says_what_is_to_be_seen_and_how_it_moves():
    strip = world_strip(DemoConfig(width=64, height=32), "paint it a bright colour")
    scenes = wide_strip(0, 64, 32).scenes
    assert strip.captions.before == [caption(scene) for scene in scenes]
    assert len(strip.captions.after) == len(strip.answers) == 3
    assert all("red" in text for text in strip.captions.after[0])
    clip = world_orbit(DemoConfig(height=32, frames=3), "paint it a bright colour")
    assert len(clip.captions.before) == 1
    assert len(clip.captions.after) == 3
    motion, seen = clip.flow(0, 2)
    assert motion.shape == (32, 32, 2)
    assert seen.any()
    assert world_orbit(DemoConfig(height=32, frames=1), "make it better").captions is None
