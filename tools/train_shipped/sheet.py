"""Contact sheets of the shipped models' results, in the style of the reports: rows of pictures with captions."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from csd3d.report.page import ViewRow
from csd3d.report.pictures import save_grid
from tools.train_shipped.data import Pairs


def save_sheet(path: Path, rows: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    """Write a PNG of rows: words and pictures [3,S,S] in [0, 1], as many in every row."""
    save_grid(path, [ViewRow(words, [image.permute(1, 2, 0) for image in images]) for words, images in rows])


def edit_rows(pairs: Pairs, edits: dict[int, Tensor], count: int = 24) -> list[tuple[str, list[Tensor]]]:
    """The rows of up to `count` edits {pair index: [3,S,S]}, the families in turn: source, edit, nearest answer."""
    chosen = by_turns([(pairs.records[i]["family"], i) for i in edits])[:count]
    rows = []
    for i in chosen:
        truths = pairs.truths(i).permute(0, 3, 1, 2).float() / 255
        truth = truths[(truths - edits[i]).square().mean((1, 2, 3)).argmin()]
        rows.append((pairs.records[i]["instruction"], [pairs.source[i].permute(2, 0, 1) / 255, edits[i], truth]))
    return rows


def by_turns(items: list[tuple[str, int]]) -> list[int]:
    """Order the indices: one of each family, then a second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for family, index in items:
        seen[family] = seen.get(family, 0) + 1
        ranked.append((seen[family], family, index))
    return [index for _, _, index in sorted(ranked)]
