"""Command lines of ffmpeg (imageio-ffmpeg's binary): local files of known containers only, without a shell.

Every ffmpeg runs in a session of its own, so that Ctrl+C in a terminal, which goes to all processes of the session,
reaches csd3d alone: csd3d decides when ffmpeg ends.
"""

import re
import signal
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio_ffmpeg

# no playlists or scripts (hls, concat, ...): they refer to other files and addresses
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,asf,ogg"
AUDIO = "wav,mp3,aac,flac"
BAD_CLOCK = "non monotonically increasing dts"  # concerns the order of time stamps; the pictures are whole


def command(*arguments: str, level: str = "warning") -> list[str]:
    """ffmpeg with `arguments`: asks nothing, overwrites files, and logs from `level` on, each line with its level."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", "-hide_banner", "-v", f"level+{level}", *arguments]


def start(arguments: Sequence[str], **pipes: Any) -> subprocess.Popen:
    """Start a command line in a session of its own."""
    return subprocess.Popen(arguments, start_new_session=True, **pipes)


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess:
    """Run a command line to its end in a session of its own; its output is text."""
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "errors": "replace"}
    return subprocess.run(arguments, start_new_session=True, **quiet)


def killed(code: int) -> str | None:
    """How ffmpeg was ended from outside, by its exit code; None if it ended by itself.

    After SIGINT or SIGTERM ffmpeg exits with 255, after three of them with 123.
    """
    if code < 0:
        known = {each.value: each.name for each in signal.Signals}
        return f"it was killed by signal {-code} ({known.get(-code, 'unknown')})"
    return "it was interrupted by a signal" if code in (123, 255) else None


def source(path: str | Path, formats: str = CONTAINERS) -> list[str]:
    """Arguments that open `path` as input."""
    return ["-protocol_whitelist", "file,pipe", "-format_whitelist", formats, "-i", location(path)]


def location(path: str | Path) -> str:
    """A path in a form that ffmpeg cannot take for an option or another protocol."""
    return f"file:{Path(path).absolute()}"


def complaint(log: str, ignored: Sequence[str] = ()) -> str | None:
    """The first error, or warning of damage, in a log of `level+warning`, in one line; None without one.

    Lines that contain one of `ignored`, or `BAD_CLOCK`, are passed over.
    """
    lines = [" ".join(line.split()) for line in log.splitlines()]
    lines = [line for line in lines if not any(text in line for text in (*ignored, BAD_CLOCK))]
    for wanted in ("No space left", "[error]", "[fatal]", "corrupt"):
        for line in lines:
            if wanted in line:
                return re.sub(r"\[[^]]*\] ", "", line)[:160].rstrip(".")
    return None


def exact_rate(fps: float | Fraction) -> Fraction:
    """A frame rate as an exact fraction: 29.97002997 is 30000/1001."""
    return Fraction(fps).limit_denominator(1001)
