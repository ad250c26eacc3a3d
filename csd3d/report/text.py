"""Figures of what text to 3D made, from held-out cameras, and what the run leaves: pictures, videos, meshes, report."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csd3d.cameras import Cameras, orbit
from csd3d.config import to_yaml
from csd3d.engine.phase import Job
from csd3d.evaluation.text import load_judge
from csd3d.export import write_video
from csd3d.rendering import Shading
from csd3d.report.charts import charts
from csd3d.report.models import render_path, save_mesh
from csd3d.report.page import ReportData, ViewRow, write_report
from csd3d.report.pictures import save_each, save_grid
from csd3d.representations.base import ALBEDO, SceneModel
from csd3d.representations.batch import Assets
from csd3d.schema import path_key
from csd3d.tasks.text_to_image import slug, title

WHITE = Shading("textureless", ambient=0.4)


@dataclass
class EvaluateConfig:
    """Held-out cameras: `views` evenly round at `elevation_deg`, pictures of `size`²; `clip` judges them ("": the
    shipped one), a folder or open_clip:ARCHITECTURE/WEIGHTS."""

    views: int = 12
    elevation_deg: float = 30.0
    size: int = 128
    clip: str = path_key(identity=False)

    def __post_init__(self) -> None:
        if self.views < 1 or self.size < 16 or not -90 <= self.elevation_deg <= 90:
            given = f"views is {self.views}, size {self.size}, elevation_deg {self.elevation_deg:g}"
            raise ValueError(f"{given}: give at least 1, at least 16, and an angle in [-90, 90]")

    @property
    def azimuths_deg(self) -> list[float]:
        """Azimuths [V] of the held-out cameras."""
        return [360.0 * i / self.views for i in range(self.views)]


def held_out(config, count: int, size: int) -> Cameras:
    """`count` cameras evenly round, at the middle of the training distances and fields of view."""
    distance, fov = sum(config.views.distance) / 2, sum(config.views.fov_deg) / 2
    return orbit(count, distance, config.evaluate.elevation_deg, fov, size, size)


@dataclass(frozen=True)
class AssetsSeen:
    """A method's N assets from the V held-out cameras, coloured and white, [N, V, 3, S, S] in [0, 1]."""

    colour: Tensor
    shape: Tensor


def held_out_views(config, assets: dict[str, Assets]) -> dict[str, AssetsSeen]:
    """Every method's assets, rendered once for figures, rows and pictures alike."""
    cameras = held_out(config, config.evaluate.views, config.evaluate.size)

    def seen(asset: Assets, shading: Shading) -> Tensor:
        return torch.stack([views_of(model, cameras, shading) for model in asset.models])

    return {name: AssetsSeen(seen(asset, ALBEDO), seen(asset, WHITE)) for name, asset in assets.items()}


def evaluate(job: Job, views: dict[str, AssetsSeen]) -> tuple[dict[str, dict], str | None]:
    """Figures of every method, and the name of the CLIP they are by."""
    config = job.config
    judge = load_judge(config.evaluate.clip, job.device)

    def say(prompt: str, view: int) -> str:
        return config.say(prompt, config.evaluate.azimuths_deg[view], config.evaluate.elevation_deg)

    figures: dict[str, dict] = {name: {} for name in views}
    for name, seen in views.items() if judge else ():
        places = config.evaluate.azimuths_deg
        figures[name] = judge.score_assets(seen.colour, seen.shape, config.prompt, places, say, config.seed)
    return figures, judge.name if judge else None


def views_of(model: SceneModel, cameras: Cameras, shading: Shading) -> Tensor:
    """[V, 3, S, S] in [0, 1]."""
    return model.render_views(cameras, torch.arange(len(cameras)), shading).rgb.clamp(0, 1).permute(0, 3, 1, 2)


