"""Picture files of a run: single pictures, strips, and the rows of the report as one picture."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from csd3d.export import to_uint8
from csd3d.files import write_bytes
from csd3d.report.page import ViewRow


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def save_each(folder: Path, images: Sequence[Tensor] | Tensor, numbers: Tensor) -> None:
    """Write B images [H,W,3] to folder/NNN.png, by their numbers [B]."""
    for image, number in zip(images, numbers.tolist(), strict=True):
        save_png(folder / f"{number:03}.png", Image.fromarray(to_uint8(image)))


def save_strip(path: Path, images: Sequence[Tensor] | Tensor) -> None:
    """Write images [B,H,W,3] side by side."""
    save_png(path, Image.fromarray(np.concatenate([to_uint8(image) for image in images], 1)))


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
    save_png(path, page)
