"""Decoding a video file once, with ffmpeg, to raw rgb frames in a temporary folder."""

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np

from csd3d.errors import InputError
from csd3d.media.cache import free_bytes
from csd3d.media.ffmpeg import command, complaint, killed, location, source, start
from csd3d.media.probe import Probe
from csd3d.media.timing import Timing, header, read_timing

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
    pixel_aspect: Fraction
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
    with open(folder / "log", "w+", errors="replace") as errors:
        arguments = _arguments(path, folder, probe, limits, keep_marked)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        process = start(arguments, cwd=folder, **pipes)
        try:
            with process.stdout:
                stored = _store(process.stdout, folder / "frames", path, limits)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        log = errors.read(2**20)
    if stored.changed is None and killed(code):
        raise InputError(
            f"{path}: decoding stopped after {stored.count} frames, as ffmpeg did not end by itself ({killed(code)}); "
            "start again, with more memory if that ran out"
        )
    fault = stored.changed or complaint(log, JOINTS if keep_marked else ()) or (code and f"ffmpeg ended with {code}")
    count = stored.count
    if fault and count > 1 and probe.format == "gif":
        count -= 1  # ffmpeg returns the last frame even if it is incomplete
    if count == 0:
        raise InputError(f"{path}: {_nothing(log, fault or 'it holds no pictures')}")
    packets, (height, width) = (folder / "packets").read_text(), stored.size
    timing = read_timing(packets, (folder / "stamps").read_text(), count, damaged=bool(fault))
    aspect = header(packets, "sar") or Fraction(1)
    aspect = aspect if f" {width}x{height}" in packets else 1 / aspect  # a phone video, turned upright
    return Decoded(count, height, width, timing, aspect, fault or None, stored.transparent)


def _arguments(path: Path, folder: Path, probe: Probe, limits: Limits, keep_marked: bool) -> list[str]:
    """ffmpeg's command line: frames to stdout, their times to `stamps`, and a listing of all packets to `packets`.

    The sound is listed too: the clock begins at the first packet of any stream that is used.
    """
    opened = ["-max_pixels", str(limits.pixels)] + ([] if keep_marked else ["-fflags", "+discardcorrupt"])
    opened += ["-c:V", probe.alpha_decoder] if probe.alpha_decoder else []
    pictures = ["-map", "0:V:0", "-fps_mode", "passthrough"]
    pictures += ["-vf", ",".join([*STAMPS, *probe.filters])]
    pictures += ["-pix_fmt", "rgba" if probe.has_alpha else "rgb24", "-c:v", "pam" if probe.has_alpha else "ppm"]
    pictures += ["-sws_flags", "bicubic+accurate_rnd+full_chroma_int", "-f", "image2pipe", "pipe:1"]
    packets = ["-map", "0:V:0", "-map", "0:a?", "-fps_mode", "passthrough", "-c", "copy", "-f", "framecrc"]
    return command(*opened, *source(path), *pictures, *packets, location(folder / "packets"))


def _nothing(log: str, fault: str) -> str:
    """Why there is no frame."""
    expected = "expected MP4, MOV, MKV, WebM, AVI, GIF or a folder of frames"
    if "matches no streams" in log:
        fault = "it holds no video, only sound or a cover picture"
    return f"no frame can be decoded ({fault}); {expected}"


# ------------------------------------------------------------------------------------------------------------- storing


@dataclass
class Stored:
    """What was written: `count` frames of `size` (height, width); `changed`: why it ended early, or None."""

    count: int = 0
    size: tuple[int, int] = (0, 0)
    changed: str | None = None
    transparent: bool = False


def _store(stream: IO[bytes], file: Path, path: Path, limits: Limits) -> Stored:
    """Write the frames of a stream to `file`, over white."""
    done, room = Stored(), SHARE_OF_ROOM * free_bytes(file.parent)
    try:
        with file.open("wb") as out:
            for frame in read_pictures(stream):
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
