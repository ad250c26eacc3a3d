"""Metrics of results against their text: of pictures by a CLIP, of assets also by the right objects (`objects`).

The shipped CLIP knows the procedural world only. Its metrics are named "CLIP (world)" and "FD (world)", and exist only
for pictures of models that were trained on that world, and for prompts in its words. A Fréchet distance of few pictures
is never 0: `fd_floor` is that of as many true renders.
Symbols: V views, D embedding dimensions, K texts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from csd3d.cameras import Cameras, orbit
from csd3d.engine.phase import Job
from csd3d.errors import InputError, short
from csd3d.evaluation.assets import SeenAsset
from csd3d.evaluation.ground_truth import TextTruth, text_truth
from csd3d.memory import check_fits
from csd3d.metrics.clip import (
    INSTALL,
    OPEN_CLIP,
    WORLD,
    WORLD_FOLDER,
    ClipModel,
    check_clip,
    check_open_clip,
    load_clip,
    mean_pairwise_distance,
    retrieval_rank,
    text_image_score,
    view_word_accuracy,
)
from csd3d.metrics.fid import frechet_distance
from csd3d.priors import Prior
from csd3d.rendering import Rendered, Shading
from csd3d.representations.base import ALBEDO, SceneModel, render_all
from csd3d.representations.batch import Assets
from csd3d.schema import Within, path_key

logger = logging.getLogger("csd3d")
BYTES_PER_PIXEL = 12  # of a picture
DISTRACTORS = 31
WHITE = Shading("textureless", ambient=0.4)
PLAIN = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}  # backgrounds of one colour
GREY = (0.6, 0.6, 0.6)  # behind assets that have none of one colour
Say = Callable[[str, int], str]  # (prompt, view) -> the prompt with the words for that view


# ------------------------------------------------------------------------------------------------------ held-out views


@dataclass
class EvaluateConfig:
    """The held-out cameras, evenly spaced on a circle, that assets are judged and shown from."""

    views: Annotated[int, Within(1, 1000)] = 12  # number of held-out cameras
    elevation_deg: float = 30.0  # elevation of the held-out cameras, -90 to 90
    size: Annotated[int, Within(16, 2048)] = 128  # side of the pictures from the held-out cameras, in pixels
    # CLIP for metrics: a folder, a hub name or open_clip:NAME/WEIGHTS; "": CLIP (world), the shipped one
    clip: str = path_key(identity=False)
    # a folder of pictures for FID, which needs the extra `metrics` and thousands of pictures; "": no FID
    fid_against: str = path_key(identity=False)
    candidates: Annotated[int, Within(1, 10_000)] = 64  # right objects drawn, to search the nearest to each asset

    def __post_init__(self) -> None:
        if self.views < 1 or self.size < 16 or not -90 <= self.elevation_deg <= 90:
            given = f"views is {self.views}, size {self.size}, elevation_deg {self.elevation_deg:g}"
            raise ValueError(f"{given}: give at least 1, at least 16, and an angle in [-90, 90]")

    @property
    def azimuths_deg(self) -> list[float]:
        """Azimuths [V] of the held-out cameras."""
        return [360.0 * i / self.views for i in range(self.views)]


@dataclass(frozen=True)
class AssetsSeen:
    """N assets from the V held-out cameras, coloured and white, [N, V, 3, S, S] in [0, 1]."""

    colour: Tensor
    shape: Tensor
    plain: list[SeenAsset]  # the assets before one colour, for the judge of objects


def check_shown(config, side: int, device: torch.device, encoding: float = 0.0) -> None:
    """Raise InputError if a step's pictures for the prior, `side` pixels a side, do not fit in the device's memory.

    encoding: bytes that the prior takes to encode them.
    """
    given = f"guidance_size {side} with {config.particles} × {config.views_per_step} views"
    needed = BYTES_PER_PIXEL * config.particles * config.views_per_step * side**2 + encoding
    check_fits(needed, f"{given}: a step's pictures", "lower guidance_size, views_per_step or particles", device)


def check_judged(config) -> None:
    """Raise InputError if the held-out views do not fit in memory."""
    judged, count = config.evaluate, config.particles
    views = len(config.runs) * count * judged.views
    given = f"evaluate.size {judged.size} with evaluate.views {judged.views} of {len(config.runs)} × {count} assets"
    needed = 2 * BYTES_PER_PIXEL * views * judged.size**2  # coloured and white
    check_fits(needed, f"{given}: these pictures", "lower evaluate.size, evaluate.views or particles")


def held_out(config, count: int, size: int) -> Cameras:
    """`count` cameras evenly spaced, at the middle of the training distances and fields of view."""
    distance, fov = sum(config.views.distance) / 2, sum(config.views.fov_deg) / 2
    return orbit(count, distance, config.evaluate.elevation_deg, fov, size, size)


def held_out_views(config, assets: dict[str, Assets]) -> dict[str, AssetsSeen]:
    """Render every method's assets, once for metrics and pictures."""
    cameras = held_out(config, config.evaluate.views, config.evaluate.size)

    def seen(name: str, shading: Shading) -> list[Rendered]:
        what = f"evaluate, {name}, {'colour' if shading == ALBEDO else 'shape'}"
        return [render_all(model, cameras, what, shading=shading) for model in assets[name].models]

    def pictures(views: list[Rendered]) -> Tensor:
        return torch.stack([view.rgb.permute(0, 3, 1, 2) for view in views])

    found = {}
    for name, batch in assets.items():
        colour, shape = seen(name, ALBEDO), seen(name, WHITE)
        pairs = zip(batch.models, colour, strict=True)
        plain = [before_plain(config, model, view, cameras, batch.aabb) for model, view in pairs]
        found[name] = AssetsSeen(pictures(colour), pictures(shape), plain)
    return found


