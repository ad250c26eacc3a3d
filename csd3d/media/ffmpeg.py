"""Command lines of ffmpeg (imageio-ffmpeg's binary): local files of known containers only, without a shell."""

import re
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg

# no playlists or scripts (hls, concat, ...): they refer to other files and addresses
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,asf,ogg"
AUDIO = "wav,mp3,aac,flac"


def command(*arguments: str) -> list[str]:
    """ffmpeg with `arguments`: asks nothing, overwrites files, and logs warnings and errors, each with its level."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", "-hide_banner", "-v", "level+warning", *arguments]


def source(path: str | Path, formats: str = CONTAINERS) -> list[str]:
    """Arguments that open `path` as input."""
    return ["-protocol_whitelist", "file,pipe", "-format_whitelist", formats, "-i", location(path)]


def location(path: str | Path) -> str:
    """A path in a form that ffmpeg cannot take for an option or another protocol."""
    return f"file:{Path(path).absolute()}"


def complaint(log: str) -> str | None:
    """The first error, or warning of damage, in a log of `level+warning`, in one line; None without one."""
    lines = [" ".join(line.split()) for line in log.splitlines()]
    for wanted in ("No space left", "[error]", "[fatal]", "corrupt"):
        for line in lines:
            if wanted in line:
                return re.sub(r"\[[^]]*\] ", "", line)[:160].rstrip(".")
    return None


def exact_rate(fps: float | Fraction) -> Fraction:
    """A frame rate as an exact fraction: 29.97002997 is 30000/1001."""
    return Fraction(fps).limit_denominator(1001)
