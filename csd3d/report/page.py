"""`report.html`: one page about a run that works offline and from a file:// address, and loads nothing.

Pictures, videos and turntable frames are embedded as data URIs; a Content-Security-Policy in the page forbids every
other source. All text from outside (prompts, labels, config) is escaped.
"""

import base64
import io
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import numpy as np
from PIL import Image

from csd3d import __version__
from csd3d.export.video import Picture, to_uint8
from csd3d.files import write_bytes
from csd3d.report.charts import Curves, chart_svg
from csd3d.report.labels import METRICS, format_value, metric_label

IMAGES = ("images/front.png", "images/views.png", "images/grid.png")
LINKED = ("result.*", "mesh*/mesh.*", "videos/*.mp4", *IMAGES, "log.txt")
TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass
class ViewRow:
    """A row of pictures, one for each view."""

    label: str
    images: Sequence[Picture]
    note: str = ""
    method: str = ""  # "source", "csd_edit", "in2n", "truth", …: the colour of its mark
    names: Sequence[str] = ()  # of its pictures, where they are not the report's `view_names`


@dataclass
class Whole:
    """A picture in full width, with a link to its file."""

    label: str
    image: Picture
    file: str  # path relative to the run folder
    method: str = ""


@dataclass
class ReportData:
    """The contents of a report; empty parts are left out. Pictures are [H, W, 3], float in [0, 1] or uint8."""

    prompt: str
    scene: str = ""
    used: str = ""  # model, representation and reader, see `used`
    warned: Sequence[str] = ()  # at the start of the run
    finished: bool = True
    before: Picture | None = None
    after: Picture | None = None
    facts: dict[str, str] = field(default_factory=dict)  # headline numbers, formatted
    view_names: Sequence[str] = ()
    rows: Sequence[ViewRow] = ()
    wholes: Sequence[Whole] = ()
    methods: dict[str, str] = field(default_factory=dict)  # key in `results` -> title; the main method first
    results: dict[str, dict[str, float | int | None]] = field(default_factory=dict)  # method -> metric -> value
    metric_notes: str = ""
    judge: str = ""  # name of the CLIP of the metrics, "CLIP (world)" for the shipped one; FD uses its features
    videos: dict[str, Path] = field(default_factory=dict)  # caption -> MP4 to embed
    turntable: Sequence[Picture] = ()  # one turn, evenly spaced
    mesh_note: str = ""
    curves: Sequence[Curves] = ()
    config: str = ""
    environment: dict[str, object] = field(default_factory=dict)


