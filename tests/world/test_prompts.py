"""Prompts mean what captions mean: read back, drawn as scenes, contradicted by distractors, and found in renders."""

import itertools
import random
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from csd3d.errors import InputError
from csd3d.metrics.clip import ClipModel
from csd3d.world.dataset import DISTANCE
from csd3d.world.language import caption
from csd3d.world.pairs import FOV_DEG, sample_scene
from csd3d.world.prompts import (
    ANY,
    OPEN,
    USUAL,
    distinct_values,
    distractors,
    loosen,
    open_attribute_values,
    open_attributes,
    parse_prompt,
    scenes_of_prompt,
    true_renders,
    write_prompt,
    zero_shot_texts,
)
from csd3d.world.render import camera_row, render
from csd3d.world.scene import BACKDROPS, COLOURS, Scene
from csd3d.world.shapes import KINDS

PROMPTS = [
    "a chair",
    "a red chair with yellow stripes",
    "A blue metal duck, wearing a red hat, front view.",
    "an orange object",
    "a small glossy house with dots, covered with snow, sky blue background, night",
    "a robot wearing a hat",
    "a plain white mug, sunset",
    "a chair with red stripes",
]


def test_captions_are_read_back():
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_scene(rng)
        text = caption(scene, rng.uniform(0, 360), rng.choice((20, 70)))
        said = parse_prompt(text)
        for key in ("kind", "colour", "backdrop"):
            assert said[key] == getattr(scene, key)
        silent = {"pattern": "plain", "material": "matte", "hat": None, "snow": False, "time": "day", "scale": 1.0}
        for key, value in silent.items():
            assert said.get(key, value) == getattr(scene, key), (text, key)
        assert said.get("pattern_colour") == (scene.pattern_colour if scene.pattern != "plain" else None)
        assert said.get("view", "") == (re.findall(r"\w+ view", text) or [""])[0]
        assert said.get("facing", "") == (re.findall(r"facing \w+$", text) or [""])[0]
        assert write_prompt(said) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a chair", {"kind": "chair"}),
        (
            "  A Red  chair with yellow stripes. ",
            {"kind": "chair", "colour": "red", "pattern": "stripes", "pattern_colour": "yellow"},
        ),
        (
            "a metal blue duck wearing a red hat , front view",
            {"kind": "duck", "material": "metal", "colour": "blue", "hat": "red", "view": "front view"},
        ),
        ("a robot wearing a hat", {"kind": "robot", "hat": ANY}),
        ("an object with dots", {"pattern": "dots"}),
        (
            "a plain white mug, sky blue background",
            {"kind": "mug", "colour": "white", "pattern": "plain", "backdrop": "sky blue"},
        ),
    ],
)
def test_what_prompts_say(text, said):
    assert parse_prompt(text) == said
    assert parse_prompt(write_prompt(said)) == said


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "red", "a horse", "a red blue chair", "a red chair with yellow", "a red chair with yellow spots",
        "a chair, wearing a brown hat", "a chair, night, sunset", "a chair, red", "a chair,", "make it red",
        "a chair with mint stripes", "a chair, beige", "a chair, wearing a red hat, wearing a blue hat",
        "a plain chair with dots", "a chair, left view", "a chair on a table",
    ],
)  # fmt: skip
def test_what_is_no_prompt_of_the_world(text):
    assert parse_prompt(text) is None
    for use in (scenes_of_prompt, distractors):
        with pytest.raises(InputError, match="not in the world's words"):
            use(text, 3, 0)


