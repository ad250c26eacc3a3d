"""Picture files of a run: single pictures, strips, and the rows of the report as one picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from csd3d.export import to_uint8
from csd3d.report.page import ViewRow


def save_each(folder: Path, images: Sequence[Tensor] | Tensor, numbers: Tensor) -> None:
    """Write B images [H,W,3] to folder/NNN.png, by their numbers [B]."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, number in zip(images, numbers.tolist(), strict=True):
        Image.fromarray(to_uint8(image)).save(folder / f"{number:03}.png")


def save_strip(path: Path, images: Sequence[Tensor] | Tensor) -> None:
    """Write images [B,H,W,3] side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([to_uint8(image) for image in images], 1)).save(path)


def save_grid(path: Path, rows: Sequence[ViewRow], margin: int = 190) -> None:
    """Write the report's rows as one picture, with their labels in a left margin of `margin` pixels."""
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
