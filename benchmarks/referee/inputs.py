"""A scene of the world as the referee judges edits of it: its capture, its true answers, and measures of an edit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.datasets import Capture, SceneConfig, load_capture
from csd3d.evaluation.ground_truth import TrueViews, changed_pixels
from csd3d.evaluation.views import nearest_of
from csd3d.metrics import psnr, psnr_outside
from csd3d.rendering import Rendered
from csd3d.world.dataset import write_capture
from csd3d.world.language import Edit, find_edit
from csd3d.world.plugin import WorldSceneTruth
from csd3d.world.scene import Scene

CAPTURE_SEED = 3
GROWN = 2  # pixels by which the true edit is grown for what it should have left alone


def open_capture(folder: Path, scene: Scene, every: int = 1) -> Capture:
    """The capture of a scene, written if it is not there, with each `every`-th training view."""
    if not (folder / "world.json").exists():
        write_capture(folder, scene, seed=CAPTURE_SEED)
    capture = load_capture(SceneConfig(path=str(folder)))
    return replace(capture, train=capture.train[::every])


@dataclass(eq=False)
class Input:
    """A scene and its training views, whose true renders are made once."""

    name: str
    scene: Scene
    capture: Capture

    @property
    def cameras(self) -> Cameras:
        """The training views' cameras."""
        return self.capture.cameras[self.capture.train]

    @property
    def photos(self) -> Tensor:
        """The training views [V, H, W, 3]."""
        return self.capture.images[self.capture.train]

    @cached_property
    def truth(self) -> WorldSceneTruth:
        return WorldSceneTruth(self.capture, self.scene, ())

    @cached_property
    def before(self) -> TrueViews:
        """The unedited scene."""
        return self.after(self.scene)

    @lru_cache(maxsize=16)  # noqa: B019 (an input lives as long as the process)
    def after(self, scene: Scene) -> TrueViews:
        """A right answer in the training views."""
        return self.truth.views(scene, self.capture.train)

    def edit(self, instruction: str) -> Edit:
        """The true edit; ValueError where the instruction does not apply to this scene."""
        found = find_edit(self.scene, instruction)
        if found is None:
            raise ValueError(f"{instruction!r} is no instruction for {self.name}")
        return found


class Views:
    """In place of a fitted scene: training views as they are now, with the true depth of the unedited scene."""

    def __init__(self, given: Input):
        self.given, self.images = given, given.capture.images.clone()

    def render_views(self, cameras: Cameras, rows: Tensor) -> Rendered:
        """The training views `rows`."""
        before, shown = self.given.before, self.images[self.given.capture.train[rows]]
        solid = before.depth[rows].isfinite()
        return Rendered(shown, before.depth[rows].where(solid, 0.0), solid.float(), 0)


def judge(given: Input, instruction: str, after: Tensor) -> dict[str, float | int | None]:
    """How right edited training views [V, H, W, 3] are: see docs/referee.md for each figure."""
    answers = [given.after(scene).rgb for scene in given.edit(instruction).answers]
    return compare(given.photos, given.before.rgb, answers, after)


def compare(photos: Tensor, before: Tensor, answers: Sequence[Tensor], after: Tensor) -> dict[str, float | int | None]:
    """How right edited pictures `after` are, by their right `answers`; all [V, H, W, 3].

    before: the true pictures of what `photos` show.
    """
    scores = torch.stack([psnr(after, answer) for answer in answers])  # [K, V]
    nearest = nearest_of(dict(enumerate(scores)))
    best = nearest["answer"]
    truth = answers[best]
    changed = changed_pixels(before, truth)
    left = psnr_outside(after, photos, changed, GROWN)
    figures = {
        "psnr": nearest["psnr_truth"],
        "psnr_worst": scores[best].min().item(),
        "psnr_each": scores.amax(0).mean().item(),  # each view's own nearest answer
        "psnr_unedited": psnr(photos, truth).mean().item(),
        "answer": best,
        "answers": len(answers),
        "agree": nearest["answer_agreement"],
        "left_alone": left.nanmean().item() if not left.isnan().all() else None,
    }
    return figures | {"detail": detail(after, truth, changed) if bool(changed.any()) else None}


def detail(after: Tensor, truth: Tensor, changed: Tensor) -> float:
    """Share of the truth's fine detail that the edit shows, inside the true edit: 1 for all, 0 for none.

        Σ_p ⟨h(after), h(truth)⟩ / Σ_p ‖h(truth)‖²,   h(x) = x − blurred x, a box of 5 pixels

    It is a regression coefficient, so that noise, and detail in wrong places, do not count as detail.
    """
    own, right = (fine(x) for x in (after, truth))
    inside = changed[..., None]
    return float((own * right * inside).sum() / (right.square() * inside).sum().clamp_min(1e-12))


def fine(x: Tensor) -> Tensor:
    """Pictures [V, H, W, 3] without what a blur by 5 pixels keeps."""
    stack = x.permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(F.pad(stack, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return (stack - blurred).permute(0, 2, 3, 1)