def plain_backdrop(config) -> Tensor:
    """The colour [3] before which assets are judged: their own background, grey if that has several."""
    return torch.tensor(config.finished_background or PLAIN.get(config.asset.background) or GREY)


@torch.no_grad()
def before_plain(config, model: SceneModel, views: Rendered, cameras: Cameras, box: Tensor) -> SeenAsset:
    """The asset for the judge of objects; rendered again, before grey, if its own background has several colours."""
    backdrop = plain_backdrop(config)
    if not config.finished_background and config.asset.background not in PLAIN:
        grey = [model.render(cameras[i], background=lambda d: backdrop.to(d).expand_as(d)) for i in range(len(cameras))]
        rgb = torch.cat([view.rgb for view in grey])
    else:
        rgb = views.rgb
    parts = (x.detach().cpu() for x in (rgb.clamp(0, 1), views.opacity, views.depth))
    return SeenAsset(*parts, cameras.to("cpu"), backdrop, model.density, box)


def evaluate(job: Job, views: dict[str, AssetsSeen]) -> tuple[dict[str, dict], str | None]:
    """CLIP metrics of every method, and the name of the CLIP; empty and None if no CLIP can judge the prompt."""
    config = job.config
    judge = judge_of([config.prompt], config.evaluate.clip, job.prior, "evaluate.clip")
    if judge and not config.has_truth:
        judge = replace(judge, knows=False)

    def say(prompt: str, view: int) -> str:
        return config.say(prompt, config.evaluate.azimuths_deg[view], config.evaluate.elevation_deg)

    figures: dict[str, dict] = {name: {} for name in views}
    for name, seen in views.items() if judge else ():
        places = config.evaluate.azimuths_deg
        figures[name] = judge.score_assets(seen.colour, seen.shape, config.prompt, places, say, config.seed)
    for name, seen in views.items() if job.fid else ():
        figures[name]["fid"] = job.fid(seen.colour.flatten(0, 1))
    return figures, judge.name if judge else None


