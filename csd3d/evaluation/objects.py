"""A run's assets against the right objects of its prompt: each by itself, and how many different ones they are.

Symbols: N assets of one method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from csd3d.engine.phase import Job
from csd3d.evaluation.assets import Figures, judge_asset
from csd3d.evaluation.ground_truth import RightObjects, text_truth

if TYPE_CHECKING:
    from csd3d.evaluation.text import AssetsSeen

LIKE_IOU, LIKE_COLOURS = 0.7, 0.5  # mask_iou and colours_found from which on an asset resembles its nearest object


@dataclass(frozen=True)
class NearestObjects:
    """The right objects that are nearest to a method's N assets: in words, and the signed distance to each of them."""

    names: list[str]
    distances: list[Callable[[Tensor], Tensor]]  # points [P, 3] -> [P], world units, negative inside


def evaluate_objects(job: Job, views: "dict[str, AssetsSeen]") -> tuple[dict[str, dict], dict[str, NearestObjects]]:
    """Figures of every method's assets against the nearest right objects, and these; empty if none are known.

    Figures are means over the assets that have them; of several assets also `coverage`.
    """
    config = job.config
    truth = text_truth(config.prompt) if job.prior.knows and config.has_truth else None
    objects = truth.right_objects(config.prompt) if hasattr(truth, "right_objects") else None
    figures: dict[str, dict] = {name: {} for name in views}
    nearest: dict[str, NearestObjects] = {}
    for name, seen in views.items() if objects else ():
        judged = [judge_asset(one, objects, config.evaluate.candidates, config.seed) for one in seen.plain]
        things = [thing for _, thing in judged]
        distances = [partial(objects.distance, thing) for thing in things]
        nearest[name] = NearestObjects([objects.name(thing) for thing in things], distances)
        for key in judged[0][0]:
            known = [found[key] for found, _ in judged if found[key] is not None]
            figures[name][key] = sum(known) / len(known) if known else None
        if len(judged) > 1:
            figures[name] |= coverage(judged, objects)
    return figures, nearest


def coverage(judged: Sequence[tuple[Figures, Any]], objects: RightObjects) -> dict[str, int]:
    """How many different right objects N assets are, by what the prompt leaves open; from `judge_asset` of each.

    distinct_answers: different objects among the nearest ones; a blob is nearest to some object too.
    answers_covered: the same of the assets that resemble theirs, by silhouette (`LIKE_IOU`) and colours
    (`LIKE_COLOURS`).
    """

    def alike(figures: Figures) -> bool:
        colours = figures.get("colours_found")
        return (figures["mask_iou"] or 0) >= LIKE_IOU and (colours is None or colours >= LIKE_COLOURS)

    answers = [tuple(sorted(objects.open_values(thing).items())) for _, thing in judged]
    like = {answer for (figures, _), answer in zip(judged, answers, strict=True) if alike(figures)}
    return {"distinct_answers": len(set(answers)), "answers_covered": len(like)}
