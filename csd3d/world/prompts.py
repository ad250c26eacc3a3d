"""Prompts about the world, read: what a prompt says, what it leaves open, its scenes, and prompts that say otherwise.

A prompt is a caption (`csd3d.world.language.caption`) of which any part may be missing, even the kind ("a red object").
What it says is a dict with the names and values of `Scene`'s fields, `view` and `facing`. What it says nothing of is
*open* (`OPEN`), or as captions that say nothing of it have it: matte and plain, by day, no snow, no hat, full size,
front towards azimuth 0.
Symbols: N particles, V views.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from csd3d.errors import InputError
from csd3d.world.dataset import DISTANCE
from csd3d.world.language import DESIGNS, ON_PLATE, caption, contrast
from csd3d.world.pairs import FOV_DEG, sample_scene
from csd3d.world.render import camera_row, render
from csd3d.world.scene import BACKDROPS, COLOURS, MATERIALS, TIMES, Scene
from csd3d.world.shapes import KINDS

if TYPE_CHECKING:  # prompts are read without the libraries that the metrics need
    from csd3d.metrics.clip import ClipModel

ANY = "any"  # the value of `hat` in "wearing a hat"
SMALL = 0.62  # the scale of what is said to be small
USUAL = {
    "material": "matte", "pattern": "plain", "time": "day", "snow": False, "hat": None, "scale": 1.0,
    "azimuth_deg": 0.0,
}  # fmt: skip
OPEN = {"kind": KINDS, "colour": COLOURS, "backdrop": BACKDROPS}
OTHERS = {  # what could be said instead
    "kind": KINDS,
    "colour": COLOURS,
    "material": MATERIALS[1:],
    "pattern": DESIGNS,
    "pattern_colour": COLOURS,
    "hat": COLOURS,
    "backdrop": BACKDROPS,
    "time": TIMES[1:],
}
COMPLETIONS = 12  # sentences a value is read by, each with other words for the rest that is open
VIEWS = ("front", "side", "back", "overhead")


def parse_prompt(text: str) -> dict[str, Any] | None:
    """What a prompt says, by the names of `Scene`'s fields and `view`; None where it is no prompt of the world."""
    words = re.sub(r",? (?=wearing |covered with |on a plate)", ", ", " ".join(text.lower().split()).rstrip(" .!"))
    head, *clauses = re.split(r" ?, ?", words)
    said = _parse_head(head)
    for clause in clauses:
        told = _parse_clause(clause)
        if said is None or told is None or said.keys() & told.keys():
            return None
        said |= told
    return said


def _parse_head(head: str) -> dict[str, Any] | None:
    """What "a small red metal chair with yellow stripes" says: adjectives in any order, no two of a kind."""
    match = re.fullmatch(r"(?:an? |the )?((?:\w+ )*?)(\w+)(?: with (?:(\w+) )?(\w+))?", head)
    if match is None or match[2] not in (*KINDS, "object"):
        return None
    said = {} if match[2] == "object" else {"kind": match[2]}
    told = [_parse_adjective(word) for word in match[1].split()]
    if match[4]:
        told += [{"pattern": match[4]} if match[4] in DESIGNS else None]
        told += [{"pattern_colour": match[3]} if match[3] in COLOURS else None] if match[3] else []
    for part in told:
        if part is None or said.keys() & part.keys():
            return None
        said |= part
    return said


def _parse_adjective(word: str) -> dict[str, Any] | None:
    if word == "small":
        return {"scale": SMALL}
    found = {"colour": COLOURS, "material": MATERIALS, "pattern": ("plain",)}
    return next(({key: word} for key, values in found.items() if word in values), None)


def _parse_clause(clause: str) -> dict[str, Any] | None:
    if clause == "covered with snow":
        return {"snow": True}
    if clause == ON_PLATE:
        return {"plate": True}
    if clause in TIMES:
        return {"time": clause}
    if match := re.fullmatch(r"wearing an? (?:(\w+) )?hat", clause):
        return {"hat": match[1] or ANY} if match[1] in (None, *COLOURS) else None
    if clause in ("facing left", "facing right"):
        return {"facing": clause}
    for key, ending, values in (("backdrop", " background", BACKDROPS), ("view", " view", VIEWS)):
        if clause.endswith(ending) and (word := clause.removesuffix(ending)) in values:
            return {key: clause if key == "view" else word}
    return None


