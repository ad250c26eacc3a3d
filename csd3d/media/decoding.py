"""Decoding a video file once, with ffmpeg, to raw rgb frames in a temporary folder."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from csd3d.errors import InputError
from csd3d.media.ffmpeg import command, complaint, killed, location, source, start
from csd3d.media.probe import Probe
from csd3d.media.refusals import CONTAINERS, nothing_found
from csd3d.media.timing import Timing, read_timing

EXPECTED = f"{CONTAINERS} or a folder of frames"
SHARE_OF_ROOM = 0.9  # of the room in TMPDIR that the frames may take
# what the demuxer of a transport stream says where two recordings were joined, or where a packet was lost
JOINTS = ("Packet corrupt", "corrupt input packet")
# pictures as they are; then the times of the decoded ones, in microseconds
STAMPS = ("settb=AVTB", "metadata=mode=add:key=csd3d:value=1", "metadata=mode=print:file=stamps")


@dataclass(frozen=True)
class Limits:
    """What a video may have: frames, pixels a frame, and GiB of decoded frames in all; each is a key of the jobs."""

    frames: int
    pixels: int
    gib: float


@dataclass(frozen=True)
class Decoded:
    """`count` frames of `height` x `width`, raw rgb in the file `frames` of the folder; the first fault found, or None;
    whether any pixel was transparent."""

    count: int
    height: int
    width: int
    timing: Timing
    fault: str | None
    transparent: bool


def decode(path: Path, folder: Path, probe: Probe, limits: Limits) -> Decoded:
    """Decode the pictures of `path` into `folder`.

    Of a file that ends early or is damaged the frames before that. Raises InputError if there is none, if there are
    more than the limits allow, and if ffmpeg was killed, as the rest of the video would be missing.
    """
    if probe.is_transport_stream:  # where recordings are joined, whole packets are marked as corrupt
        found = _decode(path, folder, probe, limits, keep_marked=True)
        if found.fault is None:
            return found
    return _decode(path, folder, probe, limits, keep_marked=False)


def _decode(path: Path, folder: Path, probe: Probe, limits: Limits, keep_marked: bool) -> Decoded:
    """Decode once; keep_marked: packets that the demuxer marks as corrupt are decoded nevertheless."""
    with Decoder(_arguments(path, folder, probe, limits, keep_marked), folder) as decoder:
        stored = _store(decoder.pictures(), folder / "frames", path, limits)
        ended = decoder.end()
    if stored.changed is None:
        check_end(path, ended, stored.count)
    fault = stored.changed or fault_in(ended, JOINTS if keep_marked else ())
    count = stored.count
    if fault and count > 1 and probe.format == "gif":
        count -= 1  # ffmpeg returns the last frame even if it is incomplete
    if count == 0:
        raise nothing_found(path, ended.log, fault, EXPECTED, "raise max_pixels")
    packets, (height, width) = (folder / "packets").read_text(), stored.size
    timing = read_timing(packets, (folder / "stamps").read_text(), count, damaged=bool(fault))
    return Decoded(count, height, width, timing, fault, stored.transparent)


def _arguments(path: Path, folder: Path, probe: Probe, limits: Limits, keep_marked: bool) -> list[str]:
    """ffmpeg's command line: frames to stdout, their times to `stamps`, and a listing of all packets to `packets`.

    The sound is listed too: the clock begins at the first packet of any stream that is used.
    """
    exact = ["-sws_flags", "bicubic+accurate_rnd+full_chroma_int"]
    pictures = picture_output(probe, [*STAMPS, *probe.filters], "rgb24", exact)
    packets = ["-map", "0:V:0", "-map", "0:a?", "-fps_mode", "passthrough", "-c", "copy", "-f", "framecrc"]
    opened = film_input(path, probe, limits.pixels, keep_marked)
    return command(*opened, *pictures, *packets, location(folder / "packets"))


def film_input(path: Path, probe: Probe, max_pixels: int, keep_marked: bool = False) -> list[str]:
    """ffmpeg's arguments that open a film; keep_marked: as in `_decode`."""
    opened = ["-max_pixels", str(max_pixels)] + ([] if keep_marked else ["-fflags", "+discardcorrupt"])
    opened += ["-c:V", probe.alpha_decoder] if probe.alpha_decoder else []
    return [*opened, *source(path)]


def picture_output(probe: Probe, filters: list[str], pixels: str, options: Sequence[str] = ()) -> list[str]:
    """ffmpeg's arguments that write the frames to stdout, through `filters`, as `pixels`: "gray" or "rgb24".

    Those of films with an alpha channel come as rgba.
    """
    kind, codec = ("rgba", "pam") if probe.has_alpha else (pixels, {"gray": "pgm", "rgb24": "ppm"}[pixels])
    output = ["-map", "0:V:0", "-fps_mode", "passthrough", "-vf", ",".join(filters), "-pix_fmt", kind, "-c:v", codec]
    return [*output, *options, "-f", "image2pipe", "pipe:1"]


@dataclass(frozen=True)
class Ended:
    """How ffmpeg ended: its exit code, and what it said."""

    code: int
    log: str


