"""What a run of `edit_scene` leaves for its user: pictures, video, mesh, report.

images/before/NNN.png, images/<method>/{training views as edited, held-out renders}, images/views.png (the rows of the
report), videos/<method>.mp4 (orbit, before | after), videos/before.mp4, videos/after-<method>.mp4, mesh/, report.html.
"""

import json
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.config import to_yaml
from csd3d.engine.logs import logger, progress, read_curves
from csd3d.errors import InputError
from csd3d.export import MeshConfig, export_mesh, render_mesh, side_by_side, to_uint8, write_video
from csd3d.report.camera_path import video_cameras
from csd3d.report.page import Curves, ReportData, ViewRow, write_report
from csd3d.representations.hashgrid import SceneModel

NAMES = {"csd_edit": "CSD-Edit, edited together", "in2n": "Instruct-NeRF2NeRF, one by one"}
TRUTH_NOTE = (
    "The truth is the re-rendered edited scene: the one of its valid answers that suits the held-out views best. "
)
SHOWN_VIEWS = 6
TURNTABLE_FRAMES = 36


@dataclass
class ExportConfig:
    """What is written at the end: the mesh, and an orbit video before | after."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    video_frames: int = 72
    video_fps: int = 24


def save_results(job, source, edited: dict, truth, metrics: dict) -> None:
    """Writes everything but metrics.json, which is to hold how long this took."""
    job.announce("video")
    main = job.config.update.method
    final = edited.get(main, source).model
    save_images(job, source.model, edited)
    cameras = video_cameras(job.capture, job.config.export.video_frames)
    before = [frame.rgb for frame in render_path(source.model, cameras, "video, before")]
    videos = {}
    options = {"fps": job.config.export.video_fps, "scale": max(1, round(384 / min(cameras.width, cameras.height)))}
    write_video(job.folder / "videos" / "before.mp4", before, **options)
    for method, phase in edited.items():
        after = [frame.rgb for frame in render_path(phase.model, cameras, f"video, {method}")]
        path = job.folder / "videos" / f"{method}.mp4"
        write_video(path, side_by_side(before, after), **options)
        write_video(path.with_name(f"after-{method}.mp4"), after, **options)
        videos[f"Before and after: {NAMES[method]}"] = path
    job.announce("mesh")
    note, turntable, _ = save_mesh(job, final, cameras, job.capture.aabb, job.capture.folder.name)
    job.announce("report")
    rows = view_rows(job, edited, truth, metrics)
    save_grid(job.folder / "images" / "views.png", rows)
    report = ReportData(
        prompt=job.config.prompt,
        scene=str(job.capture.folder.name),
        before=before[0],
        after=final.render_views(cameras, torch.tensor([0])).rgb[0].clamp(0, 1),
        facts=facts(metrics, main),
        view_names=[job.capture.names[int(i)] for i in shown(job.capture)],
        rows=rows,
        methods={method: NAMES[method] for method in edited},
        results=metrics["results"],
        metric_notes=("" if truth is None else TRUTH_NOTE) + "Disagreement is measured on the edited training views, "
        "reprojected by depth.",
        videos=videos,
        turntable=turntable,
        mesh_note=note,
        curves=charts(job.folder, (("PSNR of the fit, dB", "psnr"), ("Loss", "loss"))),
        config=to_yaml(job.config),
        environment=json.loads((job.folder / "environment.json").read_text()),
    )
    write_report(job.folder / "report.html", report)


def facts(metrics: dict, main: str) -> dict[str, str]:
    """The headline numbers of the report."""
    figures, seconds = metrics["results"].get(main, {}), metrics["seconds"]
    found = {
        "Reconstruction": (metrics["reconstruction"]["psnr"], "dB"),
        "Edit, to truth": (figures.get("psnr_truth"), "dB"),
    }
    written = {key: f"{value:.1f} {unit}" for key, (value, unit) in found.items() if value is not None}
    return written | {"Reconstructed in": f"{seconds['reconstruct']:.0f} s", "Edited in": f"{seconds['edit']:.0f} s"}


def render_path(model: SceneModel, cameras: Cameras, title: str):
    """Renders of a path, one at a time, under a progress bar."""
    for i in progress(range(len(cameras)), title):
        view = model.render_views(cameras, torch.tensor([i]))
        yield type(view)(
            rgb=view.rgb[0].clamp(0, 1), depth=view.depth[0], opacity=view.opacity[0], samples=view.samples
        )


def shown(capture) -> Tensor:
    """The training views that the report shows: evenly spread."""
    count = min(SHOWN_VIEWS, len(capture.train))
    return capture.train[torch.linspace(0, len(capture.train) - 1, count).round().long()]


def view_rows(job, edited: dict, truth, metrics: dict) -> list[ViewRow]:
    """Source; per method its edited training views and the scene they lead to; the truth where it is known."""
    views = shown(job.capture)
    rows = [ViewRow("The capture", list(job.capture.images[views]), method="source")]
    for method, phase in sorted(edited.items(), key=lambda item: item[0] == job.config.update.method):
        rendered = phase.model.render_views(job.capture.cameras, views).rgb.clamp(0, 1)
        rows.append(ViewRow(NAMES[method], list(phase.images[views]), "the edited training views", method))
        rows.append(ViewRow("… and the scene", list(rendered), "that they lead to", method))
    if truth is not None and edited:
        best = metrics["results"][job.config.update.method]["answer"]
        true = truth.views(truth.answers[best], views).rgb
        rows.append(ViewRow("The truth", list(true), "the nearest right answer, re-rendered", "truth"))
    return rows


def save_images(job, source: SceneModel, edited: dict) -> None:
    """Held-out renders of the source and of every method, and the edited training views."""
    capture = job.capture
    held_out = capture.test if len(capture.test) else capture.train[:4]
    save_each(job.folder / "images" / "source", source.render_views(capture.cameras, held_out).rgb, held_out)
    for method, phase in edited.items():
        folder = job.folder / "images" / method
        save_each(folder / "held_out", phase.model.render_views(capture.cameras, held_out).rgb, held_out)
        save_each(folder / "train", phase.images[capture.train], capture.train)


def save_each(folder: Path, images: Tensor, numbers: Tensor) -> None:
    """images [B,H,W,3] as folder/NNN.png, by frame number."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, number in zip(images, numbers.tolist(), strict=True):
        Image.fromarray(to_uint8(image)).save(folder / f"{number:03}.png")


