"""Videos out: H.264 in MP4, of exactly the size, count and rate of what comes in.

Frames of even sides are stored as yuv420p, which every player takes. An odd side cannot be halved, so such frames are
stored as yuv444p: exact in size, played by ffmpeg, VLC, mpv and Chrome, not by every other browser.
"""

import contextlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np

from csd3d.errors import InputError
from csd3d.media.ffmpeg import AUDIO, CONTAINERS, command, complaint, exact_rate, location, source

log = logging.getLogger("csd3d")

# fragments of a second each: what is on the disk when writing stops is a valid video
FRAGMENTED = ("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-frag_duration", "1000000")
INDEX_FIRST = ("-movflags", "+faststart")


def write_frames(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float | Fraction,
    sound_from: str | Path | None = None,
    sample_aspect: Fraction = Fraction(1),
    crf: int = 18,
) -> None:
    """Writes `frames` [H, W, 3] uint8 as an MP4, one at a time, with the sound of the file `sound_from` where it has
    any: copied (as AAC where MP4 can't hold it), cut to the frames' length. `sample_aspect` is pixels' width / height.

    The file appears whole or not at all. Where writing stops (no room, a frame that can't be read), the finished part
    stays beside it, playable, as NAME.partial.mp4. Raises InputError saying so, for no frames and for other suffixes;
    ValueError for frames that differ in size.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path}: videos are written as .mp4")
    partial, whole = path.with_name(f"{path.stem}.partial.mp4"), path.with_name(f".{path.stem}.whole.mp4")
    with contextlib.suppress(OSError):
        partial.unlink()  # an earlier run's
    try:
        count = encode(partial, frames, fps, crf, FRAGMENTED, sample_aspect)
        _finish(partial, whole, sound_from, count / exact_rate(fps))
        os.replace(whole, path)
    except InputError as error:
        kept = f"; the finished part is {partial}" if _keep_whole_boxes(partial) else ""
        raise InputError(f"{path}: {error}{kept}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        with contextlib.suppress(OSError):
            whole.unlink()
    partial.unlink(missing_ok=True)


def encode(
    path: Path,
    frames: Iterable[np.ndarray],
    fps: float | Fraction,
    crf: int = 18,
    layout: Sequence[str] = INDEX_FIRST,
    sample_aspect: Fraction = Fraction(1),
) -> int:
    """Feeds `frames` [H, W, 3] uint8 to ffmpeg's libx264, as BT.709 and tagged so; returns how many there were.

    What was written stays where it fails. Raises as `write_frames` does; its InputErrors leave naming the file to the
    caller.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise InputError("a video needs at least one frame")
    height, width = _checked(first, np.shape(first)).shape[:2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"its folder cannot be made ({error.strerror})") from error
    # untagged, each player guesses another matrix
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    filters = f"scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd,{tags},setsar={sample_aspect}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}"]
    options = ["-vf", filters, "-c:v", "libx264", "-crf", str(crf), "-preset", "medium"]
    options += ["-pix_fmt", "yuv444p" if width % 2 or height % 2 else "yuv420p", *layout]
    arguments = [*raw, "-framerate", str(exact_rate(fps)), "-i", "pipe:0", *options, location(path)]
    return _feed(arguments, chain([first], frames), np.shape(first))


def _feed(arguments: list[str], frames: Iterator[np.ndarray], shape: tuple[int, ...]) -> int:
    """Runs ffmpeg on frames of `shape`; whatever ends it, the frames sent so far are written out."""
    count = 0
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command(*arguments), stdin=subprocess.PIPE, stderr=errors)
        try:
            for frame in frames:
                process.stdin.write(np.ascontiguousarray(_checked(frame, shape)).data)
                count += 1
        except BrokenPipeError:
            pass  # ffmpeg has ended; why is in its log
        finally:
            _hang_up(process)
        if process.returncode != 0:
            errors.seek(0)
            reason = complaint(errors.read()) or f"ffmpeg ended with {process.returncode}"
            raise InputError(f"writing stopped after about {count} frames ({reason})")
    return count


def _hang_up(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()


def _checked(frame: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The frame, if it is [H, W, 3] uint8 of `shape`; ValueError if not."""
    if np.shape(frame) != shape:
        raise ValueError(f"video frames differ in size: {np.shape(frame)} after {shape}")
    if len(shape) != 3 or shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"expected frames [H, W, 3] uint8, got {shape} {frame.dtype}")
    return frame


def _finish(video: Path, whole: Path, sound_from: str | Path | None, seconds: Fraction) -> None:
    """Copies `video` to `whole` with its index in front, and the sound of `sound_from` cut to `seconds`."""
    plain = [*source(video), "-map", "0:v:0", "-c", "copy", *INDEX_FIRST, location(whole)]
    attempts = [plain]
    if sound_from is not None and not Path(sound_from).is_dir():
        both = [*source(video), *source(sound_from, f"{CONTAINERS},{AUDIO}"), "-map", "0:v:0", "-map", "1:a?"]
        both += ["-t", f"{float(seconds):.6f}", *INDEX_FIRST]
        attempts = [[*both, "-c", "copy"], [*both, "-c:v", "copy", "-c:a", "aac"]]
        attempts = [[*attempt, location(whole)] for attempt in attempts] + [plain]
    for attempt in attempts:
        done = subprocess.run(command(*attempt), stdin=subprocess.DEVNULL, capture_output=True, errors="replace")
        if done.returncode == 0:
            break
        reason = complaint(done.stderr) or f"ffmpeg ended with {done.returncode}"
    else:
        raise InputError(f"the video cannot be finished ({reason})")
    if attempt is plain and len(attempts) > 1:
        log.warning("%s: its sound could not be kept (%s)", sound_from, reason)


def _keep_whole_boxes(path: Path) -> bool:
    """Cuts an MP4 in fragments after its last whole one; without any, removes it. Returns whether it stays."""
    end = 0
    if path.exists():
        with path.open("r+b") as file:
            size, at = path.stat().st_size, 0
            while at + 8 <= size:
                file.seek(at)
                length, kind = int.from_bytes(file.read(4)), file.read(4)
                if length < 8 or at + length > size:
                    break
                at += length
                end = at if kind == b"mdat" else end
            file.truncate(end)
    if not end:
        with contextlib.suppress(OSError):
            path.unlink()
    return end > 0
