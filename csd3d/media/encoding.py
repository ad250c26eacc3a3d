"""Writing videos: H.264 in MP4, with exactly the size, count and rate of the frames given.

Frames with even sides are stored as yuv420p, which every player supports. With an odd side they are stored as yuv444p,
which ffmpeg, VLC, mpv and Chrome play, but not every browser.
"""

import contextlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from csd3d.errors import InputError
from csd3d.files import make_folder
from csd3d.media import raw_frames
from csd3d.media.ffmpeg import (
    AUDIO,
    CONTAINERS,
    command,
    complaint,
    exact_rate,
    killed,
    location,
    run,
    source,
    start,
)

log = logging.getLogger("csd3d")

# fragments of one second: the file is a valid video whenever writing stops
FRAGMENTED = ("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-frag_duration", "1000000")
# each frame at its own time, on the clock of most cameras, rather than at multiples of a guessed rate
KEEP_TIMES = ("-fps_mode", "passthrough", "-enc_time_base", "1/90000", "-video_track_timescale", "90000")
INDEX_FIRST = ("-movflags", "+faststart")


@contextlib.contextmanager
def frame_writer(
    path: str | Path,
    fps: float | Fraction,
    sound_from: str | Path | None = None,
    sample_aspect: Fraction = Fraction(1),
    crf: int = 18,
    begin: Fraction | None = None,
    times: Sequence[Fraction] | None = None,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a frame [H, W, 3] uint8 to an MP4, which is complete once the block ends.

    sound_from: a file whose sound is copied (as AAC if MP4 cannot hold it) and cut to the length of the frames.
    sample_aspect: width / height of a pixel.  begin: where the first frame is on the clock of `sound_from`, in seconds;
    None for a file of sound alone, with which the frames begin.
    times: when each frame begins after the first, and when the last one ends, in seconds, one more than there are
    frames; None: evenly, at `fps`.

    The file appears complete or not at all. If writing stops (disk full, unreadable frame), the finished part stays
    beside it, playable, as NAME.partial.mp4. Raises InputError then, and for no frames or another suffix; ValueError
    for frames that differ in size.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path}: videos are written as .mp4")
    partial, whole = path.with_name(f"{path.stem}.partial.mp4"), path.with_name(f".{path.stem}.whole.mp4")
    with contextlib.suppress(OSError):
        partial.unlink()  # left by an earlier run
    try:
        with Encoder(partial, fps, crf, FRAGMENTED, sample_aspect, times) as encoder:
            yield encoder.add
        seconds = times[encoder.count] if times else encoder.count / exact_rate(fps)
        _finish(partial, whole, sound_from, begin, seconds)
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


def encode(path: Path, frames: Iterable[np.ndarray], fps: float | Fraction, crf: int = 18) -> int:
    """Write all `frames` [H, W, 3] uint8 with an `Encoder`; return their number."""
    with Encoder(path, fps, crf) as encoder:
        for frame in frames:
            encoder.add(frame)
    return encoder.count