def save_strip(path: Path, images: Tensor) -> None:
    """images [B,H,W,3] side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([to_uint8(image) for image in images], 1)).save(path)


def save_grid(path: Path, rows: list[ViewRow], margin: int = 190) -> None:
    """The report's rows as one picture, each row's label in a margin of `margin` pixels before it."""
    lines = [np.concatenate([to_uint8(image) for image in row.images], 1) for row in rows]
    height, width = lines[0].shape[:2]
    page = Image.new("RGB", (margin + width, height * len(rows)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        page.paste(Image.fromarray(line), (margin, i * height))
        words = "\n".join(textwrap.wrap(row.label, 24) + textwrap.wrap(row.note, 24))
        draw.multiline_text((10, i * height + height / 2), words, "black", font, anchor="lm", spacing=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def save_mesh(
    job, model: SceneModel, cameras: Cameras, aabb: Tensor, name: str, folder: str = "mesh"
) -> tuple[str, list[np.ndarray], dict[str, float | int | bool]]:
    """Writes mesh/ of the object called `name`; returns a note, turntable frames and figures.

    A scene without a surface is said, not written.
    """
    config = job.config.export.mesh

    def density(positions: Tensor) -> Tensor:
        return model.field.density(positions)[0]

    try:
        files = job.folder / folder
        mesh, figures = export_mesh(density, model.field, aabb, files, config, str(job.device), object_name(name))
    except InputError as error:
        logger.error("%s", error)
        return f"No mesh: {error}", [], {}
    steps = torch.linspace(0, len(cameras) - 1, min(TURNTABLE_FRAMES, len(cameras))).round().long()
    larger = (
        cameras.resized(cameras.width * 3, cameras.height * 3) if min(cameras.width, cameras.height) < 200 else cameras
    )
    frames = [render_mesh(mesh, larger, int(i)) for i in progress(steps, "turntable")]
    width, height = mesh.visual.material.baseColorTexture.size
    return f"{figures['faces']:,} faces, {width} × {height} texture.", frames, figures


def object_name(text: str) -> str:
    """What a mesh is called after a prompt or a folder: "a blue duck" is blue_duck."""
    bare = re.sub(r"^(an?|the)\s+", "", text.strip(), flags=re.IGNORECASE)
    return re.sub(r"\W+", "_", bare).strip("_")[:60] or "mesh"


def charts(folder: Path, wanted: tuple[tuple[str, str], ...]) -> list[Curves]:
    """The curves that say how it went, as (title, tag); a loss is drawn on a logarithmic scale."""
    curves = read_curves(folder)

    def chart(title: str, tag: str, log: bool = False) -> Curves:
        lines = {
            phase: tuple(zip(*[(x, y) for x, y in series[tag] if y is not None], strict=True))
            for phase, series in curves.items()
            if tag in series
        }
        return Curves(title, {phase: line for phase, line in lines.items() if line}, log=log)

    return [chart(title, tag, log=tag == "loss") for title, tag in wanted]
