"""When the frames of a video are shown: its rate, the time of each frame if they are uneven, and where it begins.

Times are exact fractions of a second on the clock on which ffmpeg gives the file's pictures and sound, so that a result
with the same times fits the same sound.
"""

import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from csd3d.media.ffmpeg import exact_rate

DEFAULT_FPS = Fraction(24)  # for frames without times
EVEN = Fraction(
    5, 1000
)  # seconds that a frame may be away from an even grid; sound out of step is noticed from 20 ms on
TICKS = Fraction(3, 2)  # or as many units of the file's own clock, which may be coarse (10 ms in a GIF)
# but no more than this: the unit of an AVI's clock is a whole frame, and a dropped frame is one unit
COARSEST = Fraction(15, 1000)
LONGEST = 3  # a damaged file's clock is not trusted if it makes the video this much longer


@dataclass(frozen=True)
class Timing:
    """`rate`: mean frames a second.  start: time of the first frame.  times: when each frame begins after the first,
    and, as one more, when the last one ends; None if they are even.  has_sound: whether the file holds sound."""

    rate: Fraction
    start: Fraction = Fraction(0)
    times: tuple[Fraction, ...] | None = None
    has_sound: bool = False

    @property
    def remark(self) -> str | None:
        """In words, how unequal the frames are; None if they are even."""
        if self.times is None:
            return None
        steps = [float(1000 * (after - before)) for before, after in itertools.pairwise(self.times)]
        return f"frames last between {min(steps):.0f} and {max(steps):.0f} ms"


def read_timing(packets: str, stamps: str, count: int, damaged: bool) -> Timing:
    """Return the timing of `count` decoded frames.

    packets: ffmpeg's framecrc listing, of the pictures first: a header "#tb 0: 1/30000", rows "0, dts, pts, duration,
    size, crc".  stamps: lines "frame:0 pts:41708 ..." of the decoded frames, pts in microseconds.  In a `damaged`
    stream, gaps do not count for the rate.
    """
    rate, last = _rate(packets, damaged)
    found = re.findall(r"^frame:\d+\s+pts:(-?\d+|\S+)", stamps, re.MULTILINE)[:count]
    sound = "#media_type 1: audio" in packets
    if len(found) < count or not all(text.strip("-").isdigit() for text in found):
        return Timing(rate, has_sound=sound)
    shown = [Fraction(int(text), 10**6) for text in found]
    start = max(shown[0], Fraction(0))
    if any(after < before for before, after in itertools.pairwise(shown)):  # no clock that can be kept
        return Timing(rate, start, None, sound)
    times = _increasing([time - shown[0] for time in shown])
    times.append(times[-1] + (last or 1 / rate))
    tick = header(packets, "tb") or Fraction(0)
    away = max((abs(time - i / rate) for i, time in enumerate(times[:-1])), default=0)
    if away <= max(EVEN, min(TICKS * tick, COARSEST)) or (damaged and times[-1] > LONGEST * count / rate):
        return Timing(rate, start, None, sound)
    return Timing(rate, start, tuple(times), sound)


def _increasing(times: Sequence[Fraction]) -> list[Fraction]:
    """Times of which each is at least a millisecond after the one before."""
    result = list(times[:1])
    for time in times[1:]:
        result.append(max(time, result[-1] + Fraction(1, 1000)))
    return result


def _rate(packets: str, damaged: bool) -> tuple[Fraction, Fraction | None]:
    """The mean rate, and how long the last frame is shown, in seconds, if that is known."""
    tick = header(packets, "tb")
    rows = [row.split(",")[1:4] for row in packets.splitlines() if row.startswith("0,")]
    times = sorted((int(pts if pts.strip("- ").isdigit() else dts), int(length)) for dts, pts, length in rows)
    if tick is None or not times:
        return DEFAULT_FPS, None
    steps = [after - before for (before, _), (after, _) in itertools.pairwise(times)]
    usual = statistics.median(steps) if steps else 0
    if damaged:
        steps = [step for step in steps if step <= 1.5 * usual]
    last = times[-1][1] if times[-1][1] > 0 else round(usual)
    return frame_rate(len(steps) + 1, sum(steps) + last, tick) or DEFAULT_FPS, last * tick or None


def header(packets: str, key: str) -> Fraction | None:
    """A fraction in the header of the listing, of the pictures."""
    found = re.search(rf"^#{key} 0: (\d+)/(\d+)$", packets, re.MULTILINE)
    return Fraction(int(found[1]), int(found[2])) if found and int(found[1]) and int(found[2]) else None


def frame_rate(count: int, ticks: int, tick: Fraction) -> Fraction | None:
    """Frames a second of `count` frames that last `ticks` of `tick` seconds in all, rounded to a common rate (whole, or
    whole × 1000/1001) within one tick; None if they last no time."""
    if ticks <= 0:
        return None
    measured = Fraction(count) / (ticks * tick)
    near = [Fraction(round(measured)), Fraction(1000 * round(measured * 1001 / 1000), 1001)]
    misses = [(abs(count / (rate * tick) - ticks), rate) for rate in near if rate > 0]
    miss, rate = min(misses, default=(2, measured))
    return rate if miss <= 1 else exact_rate(measured)
