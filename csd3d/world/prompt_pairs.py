"""Make training pairs by Prompt-to-Prompt, as InstructPix2Pix did (Brooks et al. 2023, arXiv 2211.09800, section 3.1).

`python -m csd3d.world.prompt_pairs FOLDER --count N --seed S` writes the files of `csd3d.world.pairs`, whose captions
and instructions are the procedural world's, while the pictures are drawn by a text-to-image prior. For each pair K
noises are drawn under both captions, with one random share of the self-attention taken over. Kept is the candidate
whose change looks most like the change of the captions by CLIP (world), if it is like enough; else another pair is
drawn. mask.u8 is empty, because where the object is in a drawn picture is not known.
"""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from csd3d.arguments import Parser
from csd3d.engine.phase import seeded_generator
from csd3d.errors import InputError
from csd3d.guidance.prompt_to_prompt import PromptToPrompt
from csd3d.guidance.sampling import PictureSampling, sample_pictures
from csd3d.metrics.clip import ClipModel, directional_similarity, load_clip
from csd3d.priors import Prior, PriorConfig, load_prior
from csd3d.priors.attention import check_attention
from csd3d.schema import Within
from csd3d.temporary import TemporaryFolder
from csd3d.world.language import caption
from csd3d.world.pairs import describe, sample_pair, to_bytes

MODEL = Path(__file__).parents[1] / "assets" / "t2i"
TRIES = 20  # pairs drawn for each that is kept, before giving up
SELF_STEPS = (0.1, 0.9)  # range of the share, as in the paper


@dataclass(frozen=True)
class Making:
    """How pairs are made."""

    count: Annotated[int, Within(1, 1_000_000)] = 16
    seed: int = 0
    steps: Annotated[int, Within(1, 1000)] = 30  # of DPM++
    candidates: Annotated[int, Within(1, 256)] = 4  # K noises for each pair
    least: float = 0.2  # least cosine between the changes of pictures and captions; the paper's filter has 0.2 too

    def __post_init__(self) -> None:
        for key in ("count", "steps", "candidates"):
            if getattr(self, key) < 1:
                raise InputError(f"--{key} is {getattr(self, key)}: give at least 1")
        if not -1 <= self.least <= 1:
            raise InputError(f"--least is {self.least}: give a cosine, in [-1, 1]")


def draw_pairs(prior: Prior, clip: ClipModel, making: Making) -> Iterator[tuple[np.ndarray, np.ndarray, dict]]:
    """Yield source, target [S,S,3] uint8 and the line of each pair; InputError where too few are good enough."""
    rng, side, kept = random.Random(f"{making.seed}/prompts"), prior.defaults.working_size, 0
    for number in range(TRIES * making.count):
        scene, edit, target, view = sample_pair(rng)
        share = rng.uniform(*SELF_STEPS)
        before, after = (caption(one, view.azimuth_deg, view.elevation_deg) for one in (scene, target))
        if before == after:
            continue
        own = PictureSampling("dpm++", making.steps, prompt_to_prompt=PromptToPrompt(after, self_steps=share))
        shape = (making.candidates, *prior.latent_shape(side, side))
        noise = torch.randn(shape, generator=seeded_generator(making.seed, f"pair {number}")).to(prior.device)
        pictures = prior.decode(sample_pictures(prior, own, before, "", noise, side), (side, side))
        seen, said = clip.embed_images(pictures).chunk(2), clip.embed_texts([before, after])
        likeness = directional_similarity(seen[1], seen[0], said[1], said[0])
        best = int(likeness.argmax())
        if likeness[best] < making.least:
            continue
        found = [half[best].permute(1, 2, 0).cpu().numpy() for half in pictures.chunk(2)]
        difference = float(np.sqrt(((found[0] - found[1]) ** 2).mean()))
        line = describe(scene, edit, target, view, difference)
        measured = {"self_steps": share, "directional_similarity": likeness[best].item()}
        yield to_bytes(found[0]), to_bytes(found[1]), line | measured
        kept += 1
        if kept == making.count:
            return
    raise InputError(
        f"--least is {making.least}, which {kept} of {TRIES * making.count} pairs reached, where {making.count} are "
        "wanted: lower it"
    )


def check_new(folder: Path) -> None:
    """Raise InputError unless pairs can be written into `folder`: it is not there yet, or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is a file, or not empty; give a new folder")


def write_prompt_pairs(folder: Path, prior: Prior, making: Making) -> None:
    """Write the files into `folder`, which must be new or empty; it appears whole or not at all."""
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFolder("pairs", beside=folder) as partial:
        _write_into(partial, prior, making)
        os.replace(partial, folder)


def _write_into(folder: Path, prior: Prior, making: Making) -> None:
    side = prior.defaults.working_size
    with (
        open(folder / "source.u8", "wb") as source,
        open(folder / "target.u8", "wb") as target,
        open(folder / "mask.u8", "wb") as mask,
        open(folder / "pairs.jsonl", "w") as lines,
    ):
        for before, after, line in draw_pairs(prior, load_clip(device=prior.device), making):
            before.tofile(source)
            after.tofile(target)
            np.zeros((side, side), np.uint8).tofile(mask)
            lines.write(json.dumps(line) + "\n")
    meta = {"count": making.count, "size": side, "seed": making.seed, "made_by": "prompt-to-prompt"}
    (folder / "meta.json").write_text(json.dumps(meta))


def main() -> None:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for key, kind in (("count", int), ("seed", int), ("steps", int), ("candidates", int), ("least", float)):
        parser.add_argument(f"--{key}", type=kind, default=getattr(Making, key))
    parser.add_argument("--model", default=str(MODEL), help="a text-to-image model: a diffusers folder or a hub name")
    args = vars(parser.parse_all())
    folder, model = args.pop("folder"), args.pop("model")
    try:
        making = Making(**args)
        check_new(folder)
        prior = load_prior(PriorConfig(model=model), require="text")
        check_attention(prior)
        write_prompt_pairs(folder, prior, making)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
