"""The parts of the results of `edit_scene`, which the task puts together.

images/source/NNN.png, images/EDITOR/{train, held_out}/NNN.png (training views as edited, held-out renders),
images/views.png (the rows of the report), videos/before.mp4, videos/EDITOR.mp4 (orbit, before | after),
videos/after-EDITOR.mp4.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csd3d.cameras import Cameras, evenly
from csd3d.datasets import Capture
from csd3d.evaluation.ground_truth import Truth
from csd3d.evaluation.scene import judged_views
from csd3d.export import side_by_side, write_video
from csd3d.report.models import ExportConfig
from csd3d.report.page import ViewRow
from csd3d.report.pictures import save_each
from csd3d.representations.base import SceneModel, render_each

TRUTH_NOTE = "The truth is a render of the edited scene: of its valid edits, the one nearest to the held-out views. "
METRIC_NOTE = "Disagreement is measured on the edited training views, reprojected by depth."
SHOWN_VIEWS = 6  # in a row of the report
VIDEO_SIDE = 384  # pixels of the shorter side that small videos are enlarged to


@dataclass(frozen=True)
class Edited:
    """The result of one editor."""

    title: str  # what reports call the editor
    model: SceneModel  # the edited scene
    images: Tensor  # [B, H, W, 3], the capture's frames, training views as edited
    rendered: Tensor  # [T, H, W, 3], the edited scene in the views that it is judged by


@dataclass(frozen=True)
class SceneResults:
    """The results of a run that are shown."""

    capture: Capture
    before: SceneModel  # the scene as reconstructed
    rendered: Tensor  # [T, H, W, 3], that scene in the views that scenes are judged by
    edited: dict[str, Edited]  # by the editor's name in the config, the main one first if it is there
    main: str  # the name of the main editor
    truth: Truth | None  # the right edit, if it is known

    @property
    def final(self) -> SceneModel:
        """The scene by the main editor, or the reconstruction if that has not been edited yet."""
        return self.edited[self.main].model if self.main in self.edited else self.before

    @property
    def shown(self) -> Tensor:
        """The training views that the report shows, evenly spread."""
        train = self.capture.train
        return train[evenly(len(train), SHOWN_VIEWS)]


def save_pictures(folder: Path, results: SceneResults) -> None:
    """Write held-out renders of the source and of every editor, and the edited training views."""
    capture = results.capture
    shown = capture.test if len(capture.test) else judged_views(capture)[:4]
    save_each(folder / "source", capture.cropped(results.rendered[: len(shown)], shown), shown)
    for name, edited in results.edited.items():
        save_each(folder / name / "held_out", capture.cropped(edited.rendered[: len(shown)], shown), shown)
        save_each(folder / name / "train", capture.cropped(edited.images[capture.train], capture.train), capture.train)


def save_videos(
    folder: Path, results: SceneResults, cameras: Cameras, config: ExportConfig
) -> tuple[dict[str, Path], Tensor]:
    """Write videos along `cameras`; return those of the report by caption, and the first frame before the edit."""
    before = [view.rgb[0] for view in render_each(results.before, cameras, "video, before")]
    scale = max(1, round(VIDEO_SIDE / min(cameras.width, cameras.height)))
    options, videos = {"fps": config.video_fps, "scale": scale}, {}
    write_video(folder / "before.mp4", before, **options)
    for name, edited in results.edited.items():
        after = [view.rgb[0] for view in render_each(edited.model, cameras, f"video, {name}")]
        videos[f"Before and after: {edited.title}"] = folder / f"{name}.mp4"
        write_video(folder / f"{name}.mp4", side_by_side(before, after), **options)
        write_video(folder / f"after-{name}.mp4", after, **options)
    return videos, before[0]


def view_rows(results: SceneResults, metrics: dict) -> list[ViewRow]:
    """Return the source, each editor's training views and scene with the main one last, and the truth if known."""
    capture, views = results.capture, results.shown
    hidden = capture.padding(views)[..., None]

    def photos(images: Tensor) -> list[Tensor]:
        return list(torch.where(hidden, 1.0, images[views]))

    rows = [ViewRow("The capture", photos(capture.images), method="source")]
    for name, edited in sorted(results.edited.items(), key=lambda item: item[0] == results.main):
        rendered = edited.model.render_views(capture.cameras, views).rgb.clamp(0, 1)
        rows.append(ViewRow(edited.title, photos(edited.images), "the edited training views", name))
        rows.append(ViewRow("… and the scene", list(rendered), "fitted to them", name))
    if results.truth is not None and results.main in results.edited:
        best = results.truth.answers[metrics["results"][results.main]["answer"]]
        true = results.truth.views(best, views).rgb
        rows.append(ViewRow("The truth", list(true), "the nearest right answer, re-rendered", "truth"))
    return rows


def facts(metrics: dict, main: str) -> dict[str, str]:
    """Return the headline numbers of the report."""
    figures, seconds = metrics["results"].get(main, {}), metrics["seconds"]
    found = {
        "Reconstruction": (metrics["reconstruction"]["psnr"], "dB"),
        "Edit, to truth": (figures.get("psnr_truth"), "dB"),
    }
    written = {key: f"{value:.1f} {unit}" for key, (value, unit) in found.items() if value is not None}
    return written | {"Reconstructed in": f"{seconds['reconstruct']:.0f} s", "Edited in": f"{seconds['edit']:.0f} s"}
