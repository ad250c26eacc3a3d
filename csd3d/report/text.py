"""The results of text to 3D and text to image: pictures, videos, meshes, reports.

text to 3D: images/METHOD/ASSET/NNN.png by azimuth, images/views.png, videos/METHOD.mp4, mesh/ and mesh-K/ of the main
method's assets. text to image: images/METHOD/NNN.png and images/grid.png. `titles`: of the methods, by name.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.config import to_yaml
from csd3d.engine.phase import Job
from csd3d.evaluation.objects import NearestObjects
from csd3d.evaluation.text import AssetsSeen, held_out, plain_backdrop
from csd3d.export import write_video
from csd3d.report.charts import charts
from csd3d.report.models import save_mesh
from csd3d.report.page import ReportData, ViewRow, write_report
from csd3d.report.pictures import save_each, save_grid, save_strip
from csd3d.report.used import environment_of, used
from csd3d.representations.base import render_each
from csd3d.representations.batch import Assets

Titles = Mapping[str, str]
CURVES = (("Noise level t", "t"), ("Gradient", "gradient_rms"))
VIDEO_SIDE = 192  # pixels of a turntable's frame and of the mesh's pictures


def slug(name: str) -> str:
    """Return a method's name for files and folders."""
    return name.replace("+", "-")


def report_of(job: Job, titles: Titles, metrics: dict, **sections) -> ReportData:
    """Return a text job's report: the common parts and the task's `sections` (fields of `ReportData`)."""
    return ReportData(
        prompt=job.config.told,
        used=used(job),
        warned=job.warned,
        finished=metrics["finished"],
        methods=dict(titles),
        results=metrics["results"],
        judge=metrics["judge"] or "",
        config=to_yaml(job.config),
        environment=environment_of(job.folder, job.device),
        **sections,
    )


# ------------------------------------------------------------------------------------------------------- text to image


def save_pictures(
    job: Job, found: Mapping[str, list[Tensor]], source: Tensor | None, titles: Titles, metrics: dict
) -> None:
    """Write everything but metrics.json. found: for each method, the particles [N, 3, S, S] of each prompt."""
    config = job.config
    count = sum(map(len, next(iter(found.values()))))
    rows = [] if source is None else [ViewRow("The source", list(source[0].permute(1, 2, 0).expand(count, -1, -1, -1)))]
    for name, pictures in found.items():
        images = torch.cat(pictures).permute(0, 2, 3, 1)
        save_each(job.folder / "images" / name, images, torch.arange(len(images)))
        names = [text for text in config.row_texts(name) for _ in range(config.particles)]
        rows.append(ViewRow(titles[name], list(images), method=name, names=names[: len(images)]))
    save_grid(job.folder / "images" / "grid.png", rows)
    each = ", each row by its own prompt" if len({row.names[0] for row in rows if row.names}) > 1 else ""
    report = report_of(
        job, titles, metrics,
        facts={"Drawn in": f"{metrics['seconds']['distil']:.0f} s"},
        view_names=[text for text in config.texts for _ in range(config.particles)],
        rows=rows,
        metric_notes=f"By {metrics['judge']}{each}." if metrics["judge"] else "",
        curves=charts(job.folder, CURVES),
    )  # fmt: skip
    write_report(job.folder / "report.html", report)


# ---------------------------------------------------------------------------------------------------------- text to 3D


def save_assets(
    job: Job,
    assets: dict[str, Assets],
    views: dict[str, AssetsSeen],
    nearest: dict[str, NearestObjects],
    titles: Titles,
    metrics: dict,
) -> dict[str, int | float | bool | str | None]:
    """Write everything but metrics.json; return the main mesh's figures, empty if there is no mesh."""
    config = job.config
    cameras = held_out(config, config.export.video_frames, VIDEO_SIDE)
    job.announce("video")
    videos = save_videos(job, assets, cameras, titles)
    job.announce("mesh")
    notes, turntable, figures = save_meshes(
        job, next(iter(assets.values())), cameras, next(iter(nearest.values()), None)
    )
    job.announce("report")
    front = save_front(job, titles) if job.front is not None else []
    rows = view_rows(config, views, titles)
    save_grid(job.folder / "images" / "views.png", rows)
    save_views(job, views)
    judged = judged_by(metrics, config.evaluate.views)
    report = report_of(
        job, titles, metrics,
        after=rows[0].images[0] if rows else None,
        facts=asset_facts(metrics, figures),
        view_names=[f"{azimuth:.0f}°" for azimuth in config.evaluate.azimuths_deg[:: row_step(config)]],
        rows=[*front, *rows],
        metric_notes=judged,
        videos=videos,
        turntable=turntable,
        mesh_note=" ".join(notes),
        curves=charts(job.folder, (*CURVES, ("Opacity", "opacity"))),
    )  # fmt: skip
    write_report(job.folder / "report.html", report)
    return figures


def save_front(job: Job, titles: Titles) -> list[ViewRow]:
    """Write images/front.png: the picture, and beside it every asset of every method by its camera; return this row."""
    backdrop = plain_backdrop(job.config)
    shown = [job.front.shown(assets, backdrop)[0] for assets in job.assets.values()]
    picture, _ = job.front.target(backdrop, job.config.front.size)
    images = torch.cat([picture.permute(1, 2, 0)[None], *shown]).cpu()
    save_strip(job.folder / "images" / "front.png", images)
    made = [
        label_of(titles[name], k, len(own.models)) for name, own in job.assets.items() for k in range(len(own.models))
    ]
    note = "the picture, and what its camera sees of the asset"
    return [ViewRow("Front view", list(images), note, "source", names=["The picture", *made])]


