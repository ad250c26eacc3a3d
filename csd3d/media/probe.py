"""What the pictures of a video file are like, from its header and first frame: colours, transparency, container.

HDR video (PQ or HLG) and wide gamuts become SDR with the primaries of BT.709, which is what the models know and what
the results are tagged as. BT.2408: diffuse white is at 203 cd/m², and SDR values below the knee stay as they are.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from csd3d.errors import InputError
from csd3d.media.ffmpeg import command, killed, run, source

WHITE_NITS = 203  # of diffuse white in HDR
PEAK_NITS = 1000  # of HLG, and of what phones and cameras record in PQ; brighter parts are clipped
KNEE = 0.5  # linear light, of white, below which nothing changes; above, highlights are compressed
HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
WIDE = {"bt2020": "BT.2020", "smpte431": "DCI-P3", "smpte432": "Display P3"}
ALPHA = re.compile(r"^(yuva|rgba|bgra|argb|abgr|gbrap|ya\d|pal8|ayuv|vuya)")
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own decoders leave the transparency out
# the only output of the probe is its first frame, in ffmpeg's words "wrapped_avframe, yuv420p10le(tv, ...), 96x64"
FIRST_FRAME = re.compile(r"Video: wrapped_avframe, (\w+)(?:\(([^)]*)\))?, (\d+)x(\d+)(?: \[SAR (\d+):(\d+))?")


@dataclass(frozen=True)
class Probe:
    """format: ffmpeg's name of the container.  pixels: of the pixel format.  matrix, primaries, transfer: of the
    colours, "unknown" where the file does not say.  odd: a side is odd.  alpha_decoder: needed to see transparency.
    pixel_aspect: a pixel's width / height as displayed."""

    format: str = ""
    pixels: str = ""
    matrix: str = "unknown"
    primaries: str = "unknown"
    transfer: str = "unknown"
    odd: bool = False
    alpha_decoder: str | None = None
    pixel_aspect: Fraction = Fraction(1)

    @property
    def is_transport_stream(self) -> bool:
        return self.format == "mpegts"

    @property
    def has_alpha(self) -> bool:
        """Whether the frames have an alpha channel, which may be opaque throughout."""
        return self.alpha_decoder is not None or ALPHA.match(self.pixels) is not None

    @property
    def is_rgb(self) -> bool:
        return re.match(r"gbr|rgb|bgr|argb|abgr|pal8|x2rgb|x2bgr|0", self.pixels) is not None

    @property
    def colours(self) -> str | None:
        """The name of colours that are to be converted; None if they are SDR in the usual gamut."""
        gamut = WIDE.get(self.primaries)
        if self.transfer in HDR:
            return f"HDR ({HDR[self.transfer]}, {gamut or WIDE['bt2020']})"
        return f"wide-gamut video ({gamut})" if gamut else None

    @property
    def colour_note(self) -> str | None:
        """What becomes of the colours, in words; None if they stay as they are."""
        knee = ", its highlights compressed" if self.transfer in HDR else ""
        return f"{self.colours}, converted to SDR (BT.709){knee}" if self.colours else None

    @property
    def filters(self) -> list[str]:
        """The ffmpeg filters that make the colours SDR BT.709."""
        if self.colours is None:
            return []
        is_hdr = self.transfer in HDR
        guessed = {"color_primaries": (self.primaries, "bt2020"), "color_trc": (self.transfer, "bt709")}
        guessed["colorspace"] = self.matrix, "bt2020nc" if is_hdr or self.primaries == "bt2020" else "bt709"
        if self.is_rgb:
            del guessed["colorspace"]
        missing = [f"{key}={usual}" for key, (given, usual) in guessed.items() if given == "unknown"]
        fill = [f"setparams={':'.join(missing)}"] if missing else []
        # zscale takes no halved colours with odd sides
        whole = ["format=yuva444p16le" if self.has_alpha else "format=yuv444p16le"]
        whole = whole if self.odd and self.pixels.startswith("yuv") else []
        light = "format=gbrapf32le" if self.has_alpha else "format=gbrpf32le"
        linear = [f"zscale=t=linear:npl={WHITE_NITS if is_hdr else 100}", light, "zscale=p=bt709"]
        knee = [f"tonemap=mobius:param={KNEE}:peak={PEAK_NITS / WHITE_NITS:.3f}:desat=0"] if is_hdr else []
        return [
            *fill,
            *whole,
            *linear,
            *knee,
            "zscale=t=bt709:r=pc",
            "format=gbrap" if self.has_alpha else "format=gbrp",
        ]


def probe(path: Path, max_pixels: int) -> Probe:
    """Look at a file's header and first frame. A file that cannot be read gives a `Probe` that knows nothing.

    Raises InputError for HDR video that this ffmpeg cannot convert, and if ffmpeg was killed.
    """
    look = ["-map", "0:V:0", "-frames:v", "1", "-f", "null", "-"]
    done = run(command("-max_pixels", str(max_pixels), *source(path), *look, level="info"))
    if killed(done.returncode):
        raise InputError(f"{path}: ffmpeg could not look at it ({killed(done.returncode)}); start again")
    text = done.stderr
    container, frame = re.search(r"Input #0, ([^,]+),", text), FIRST_FRAME.search(text)
    if frame is None:
        return Probe(container[1] if container else "")
    told = next(
        (part.strip() for part in (frame[2] or "").split(",") if part.count("/") == 2), "unknown/unknown/unknown"
    )
    codec = re.search(r"Stream #0:\d+ -> #0:0 \((\w+)", text)
    decoder = ALPHA_DECODERS.get(codec[1]) if codec and re.search(r"alpha_mode\s*: 1", text, re.IGNORECASE) else None
    odd = bool(int(frame[3]) % 2 or int(frame[4]) % 2)
    aspect = Fraction(int(frame[5]), int(frame[6])) if frame[5] and int(frame[5]) * int(frame[6]) else Fraction(1)
    found = Probe(container[1] if container else "", frame[1], *told.split("/"), odd, decoder, aspect)
    if found.filters:
        _check_filters(path, found)
    return found


def _check_filters(path: Path, found: Probe) -> None:
    """Raise InputError unless ffmpeg has the filters; a user's own ffmpeg (IMAGEIO_FFMPEG_EXE) may lack them."""
    known = run(command("-filters", level="error")).stdout
    missing = [name for name in ("zscale", "tonemap") if not re.search(rf"^ \S+ +{name} ", known, re.MULTILINE)]
    if missing:
        reason = f"{found.colours}, and this ffmpeg has no filter {' and '.join(missing)} to convert it"
        raise InputError(f"{path}: {reason}; unset IMAGEIO_FFMPEG_EXE and install imageio-ffmpeg")
