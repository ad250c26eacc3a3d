"""Parse prompts about the world; find their open attributes, matching scenes, and contradicting prompts.

A prompt is a caption (`csd3d.world.language.caption`) in which any part may be missing, even the kind ("a red object").
It is parsed to a dict with the names and values of `Scene`'s fields, `view` and `facing`. Fields that it does not
mention are *open* (`OPEN`), or have their usual value (`USUAL`).
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
from csd3d.world.language import ANY, DESIGNS, ON_PLATE, caption, contrast, write_prompt
from csd3d.world.pairs import FOV_DEG, sample_scene
from csd3d.world.render import camera_row, render
from csd3d.world.scene import BACKDROPS, COLOURS, MATERIALS, TIMES, Scene
from csd3d.world.shapes import KINDS

if TYPE_CHECKING:  # parsing prompts does not need the libraries of the metrics
    from csd3d.metrics.clip import ClipModel

SMALL = 0.62  # the scale of "a small ..."
USUAL = {
    "material": "matte", "pattern": "plain", "time": "day", "snow": False, "hat": None, "scale": 1.0,
    "azimuth_deg": 0.0,
}  # fmt: skip
OPEN = {"kind": KINDS, "colour": COLOURS, "backdrop": BACKDROPS}
OTHERS = {  # alternatives of each word
    "kind": KINDS,
    "colour": COLOURS,
    "material": MATERIALS[1:],
    "pattern": DESIGNS,
    "pattern_colour": COLOURS,
    "hat": COLOURS,
    "backdrop": BACKDROPS,
    "time": TIMES[1:],
}
COMPLETIONS = 12  # captions per value in zero-shot classification, with the other open attributes drawn at random
VIEWS = ("front", "side", "back", "overhead")


def parse_prompt(text: str) -> dict[str, Any] | None:
    """Parse a prompt to {field of `Scene`, "view" or "facing": value}; None if it is no prompt of the world."""
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
    """Parse "a small red metal chair with yellow stripes": adjectives in any order, no two of one kind."""
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


def loosen(text: str, keys: Sequence[str], rng: random.Random) -> str:
    """The prompt without a random, non-empty subset of `keys`, of those that it mentions.

    A text that is no prompt of the world is returned unchanged.
    """
    said = parse_prompt(text)
    if said is None:
        return text
    present = [key for key in keys if key in said]
    dropped = rng.sample(present, rng.randint(min(1, len(present)), len(present)))
    return write_prompt({key: value for key, value in said.items() if key not in dropped})


def read_prompt(text: str) -> dict[str, Any]:
    """`parse_prompt`; raises InputError if it is no prompt of the world."""
    said = parse_prompt(text)
    if said is None:
        raise InputError(
            f"prompt {text!r}: not in the world's words; write for example 'a blue metal duck with red stripes, "
            "wearing a yellow hat, grey background, front view', or part of it"
        )
    return said


def open_attributes(said: dict[str, Any]) -> list[str]:
    """The fields that a prompt leaves open; the colour of a pattern or hat only if the prompt mentions one."""
    names = [key for key in OPEN if key not in said]
    if said.get("pattern") in DESIGNS and "pattern_colour" not in said:
        names.append("pattern_colour")
    return names + (["hat"] if said.get("hat") == ANY else [])


def scenes_of_prompt(text: str, count: int, seed: int) -> list[Scene]:
    """Random scenes that fit the prompt; open attributes are drawn as in `sample_scene`.

    The object's front faces azimuth 0, from which view words count; a view word in the prompt has no effect. Raises
    InputError if it is no prompt of the world.
    """
    said, rng = read_prompt(text), random.Random(seed)
    return [_draw(said, rng) for _ in range(count)]


def _draw(said: dict[str, Any], rng: random.Random) -> Scene:
    """A random scene with the given fields; its two colours differ, unless both are given."""
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
    """Prompts that mention the same attributes with at least one other value, so that no picture fits both.

    Prompts that differ in one word come first, then in two, …, each group in random order; fewer than `count` if there
    are no more. Raises InputError if it is no prompt of the world.
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
    """The alternatives of a word; with a view word, only objects that have a front."""
    turned = said.get("view") not in (None, "overhead view")
    values = [value for value in OTHERS[key] if value != said[key]]
    return [value for value in values if not (key == "kind" and turned) or KINDS[value].has_front]


def _changes(others: dict[str, list[str]], count: int) -> Iterator[dict[str, str]]:
    """All ways to change `count` attributes."""
    for keys in itertools.combinations(others, count):
        for values in itertools.product(*(others[key] for key in keys)):
            yield dict(zip(keys, values, strict=True))


def _differ(said: dict[str, Any]) -> bool:
    """Whether the pattern, if any, has another colour than the object."""
    return "colour" not in said or said["colour"] != said.get("pattern_colour")


def zero_shot_texts(said: dict[str, Any], attribute: str, seed: int = 0) -> dict[str, list[str]]:
    """Captions for zero-shot classification of an open attribute: for each of its values, the same `COMPLETIONS`.

    Whole captions, because the CLIP was trained on those, with view words all around if the kind has a front. A pattern
    never has the colour of the object.
    """
    rng, values = random.Random(seed), list(OPEN.get(attribute, COLOURS))
    rest = [_draw(said, rng) for _ in range(COMPLETIONS)]
    if attribute in ("colour", "pattern_colour") and said.get("pattern") in DESIGNS:
        taken = said.get("pattern_colour" if attribute == "colour" else "colour")
        values = [value for value in values if value != taken]
    scenes = {value: [_with(scene, attribute, value, said) for scene in rest] for value in values}
    return {value: [caption(s, 360 * i / COMPLETIONS, 30) for i, s in enumerate(row)] for value, row in scenes.items()}


def _with(scene: Scene, attribute: str, value: str, said: dict[str, Any]) -> Scene:
    """The scene with this value; if its two colours are then equal, the one not in the prompt is changed."""
    scene = replace(scene, **{attribute: value})
    if scene.colour != scene.pattern_colour:
        return scene
    if attribute == "pattern_colour":
        return replace(scene, colour=contrast(value))
    return scene if "pattern_colour" in said else replace(scene, pattern_colour=contrast(scene.colour))


def open_attribute_values(clip: "ClipModel", images: Tensor, prompt: str) -> dict[str, list[str]]:
    """Classify the renders of N particles by a CLIP, for every attribute that the prompt leaves open.

    The value of a particle maximises the mean of cos(E_I, E_T) over views and completions. images [N, V, 3, H, W] in
    [0, 1]; returns {attribute: N values}. Raises InputError if it is no prompt of the world.
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
    """The number of different values of each attribute."""
    return {attribute: len(set(found)) for attribute, found in values.items()}


def true_renders(
    text: str, cameras_azimuth_deg: Sequence[float], elevation_deg: float, count: int, size: int, seed: int
) -> Tensor:
    """Render random scenes that fit the prompt from all azimuths: [count, V, 3, size, size] in [0, 1].

    Azimuths count from the object's front. Raises InputError if it is no prompt of the world.
    """
    scenes, views = scenes_of_prompt(text, count, seed), len(cameras_azimuth_deg)
    rows = np.stack([camera_row(a, elevation_deg, DISTANCE, FOV_DEG, size) for a in cameras_azimuth_deg])
    each = [scene for scene in scenes for _ in range(views)]
    rgb = render(each, np.tile(rows, (count, 1)), size, size, samples=3).rgb
    return torch.from_numpy(rgb).permute(0, 3, 1, 2).unflatten(0, (count, views))