def save_videos(job: Job, assets: dict[str, Assets], cameras: Cameras, titles: Titles) -> dict:
    """Write videos/METHOD.mp4, all assets side by side; return the paths by title."""
    videos = {}
    for name, asset in assets.items():
        path = job.folder / "videos" / f"{slug(name)}.mp4"
        frames = orbit_frames(asset, cameras, f"video, {name}")
        write_video(path, frames, fps=job.config.export.video_fps, scale=2)
        videos[titles[name]] = path
    return videos


def save_meshes(
    job: Job, assets: Assets, cameras: Cameras, nearest: NearestObjects | None
) -> tuple[list[str], list, dict]:
    """Write the mesh of every asset; return notes on each, turntable frames and figures of the first mesh.

    The figure `stray_faces` is None if no right object is known. Colours are the albedo where lit renders were trained.
    """
    prompt, notes, turntable, figures = job.config.prompt, [], [], {}
    for k, model in enumerate(assets.models):
        called, files = (prompt, "mesh") if k == 0 else (f"{prompt} {k}", f"mesh-{k}")
        distance = nearest.distances[k] if nearest else None
        note, frames, found = save_mesh(
            job, model, cameras, assets.aabb, called, files, lit=not has_albedo(job), distance=distance
        )
        found = {"stray_faces": None} | found if found else {}
        notes, turntable, figures = [*notes, note], turntable or frames, figures or found
    return notes, turntable, figures


def has_albedo(job: Job) -> bool:
    """Whether assets' own colours are without light: training showed them lit, if their representation can be.

    A picture that assets are held to holds its light, and so do the colours that are fitted to it.
    """
    config = job.config
    supported = getattr(config.asset.representation.thing, "supports", ())
    return job.front is None and config.shading.lambertian > 0 and "shading" in supported


def orbit_frames(asset: Assets, cameras: Cameras, label: str) -> list[Tensor]:
    """Render frames [S, N·S, 3] of all assets side by side."""
    paths = [list(render_each(model, cameras, label)) for model in asset.models]
    return [torch.cat([view.rgb[0] for view in frame], 1) for frame in zip(*paths, strict=True)]


def row_step(config) -> int:
    """Return the step between the held-out views of a row, which shows at most six."""
    return max(1, math.ceil(config.evaluate.views / 6))


def view_rows(config, views: dict[str, AssetsSeen], titles: Titles) -> list[ViewRow]:
    """Return two rows for each method and asset: colour and shape."""
    step, rows = row_step(config), []
    for name, seen in views.items():
        for k, pair in enumerate(zip(seen.colour, seen.shape, strict=True)):
            label = label_of(titles[name], k, len(seen.colour))
            for pictures, note in zip(pair, ("", "its shape"), strict=True):
                rows.append(ViewRow(label, list(pictures[::step].permute(0, 2, 3, 1)), note, name))
    return rows


def label_of(title: str, k: int, count: int) -> str:
    """What asset k of a method is called, of `count`."""
    return f"{title}, {k + 1} of {count}" if count > 1 else title


def save_views(job: Job, views: dict[str, AssetsSeen]) -> None:
    """Write images/METHOD/ASSET/NNN.png, numbered by azimuth."""
    numbers = torch.tensor(job.config.evaluate.azimuths_deg).round().long()
    for name, seen in views.items():
        for k, pictures in enumerate(seen.colour):
            save_each(job.folder / "images" / slug(name) / str(k), pictures.permute(0, 2, 3, 1), numbers)


def judged_by(metrics: dict, views: int) -> str:
    """Say what the figures were measured against."""
    has_fd = any(result.get("fd") is not None for result in metrics["results"].values())
    by_clip = f"{'CLIP and FD' if has_fd else 'CLIP'} figures by {metrics['judge']}." if metrics["judge"] else ""
    if not metrics["nearest"]:
        return f"{by_clip} From {views} held-out cameras.".strip() if by_clip else ""
    names = next(iter(metrics["nearest"].values()))
    first = f"Nearest right object of the main method: {', '.join(names)}."
    return f"{first} {by_clip} From {views} held-out cameras.".replace("  ", " ")


def asset_facts(metrics: dict, mesh: dict) -> dict[str, str]:
    """Return the headline numbers of the report; mesh: the figures of the main mesh."""
    main = next(iter(metrics["results"].values()))
    found = {"Made in": f"{metrics['seconds']['distil']:.0f} s"}
    if main.get("object_psnr") is not None:
        found["PSNR on the object"] = f"{main['object_psnr']:.1f} dB"
    if mesh.get("stray_faces") is not None:
        found["Faces that are not the object"] = f"{mesh['stray_faces']:.1%}"
    if main.get("front_psnr") is not None:
        found["PSNR of the front view"] = f"{main['front_psnr']:.1f} dB"
    if main.get("rank") is not None:
        found["Among 32 prompts"] = f"rank {main['rank']}"
    if main.get("clip_colour") is not None:
        found[f"Fit, {metrics['judge']}"] = f"{main['clip_colour']:.3f}"
    return found
