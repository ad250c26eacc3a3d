"""The results of an edit of a picture or a video, written in one pass over the frames for all methods.

result.png or result.mp4, of exactly the input's size; images/before.png; images/METHOD.png or videos/METHOD.mp4 of the
other methods; images/views.png (the rows of the report); videos/before-after-METHOD.mp4; report.html.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d import registry
from csd3d.canvas.clip import Clip
from csd3d.canvas.latents import Latents, edited_frames
from csd3d.config import to_yaml
from csd3d.engine.logs import progress
from csd3d.evaluation.canvas import Metrics, part_count, parts
from csd3d.export import side_by_side, to_uint8, write_video
from csd3d.files import make_folder
from csd3d.media import frame_writer, write_image
from csd3d.report.charts import charts
from csd3d.report.page import ReportData, ViewRow, Whole, write_report
from csd3d.report.pictures import save_grid, save_strip

SHOWN = 6  # pictures in a row of the report
SHOWN_SIDE = 384  # pixels of their longer side
HERO_SIDE = 1280
WHOLE_SIDE = 2048  # longer side of a whole picture
MOVIE_SIDE, MOVIE_FRAMES = 320, 300  # longer side and most frames of before | after in the report
PREVIEW_COST = 0.1  # most of the time that previews may take, as a share
CURVES = (("Noise level t", "t"), ("Gradient", "gradient_rms"), ("Kernel", "kernel_mean"))
SOURCE = "source"


@dataclass
class Shown:
    """The pictures of one method, or of the source, that the report shows."""

    hero: Tensor | None = None  # at the top of the page
    row: list[Tensor] = field(default_factory=list)
    whole: Tensor | None = None  # the whole picture; None for a video
    movie: list[np.ndarray] = field(default_factory=list)  # small frames of a video

    def add(self, clip: Clip, number: int, picture: Tensor) -> None:
        """Add frame `number`, [3, H, W]."""
        if number == clip.count // 2:
            self.hero = shrink(picture, HERO_SIDE)
        if number in shown_frames(clip):
            self.row += shown_parts(picture, clip)
        if not clip.is_video:
            self.whole = shrink(picture, WHOLE_SIDE)
        elif number < MOVIE_FRAMES:
            self.movie.append(to_uint8(shrink(picture, MOVIE_SIDE)))


def title(name: str) -> str:
    """Return a method's title in reports; that of "ip2p+shared" ends with "(shared)"."""
    base, _, variant = name.partition("+")
    return registry.title("canvas_editor", base) + (f" ({variant})" if variant else "")


# -------------------------------------------------------------------------------------------------- pictures and videos


def write_results(
    folder: Path, edits: Mapping[str, tuple[Latents, Tensor]], main: str, metrics: Metrics
) -> dict[str, Shown]:
    """Write and measure every method's picture or video; return what the report shows of each and of the source.

    edits: (source latents, edited latents) by method. Each source frame is read and decoded once.
    """
    clip = metrics.clip
    shown = {name: Shown() for name in (SOURCE, *edits)}
    with contextlib.ExitStack() as files:
        add = {name: files.enter_context(result_writer(result_path(folder, clip, name, main), clip)) for name in edits}
        for number, source, frames in progress(edited_frames(edits), "write", total=clip.count):
            shown[SOURCE].add(clip, number, source)
            metrics.add_source(number, source)
            if number == 0:
                write_picture(folder / "images" / "before.png", source)
            for name, frame in frames.items():
                shown[name].add(clip, number, frame.picture)
                metrics.add(name, number, frame)
                add[name](frame.picture)
    return shown


