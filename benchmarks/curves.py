"""Curves of one figure against another, as a picture: drawn with Pillow, which csd3d needs anyway."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from csd3d.report.charts import ticks

Points = dict[str, list[tuple[float, float, str]]]  # per curve its points (x, y, what stands beside it)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 560, 80, 290, 20, 60
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#cb912f")


def draw_curves(path: Path, curves: Points, labels: tuple[str, str]) -> None:
    """Writes a PNG of the curves, `labels` on the axes of x and y, and a legend beside them."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    axes = [padded([point[axis] for points in curves.values() for point in points]) for axis in (0, 1)]
    boxes = ((LEFT, WIDTH - RIGHT), (HEIGHT - BOTTOM, TOP))

    def at(value: float, axis: int) -> float:
        (low, high), (begin, end) = axes[axis], boxes[axis]
        return begin + (value - low) / (high - low) * (end - begin)

    for x in ticks(*axes[0]):
        draw.line([(at(x, 0), TOP), (at(x, 0), HEIGHT - BOTTOM)], "#dddddd")
        draw.text((at(x, 0), HEIGHT - BOTTOM + 6), f"{x:.3g}", "#666666", font, anchor="ma")
    for y in ticks(*axes[1]):
        draw.line([(LEFT, at(y, 1)), (WIDTH - RIGHT, at(y, 1))], "#dddddd")
        draw.text((LEFT - 8, at(y, 1)), f"{y:.3g}", "#666666", font, anchor="rm")
    for number, (name, points) in enumerate(curves.items()):
        colour, line = COLOURS[number % len(COLOURS)], [(at(x, 0), at(y, 1)) for x, y, _ in points]
        draw.line(line, colour, 3)
        for (x, y), (*_, label) in zip(line, points, strict=True):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
            draw.text((x + 7, y - 7), label, colour, font, anchor="ls")
        draw.text((WIDTH - RIGHT + 16, TOP + 8 + 24 * number), name, colour, font)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22), labels[0], "black", font, anchor="mm")
    draw.text((LEFT + 8, TOP + 4), labels[1], "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def padded(values: list[float], margin: float = 0.08) -> tuple[float, float]:
    """The range of `values` and a margin around it, never empty."""
    low, high = min(values), max(values)
    pad = margin * (high - low) or 0.01
    return low - pad, high + pad
