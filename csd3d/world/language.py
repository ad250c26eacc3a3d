"""Words for scenes: captions with view words, and instructions with the edited scenes that are right.

An instruction's `answers` are all edited scenes that fulfil it. The families in `AMBIGUOUS` have several, which differ
clearly and whose average is wrong; all others have exactly one. No answer depends on what the picture cannot show, such
as how far a ball is turned.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from csd3d.cameras import side_seen
from csd3d.world.scene import BACKDROPS, COLOURS, PATTERNS, Scene
from csd3d.world.shapes import KINDS, ROUND

NOTHING = ("leave it as it is", "do nothing")
PRIMARY = ("red", "green", "blue")
SOLIDS = ("ball", "cylinder", "cone")
DESIGNS = PATTERNS[1:]
ON_PLATE = "on a plate"
ANY = "any"  # the value of `hat` in "wearing a hat"
VIEW_WORDS = {
    "front": "front view",
    "left": "side view, facing left",
    "right": "side view, facing right",
    "back": "back view",
}
LIGHT_COLOURS = ("white", "yellow", "cyan", "pink", "orange")


@dataclass(frozen=True)
class Edit:
    """An instruction and the edited scenes that fulfil it."""

    family: str
    instruction: str
    answers: tuple[Scene, ...]

    @property
    def ambiguous(self) -> bool:
        """Whether more than one answer is right."""
        return len(self.answers) > 1


def contrast(colour: str) -> str:
    """The default colour of a pattern: black on light colours, white on dark ones."""
    return "black" if colour in LIGHT_COLOURS else "white"


Answers = Iterator[tuple[dict[str, str], tuple[Scene, ...]]]  # (words to fill in, the edited scenes)


def _recolour(s: Scene) -> Answers:
    for colour in COLOURS:
        if colour != s.colour and not (s.pattern != "plain" and colour == s.pattern_colour):
            yield {"colour": colour}, (replace(s, colour=colour),)


def _designs(s: Scene) -> tuple[str, ...]:
    """The patterns whose position is visible: on round objects only stripes, which run around them."""
    return ("stripes",) if KINDS[s.kind].symmetry == ROUND else DESIGNS


def _pattern(s: Scene) -> Answers:
    for design in _designs(s):
        for colour in COLOURS:
            if colour != s.colour and (design, colour) != (s.pattern, s.pattern_colour):
                yield {"pattern": design, "colour": colour}, (replace(s, pattern=design, pattern_colour=colour),)


def _plain(s: Scene) -> Answers:
    if s.pattern != "plain":
        yield {}, (replace(s, pattern="plain"),)


def _replace(s: Scene) -> Answers:
    for kind in KINDS:
        if kind != s.kind and KINDS[kind].symmetry % KINDS[s.kind].symmetry == 0:  # else its turn is a guess
            yield {"kind": kind}, (replace(s, kind=kind),)


def _material(s: Scene) -> Answers:
    if s.material != "metal" and s.time == "day":
        yield {}, (replace(s, material="metal"),)


def _backdrop(s: Scene) -> Answers:
    for backdrop in BACKDROPS:
        if backdrop != s.backdrop:
            yield {"backdrop": backdrop}, (replace(s, backdrop=backdrop),)


def _snow(s: Scene) -> Answers:
    if not s.snow and s.colour != "white":
        yield {}, (replace(s, snow=True),)


def _night(s: Scene) -> Answers:
    if s.time != "night":
        yield {}, (replace(s, time="night"),)


def _sunset(s: Scene) -> Answers:
    if s.time == "day":
        yield {}, (replace(s, time="sunset"),)


def _hat(s: Scene) -> Answers:
    for colour in COLOURS:
        if s.hat is None:
            yield {"colour": colour}, (replace(s, hat=colour),)


def _shrink(s: Scene) -> Answers:
    if s.scale > 0.9:
        yield {}, (replace(s, scale=0.62),)


def _any_colour(s: Scene) -> Answers:
    if s.colour not in PRIMARY and s.pattern == "plain":
        yield {}, tuple(replace(s, colour=colour) for colour in PRIMARY)


def _any_pattern(s: Scene) -> Answers:
    if s.pattern == "plain" and KINDS[s.kind].symmetry != ROUND:
        yield {}, tuple(replace(s, pattern=design, pattern_colour=contrast(s.colour)) for design in DESIGNS)


def _any_backdrop(s: Scene) -> Answers:
    if s.backdrop not in PRIMARY and s.time == "day":
        yield {}, tuple(replace(s, backdrop=backdrop) for backdrop in PRIMARY)


def _any_solid(s: Scene) -> Answers:
    if s.kind not in SOLIDS:
        yield {}, tuple(replace(s, kind=kind) for kind in SOLIDS)


@dataclass(frozen=True)
class Family:
    """A kind of instruction: its phrases, all ways to fill them in, and its weight when training draws one."""

    phrases: tuple[str, ...]
    answers: Callable[[Scene], Answers]
    weight: float = 1.0


FAMILIES: dict[str, Family] = {
    "recolour": Family(("make it {colour}", "paint it {colour}", "turn it {colour}"), _recolour, 2.0),
    "pattern": Family(("give it {colour} {pattern}", "cover it with {colour} {pattern}"), _pattern, 2.0),
    "plain": Family(("remove the pattern", "make it plain"), _plain, 0.8),
    "replace": Family(("turn it into a {kind}", "replace it with a {kind}"), _replace, 1.8),
    "material": Family(("make it metal", "make it out of metal"), _material, 0.6),
    "backdrop": Family(("put it before a {backdrop} background", "make the background {backdrop}"), _backdrop, 1.2),
    "snow": Family(("cover it with snow", "make it winter"), _snow, 0.8),
    "night": Family(("make it night", "turn day into night"), _night, 0.6),
    "sunset": Family(("make it sunset", "light it by a setting sun"), _sunset, 0.6),
    "hat": Family(("put a {colour} hat on it", "give it a {colour} hat"), _hat, 1.0),
    "shrink": Family(("make it smaller", "shrink it"), _shrink, 0.8),
    "any colour": Family(("paint it a bright colour", "give it a vivid colour"), _any_colour, 1.4),
    "any pattern": Family(("give it a pattern", "decorate it with a pattern"), _any_pattern, 1.4),
    "any backdrop": Family(("give it a vivid background", "make the background colourful"), _any_backdrop, 1.0),
    "any solid": Family(("turn it into a simple solid", "replace it with a simple solid"), _any_solid, 0.8),
}
AMBIGUOUS = ("any colour", "any pattern", "any backdrop", "any solid")


def sample_edit(scene: Scene, rng: random.Random, family: str | None = None) -> Edit | None:
    """A random instruction for `scene`, of `family` if given; None if the family does not apply to the scene."""
    if family is None:
        weights = [f.weight for f in FAMILIES.values()]
        family = rng.choices(list(FAMILIES), weights)[0]
    choices = list(FAMILIES[family].answers(scene))
    if not choices:
        return None
    words, answers = rng.choice(choices)
    return Edit(family, rng.choice(FAMILIES[family].phrases).format(**words), answers)


def find_edit(scene: Scene, instruction: str) -> Edit | None:
    """The edit of `scene` by `instruction`, or None if the world does not know these words.

    It also knows two kinds that are never trained on: `NOTHING`, and several instructions joined by "and", which are
    followed in turn.
    """
    wanted = " ".join(instruction.lower().split()).rstrip(".!")
    if wanted in NOTHING:
        return Edit("nothing", wanted, (scene,))
    for name, family in FAMILIES.items():
        for words, answers in family.answers(scene):
            if any(phrase.format(**words) == wanted for phrase in family.phrases):
                return Edit(name, wanted, answers)
    first, joined, rest = wanted.partition(" and ")
    before = find_edit(scene, first) if joined else None
    edits = [find_edit(answer, rest) for answer in before.answers] if before else []
    if not edits or None in edits:
        return None
    return Edit("several at once", wanted, tuple(answer for edit in edits for answer in edit.answers))


def caption(
    scene: Scene, view_azimuth_deg: float | None = None, elevation_deg: float = 0.0, plate: bool = False
) -> str:
    """A caption of the scene, with a view word if a camera's azimuth is given and the object has a front.

    `plate`: also mention the plate, if there is one; captions usually do not.
    """
    said = {
        "scale": scene.scale < 0.9,
        "colour": scene.colour,
        "material": scene.material != "matte" and scene.material,
        "kind": scene.kind,
        "hat": scene.hat,
        "snow": scene.snow,
        "plate": plate and scene.plate,
        "backdrop": scene.backdrop,
        "time": scene.time != "day" and scene.time,
        "view": view_word(scene, view_azimuth_deg, elevation_deg),
    }
    if scene.pattern != "plain":
        said |= {"pattern": scene.pattern, "pattern_colour": scene.pattern_colour}
    return write_prompt({key: value for key, value in said.items() if value})


def write_prompt(said: dict[str, Any]) -> str:
    """Write a prompt that says exactly this, in the order of captions; the inverse of `prompts.parse_prompt`."""
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


def view_word(scene: Scene, view_azimuth_deg: float | None, elevation_deg: float) -> str | None:
    """ "overhead view"; "front view", "back view" (within 45° of the object's own front or back), "side view, facing
    left" or "right" in the picture; None where it has no front."""
    if view_azimuth_deg is None:
        return None
    if elevation_deg > 60:
        return "overhead view"
    if not KINDS[scene.kind].has_front:
        return None
    return VIEW_WORDS[side_seen(view_azimuth_deg - scene.azimuth_deg)]


def vocabulary() -> list[str]:
    """All phrases of the world, filled in all ways, to build a tokenizer from."""
    words = {
        "colour": list(COLOURS), "pattern": list(DESIGNS), "kind": list(KINDS), "backdrop": list(BACKDROPS),
    }  # fmt: skip
    texts = []
    for family in FAMILIES.values():
        for phrase in family.phrases:
            keys = [key for key in words if "{" + key + "}" in phrase]
            fills = itertools.product(*(words[key] for key in keys))
            texts += [phrase.format(**dict(zip(keys, fill, strict=True))) for fill in fills]
    views = (*VIEW_WORDS.values(), "overhead view")
    scenes = [Scene(kind, colour) for kind in KINDS for colour in COLOURS]
    texts += [f"{caption(scene)}, {view}" for scene in scenes for view in views]
    materials = ("glossy", "metal", "small", "wearing a hat", "covered with snow", ON_PLATE, "sunset", "night")
    return texts + list(materials)
