"""Why a file gives no frames, in csd3d's own words, and what to do about it."""

import re
from pathlib import Path

from csd3d.errors import InputError
from csd3d.media.pictures import check_file, modern_format

CONTAINERS = "MP4, MOV, MKV, WebM, AVI, GIF"
# patterns of the first bytes of pictures; a GIF, and an animated PNG, which ffmpeg reads as such, are films
PICTURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    rb"II\*\0": "TIFF",
    rb"MM\0\*": "TIFF",
    b"BM....\0\0\0\0": "BMP",
    b"RIFF....WEBP": "WebP",
}
SOUNDS = {b"RIFF....WAVE": "WAV", b"ID3": "MP3", b"fLaC": "FLAC"}
# of the first unit in a video stream without a container, after the start code 00 00 01
BARE = {0x67: "H.264", 0x27: "H.264", 0x09: "H.264", 0x40: "H.265", 0x46: "H.265", 0xB3: "MPEG-2", 0xB0: "MPEG-4"}
BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # with which MP4 and MOV begin
TOO_LARGE = re.compile(r"Picture size (\d+)x(\d+) exceeds specified max pixel count (\d+)")
SMALLER = "make its picture smaller (ffmpeg -i FILM -vf scale=1920:-2 SMALLER.mp4)"


def check_film(path: Path, what: str) -> None:
    """Raise InputError unless `path` is a file that may hold a film; `what` is expected, for messages.

    HEIC pictures are refused, as ffmpeg would take one of the tiles of which they consist for a frame.
    """
    check_file(path, what)
    if reason := modern_format(path):
        raise InputError(f"{path}: {reason}")


def nothing_found(path: Path, log: str, fault: str | None, what: str, remedy: str | None) -> InputError:
    """The error for a file of which no frame was decoded, with ffmpeg's `log` and the first `fault` in it, if any.

    remedy: what else helps against too many pixels, such as a key to raise.
    """
    if large := TOO_LARGE.search(log):
        size = f"{large[1]}x{large[2]} pixels a frame; at most {large[3]} are read"
        return InputError(f"{path}: {size}: {SMALLER}{f', or {remedy}' if remedy else ''}")
    return InputError(f"{path}: no frame can be decoded ({_reason(path, log, fault)}); expected {what}")


def _reason(path: Path, log: str, fault: str | None) -> str:
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "the file is empty"
    if kind := _kind(start, PICTURES):
        return f"it is a picture, {kind}, not a film"
    if kind := _bare(start):
        return f"it is {kind} without a container; put it in one: ffmpeg -framerate 30 -i {path.name} -c copy FILM.mp4"
    if _kind(start, SOUNDS) or "matches no streams" in log:
        return "it holds no video, only sound or a cover picture"
    if "moov atom not found" in log:
        broken = "it breaks off before its index (moov): copy it again from the camera"
        return broken if start[4:8] in BOXES else "it is no video"
    if "not on whitelist" in log or "Invalid data found when processing input" in log:
        return "it is damaged, or no video of a format that is read"
    return fault or "it holds no pictures"


def _kind(start: bytes, kinds: dict[bytes, str]) -> str | None:
    return next((name for magic, name in kinds.items() if re.match(magic, start, re.DOTALL)), None)


def _bare(start: bytes) -> str | None:
    code = start.find(b"\0\0\1", 0, 4)
    return BARE.get(start[code + 3]) if code in (0, 1) and len(start) > code + 3 else None
