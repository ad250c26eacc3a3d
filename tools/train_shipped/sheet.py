"""The contact sheet of held-out edits: source, instruction, edit and truth, one column a pair."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tools.train_shipped.data import Pairs, gather

TEXT_HEIGHT, GAP = 46, 6


def contact_sheet(pairs: Pairs, edits: dict[int, Tensor], path: Path, columns: int = 10, blocks: int = 3) -> None:
    """Write a PNG of up to columns × blocks pairs, the families in turn; edits {pair index: [3,S,S] in [0, 1]}."""
    chosen = by_turns([(pairs.records[i]["family"], i) for i in edits])[: columns * blocks]
    size = pairs.size
    width, height = columns * (size + GAP) + GAP, 3 * size + TEXT_HEIGHT + 2 * GAP
    sheet = Image.new("RGB", (width, height * -(-len(chosen) // columns)), "white")
    for k, i in enumerate(chosen):
        corner = GAP + (k % columns) * (size + GAP), (k // columns) * height + GAP
        draw_column(
            sheet, corner, [_pil(_source(pairs, i)), _pil(edits[i]), _pil(_truth(pairs, i, edits[i]))], pairs.records[i]
        )
    sheet.save(path, optimize=True)


def captioned_sheet(captions: list[str], images: Tensor, path: Path, columns: int = 8, rows: int = 6) -> None:
    """Write a PNG of the first columns × rows images [P,3,S,S] in [0, 1], the caption under each."""
    shown, size = list(zip(captions, images, strict=True))[: columns * rows], images.shape[-1]
    step = (size + GAP, size + TEXT_HEIGHT + GAP)
    sheet = Image.new("RGB", (columns * step[0] + GAP, step[1] * -(-len(shown) // columns) + GAP), "white")
    for k, (caption, image) in enumerate(shown):
        corner = GAP + (k % columns) * step[0], GAP + (k // columns) * step[1]
        sheet.paste(_pil(image), corner)
        write_below(sheet, corner, size, caption)
    sheet.save(path, optimize=True)


def write_below(sheet: Image.Image, corner: tuple[int, int], size: int, words: str) -> None:
    """Up to three lines of text under a picture of `size`² at `corner`."""
    text = "\n".join(textwrap.wrap(words, 22)[:3])
    place = (corner[0], corner[1] + size + 3)
    ImageDraw.Draw(sheet).text(place, text, "black", ImageFont.load_default(11), spacing=2)


def by_turns(items: list[tuple[str, int]]) -> list[int]:
    """One index of each family, then a second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for family, index in items:
        seen[family] = seen.get(family, 0) + 1
        ranked.append((seen[family], family, index))
    return [index for _, _, index in sorted(ranked)]


def draw_column(sheet: Image.Image, corner: tuple[int, int], images: list[Image.Image], record: dict) -> None:
    """Source, the instruction's text, edit, truth, downwards from `corner`."""
    x, y = corner
    size = images[0].width
    sheet.paste(images[0], (x, y))
    write_below(sheet, corner, size, record["instruction"])
    sheet.paste(images[1], (x, y + size + TEXT_HEIGHT))
    sheet.paste(images[2], (x, y + 2 * size + TEXT_HEIGHT))


def _source(pairs: Pairs, index: int) -> Tensor:
    return gather(pairs.source, torch.tensor([index]))[0]


def _truth(pairs: Pairs, index: int, edit: Tensor) -> Tensor:
    truths = pairs.truths(index).permute(0, 3, 1, 2).float() / 255
    return truths[(truths - edit).square().mean((1, 2, 3)).argmin()]


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