class Encoder:
    """Sends frames [H, W, 3] uint8, all of one size, to ffmpeg's libx264, converted to and tagged as BT.709.

    times: as in `frame_writer`; they are kept to 1/90000 s.

    A context manager: at its end, also after an error, the frames sent so far are written. Raises InputError, without
    the file's name, if ffmpeg fails or there was no frame; ValueError for frames that differ in size.
    """

    def __init__(
        self,
        path: Path,
        fps: float | Fraction,
        crf: int = 18,
        layout: Sequence[str] = INDEX_FIRST,
        sample_aspect: Fraction = Fraction(1),
        times: Sequence[Fraction] | None = None,
    ) -> None:
        self.path, self.fps, self.crf, self.layout, self.sample_aspect = path, fps, crf, layout, sample_aspect
        self.times = times
        self.count, self.shape, self.process = 0, (), None
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed by __exit__

    def __enter__(self) -> "Encoder":
        return self

    def add(self, frame: np.ndarray) -> None:
        """Append the next frame."""
        if self.process is None:
            self._start(frame)
        data = np.ascontiguousarray(_checked(frame, self.shape)).data
        if self.times and self.count + 1 >= len(self.times):
            raise ValueError(f"more frames than the {len(self.times) - 1} that have a time")
        try:
            if self.times and self.count == 0:
                self.process.stdin.write(raw_frames.header(self.shape[1], self.shape[0]))
            if self.times:
                self.process.stdin.write(raw_frames.before_frame(*self.times[self.count :][:2], data.nbytes))
            self.process.stdin.write(data)
        except BrokenPipeError:
            self._end()  # raises with the reason from ffmpeg's log
            raise InputError(f"ffmpeg ended after {self.count} frames, before the last") from None
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.process is not None:
                _hang_up(self.process)
            if kind is None:
                self._end()
        finally:
            self.errors.close()

    def _start(self, first: np.ndarray) -> None:
        self.shape = np.shape(first)
        height, width = _checked(first, self.shape).shape[:2]
        try:
            make_folder(self.path.parent)
        except OSError as error:
            raise InputError(f"its folder cannot be made ({error.strerror})") from error
        # without tags, players guess different colour matrices
        tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
        filters = f"scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd,{tags}"
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}"]
        raw += ["-framerate", str(exact_rate(self.fps)), "-i", "pipe:0"]
        if self.times:
            raw = ["-f", "matroska", "-i", "pipe:0", *KEEP_TIMES]
        options = ["-vf", f"{filters},setsar={self.sample_aspect}", "-c:v", "libx264", "-crf", str(self.crf)]
        options += ["-preset", "medium", "-pix_fmt", "yuv444p" if width % 2 or height % 2 else "yuv420p", *self.layout]
        arguments = command(*raw, *options, location(self.path))
        self.process = start(arguments, stdin=subprocess.PIPE, stderr=self.errors)

    def _end(self) -> None:
        if self.process is None:
            raise InputError("a video needs at least one frame")
        _hang_up(self.process)
        if self.process.returncode != 0:
            self.errors.seek(0)
            code = self.process.returncode
            reason = killed(code) or complaint(self.errors.read()) or f"ffmpeg ended with {code}"
            raise InputError(f"writing stopped after about {self.count} frames ({reason})")


def _hang_up(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()


def _checked(frame: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the frame if it is [H, W, 3] uint8 of `shape`; ValueError if not."""
    if np.shape(frame) != shape:
        raise ValueError(f"video frames differ in size: {np.shape(frame)} after {shape}")
    if len(shape) != 3 or shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"expected frames [H, W, 3] uint8, got {shape} {frame.dtype}")
    return frame


def _finish(video: Path, whole: Path, sound_from: str | Path | None, begin: Fraction | None, seconds: Fraction) -> None:
    """Copy `video` to `whole` with its index in front, and the sound of `sound_from`, of which `video` begins at
    `begin`, cut where `video` ends after `seconds`."""
    plain = [*source(video), "-map", "0:v:0", "-c", "copy", *INDEX_FIRST, location(whole)]
    attempts = [plain]
    if sound_from is not None and not Path(sound_from).is_dir():
        # of a transport stream, the clock begins at the first packet of what is read: read the pictures as well
        clock = [] if begin is None else ["-map", "1:V:0", "-c", "copy", "-f", "null", "-"]
        begin = begin or Fraction(0)
        both = ["-itsoffset", f"{float(begin):.6f}", *source(video), *source(sound_from, f"{CONTAINERS},{AUDIO}")]
        both += ["-map", "0:v:0", "-map", "1:a?", "-t", f"{float(begin + seconds):.6f}", *INDEX_FIRST]
        attempts = [[*both, "-c", "copy"], [*both, "-c:v", "copy", "-c:a", "aac"]]
        attempts = [[*attempt, location(whole), *clock] for attempt in attempts] + [plain]
    for attempt in attempts:
        done = run(command(*attempt))
        if done.returncode == 0:
            break
        reason = killed(done.returncode) or complaint(done.stderr) or f"ffmpeg ended with {done.returncode}"
        if killed(done.returncode):
            raise InputError(f"the video cannot be finished ({reason})")
    else:
        raise InputError(f"the video cannot be finished ({reason})")
    if attempt is plain and len(attempts) > 1:
        log.warning("%s: its sound could not be kept (%s)", sound_from, reason)


def _keep_whole_boxes(path: Path) -> bool:
    """Cut a fragmented MP4 after its last complete fragment, or remove it if it has none; return whether it stays."""
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
