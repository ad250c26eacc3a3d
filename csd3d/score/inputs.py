"""Opening the pictures to be judged, and checking that they belong together, before any is decoded."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.errors import InputError
from csd3d.media import frames_of, open_video
from csd3d.media.videos import VideoReader
from csd3d.memory import check_fits

LEAST_SIDE = 16  # pixels; optical flow needs them
LONGEST = 512  # views are compared with each other at this longer side at most
BYTES_PER_PIXEL = 100  # of a view at that size: before, after, reprojection
BYTES_DECODING = 60  # of a pixel of one full picture while it is decoded and made smaller


@dataclass(frozen=True)
class Views:
    """One system's pictures; names are those of a folder's files without suffix, None for a video."""

    name: str
    reader: VideoReader
    names: list[str] | None

    def read(self, view: int) -> np.ndarray:
        """A picture [H, W, 3], uint8."""
        return self.reader.read(view)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.reader.width, self.reader.height


@dataclass(frozen=True)
class Inputs:
    """What is judged: numbers of the views in each of the folders, which are of one length and one size."""

    before: Views
    after: Views
    truths: dict[str, Views]
    chosen: list[int]
    cameras: Cameras | None = None  # at the working size
    depths: Tensor | None = None  # [V, h, w] along the rays, at the working size
    notes: list[str] = field(default_factory=list)

    @property
    def view_names(self) -> list[str]:
        """How the views are called on the page."""
        names = self.before.names or self.after.names
        return [names[i] if names else str(i) for i in self.chosen]


def working_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which views (width, height) are compared with each other."""
    scale = min(1.0, LONGEST / max(size))
    return tuple(max(LEAST_SIDE, round(side * scale)) for side in reversed(size))


@contextmanager
def open_inputs(before: Path, after: Path, truths: Sequence[Path] = (), every: int = 1) -> Iterator[Inputs]:
    """Open and check everything; closed again at the end. Raises InputError, one line."""
    with ExitStack() as stack:
        first = _open(before, stack)
        if min(first.size) < LEAST_SIDE:
            raise InputError(f"{before}: views of {_shown(first)}; expected at least {LEAST_SIDE} pixels a side")
        second, *rest = (_fitting(_open(path, stack), path, first, before) for path in (after, *truths))
        chosen = list(range(0, first.reader.count, every))
        height, width = working_size(first.size)
        needed = BYTES_PER_PIXEL * len(chosen) * height * width
        check_fits(needed, f"{before}: {len(chosen)} views", "judge fewer by --every N")
        check_fits(BYTES_DECODING * first.size[0] * first.size[1], f"{before}: a view of {_shown(first)}", "shrink it")
        notes = [note for views in (first, second, *rest) for note in views.reader.warnings]
        if len(chosen) == 1:
            notes.append("one view: whether views agree needs at least two, so those figures are left out")
        yield Inputs(first, second, _named(rest, truths), chosen, notes=notes)


def _open(path: Path, stack: ExitStack) -> Views:
    reader = stack.enter_context(open_video(path))
    if not path.is_dir():
        return Views(_printable(path.resolve().name), reader, None)
    files = {}
    for file in frames_of(path):
        first = files.setdefault(file.stem, file)
        if first is not file:
            raise InputError(f"{path}: {first.name} and {file.name} are two pictures of one name; keep one")
    return Views(_printable(path.resolve().name), reader, [_printable(name) for name in files])


def _printable(name: str) -> str:
    """A name whose bytes are not UTF-8, which JSON and the page could not hold, with "\\udcff" in place of these."""
    return name.encode("utf-8", "backslashreplace").decode()


def _fitting(views: Views, path: Path, first: Views, before: Path) -> Views:
    """`views`, if there are as many as before, of the same size and names; InputError otherwise."""
    count, expected = views.reader.count, first.reader.count
    if views.names and first.names and views.names != first.names and set(views.names) & set(first.names):
        odd = sorted(set(first.names) ^ set(views.names))
        where = (before, path) if odd and odd[0] in first.names else (path, before)
        told = f"{odd[0]} is in {where[0]} but not in {where[1]}" if odd else "its suffixes put it in another order"
        raise InputError(f"{path}: {told}; expected the same names as in {before}, or none of them")
    if count != expected:
        raise InputError(f"{path}: {count} views, but {before} has {expected}; expected as many")
    if views.size != first.size:
        raise InputError(f"{path}: views of {_shown(views)}, but those of {before} are {_shown(first)}; one size")
    return views


def _named(rest: Sequence[Views], paths: Sequence[Path]) -> dict[str, Views]:
    """Truths by the names of their folders, or by their paths where two folders are called the same."""
    names = [views.name for views in rest]
    called = names if len(set(names)) == len(names) else [str(path) for path in paths]
    if len(set(called)) < len(called):
        raise InputError(f"--truth: {next(name for name in called if called.count(name) > 1)} is given twice")
    return dict(zip(called, rest, strict=True))


def _shown(views: Views) -> str:
    return "x".join(map(str, views.size))