@pytest.mark.parametrize("text", PROMPTS)
def test_scenes_are_as_said_and_open_where_nothing_is_said(text):
    said, scenes = parse_prompt(text), scenes_of_prompt(text, 200, seed=1)
    for scene in scenes:
        found = parse_prompt(caption(scene)) | {"azimuth_deg": scene.azimuth_deg, "view": said.get("view")}
        for key, value in said.items():
            assert found.get(key, "plain") == value or (value == ANY and key == "hat" and scene.hat in COLOURS), key
        for key, value in USUAL.items():
            assert key in said or getattr(scene, key) == value
        assert scene.pattern == "plain" or scene.pattern_colour != scene.colour
    for key in open_attributes(said):
        values = {getattr(scene, key) for scene in scenes}
        taken = {said.get("pattern_colour")} if key == "colour" else {said.get("colour")} if "_" in key else set()
        assert values == set(OPEN.get(key, COLOURS)) - taken, key
    assert scenes == scenes_of_prompt(text, 200, seed=1)
    assert scenes[:20] == scenes_of_prompt(text, 20, seed=1)
    assert scenes != scenes_of_prompt(text, 200, seed=2)


def test_the_front_looks_to_azimuth_0():
    scene = scenes_of_prompt("a red chair", 1, seed=0)[0]
    assert caption(scene, 0, 30).endswith("front view")
    assert caption(scene, 180, 30).endswith("back view")


def entails(text, prompt):
    told, said = parse_prompt(text), parse_prompt(prompt)
    return all(told.get(key) == value for key, value in said.items())


@pytest.mark.parametrize("text", [*PROMPTS, "a red chair, back view", "a red duck, side view, facing left"])
def test_distractors_never_entail_the_prompt_nor_it_them(text):
    said, found = parse_prompt(text), distractors(text, 300, seed=3)
    assert len(found) == len(set(found)) > 8
    for other in found:
        told = parse_prompt(other)
        assert told.keys() == said.keys()  # of the same form
        assert not entails(other, text)
        assert not entails(text, other)
        assert told.get("view") == said.get("view")
        assert told.get("colour", "") != told.get("pattern_colour")
    assert found == distractors(text, 300, seed=3)
    assert len(found) < 200 or found != distractors(text, 300, seed=4)


def test_the_nearest_distractors_come_first_and_all_of_them_in_the_end():
    kinds, colours = len(KINDS), len(COLOURS)
    assert len(distractors("a chair", 999, 0)) == kinds - 1
    found = distractors("a red chair", 999, 0)
    assert len(found) == kinds * colours - 1
    near = [write_prompt({"kind": k, "colour": "red"}) for k in KINDS if k != "chair"]
    near += [write_prompt({"kind": "chair", "colour": c}) for c in COLOURS if c != "red"]
    assert sorted(found[: len(near)]) == sorted(near)
    assert distractors("an object", 5, 0) == []
    turned = {parse_prompt(other)["kind"] for other in distractors("a chair, back view", 99, 0)}
    assert turned == {kind for kind in KINDS if KINDS[kind].has_front} - {"chair"}  # a ball has no back


@pytest.mark.parametrize("text", PROMPTS)
def test_values_are_read_by_whole_captions_that_differ_in_the_value_alone(text):
    said = parse_prompt(text)
    for attribute in open_attributes(said):
        texts = zero_shot_texts(said, attribute)
        for value, sentences in texts.items():
            told = [parse_prompt(sentence) for sentence in sentences]
            assert all(t.get(attribute) == value for t in told)
            assert all(
                t[key] == v for t in told for key, v in said.items() if v not in (ANY, "plain") and key != "view"
            )
            assert all({"kind", "colour", "backdrop"} <= t.keys() for t in told)
            assert all(("view" in t) == KINDS[t["kind"]].has_front for t in told)  # as in every caption of a picture
            assert all(t["colour"] != t.get("pattern_colour") for t in told)
    assert set(zero_shot_texts(parse_prompt("a chair with red stripes"), "colour")) == set(COLOURS) - {"red"}


def words_clip(captions):
    """A CLIP that sees the words and word pairs of captions[k] in a picture of brightness k / 100."""

    def embed(text):
        words = re.findall(r"\w+|,", text)
        found = torch.zeros(4096)
        for part in [*words, *map(" ".join, itertools.pairwise(words))]:
            found[zlib.crc32(part.encode()) % 4096] += 1
        return F.normalize(found, dim=0)

    def images(pictures):
        return torch.stack([embed(captions[round(100 * float(x.mean()))]) for x in pictures])

    return ClipModel("CLIP (words)", images, lambda texts: torch.stack([embed(text) for text in texts]))