def write_report(path: Path, data: ReportData) -> None:
    """Write the page atomically. It ends with links to files in the run folder, relative to the page."""
    path = Path(path)
    unfinished = "" if data.finished else "Stopped early: these are results of an unfinished run."
    lines = (data.scene, data.used, *(f"Warning: {line}" for line in data.warned), unfinished)
    parts = {
        "title": escape(data.prompt),
        "scene": "<br>".join(escape(line) for line in lines if line),
        "hero": _hero(data),
        "ratio": "1" if data.after is None else f"{np.shape(data.after)[1] / np.shape(data.after)[0]:.4f}",
        "facts": _facts(data.facts),
        "wholes": _wholes(data.wholes),
        "views": _views(data.rows, data.view_names),
        "results": _results(data),
        "motion": _motion(data),
        "curves": _curves(data.curves),
        "details": _details(data),
        "footer": _footer(path.parent),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    write_bytes(path, page.encode(errors="replace"))  # a file's name need not be UTF-8


def data_uri(image: Picture, jpeg: bool = False) -> str:
    """Return a picture as a data URI: PNG, or JPEG of quality 88."""
    buffer = io.BytesIO()
    options = {"format": "JPEG", "quality": 88} if jpeg else {"format": "PNG", "optimize": True}
    Image.fromarray(to_uint8(image)).save(buffer, **options)
    kind = "jpeg" if jpeg else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _img(image: Picture, alt: str, extra: str = "") -> str:
    height, width = np.shape(image)[:2]
    return f'<img src="{data_uri(image)}" width="{width}" height="{height}" alt="{escape(alt)}" {extra}>'


def _hero(data: ReportData) -> str:
    if data.before is None or data.after is None:
        return ""
    return (
        '<figure class="compare"><div class="stage">'
        f"{_img(data.after, 'After the edit')}{_img(data.before, 'Before the edit', 'class=before')}"
        '<span class="tag left" aria-hidden="true">before</span><span class="tag right" aria-hidden="true">after</span>'
        '<span class="handle" aria-hidden="true"></span>'
        '<input type="range" min="0" max="100" value="50" step="0.5" aria-label="Share of the picture before the edit">'
        "</div></figure>"
    )


def _facts(facts: dict[str, str]) -> str:
    if not facts:
        return ""
    rows = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _views(rows: Sequence[ViewRow], names: Sequence[str]) -> str:
    """All rows share one grid, so that a view has the same column in each, and one scrollbar.

    The names of the columns stand above the first row, and again wherever a row's are others.
    """
    count = max((len(row.images) for row in rows), default=0)
    if not count:
        return ""
    cells, above = [], []
    for row in rows:
        own = list(row.names or names)[:count]
        if own != above:
            cells.append(_heads(own, count))
        above = own
        note = f"<p>{escape(row.note)}</p>" if row.note else ""
        cells.append(
            f'<div class="row-label" data-method="{escape(row.method)}"><h3>{escape(row.label)}</h3>{note}</div>'
        )
        for index in range(count):
            name = own[index] if index < len(own) else f"view {index + 1}"
            picture = _img(row.images[index], f"{row.label}, {name}") if index < len(row.images) else ""
            cells.append(f'<div class="cell">{picture}</div>')
    return _section(
        "The views",
        f'<div class="wall" tabindex="0"><div class="grid" style="--n:{count}">{"".join(cells)}</div></div>',
    )


def _heads(names: Sequence[str], count: int) -> str:
    """The names above `count` columns; one that several columns in turn have stands once, over all of them."""
    heads = []
    for name, same in groupby(names):
        wide = len(list(same))
        span = f' style="grid-column: span {wide}"' if wide > 1 else ""
        heads.append(f'<div class="cell head"{span}>{escape(name)}</div>')
    return f'<div class="row-label"></div>{"".join(heads)}' + '<div class="cell"></div>' * (count - len(names))


def _wholes(wholes: Sequence[Whole]) -> str:
    """Whole pictures one below the other, so that a wide one can fill the width of the page."""
    figures = "".join(
        f'<figure data-method="{escape(whole.method)}"><a href="{escape(quote(whole.file))}">'
        f"{_img(whole.image, whole.label)}</a><figcaption>{escape(whole.label)}, full size: "
        f'<a href="{escape(quote(whole.file))}">{escape(whole.file)}</a></figcaption></figure>'
        for whole in wholes
    )
    return _section("The whole picture", f'<div class="wholes">{figures}</div>') if figures else ""


def _results(data: ReportData) -> str:
    methods = [m for m in (data.methods or data.results) if m in data.results]
    if not methods:
        return ""
    keys = [key for key in dict.fromkeys(key for m in methods for key in data.results[m]) if key != "answer"]
    keys.sort(key=lambda key: list(METRICS).index(key) if key in METRICS else len(METRICS))
    head = "".join(f'<th scope="col" data-method="{escape(m)}">{escape(data.methods.get(m, m))}</th>' for m in methods)
    rows = {key: [data.results[m].get(key) for m in methods] for key in keys}
    known = {key: row for key, row in rows.items() if any(value is not None for value in row)}
    body = "".join(_metric_row(key, row, data.judge) for key, row in known.items())
    note = f'<p class="note">{escape(data.metric_notes)}</p>' if data.metric_notes else ""
    table = f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return _section("Metrics", table + note)


def _metric_row(key: str, values: list[float | int | None], judge: str = "") -> str:
    _, unit, better, decimals = METRICS.get(key, ("", "", None, 3))
    label = metric_label(key, judge)
    known = [v for v in values if v is not None and math.isfinite(v)]
    best = None if better is None or len(known) < 2 else (max if better == "higher" else min)(known)
    cells = "".join(
        f"<td{' class=best' if best is not None and value == best else ''}>{format_value(value, decimals)}</td>"
        for value in values
    )
    hint = ", ".join(filter(None, [unit, f"{better} is better" if better else ""]))
    small = f" <small>{escape(hint)}</small>" if hint else ""
    return f'<tr><th scope="row">{escape(label)}{small}</th>{cells}</tr>'


def _motion(data: ReportData) -> str:
    figures = [_turntable(data)] if len(data.turntable) else []
    for caption, path in data.videos.items():
        video = base64.b64encode(Path(path).read_bytes()).decode()
        figures.append(
            f'<figure><video src="data:video/mp4;base64,{video}" controls loop muted playsinline autoplay></video>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return _section("Videos and mesh", f'<div class="motion">{"".join(figures)}</div>') if figures else ""


def _turntable(data: ReportData) -> str:
    height, width = np.shape(data.turntable[0])[:2]
    frames = json.dumps(
        [data_uri(frame, jpeg=True) for frame in data.turntable]
    )  # base64: nothing that could end the script
    note = f" {escape(data.mesh_note)}" if data.mesh_note else ""
    return (
        f'<figure class="turntable"><canvas width="{width}" height="{height}" tabindex="0" role="slider" '
        'aria-valuemin="0" aria-valuemax="359" aria-valuenow="0" '
        'aria-label="The mesh, turned by dragging or by the arrow keys"></canvas>'
        f'<script type="application/json">{frames}</script>'
        f"<figcaption>The mesh; drag to turn it.{note}</figcaption></figure>"
    )


def _curves(curves: Sequence[Curves]) -> str:
    figures = []
    for chart in curves:
        if svg := chart_svg(chart):
            names = [f'<span class="key s{i % 6}">{escape(label)}</span>' for i, label in enumerate(chart.lines)]
            legend = "".join(names) if len(names) > 1 else ""
            figures.append(f"<figure><figcaption><b>{escape(chart.title)}</b>{legend}</figcaption>{svg}</figure>")
    return _section("Curves", f'<div class="charts">{"".join(figures)}</div>') if figures else ""


def _details(data: ReportData) -> str:
    blocks = [("Config", data.config)]
    blocks.append(("Environment", "\n".join(f"{key}: {value}" for key, value in data.environment.items())))
    return "".join(
        f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in blocks if text
    )


def _footer(folder: Path) -> str:
    """The footer: version, date, links to the run's files, and the command."""
    found = [file for pattern in LINKED for file in sorted(folder.glob(pattern))]
    names = [str(PurePosixPath(file.relative_to(folder))) for file in found]
    links = ", ".join(f'<a href="{escape(quote(name))}">{escape(name)}</a>' for name in names)
    parts = [f"Made by csd3d {__version__}, {time.strftime('%Y-%m-%d')}."]
    parts += [f"Files beside this page: {links}."] if links else []
    command = folder / "cmd.txt"
    if command.is_file():
        parts.append(f"Command: <code>{escape(command.read_text(encoding='utf-8', errors='replace').strip())}</code>")
    return " ".join(parts)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"