class Decoder:
    """ffmpeg at work, which writes pictures to its stdout. It is killed when the context is left before its `end`."""

    def __init__(self, arguments: list[str], folder: Path | None = None) -> None:
        self.arguments, self.folder = arguments, folder

    def __enter__(self) -> "Decoder":
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        try:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": self._log}
            self._process = start(self.arguments, cwd=self.folder, **pipes)
        except BaseException:
            self._log.close()
            raise
        return self

    def pictures(self) -> Iterator[np.ndarray]:
        """The pictures as they come, as in `read_pictures`."""
        return read_pictures(self._process.stdout)

    def end(self) -> Ended:
        """Read no more, and wait for ffmpeg to end."""
        self._process.stdout.close()
        code = self._process.wait()
        self._log.seek(0)
        return Ended(code, self._log.read(2**20))

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()


def check_end(path: Path, ended: Ended, count: int) -> None:
    """Raise InputError if ffmpeg was killed after `count` frames, as the rest of the film would be missing."""
    if how := killed(ended.code):
        raise InputError(
            f"{path}: decoding stopped after {count} frames, as ffmpeg did not end by itself ({how}); "
            "start again, with more memory if that ran out"
        )


def fault_in(ended: Ended, ignored: Sequence[str] = ()) -> str | None:
    """The first fault of the file that ffmpeg found, or None."""
    return complaint(ended.log, ignored) or (f"ffmpeg ended with {ended.code}" if ended.code else None)


def early_end(fault: str, count: int) -> str:
    """What becomes of a film with a fault."""
    return f"ends early or is damaged ({fault}); its first {count} frames"


# ------------------------------------------------------------------------------------------------------------- storing


@dataclass
class Stored:
    """What was written: `count` frames of `size` (height, width); `changed`: why it ended early, or None."""

    count: int = 0
    size: tuple[int, int] = (0, 0)
    changed: str | None = None
    transparent: bool = False


def _store(pictures: Iterable[np.ndarray], file: Path, path: Path, limits: Limits) -> Stored:
    """Write frames to `file`, over white."""
    done, room = Stored(), SHARE_OF_ROOM * free_bytes(file.parent)
    try:
        with file.open("wb") as out:
            for frame in pictures:
                height, width, depth = frame.shape
                done.size = (height, width) if done.count == 0 else done.size
                if (height, width) != done.size:
                    done.changed = f"its size changes from {done.size[1]}x{done.size[0]} to {width}x{height}"
                    return done
                if done.count == limits.frames:
                    raise InputError(f"{path}: more than {limits.frames} frames; cut it, or raise max_frames")
                _check_room(path, 3 * height * width * (done.count + 1), limits.gib * 2**30, room)
                if depth == 4:
                    done.transparent |= bool(frame[:, :, 3].min() < 255)
                    frame = over_white(frame)
                out.write(frame.data)
                done.count += 1
    except OSError as error:
        hint = "set TMPDIR to a folder with more room"
        raise InputError(f"{path}: its frames can't be kept in {file.parent} ({error.strerror}); {hint}") from error
    return done


def free_bytes(folder: Path) -> int:
    """The bytes that may still be written in a folder."""
    return shutil.disk_usage(folder).free


def _check_room(path: Path, bytes_: int, allowed: float, room: float) -> None:
    """Raise InputError if the decoded frames take more than they may."""
    if bytes_ > min(allowed, room):
        most = f"its decoded frames take more than {min(allowed, room) / 2**30:.3g} GiB"
        smaller = "cut it or make its picture smaller"
        if allowed <= room:
            raise InputError(f"{path}: {most}; {smaller}, or raise max_decoded_gib")
        where = f"{100 * SHARE_OF_ROOM:.0f} % of the room in {tempfile.gettempdir()}"
        raise InputError(f"{path}: {most}, {where}; {smaller}, or set TMPDIR to a folder with more room")


def over_white(frame: np.ndarray) -> np.ndarray:
    """[H, W, 4] uint8, colours not multiplied by alpha, over white: [H, W, 3] uint8, rounded."""
    alpha = frame[:, :, 3:].astype(np.uint16)
    return ((frame[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def read_pictures(stream: IO[bytes]) -> Iterator[np.ndarray]:
    """Yield each complete picture, [H, W, 1 | 3 | 4] uint8, of a stream of binary PGM, PPM or PAM (rgba)."""
    while (kind := stream.readline()) in (b"P5\n", b"P6\n", b"P7\n"):
        if kind != b"P7\n":
            width, height, depth = *map(int, stream.readline().split()), 1 if kind == b"P5\n" else 3
            stream.readline()
        else:
            fields = dict(line.split(maxsplit=1) for line in iter(stream.readline, b"ENDHDR\n") if line.strip())
            width, height, depth = (int(fields[key]) for key in (b"WIDTH", b"HEIGHT", b"DEPTH"))
        data = stream.read(depth * width * height)
        if len(data) < depth * width * height:
            return
        yield np.frombuffer(data, np.uint8).reshape(height, width, depth)