@contextlib.contextmanager
def result_writer(path: Path, clip: Clip) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that writes the next frame [3, H, W] in [0, 1].

    The file has the clip's size, and its frames' times and sound, or its alpha and bit depth.
    """
    if not clip.is_video:
        yield lambda picture: write_picture(path, picture, clip.alpha, clip.bits)
        return
    make_folder(path.parent)
    shown = {"begin": clip.begin, "times": clip.times}
    with frame_writer(path, clip.fps, clip.sound_from, clip.sample_aspect, **shown) as add:
        yield lambda picture: add(to_uint8(picture.permute(1, 2, 0)))


def write_picture(path: Path, picture: Tensor, *options: object) -> None:
    """Write a picture [3, H, W] in [0, 1]."""
    make_folder(path.parent)
    write_image(path, picture.permute(1, 2, 0).contiguous().numpy(), *options)


def result_path(folder: Path, clip: Clip, name: str, main: str) -> Path:
    """Return the path of a method's result; the main method's is beside the report."""
    kind, suffix = ("videos", "mp4") if clip.is_video else ("images", "png")
    return folder / f"result.{suffix}" if name == main else folder / kind / f"{name}.{suffix}"


def write_movies(folder: Path, clip: Clip, shown: Mapping[str, Shown]) -> dict[str, Path]:
    """Write small videos of before | after; return their paths by caption. Pictures have none."""
    videos = {}
    for name in shown if clip.is_video else ():
        if name == SOURCE:
            continue
        path = folder / "videos" / f"before-after-{name}.mp4"
        enlarged = max(1, round(MOVIE_SIDE / max(clip.size)))
        frames = side_by_side(shown[SOURCE].movie, shown[name].movie)
        write_video(path, frames, fps=max(1, round(clip.fps)), scale=enlarged)
        videos[f"Before and after: {title(name)}"] = path
    return videos


def previewer(folder: Path, latents: Latents, every_seconds: float) -> Callable[[str, Tensor], None]:
    """Return a function (method, z) that writes images/preview-METHOD.png, at most every `every_seconds`."""
    last, cost = time.monotonic(), 0.0

    def show(name: str, z: Tensor) -> None:
        nonlocal last, cost
        now = time.monotonic()
        if now - last < max(every_seconds, cost / PREVIEW_COST):
            return
        clip = latents.clip
        found = [part for i in shown_frames(clip) for part in shown_parts(latents.decode(z, [i])[0], clip)]
        save_strip(folder / "images" / f"preview-{name}.png", torch.stack(found))
        last = time.monotonic()
        cost = last - now

    return show


# -------------------------------------------------------------------------------------------------------------- report


@dataclass
class CanvasReport:
    """The report of a run."""

    folder: Path  # of the run
    config: object  # the task's, with `told`
    clip: Clip
    main: str  # name of the main method
    metrics: dict  # as in metrics.json
    shown: dict[str, Shown]  # by method, and of the source
    used: str = ""  # the model
    environment: dict[str, object] = field(default_factory=dict)
    warned: Sequence[str] = ()  # at the start of the run

    def write(self) -> None:
        """Write images/views.png, the small movies and report.html."""
        clip, rows = self.clip, self.rows()
        save_grid(self.folder / "images" / "views.png", rows)
        size = f"{clip.width} × {clip.height}" + (f", {clip.count} frames" if clip.is_video else "")
        results = self.metrics["results"]
        data = ReportData(
            prompt=self.config.told,
            scene=f"{clip.name}, {size}",
            used=self.used,
            warned=self.warned,
            finished=self.metrics["finished"],
            before=self.shown[SOURCE].hero,
            after=self.shown[self.main].hero,
            facts=self.facts(),
            view_names=view_names(clip, len(rows[0].images)),
            rows=rows,
            wholes=self.wholes(),
            methods={name: title(name) for name in results},
            results=results,
            metric_notes=" ".join(self.notes()),
            judge=self.metrics["judge"] or "",
            videos=write_movies(self.folder, clip, self.shown),
            curves=charts(self.folder, CURVES),
            config=to_yaml(self.config),
            environment=self.environment,
        )
        write_report(self.folder / "report.html", data)

    def notes(self) -> list[str]:
        """Explanations of the figures."""
        notes = [f"By {self.metrics['judge']}."] if self.metrics["judge"] else []
        if self.clip.answers is not None:
            notes += ["The truth is the valid edit of the procedural world that is nearest to the result."]
        return notes

    def facts(self) -> dict[str, str]:
        """The headline numbers."""
        figures, seconds = self.metrics["results"][self.main], self.metrics["seconds"]
        known = {"Edit, to truth": "psnr_truth", "Outside, to source": "psnr_outside"}
        found = {label: f"{figures[key]:.1f} dB" for label, key in known.items() if figures.get(key) is not None}
        return found | {
            "Edited in": f"{seconds['edit']:.0f} s",
            "UNet evaluations": f"{figures['unet_evaluations']:,}",
        }

    @property
    def ordered(self) -> list[str]:
        """The methods, the main one last."""
        return sorted((name for name in self.shown if name != SOURCE), key=lambda name: name == self.main)

    def rows(self) -> list[ViewRow]:
        """The source, the methods with the main one last, and the truth if it is known."""
        rows = [ViewRow("Before", self.shown[SOURCE].row, method=SOURCE)]
        rows += [ViewRow(title(name), self.shown[name].row, method=name) for name in self.ordered]
        if self.clip.answers is not None:
            true = Shown()
            for number in shown_frames(self.clip):
                picture = self.clip.answers[self.metrics["results"][self.main]["answer"], number]
                true.add(self.clip, number, torch.from_numpy(to_uint8(picture)).permute(2, 0, 1) / 255)
            rows.append(ViewRow("The truth", true.row, "the nearest right answer", "truth"))
        return rows

    def wholes(self) -> list[Whole]:
        """The whole picture, before and after, with links to the files; none of a video."""
        if self.clip.is_video:
            return []
        paths = {name: result_path(self.folder, self.clip, name, self.main) for name in self.ordered}
        files = {SOURCE: "images/before.png"} | {n: p.relative_to(self.folder).as_posix() for n, p in paths.items()}
        labels = {SOURCE: "Before"}
        return [
            Whole(labels.get(name) or title(name), self.shown[name].whole, files[name], name)
            for name in (SOURCE, *self.ordered)
        ]


def view_names(clip: Clip, count: int) -> list[str]:
    """Return the headings of the report's columns."""
    if clip.is_video:
        return [f"frame {number + 1}" for number in shown_frames(clip)]
    return [f"part {i + 1}" for i in range(count)] if count > 1 else [clip.name]


def shown_frames(clip: Clip) -> list[int]:
    """Return the numbers of the frames that the report shows, evenly spread."""
    count = min(SHOWN, clip.count)
    return torch.linspace(0, clip.count - 1, count).round().long().tolist()


def shown_parts(picture: Tensor, clip: Clip) -> list[Tensor]:
    """Return a frame for a row, [H, W, 3] each: a wide picture is cut into parts from left to right."""
    return [shrink(part, SHOWN_SIDE) for part in parts(picture, min(SHOWN, part_count(clip)))]


def shrink(picture: Tensor, longest: int) -> Tensor:
    """Return a picture [3, H, W] as [H', W', 3] whose longer side is at most `longest` pixels."""
    scale = longest / max(picture.shape[1:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in picture.shape[1:]]
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    return picture.permute(1, 2, 0).clamp(0, 1)