def write_prompt(said: dict[str, Any]) -> str:
    """The prompt that says this much and no more, in the order of captions; `parse_prompt` reads it back."""
    plain = "plain" if said.get("pattern") == "plain" else None
    words = ["a", "small" if "scale" in said else None, plain, said.get("colour"), said.get("material")]
    text = " ".join(word for word in (*words, said.get("kind", "object")) if word)
    if said.get("pattern") in DESIGNS:
        text += " with " + " ".join(said[key] for key in ("pattern_colour", "pattern") if key in said)
    if "hat" in said:
        text += ", wearing a hat" if said["hat"] == ANY else f", wearing a {said['hat']} hat"
    text += ", covered with snow" if said.get("snow") else ""
    text += f", {ON_PLATE}" if said.get("plate") else ""
    text += f", {said['backdrop']} background" if "backdrop" in said else ""
    return text + "".join(f", {said[key]}" for key in ("time", "view", "facing") if key in said)


def loosen(text: str, keys: Sequence[str], rng: random.Random) -> str:
    """The prompt without some of `keys`: at least one of those that it says is dropped, any number may be.

    What is no prompt of the world stays as it is.
    """
    said = parse_prompt(text)
    if said is None:
        return text
    present = [key for key in keys if key in said]
    dropped = rng.sample(present, rng.randint(min(1, len(present)), len(present)))
    return write_prompt({key: value for key, value in said.items() if key not in dropped})


def read_prompt(text: str) -> dict[str, Any]:
    """`parse_prompt`, or InputError where it is no prompt of the world."""
    said = parse_prompt(text)
    if said is None:
        raise InputError(
            f"prompt {text!r}: not in the world's words; such as 'a blue metal duck with red stripes, wearing a yellow "
            "hat, grey background, front view' would be, or less of it"
        )
    return said


def open_attributes(said: dict[str, Any]) -> list[str]:
    """The fields that a prompt leaves open; the colour of a pattern or a hat only where it speaks of one."""
    names = [key for key in OPEN if key not in said]
    if said.get("pattern") in DESIGNS and "pattern_colour" not in said:
        names.append("pattern_colour")
    return names + (["hat"] if said.get("hat") == ANY else [])


def scenes_of_prompt(text: str, count: int, seed: int) -> list[Scene]:
    """Random scenes that the prompt describes; what it leaves open is drawn as `sample_scene` draws it.

    The object's front looks to azimuth 0, as view words count from there; a view word changes nothing. Raises
    InputError for what is no prompt of the world.
    """
    said, rng = read_prompt(text), random.Random(seed)
    return [_draw(said, rng) for _ in range(count)]


def _draw(said: dict[str, Any], rng: random.Random) -> Scene:
    """A scene as said; its two colours differ unless both are said, whether or not it has a pattern."""
    fields = {key: value for key, value in said.items() if key not in ("view", "facing")}
    if fields.get("hat") == ANY:
        fields["hat"] = rng.choice(list(COLOURS))
    drawn = replace(sample_scene(rng), **USUAL)
    scene = replace(drawn, **fields)
    if "pattern_colour" not in said:
        other = contrast(scene.colour) if rng.random() < 0.4 else rng.choice(_without(scene.colour))
        return replace(scene, pattern_colour=other)
    if "colour" not in said:
        return replace(scene, colour=rng.choice(_without(scene.pattern_colour)))
    return scene


def _without(colour: str) -> list[str]:
    return [c for c in COLOURS if c != colour]


def distractors(text: str, count: int, seed: int) -> list[str]:
    """Other prompts that say the same kinds of things, at least one of them differently: no picture fits both.

    The nearest first: all that differ in one word, then in two, …, within these in random order; fewer than `count`
    where there are no more. Raises InputError for what is no prompt of the world.
    """
    said, rng = read_prompt(text), random.Random(seed)
    others = {key: _others(key, said) for key in OTHERS if key in said and said[key] not in (ANY, "plain", "day")}
    found: list[str] = []
    for changes in range(1, len(others) + 1):
        if len(found) >= count:
            break
        level = [write_prompt(said | change) for change in _changes(others, changes) if _differ(said | change)]
        rng.shuffle(level)
        found += level
    return found[:count]