def save_results(
    job: Job, assets: dict[str, Assets], views: dict[str, AssetsSeen], metrics: dict
) -> dict[str, int | float | bool | None]:
    """Writes everything but metrics.json; returns the main mesh's figures (empty: there is none)."""
    config, main = job.config, job.config.methods[0]
    job.announce("video")
    cameras = held_out(config, config.export.video_frames, 192)
    videos, notes, turntable = {}, [], []
    for name, asset in assets.items():
        path = job.folder / "videos" / f"{slug(name)}.mp4"
        write_video(path, orbit_frames(asset, cameras, f"video, {name}"), fps=config.export.video_fps, scale=2)
        videos[title(name)] = path
    figures: dict = {}
    job.announce("mesh")
    for k, model in enumerate(assets[main].models):
        called, files = (config.prompt, "mesh") if k == 0 else (f"{config.prompt} {k}", f"mesh-{k}")
        note, frames, found = save_mesh(job, model, cameras, assets[main].aabb, called, files)
        notes, turntable, figures = [*notes, note], turntable or frames, figures or found
    job.announce("report")
    rows = view_rows(config, views)
    save_grid(job.folder / "images" / "views.png", rows)
    save_pictures(job.folder, config, views)
    front = rows[0].images[0] if rows else None
    report = ReportData(
        prompt=config.prompt,
        after=front,
        facts=facts(metrics),
        view_names=[f"{azimuth:.0f}°" for azimuth in config.evaluate.azimuths_deg[:: row_step(config)]],
        rows=rows,
        methods={name: title(name) for name in assets},
        results=metrics["results"],
        metric_notes=f"By {metrics['judge']}, from {config.evaluate.views} held-out cameras."
        if metrics["judge"]
        else "",
        videos=videos,
        turntable=turntable,
        mesh_note=" ".join(notes),
        curves=charts(job.folder, (("Noise level t", "t"), ("Gradient", "gradient_rms"), ("Opacity", "opacity"))),
        config=to_yaml(config),
        environment=json.loads((job.folder / "environment.json").read_text()),
    )
    write_report(job.folder / "report.html", report)
    return figures


def orbit_frames(asset: Assets, cameras: Cameras, label: str) -> list[Tensor]:
    """Frames [S, N·S, 3] of all assets side by side."""
    paths = [list(render_path(model, cameras, label)) for model in asset.models]
    return [torch.cat([view.rgb for view in frame], 1) for frame in zip(*paths, strict=True)]


def row_step(config) -> int:
    """A row has every so many of the held-out views: at most six, evenly spread."""
    return max(1, math.ceil(config.evaluate.views / 6))


def view_rows(config, views: dict[str, AssetsSeen]) -> list[ViewRow]:
    """A row a method and asset, and below it its shape."""
    step, rows = row_step(config), []
    for name, seen in views.items():
        for k, pair in enumerate(zip(seen.colour, seen.shape, strict=True)):
            label = title(name) + (f", {k + 1} of {len(seen.colour)}" if len(seen.colour) > 1 else "")
            for pictures, note in zip(pair, ("", "its shape"), strict=True):
                rows.append(ViewRow(label, list(pictures[::step].permute(0, 2, 3, 1)), note, name))
    return rows


def save_pictures(folder: Path, config, views: dict[str, AssetsSeen]) -> None:
    """images/METHOD/ASSET/NNN.png, by azimuth."""
    numbers = torch.tensor(config.evaluate.azimuths_deg).round().long()
    for name, seen in views.items():
        for k, pictures in enumerate(seen.colour):
            save_each(folder / "images" / slug(name) / str(k), pictures.permute(0, 2, 3, 1), numbers)


def facts(metrics: dict) -> dict[str, str]:
    """The headline numbers of the report."""
    main = next(iter(metrics["results"].values()))
    found = {"Made in": f"{metrics['seconds']['distil']:.0f} s"}
    if main.get("rank") is not None:
        found["Among 32 prompts"] = f"rank {main['rank']}"
    if main.get("clip_colour") is not None:
        found[f"Fit, {metrics['judge']}"] = f"{main['clip_colour']:.3f}"
    return found
