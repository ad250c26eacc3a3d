"""The contact sheet of held-out edits: source, instruction, edit and truth, one column a pair."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from csd3d.world.train.data import Pairs, gather

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
    lines = textwrap.wrap(record["instruction"], 22)[:3]
    text = "\n".join(lines)
    ImageDraw.Draw(sheet).text((x, y + size + 3), text, "black", ImageFont.load_default(11), spacing=2)
    sheet.paste(images[1], (x, y + size + TEXT_HEIGHT))
    sheet.paste(images[2], (x, y + 2 * size + TEXT_HEIGHT))


def _source(pairs: Pairs, index: int) -> Tensor:
    return gather(pairs.source, torch.tensor([index]))[0]


def _truth(pairs: Pairs, index: int, edit: Tensor) -> Tensor:
    truths = pairs.truths(index).permute(0, 3, 1, 2).float() / 255
    return truths[(truths - edit).square().mean((1, 2, 3)).argmin()]


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
