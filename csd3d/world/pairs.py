"""Write training pairs (source picture, instruction, edited picture) as raw files, which training maps into memory.

`python -m csd3d.world.pairs FOLDER --count N --seed S` writes source.u8, target.u8 [N,S,S,3] uint8, mask.u8 [N,S,S]
uint8 (the source's object), pairs.jsonl (a line a pair) and meta.json. With --answers, for evaluation, also answers.u8
[A,S,S,3] with all right answers of the ambiguous pairs, whose lines then have "answers": [first, count].
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from csd3d.arguments import Parser
from csd3d.world.language import FAMILIES, Edit, caption, contrast, sample_edit
from csd3d.world.render import camera_row, render
from csd3d.world.scene import BACKDROPS, COLOURS, MATERIALS, PATTERNS, SKIES, Scene
from csd3d.world.shapes import KINDS

CHUNK = 128
FOV_DEG = 31.0  # the object fills the picture, with parts larger than a latent's 8 pixels


@dataclass(frozen=True)
class View:
    """The camera of a pair."""

    azimuth_deg: float
    elevation_deg: float
    distance: float
    fov_deg: float
    target: tuple[float, float, float]

    def row(self, size: int) -> np.ndarray:
        """The renderer's camera row, [16]."""
        return camera_row(self.azimuth_deg, self.elevation_deg, self.distance, self.fov_deg, size, self.target)


def sample_scene(rng: random.Random) -> Scene:
    """A random scene, mostly plain and matte, by day, so that most instructions apply."""
    colour = rng.choice(list(COLOURS))
    scene = Scene(
        kind=rng.choice(list(KINDS)),
        colour=colour,
        backdrop=rng.choice(list(BACKDROPS)),
        sky=rng.choice(SKIES),
        material=rng.choices(MATERIALS, (0.6, 0.3, 0.1))[0],
        time=rng.choices(("day", "sunset", "night"), (0.86, 0.07, 0.07))[0],
        snow=rng.random() < 0.06,
        hat=rng.choice(list(COLOURS)) if rng.random() < 0.1 else None,
        scale=0.62 if rng.random() < 0.08 else 1.0,
        azimuth_deg=rng.uniform(0, 360),
        sun_azimuth_deg=rng.uniform(0, 360),
        sun_elevation_deg=rng.uniform(35, 70),
    )
    if rng.random() < 0.3:
        other = contrast(colour) if rng.random() < 0.4 else rng.choice([c for c in COLOURS if c != colour])
        scene = replace(scene, pattern=rng.choice(PATTERNS[1:]), pattern_colour=other)
    return scene


def sample_view(rng: random.Random) -> View:
    """A random camera around the scene, as in captures."""
    target = tuple(rng.uniform(-0.06, 0.06) for _ in range(3))
    return View(rng.uniform(0, 360), rng.uniform(2, 58), rng.uniform(3.7, 4.3), FOV_DEG, target)


def sample_pair(rng: random.Random) -> tuple[Scene, Edit, Scene, View]:
    """A random scene, an instruction for it, one of its answers, and the view."""
    while True:
        scene = sample_scene(rng)
        edit = sample_edit(scene, rng)
        if edit is not None:
            return scene, edit, rng.choice(edit.answers), sample_view(rng)


def describe(scene: Scene, edit: Edit, target: Scene, view: View, difference: float) -> dict:
    """The pair's line in pairs.jsonl; `changes`: whether the pictures differ by more than 0.03 RMSE.

    `camera`: azimuth from the target's front and elevation, in degrees, and distance.
    """
    where = (view.azimuth_deg, view.elevation_deg)
    return {
        "instruction": edit.instruction,
        "caption": caption(scene, *where),
        "target_caption": caption(target, *where),
        "family": edit.family,
        "ambiguous": edit.ambiguous,
        "changes": difference > 0.03,
        "colour": scene.colour if scene.pattern == "plain" else None,
        "target_colour": target.colour if target.pattern == "plain" else None,
        "camera": [view.azimuth_deg - target.azimuth_deg, view.elevation_deg, view.distance],
    }


def _chunks(count: int, seed: int, size: int) -> Iterator[tuple]:
    """Yield source, target, mask [C,S,S,...] uint8, lines and draws of CHUNK pairs at a time."""
    for first in range(0, count, CHUNK):
        rng = random.Random(f"{seed}/{first}")
        drawn = [sample_pair(rng) for _ in range(min(CHUNK, count - first))]
        cameras = np.stack([view.row(size) for *_, view in drawn])
        source = render([scene for scene, *_ in drawn], cameras, size, size)
        target = render([scene for _, _, scene, _ in drawn], cameras, size, size)
        rmse = np.sqrt(((source.rgb - target.rgb) ** 2).mean((1, 2, 3)))
        lines = [describe(*pair, float(d)) for pair, d in zip(drawn, rmse, strict=True)]
        yield to_bytes(source.rgb), to_bytes(target.rgb), to_bytes(source.mask), lines, drawn


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """[0,1] floats to uint8, rounded."""
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def render_answers(
    drawn: list[tuple[Scene, Edit, Scene, View]], lines: list[dict], first: int, size: int
) -> np.ndarray:
    """Render all answers [A,S,S,3] uint8 of the ambiguous pairs; write their indices, from `first`, to the lines."""
    scenes, views = [], []
    for (_, edit, _, view), line in zip(drawn, lines, strict=True):
        if edit.ambiguous:
            line["answers"] = [first + len(scenes), len(edit.answers)]
            scenes += edit.answers
            views += [view.row(size)] * len(edit.answers)
    if not scenes:
        return np.empty((0, size, size, 3), np.uint8)
    return to_bytes(render(scenes, np.stack(views), size, size).rgb)


def write_pairs(folder: Path, count: int, seed: int, size: int = 128, answers: bool = False) -> None:
    """Write `count` pairs of `size`² pixels; pair i depends only on `seed` and i."""

    def chunks() -> Iterator[tuple[list[np.ndarray], list[dict]]]:
        written = 0
        for *pictures, lines, drawn in _chunks(count, seed, size):
            if answers:
                pictures.append(render_answers(drawn, lines, written, size))
                written += len(pictures[-1])
            yield pictures, lines

    folder.mkdir(parents=True, exist_ok=True)
    families = {name: family.weight for name, family in FAMILIES.items()}
    write_files(folder, chunks(), {"count": count, "size": size, "seed": seed, "families": families}, answers)


def write_files(
    folder: Path, chunks: Iterable[tuple[Sequence[np.ndarray], Sequence[dict]]], meta: dict, answers: bool = False
) -> None:
    """Write the files of the module's text into a folder, from chunks of their pictures, in its order, and lines."""
    names = ["source.u8", "target.u8", "mask.u8", *(["answers.u8"] if answers else [])]
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "wb")) for name in names]
        text = stack.enter_context(open(folder / "pairs.jsonl", "w"))
        for pictures, lines in chunks:
            for file, picture in zip(files, pictures, strict=True):
                picture.tofile(file)
            text.writelines(json.dumps(line) + "\n" for line in lines)
    (folder / "meta.json").write_text(json.dumps(meta))


def main() -> None:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--answers", action="store_true")
    args = parser.parse_all()
    write_pairs(args.folder, args.count, args.seed, args.size, args.answers)


if __name__ == "__main__":
    main()
