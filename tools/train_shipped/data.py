"""Read the pair data set written by `csd3d.world.pairs.write_pairs` through memory maps.

Symbols: P pairs, S image size in pixels. Files: source.u8 and target.u8 [P,S,S,3], mask.u8 [P,S,S], pairs.jsonl,
meta.json; optionally answers.u8 [A,S,S,3], the valid answers of ambiguous pairs, whose records then have
`"answers": [first, count]`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csd3d.errors import InputError
from csd3d.files import read_json


@dataclass(frozen=True)
class Pairs:
    """Memory-mapped uint8 pairs: source, target [P,S,S,3], mask [P,S,S], a record a pair, answers [A,S,S,3] or None."""

    source: Tensor
    target: Tensor
    mask: Tensor
    records: list[dict]
    answers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def size(self) -> int:
        return self.source.shape[1]

    def truths(self, index: int) -> Tensor:
        """The right edits of pair `index`, [K,S,S,3] uint8: all its answers if listed, else only its target."""
        if self.answers is None or not self.records[index].get("answers"):
            return self.target[index : index + 1]
        first, count = self.records[index]["answers"]
        return self.answers[first : first + count]


def open_pairs(folder: Path | str) -> Pairs:
    """Open a data set without reading its images; raises InputError for missing files or wrong lengths."""
    folder = Path(folder)
    meta = read_json(folder / "meta.json", "what csd3d.world.pairs writes beside the pairs")
    count, size = int(meta["count"]), int(meta["size"])
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    if len(lines) < count:
        raise InputError(f"{folder}/pairs.jsonl: {len(lines)} records, meta.json says {count}; write the pairs again")
    images = [_map(folder / name, (count, size, size, 3)) for name in ("source.u8", "target.u8")]
    answers = folder / "answers.u8"
    return Pairs(
        *images,
        _map(folder / "mask.u8", (count, size, size)),
        [json.loads(line) for line in lines[:count]],
        _map(answers, (answers.stat().st_size // (size * size * 3), size, size, 3)) if answers.exists() else None,
    )


def gather(images: Tensor, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Images [P,S,S,3] uint8 at `indices` [B] as float32 [B,3,S,S] in [0, 1]."""
    return images[indices].to(device).permute(0, 3, 1, 2).float() / 255


def random_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The same random `size`² window, on an 8-pixel grid, of all images [B,3,S,S]."""
    room = (images.shape[-1] - size) // 8 + 1
    top, left = (8 * torch.randint(room, (2,), generator=generator)).tolist()
    return images[..., top : top + size, left : left + size]


def move(images: Tensor, right: Tensor, down: Tensor | None = None) -> Tensor:
    """Shift images or latents [B,C,h,w] by whole pixels `right` and `down` [B], repeating the border."""
    if down is not None:
        images = move(images.mT, down).mT
    size = images.shape[-1]
    columns = (torch.arange(size) - right[:, None]).clamp(0, size - 1).to(images.device)
    return images.gather(3, columns[:, None, None].expand_as(images))


def texts(pairs: Pairs) -> list[str]:
    """All distinct instructions and captions of a data set, sorted, the empty prompt first."""
    keys = ("instruction", "caption", "target_caption")
    return ["", *sorted({record[key] for record in pairs.records for key in keys} - {""})]


def _map(path: Path, shape: tuple[int, ...]) -> Tensor:
    if not path.exists() or path.stat().st_size != int(np.prod(shape)):
        raise InputError(f"{path}: missing or not {'x'.join(map(str, shape))} bytes; write the pairs again")
    # copy on write: torch refuses read-only memory, and writes must not reach the file
    return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=shape))
