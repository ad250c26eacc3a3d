"""How ffmpeg (imageio-ffmpeg's binary) is run: no shell, one local file of a known container, nothing it points to."""

import re
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg

# neither playlists nor scripts (hls, concat, ...), which name other files and addresses
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,asf,ogg"
AUDIO = "wav,mp3,aac,flac"


def command(*arguments: str) -> list[str]:
    """ffmpeg with `arguments`; it asks nothing, overwrites, and says only what went wrong, each line with its level."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", "-hide_banner", "-v", "level+warning", *arguments]


def source(path: str | Path, formats: str = CONTAINERS) -> list[str]:
    """The arguments that open `path` as input."""
    return ["-protocol_whitelist", "file,pipe", "-format_whitelist", formats, "-i", location(path)]


def location(path: str | Path) -> str:
    """A path in the form that ffmpeg never takes for an option or another protocol."""
    return f"file:{Path(path).absolute()}"


def complaint(log: str) -> str | None:
    """What a log of `level+warning` says went wrong, in one line, or None; warnings of damage count, others don't."""
    lines = [" ".join(line.split()) for line in log.splitlines()]
    for wanted in ("No space left", "[error]", "[fatal]", "corrupt"):
        for line in lines:
            if wanted in line:
                return re.sub(r"\[[^]]*\] ", "", line)[:160].rstrip(".")
    return None


def exact_rate(fps: float | Fraction) -> Fraction:
    """A frame rate as the fraction that it means: 29.97002997 is 30000/1001."""
    return Fraction(fps).limit_denominator(1001)
