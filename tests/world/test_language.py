"""Instructions lead where they say, and ambiguous ones have answers that differ plainly and do not average to one."""

import random
from dataclasses import replace

import numpy as np
import pytest

from csd3d.world.dataset import read_scene, true_answers, write_capture
from csd3d.world.language import AMBIGUOUS, FAMILIES, caption, find_edit, sample_edit, view_word
from csd3d.world.pairs import sample_scene
from csd3d.world.render import camera_row, render
from csd3d.world.scene import COLOURS, Scene
from csd3d.world.shapes import KINDS, ROUND


def test_instructions_lead_where_they_say():
    scene = Scene("mug", "yellow")
    assert find_edit(scene, "Paint it blue.").answers == (Scene("mug", "blue"),)
    assert find_edit(scene, "turn it into a chair").answers == (Scene("chair", "yellow"),)
    assert find_edit(scene, "give it red stripes").answers[0].pattern == "stripes"
    assert {s.colour for s in find_edit(scene, "paint it a bright colour").answers} == {"red", "green", "blue"}
    assert find_edit(scene, "make it sing") is None
    assert true_answers(scene, "make it sing") == ()


def test_every_sampled_instruction_is_found_again():
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        edit = sample_edit(scene, rng)
        if edit is not None:
            assert find_edit(scene, edit.instruction).answers == edit.answers
            assert scene not in edit.answers


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_are_visible_and_ambiguity_is_where_it_should_be(family):
    rng, scene = (
        random.Random(1),
        Scene("robot", "yellow", pattern="plain" if family != "plain" else "dots", azimuth_deg=20),
    )
    edit = sample_edit(scene, rng, family)
    assert edit.ambiguous == (family in AMBIGUOUS)
    scenes = [scene, *edit.answers]
    views = render(scenes, np.stack([camera_row(30, 25, 4, 38, 48)] * len(scenes)), 48, 48).rgb
    source, answers = views[0], views[1:]
    assert all(np.sqrt(((a - source) ** 2).mean()) > 0.02 for a in answers)
    if edit.ambiguous:
        average = answers.mean(0)
        for i, a in enumerate(answers):
            gaps = [((a - b) ** 2).mean() for j, b in enumerate(answers) if j != i]
            assert min(gaps) > 1e-3  # they differ plainly ...
            assert ((average - a) ** 2).mean() > 0.15 * min(gaps)  # ... and their average is none of them


@pytest.mark.parametrize("kind", KINDS)
def test_symmetry_is_that_of_the_pictures(kind):
    """A turn by 360° / symmetry changes nothing but the noise of a few edge pixels; by half of that it does."""
    order, scene = KINDS[kind].symmetry, Scene(kind, "blue", sun_azimuth_deg=30)
    turns = (0, 360 / order, 180 / order) if order != ROUND else (0, 37, 121)
    scenes = [replace(scene, azimuth_deg=turn) for turn in turns]
    first, same, other = render(scenes, np.stack([camera_row(50, 30, 4, 38, 64)] * 3), 64, 64).rgb
    assert np.abs(same - first).mean() < 1e-3
    assert (np.abs(other - first).mean() < 1e-3) == (order == ROUND)


def test_no_answer_depends_on_what_the_picture_cannot_show():
    """Two scenes that look the same, a turn of the object apart, have answers that look the same."""
    rng = random.Random(3)
    for kind in KINDS:
        order = KINDS[kind].symmetry
        for family in FAMILIES:
            scene = Scene(kind, rng.choice(list(COLOURS)), pattern="stripes" if family == "plain" else "plain")
            edit = sample_edit(scene, rng, family)
            if edit is None or order == 1:
                continue
            turned = [
                replace(s, azimuth_deg=s.azimuth_deg + (77 if order == ROUND else 360 / order)) for s in edit.answers
            ]
            both = [*edit.answers, *turned]
            views = render(both, np.stack([camera_row(20, 25, 4, 38, 48)] * len(both)), 48, 48).rgb
            gap = np.abs(views[: len(turned)] - views[len(turned) :]).mean()
            assert gap < 2e-3, (kind, edit.instruction, gap)


def test_captions_and_view_words():
    scene = Scene("chair", "red", pattern="stripes", azimuth_deg=90)
    assert caption(scene, 90, 20) == "a red chair with white stripes, grey background, front view"
    sides = ["side view, facing left", "side view, facing right"]
    assert [view_word(scene, a, 20) for a in (90, 180, 270, 0)] == ["front view", sides[0], "back view", sides[1]]
    assert view_word(Scene("ball", "red"), 0, 20) is None
    assert view_word(Scene("ball", "red"), 0, 80) == "overhead view"


def test_a_scene_survives_being_written_as_a_capture(tmp_path):
    scene = Scene("tree", "pink", backdrop="mint", azimuth_deg=12.5)
    write_capture(tmp_path, scene, train=3, test=1, size=16)
    assert read_scene(tmp_path) == scene
    assert len(list((tmp_path / "images").iterdir())) == 4


@pytest.mark.parametrize("azimuth", [50, 90, 130, -50, -90, -130])
def test_side_views_face_as_they_are_said_to(azimuth):
    duck = Scene("duck", "blue")
    row = camera_row(azimuth, 20, 4.0, 31.0, 64, (0.0, 0.0, 0.0))
    red, green, blue = np.moveaxis(render([duck], row[None], 64, 64).rgb[0], -1, 0)
    beak = ((red > 0.5) & (red > green + 0.2) & (green > blue)).nonzero()[1]
    assert len(beak)
    side = "left" if beak.mean() < 32 else "right"
    assert view_word(duck, azimuth, 20) == f"side view, facing {side}"
