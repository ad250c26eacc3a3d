"""Edits of whole scenes: an editor works while a scene is fitted, as in a real run, and held-out views are judged.

A scene is reconstructed once, and kept on disk; all its edits start from there. The phases are those of the task
"edit_scene" (`csd3d.tasks.edit_scene`), with splats (configs/csd-edit-splats.yaml); the
rounds of an editor are evenly spread over the fit.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.referee.inputs import Input, judge
from csd3d.editors.scene import SceneEditor, SceneSource
from csd3d.evaluation.scene import render_judged
from csd3d.metrics import psnr
from csd3d.priors import Prior
from csd3d.run import read
from csd3d.schema import Chosen
from csd3d.tasks.edit_scene import EditJob, EditSceneConfig, edit, reconstruct

CONFIG = Path(__file__).parents[2] / "configs" / "csd-edit-splats.yaml"
NEVER = 1e9  # seconds between checkpoints of an edit: it is done again if it is stopped


@dataclass(frozen=True)
class Edited:
    """An edited scene: the pictures that it was last fitted to [V, H, W, 3], and its renders of held-out views."""

    pictures: Tensor
    held_out: Tensor  # [T, H, W, 3]
    cost: dict[str, float]  # evaluations, seconds


class Whole:
    """A scene that is reconstructed, or read from `folder`, and the edits that start from it.

    keys: overrides of the config, "key.sub=value".
    """

    def __init__(self, given: Input, prior: Prior, folder: Path, keys: Sequence[str] = ()):
        self.given, self.prior = given, prior
        self.config = read(CONFIG, ["compare=[]", f"scene.path={given.capture.folder}", *keys])
        # its views in place of the training views, for `judge`
        self.held_out = Input(given.name, given.scene, replace(given.capture, train=given.capture.test))
        self.model = reconstruct(self.job(self.config, folder / self.config.representation.name)).model
        shown = render_judged(self.model, given.capture, "reconstruct")
        self.about = {
            "representation": self.config.representation.name,
            "fit_steps": self.config.fit.steps,
            "reconstruction": psnr(shown, self.held_out.photos).mean().item(),
        }

    def job(self, config: EditSceneConfig, folder: Path) -> EditJob:
        """A run of the task in a folder, of which only the phases are used."""
        folder.mkdir(parents=True, exist_ok=True)
        capture, device = self.given.capture, torch.device("cpu")
        contents = {config.scene.path: capture.fingerprint}
        return EditJob(
            config=config, device=device, capture=capture, prior=self.prior, folder=folder, contents=contents
        )

    def edit(self, source: SceneSource, name: str, editor: SceneEditor, seed: int) -> Edited:
        """Edit the scene while it is fitted, starting from the reconstruction; `name` is the editor's type."""
        editor = spread(editor, self.config.fit.steps)
        config = replace(self.config, editor=Chosen(name, editor), prompt=source.prompt, seed=seed, save_seconds=NEVER)
        self.prior.unet_evaluations, began = 0, time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            phase = edit(self.job(config, Path(folder)), source, self.model, name)
        cost = {"evaluations": self.prior.unet_evaluations, "seconds": time.process_time() - began}
        shown = render_judged(phase.model, self.given.capture, name)
        return Edited(phase.images[self.given.capture.train], shown, cost)


def spread(editor: SceneEditor, steps: int) -> SceneEditor:
    """The editor with its rounds spread evenly over a fit of `steps` steps, the first before it."""
    if not hasattr(editor, "edit_every"):
        return editor
    return replace(editor, edit_every=max(1, steps // max(1, getattr(editor, "rounds", 1))))


def judge_whole(whole: Whole, instruction: str, edited: Edited) -> dict[str, float | int | None]:
    """Measures of `judge`: of held-out views, and as "pictures_…" of the pictures that the scene was fitted to.

    left_alone is PSNR outside the true edit; reconstruction is the PSNR of held-out views before the edit.
    """
    pictures = judge(whole.given, instruction, edited.pictures)
    own = {f"pictures_{key}": pictures[key] for key in ("psnr", "psnr_each", "answer", "agree", "left_alone", "detail")}
    return judge(whole.held_out, instruction, edited.held_out) | own | whole.about
