"""What an edit of a picture or a video leaves for its user, made in one pass over the frames of each method.

result.png or result.mp4, of exactly the input's size; images/before.png, images/METHOD.png or videos/METHOD.mp4 of the
baselines; images/views.png (the rows of the report); videos/before-after.mp4; report.html.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.canvas.clip import Footage
from csd3d.canvas.latents import Workspace, frame_chunks
from csd3d.config import to_yaml
from csd3d.editors.edit_canvas import DOWNSCALED, MAIN, CanvasPhase
from csd3d.engine.logs import progress
from csd3d.engine.phase import Job
from csd3d.evaluation.canvas import Figures, Instruments, Meter, part_count, parts
from csd3d.export import side_by_side, to_uint8, write_video
from csd3d.media import write_frames, write_image
from csd3d.report.charts import charts
from csd3d.report.page import ReportData, ViewRow, write_report
from csd3d.report.pictures import save_grid, save_strip

SHOWN = 6  # pictures in a row of the report
SHOWN_SIDE = 384  # pixels of their longer side
HERO_SIDE = 1280
MOVIE_SIDE, MOVIE_FRAMES = 320, 300  # of before | after in the report
PREVIEW_COST = 0.1  # share of the time that previews may take
NAMES = {
    MAIN: "CSD-Edit, edited together",
    "ip2p": "InstructPix2Pix, one by one",
    "ip2p_multidiffusion": "InstructPix2Pix with MultiDiffusion",
    DOWNSCALED: "InstructPix2Pix on the whole, scaled down",
    "pix2video": "Pix2Video",
    "fatezero": "FateZero",
}


@dataclass
class Shown:
    """What the report keeps of one method (or the source): a hero, a row of pictures, a small movie; and figures."""

    hero: Tensor | None = None
    row: list[Tensor] = field(default_factory=list)
    movie: list[np.ndarray] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)

    def add(self, footage: Footage, number: int, picture: Tensor) -> None:
        """Frame `number`, [3, H, W]."""
        if number == footage.count // 2:
            self.hero = shrink(picture, HERO_SIDE)
        if number in shown_frames(footage):
            self.row += shown_parts(picture, footage)
        if footage.is_video and number < MOVIE_FRAMES:
            self.movie.append(to_uint8(shrink(picture, MOVIE_SIDE)))


def save_results(
    job: Job, methods: dict[str, tuple[Workspace, CanvasPhase]], metrics: dict, instruments: Instruments
) -> None:
    """Writes every method's pictures and the report; completes metrics["results"] with what is measured on the way."""
    work = methods[MAIN][0]
    source = show_source(job, work.footage)
    shown = {}
    for name, (own, phase) in methods.items():
        shown[name] = show_method(job, own, phase.z, name, instruments)
        metrics["results"][name] = shown[name].figures | metrics["results"][name]
    videos = {}
    if work.footage.is_video:
        for name in methods:
            path = job.folder / "videos" / f"before-after-{name}.mp4"
            enlarged = max(1, round(MOVIE_SIDE / max(work.footage.size)))
            frames = side_by_side(source.movie, shown[name].movie)
            write_video(path, frames, fps=max(1, round(work.footage.fps)), scale=enlarged)
            videos[f"Before and after: {NAMES[name]}"] = path
    rows = report_rows(work.footage, source, shown, metrics)
    save_grid(job.folder / "images" / "views.png", rows)
    write_report(job.folder / "report.html", report(job, work, source, shown[MAIN], rows, metrics, videos))


def show_source(job: Job, footage: Footage) -> Shown:
    """The frames before the edit; the first one goes to images/before.png."""
    shown = Shown()
    for indices in frame_chunks(footage):
        for number, picture in zip(indices, footage.read(indices), strict=True):
            shown.add(footage, number, picture)
            if number == 0:
                path = job.folder / "images" / "before.png"
                path.parent.mkdir(exist_ok=True)
                write_image(path, picture.permute(1, 2, 0).numpy())
    return shown


def show_method(job: Job, work: Workspace, z: Tensor, name: str, instruments: Instruments) -> Shown:
    """Writes a method's picture or video, and keeps what the report shows of it."""
    shown, meter, footage = Shown(), Meter(work, instruments), work.footage

    def frames() -> Iterator[Tensor]:
        for indices in work.chunks():
            edited, source = work.pictures(z, indices), footage.read(indices)
            for number, picture, before in zip(indices, edited, source, strict=True):
                shown.add(footage, number, picture)
                meter.add(number, picture, before, z)
                yield picture.permute(1, 2, 0)

    write_footage(output_path(job.folder, footage, name), footage, progress(frames(), f"write, {name}"))
    shown.figures = meter.figures()
    return shown