def test_open_attributes_are_found_in_the_renders():
    scenes = [
        Scene("chair", "red", backdrop="blue"),
        Scene("chair", "blue", backdrop="red", pattern="dots", pattern_colour="white"),
        Scene("chair", "red", backdrop="beige", material="metal"),
        Scene("chair", "green", backdrop="blue"),
    ]
    views = [caption(scene, azimuth, 30) for scene in scenes for azimuth in (0, 90, 180)]
    images = torch.arange(12).reshape(4, 3, 1, 1, 1).expand(4, 3, 3, 4, 4) / 100
    found = open_attribute_values(words_clip(views), images, "a chair")
    assert found["colour"] == ["red", "blue", "red", "green"]
    assert found["backdrop"] == ["blue", "red", "beige", "blue"]
    assert distinct_values(found) == {"colour": 3, "backdrop": 3}
    assert "colour" not in open_attribute_values(words_clip(views), images, "a red chair")


def test_an_open_kind_is_found_whether_or_not_it_has_a_front():
    scenes = [Scene(kind, "red", backdrop=backdrop) for kind, backdrop in zip(KINDS, list(BACKDROPS) * 2, strict=False)]
    views = [caption(scene, azimuth, 30) for scene in scenes for azimuth in (0, 90, 180, 270)]
    images = torch.arange(len(views)).reshape(-1, 4, 1, 1, 1).expand(-1, -1, 3, 4, 4) / 100
    assert open_attribute_values(words_clip(views), images, "a red object")["kind"] == list(KINDS)


def test_open_colours_of_patterns_and_hats_are_found():
    scene = Scene("robot", "blue", pattern="stripes", pattern_colour="pink", hat="green")
    views = [caption(s, 0, 30) for s in (scene, replace(scene, pattern_colour="black", hat="white"))]
    images = torch.arange(2).reshape(2, 1, 1, 1, 1).expand(2, 1, 3, 4, 4) / 100
    found = open_attribute_values(
        words_clip(views), images, "a blue robot with stripes, wearing a hat, grey background"
    )
    assert (found["pattern_colour"], found["hat"]) == (["pink", "black"], ["green", "white"])
    assert "colour" not in found
    assert "backdrop" not in found


def test_true_renders_are_of_the_prompts_scenes_from_their_front():
    azimuths = (0, 30, 180)
    pictures = true_renders("a duck", azimuths, 30, count=2, size=16, seed=5)
    assert pictures.shape == (2, 3, 3, 16, 16)
    for n, scene in enumerate(scenes_of_prompt("a duck", 2, seed=5)):
        for v, azimuth in enumerate(azimuths):
            row = camera_row(azimuth, 30, DISTANCE, FOV_DEG, 16)
            alone = render([scene], np.stack([row]), 16, 16, samples=3).rgb[0]
            np.testing.assert_allclose(pictures[n, v].permute(1, 2, 0).numpy(), alone, rtol=0, atol=1e-6)


def test_a_loosened_prompt_says_less_and_only_of_what_may_be_dropped():
    text = "a small red metal chair with yellow stripes, wearing a blue hat, grey background, night, back view"
    keys, said = ("colour", "pattern_colour", "backdrop"), parse_prompt(text)
    seen = [parse_prompt(loosen(text, keys, random.Random(seed))) for seed in range(60)]
    for less in seen:
        dropped = said.keys() - less.keys()
        assert dropped
        assert dropped <= set(keys)
        assert all(said[key] == value for key, value in less.items())
    assert {frozenset(said.keys() - less.keys()) for less in seen} == {  # every choice comes up
        frozenset(c) for n in (1, 2, 3) for c in itertools.combinations(keys, n)
    }
    assert [loosen(text, keys, random.Random(0)) for text in ("a chair", "make it red")] == ["a chair", "make it red"]
