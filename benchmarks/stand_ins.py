"""A stub of the video encoder for machines without imageio-ffmpeg; import this before csd3d."""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

ENCODES = importlib.util.find_spec("imageio_ffmpeg") is not None
if not ENCODES:  # a wheel of 65 MiB, which not every machine has
    stub = types.ModuleType("imageio_ffmpeg")
    stub.__spec__ = importlib.machinery.ModuleSpec("imageio_ffmpeg", None)
    sys.modules["imageio_ffmpeg"] = stub


def leave_out_videos() -> None:
    """Replace the encoder, so that every video becomes an empty file."""
    import csd3d.export.video
    import csd3d.report.canvas

    csd3d.export.video.encode = _take_frames
    csd3d.report.canvas.frame_writer = _empty_writer


@contextlib.contextmanager
def _empty_writer(path: Path, *_: object, **__: object) -> Iterator[Callable[[object], None]]:
    yield lambda frame: None
    _take_frames(path, iter(()))


def _take_frames(path: Path, frames: Iterator, *_: object, **__: object) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return sum(1 for _ in frames)
