"""Curves as inline SVG: no script, no font, no network; colours come from the page's CSS (`.s0`, `.s1`, …)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from csd3d.engine.logs import read_curves

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 30
MAX_POINTS = 400

Line = tuple[Sequence[float], Sequence[float]]  # x, y of equal length


@dataclass
class Curves:
    """One chart. Points that are NaN or infinite are left out."""

    title: str
    lines: dict[str, Line] = field(default_factory=dict)  # by label
    x_label: str = "step"
    log: bool = False  # logarithmic y axis, if all y are positive


def charts(folder: Path, wanted: Sequence[tuple[str, str]]) -> list[Curves]:
    """Return the charts of a run for each (title, tag); a loss is drawn on a logarithmic scale."""
    curves = read_curves(folder)

    def chart(title: str, tag: str) -> Curves:
        lines = {
            phase: tuple(zip(*[(x, y) for x, y in series[tag] if y is not None], strict=True))
            for phase, series in curves.items()
            if tag in series
        }
        return Curves(title, {phase: line for phase, line in lines.items() if line}, log=tag == "loss")

    return [chart(title, tag) for title, tag in wanted]


def chart_svg(curves: Curves) -> str:
    """Return an SVG of the curves, "" if no line has two finite points."""
    lines = {label: points for label, line in curves.lines.items() if len(points := _finite(*line)) > 1}
    if not lines:
        return ""
    log = curves.log and all(y > 0 for points in lines.values() for _, y in points)
    if log:
        lines = {label: [(x, math.log10(y)) for x, y in points] for label, points in lines.items()}
    x_range = _range([x for points in lines.values() for x, _ in points], 0.0)
    y_range = _range([y for points in lines.values() for _, y in points], 0.06)
    body = _grid(x_range, y_range, log)
    order = list(curves.lines)  # colours follow the legend, which names every line
    for label, points in lines.items():
        path = " ".join(f"{_at_x(x, x_range):.1f},{_at_y(y, y_range):.1f}" for x, y in points)
        body.append(f'<polyline class="line s{order.index(label) % 6}" points="{path}"/>')
    body.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(curves.x_label)}</text>'
    )
    label = escape(f"{curves.title}: {', '.join(lines)}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return log₁₀ of 1, 2 and 5 times powers of ten in [low, high]; the powers alone if there are at least three."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [
        [math.log10(m) + p for p in powers for m in steps if low <= math.log10(m) + p <= high]
        for steps in ((1,), (1, 2, 5))
    ]
    return found[0] if len(found[0]) > 2 else found[1] or ticks(low, high)


def short(value: float) -> str:
    """Format a number for a tick: 20k, 0.05, 1e-05."""
    if abs(value) >= 1e4:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.4g}"


def _grid(x_range: tuple[float, float], y_range: tuple[float, float], log: bool) -> list[str]:
    body = []
    for value in log_ticks(*y_range) if log else ticks(*y_range):
        y = _at_y(value, y_range)
        body.append(f'<path class="gridline" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        text = short(float(f"{10.0**value:.2g}") if log else value)
        body.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value in ticks(*x_range):
        x = _at_x(value, x_range)
        if x < WIDTH - RIGHT - 48:  # the axis label stands there
            body.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 2}" text-anchor="middle">{short(value)}</text>')
    body.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM + 8}H{WIDTH - RIGHT}"/>')
    return body


def _finite(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """Return the finite points, averaged in buckets to at most MAX_POINTS."""
    points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    bucket = math.ceil(len(points) / MAX_POINTS)
    if bucket <= 1:
        return points
    parts = [points[i : i + bucket] for i in range(0, len(points), bucket)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _range(values: list[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = margin * (high - low) or (0.0 if high > low else max(abs(high), 1.0) * 0.1)
    return low - pad, high + pad


def _at_x(x: float, bounds: tuple[float, float]) -> float:
    return LEFT + (x - bounds[0]) / (bounds[1] - bounds[0]) * (WIDTH - LEFT - RIGHT)


def _at_y(y: float, bounds: tuple[float, float]) -> float:
    return HEIGHT - BOTTOM - (y - bounds[0]) / (bounds[1] - bounds[0]) * (HEIGHT - BOTTOM - TOP)