def write_footage(path: Path, footage: Footage, frames: Iterator[Tensor]) -> None:
    """Frames [H, W, 3] in [0, 1] as a file like the footage's: its size, rate and sound; its alpha and bit depth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if footage.is_video:
        pixels = (to_uint8(frame) for frame in frames)
        write_frames(path, pixels, footage.fps, footage.sound_from, footage.sample_aspect)
    else:
        (frame,) = frames
        write_image(path, frame.contiguous().numpy(), footage.alpha, footage.bits)


def output_path(folder: Path, footage: Footage, name: str) -> Path:
    """Where a method's result goes: the main one's beside the report."""
    kind, suffix = ("videos", "mp4") if footage.is_video else ("images", "png")
    return folder / f"result.{suffix}" if name == MAIN else folder / kind / f"{name}.{suffix}"


def previewer(job: Job, work: Workspace):
    """A function (method, z) that writes images/preview-METHOD.png, now and then: it takes a small part of the time."""
    last, cost = time.monotonic(), 0.0

    def show(name: str, z: Tensor) -> None:
        nonlocal last, cost
        now = time.monotonic()
        if now - last < max(job.config.save_seconds, cost / PREVIEW_COST):
            return
        numbers = shown_frames(work.footage)
        found = [part for number in numbers for part in shown_parts(work.decode(z, [number])[0], work.footage)]
        save_strip(job.folder / "images" / f"preview-{name}.png", torch.stack(found))
        last = time.monotonic()
        cost = last - now

    return show


# -------------------------------------------------------------------------------------------------------------- report


def report(
    job: Job, work: Workspace, source: Shown, main: Shown, rows: list[ViewRow], metrics: dict, videos: dict[str, Path]
) -> ReportData:
    """All that report.html shows."""
    footage = work.footage
    size = f"{footage.width} × {footage.height}" + (f", {footage.count} frames" if footage.is_video else "")
    return ReportData(
        prompt="; ".join(job.config.instructions),
        scene=f"{footage.name}, {size}",
        before=source.hero,
        after=main.hero,
        facts=facts(metrics),
        view_names=view_names(footage, len(rows[0].images)),
        rows=rows,
        methods={name: NAMES[name] for name in metrics["results"]},
        results=metrics["results"],
        metric_notes=" ".join(metric_notes(footage, metrics)),
        videos=videos,
        curves=charts(job.folder, (("Noise level t", "t"), ("Gradient", "gradient_rms"), ("Kernel", "kernel_mean"))),
        config=to_yaml(job.config),
        environment=json.loads((job.folder / "environment.json").read_text()),
    )


def metric_notes(footage: Footage, metrics: dict) -> list[str]:
    """What the figures mean."""
    notes = [f"CLIP figures by {metrics['judge']}."] if metrics["judge"] else []
    if footage.answers is not None:
        notes += ["The truth is the world's own edit: the one of its valid answers that suits the whole best."]
    return notes


def facts(metrics: dict) -> dict[str, str]:
    """The headline numbers of the report."""
    figures, seconds = metrics["results"][MAIN], metrics["seconds"]
    known = {"Edit, to truth": "psnr_truth", "Outside, to source": "psnr_outside"}
    found = {label: f"{figures[key]:.1f} dB" for label, key in known.items() if figures.get(key) is not None}
    return found | {"Edited in": f"{seconds['edit']:.0f} s", "UNet evaluations": f"{figures['unet_evaluations']:,}"}


def report_rows(footage: Footage, source: Shown, shown: dict[str, Shown], metrics: dict) -> list[ViewRow]:
    """The source, the methods with the main one last, the truth where it is known."""
    rows = [ViewRow("Before", source.row, method="source")]
    for name in sorted(shown, key=lambda name: name == MAIN):
        rows.append(ViewRow(NAMES[name], shown[name].row, method=name))
    if footage.answers is not None:
        true = Shown()
        for number in shown_frames(footage):
            picture = footage.answers[metrics["results"][MAIN]["answer"], number]
            true.add(footage, number, torch.from_numpy(to_uint8(picture)).permute(2, 0, 1) / 255)
        rows.append(ViewRow("The truth", true.row, "the nearest right answer", "truth"))
    return rows


def view_names(footage: Footage, count: int) -> list[str]:
    """What stands above the columns of the report."""
    if footage.is_video:
        return [f"frame {number + 1}" for number in shown_frames(footage)]
    return [f"part {i + 1}" for i in range(count)] if count > 1 else [footage.name]


def shown_frames(footage: Footage) -> list[int]:
    """The frames that the report shows: evenly spread."""
    count = min(SHOWN, footage.count)
    return torch.linspace(0, footage.count - 1, count).round().long().tolist()


def shown_parts(picture: Tensor, footage: Footage) -> list[Tensor]:
    """A frame as it stands in a row, [H, W, 3] each: a wide picture is cut into parts from left to right."""
    return [shrink(part, SHOWN_SIDE) for part in parts(picture, min(SHOWN, part_count(footage)))]


def shrink(picture: Tensor, longest: int) -> Tensor:
    """[3, H, W] as [H', W', 3], its longer side `longest` pixels at most."""
    scale = longest / max(picture.shape[1:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in picture.shape[1:]]
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    return picture.permute(1, 2, 0).clamp(0, 1)