# -------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Judge:
    """Metrics by one CLIP. `knows`: whether ground truth about prompts is about these pictures too."""

    clip: ClipModel
    knows: bool = True

    @property
    def name(self) -> str:
        """The CLIP's name, "CLIP (world)" for the shipped one."""
        return self.clip.name

    def truth(self, prompt: str) -> TextTruth | None:
        """What is known about the prompt; None if nothing is, or the pictures are of another world."""
        return text_truth(prompt) if self.knows else None

    def rank(self, embedded: Tensor, prompt: str, say: Say, seed: int) -> int | None:
        """Rank of the prompt among 32 by mean cosine over the views; None if no ground truth knows it."""
        truth = self.truth(prompt)
        if truth is None:
            return None
        prompts = [prompt, *truth.distractors(prompt, DISTRACTORS, seed)]
        texts = [say(text, view) for text in prompts for view in range(len(embedded))]
        rows = self.clip.embed_texts(texts).view(len(prompts), *embedded.shape)
        return retrieval_rank(embedded, rows[0], rows[1:])

    def score(self, embedded: Tensor, prompt: str, say: Say) -> float:
        """Mean cosine of the views [V,D] and the prompt."""
        texts = self.clip.embed_texts([say(prompt, view) for view in range(len(embedded))])
        return text_image_score(embedded, texts).mean().item()

    def score_pictures(self, pictures: list[Tensor], texts: list[str], seed: int) -> dict[str, float]:
        """Means over prompts of the metrics of each prompt's particles [N,3,S,S]."""
        rows = []
        for images, text in zip(pictures, texts, strict=True):
            embedded = self.clip.embed_images(images)
            ranks = [self.rank(one[None], text, lambda t, v: t, seed) for one in embedded]
            row = {"clip_score": self.score(embedded, text, lambda t, v: t)}
            if None not in ranks:
                row["ranked_first"] = sum(rank == 1 for rank in ranks) / len(ranks)
            if len(images) > 1:
                row["clip_diversity"] = mean_pairwise_distance(embedded)
            rows.append(row)
        keys = set.intersection(*(set(row) for row in rows))
        return {key: sum(row[key] for row in rows) / len(rows) for key in sorted(keys)}

    def score_assets(
        self, colour: Tensor, shape: Tensor, prompt: str, azimuths_deg: list[float], say: Say, seed: int
    ) -> dict[str, float | int | None]:
        """Metrics of N assets in V views: `colour` and `shape` (white, lit) [N,V,3,S,S] in [0, 1]."""
        embedded = torch.stack([self.clip.embed_images(views) for views in colour])
        shapes = torch.stack([self.clip.embed_images(views) for views in shape])
        truth = self.truth(prompt)
        plain = truth.shape_prompt(prompt) if truth else prompt
        ranks = [self.rank(views, prompt, say, seed) for views in embedded]
        words = [view_word_accuracy(self.clip, views, say(prompt, 0), azimuths_deg)["accuracy"] for views in colour]
        report: dict[str, float | int | None] = {
            "clip_colour": _mean([self.score(views, prompt, say) for views in embedded]),
            "clip_geometry": _mean([self.score(views, plain, say) for views in shapes]),
            "rank": None if None in ranks else max(ranks),
            "ranked_first": None if None in ranks else _mean([float(rank == 1) for rank in ranks]),
            "view_words": _mean(words),
            **self.fd(embedded, say(prompt, 0), azimuths_deg, colour.shape[-1], seed),
            "diversity": mean_pairwise_distance(embedded) if len(colour) > 1 else None,
        }
        if len(colour) > 1 and truth is not None:
            found = truth.open_attribute_values(self.clip, colour, say(prompt, 0))
            report |= {f"distinct_{attribute}": len(set(values)) for attribute, values in found.items()}
        return report

    def fd(
        self, embedded: Tensor, prompt: str, azimuths_deg: list[float], size: int, seed: int
    ) -> dict[str, float | None]:
        """`fd`, the Fréchet distance of the embeddings [N,V,D] to those of true renders of the prompt, and `fd_floor`,
        that of N other scenes rendered truly; None if there are none, or fewer than two pictures."""
        truth = self.truth(prompt)
        if truth is None or embedded.shape[:2].numel() < 2:
            return {"fd": None, "fd_floor": None}

        def true(count: int, draw: int) -> Tensor:
            renders = truth.true_renders(prompt, azimuths_deg, 30.0, count, size, draw)
            return self.clip.embed_images(renders.flatten(0, 1))

        reference = true(16, seed)
        found = {"fd": embedded.flatten(0, 1), "fd_floor": true(len(embedded), seed + 1)}
        return {name: frechet_distance(features, reference) for name, features in found.items()}


def judge_of(prompts: Sequence[str], source: str, prior: Prior, key: str) -> Judge | None:
    """The judge of a prior's pictures of these prompts, or None; `key`: where the config names `source`."""
    unknown = [prompt for prompt in prompts if text_truth(prompt) is None]
    if not may_judge(source, bool(prior.knows), key, f"does not know {short(unknown[0])!r}" if unknown else ""):
        return None
    judge = load_judge(source, prior.device)
    return judge and replace(judge, knows=bool(prior.knows))


def may_judge(source: str, of_world: bool, key: str, reason: str = "") -> bool:
    """Whether a CLIP can judge pictures; if not, one line says why, and what to set.

    The shipped CLIP, which an empty `source` means, can where they are `of_world` and there is no other `reason`.
    """
    if not is_world(source) or (of_world and not reason):
        return True
    reason = reason if of_world else "knows only the toy world, and these pictures are not of it"
    text = "no CLIP metrics: CLIP (world), which ships, %s; set %s to a folder or hub name of a CLIP, or to %s (%s)"
    logger.info(text, reason, key, "open_clip:ViT-L-14/laion2b_s32b_b82k", INSTALL)
    return False


def is_world(source: str) -> bool:
    """Whether this value of a key `clip` means the shipped CLIP; its folder, by any path, does too."""
    return source in ("", WORLD) or Path(source).expanduser().resolve() == WORLD_FOLDER.resolve()


def load_judge(source: str, device: torch.device | str = "cpu") -> Judge | None:
    """Load the judge of config key `clip` ("" and "world": the shipped one, None and a warning if it is missing)."""
    try:
        return Judge(load_clip(source or WORLD, device))
    except InputError as error:
        if source:
            raise
        logger.warning("no CLIP metrics: %s", error)
        return None


def check_judge(source: str) -> None:
    """Raise InputError if there is no such CLIP, before any work is done; it is loaded at the end."""
    if source.startswith(OPEN_CLIP):
        check_open_clip(source)
    elif source:
        check_clip(source)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