def _others(key: str, said: dict[str, Any]) -> list[str]:
    """What could stand in place of a word; under a view word only objects that have a front."""
    turned = said.get("view") not in (None, "overhead view")
    values = [value for value in OTHERS[key] if value != said[key]]
    return [value for value in values if not (key == "kind" and turned) or KINDS[value].has_front]


def _changes(others: dict[str, list[str]], count: int) -> Iterator[dict[str, str]]:
    """Every way to say `count` things otherwise."""
    for keys in itertools.combinations(others, count):
        for values in itertools.product(*(others[key] for key in keys)):
            yield dict(zip(keys, values, strict=True))


def _differ(said: dict[str, Any]) -> bool:
    """Whether a pattern, if any, is of another colour than its ground."""
    return "colour" not in said or said["colour"] != said.get("pattern_colour")


def zero_shot_texts(said: dict[str, Any], attribute: str, seed: int = 0) -> dict[str, list[str]]:
    """Captions to read an open attribute by: for each of its values the same `COMPLETIONS` of the rest.

    A CLIP taught by whole captions is asked in whole captions, of views from all around where the kind has a front. No
    pattern is given the colour of its ground.
    """
    rng, values = random.Random(seed), list(OPEN.get(attribute, COLOURS))
    rest = [_draw(said, rng) for _ in range(COMPLETIONS)]
    if attribute in ("colour", "pattern_colour") and said.get("pattern") in DESIGNS:
        taken = said.get("pattern_colour" if attribute == "colour" else "colour")
        values = [value for value in values if value != taken]
    scenes = {value: [_with(scene, attribute, value, said) for scene in rest] for value in values}
    return {value: [caption(s, 360 * i / COMPLETIONS, 30) for i, s in enumerate(row)] for value, row in scenes.items()}


def _with(scene: Scene, attribute: str, value: str, said: dict[str, Any]) -> Scene:
    """The scene with this value, and its other colour moved out of the way where that is not said."""
    scene = replace(scene, **{attribute: value})
    if scene.colour != scene.pattern_colour:
        return scene
    if attribute == "pattern_colour":
        return replace(scene, colour=contrast(value))
    return scene if "pattern_colour" in said else replace(scene, pattern_colour=contrast(scene.colour))


def open_attribute_values(clip: "ClipModel", images: Tensor, prompt: str) -> dict[str, list[str]]:
    """What each of N particles shows of every attribute that the prompt leaves open, read from its renders by a CLIP.

    The value v of particle n is argmax_v of the mean over views and completions of cos(E_I, E_T). images
    `[N, V, 3, H, W]` in [0, 1] → attribute → N values. Raises InputError for what is no prompt of the world.
    """
    if images.ndim != 5:
        raise ValueError(f"expected images [N, V, 3, H, W], got {tuple(images.shape)}")
    said = read_prompt(prompt)
    embedded = clip.embed_images(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)
    found = {}
    for attribute in open_attributes(said):
        texts = zero_shot_texts(said, attribute)
        rows = {text: i for i, text in enumerate(dict.fromkeys(itertools.chain(*texts.values())))}
        words = clip.embed_texts(list(rows))
        means = torch.stack([words[[rows[text] for text in sentences]].mean(0) for sentences in texts.values()])
        found[attribute] = [list(texts)[i] for i in (embedded @ means.T).argmax(1).tolist()]
    return found


def distinct_values(values: dict[str, list[str]]) -> dict[str, int]:
    """How many different values were found of each attribute."""
    return {attribute: len(set(found)) for attribute, found in values.items()}


def true_renders(
    text: str, cameras_azimuth_deg: Sequence[float], elevation_deg: float, count: int, size: int, seed: int
) -> Tensor:
    """Random scenes that the prompt describes, each seen from all azimuths, `[count, V, 3, size, size]` in [0, 1].

    Azimuths count from the object's front. Raises InputError for what is no prompt of the world.
    """
    scenes, views = scenes_of_prompt(text, count, seed), len(cameras_azimuth_deg)
    rows = np.stack([camera_row(a, elevation_deg, DISTANCE, FOV_DEG, size) for a in cameras_azimuth_deg])
    each = [scene for scene in scenes for _ in range(views)]
    rgb = render(each, np.tile(rows, (count, 1)), size, size, samples=3).rgb
    return torch.from_numpy(rgb).permute(0, 3, 1, 2).unflatten(0, (count, views))
