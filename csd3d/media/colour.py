"""Colour profiles (ICC) of pictures: colours become sRGB, which is what the models know and what results are tagged as.

8 bits a channel go through LittleCMS (Pillow's ImageCms). It takes no 16-bit RGB there, so that those are computed here
from the curves and the matrix of the profile (ICC.1:2022, sections 10.6, 10.18, F.3).
"""

import functools
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

SAME = 2  # of 255: a profile that changes no colour by more is sRGB itself, of which there are many versions
ROWS = 256  # converted together
MODES = {"L": ("L", "LA", "1"), "RGB": ("RGB", "RGBA", "RGBX", "P", "PA"), "CMYK": ("CMYK",)}
SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}
SRGB_FROM_XYZ = np.linalg.inv(  # of the D50 white to which profiles refer
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
).astype(np.float32)
Curve = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Conversion:
    """From a profile to sRGB. `eight` converts an image of mode L, RGB or CMYK to RGB; `deep` [H, W, 1 | 3] float32 in
    [0, 1] to [H, W, 3], None where only `eight` can."""

    name: str
    eight: Callable[[Image.Image], Image.Image]
    deep: Callable[[np.ndarray], np.ndarray] | None


def conversion(image: Image.Image) -> Conversion | str | None:
    """How an opened picture's colours become sRGB; None if they are; a text, why they stay as they are."""
    data = image.info.get("icc_profile")
    mode = next((mode for mode, alike in MODES.items() if image.mode in alike), None)
    mode = "L" if image.mode.startswith("I") else mode  # 16-bit grey
    return _conversion(data, mode) if isinstance(data, bytes) and data and mode else None


def colour_note(image: Image.Image) -> str | None:
    """What becomes of an opened picture's colours, in words; None if they stay as they are."""
    found = conversion(image)
    return f'its colours are converted from "{found.name}" to sRGB' if isinstance(found, Conversion) else found


@functools.lru_cache(maxsize=8)
def _conversion(data: bytes, mode: str) -> Conversion | str | None:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space
        if space != SPACES[mode]:
            return f"its colour profile is for {_printable(space)}, not for {mode}; it is left out"
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
        name = _printable(ImageCms.getProfileDescription(profile)) or "an unnamed profile"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return f"its colour profile cannot be used ({_printable(str(error))}); it is left out"
    eight = lambda image: ImageCms.applyTransform(image, transform)  # noqa: E731
    if mode != "CMYK":
        grid = _colour_grid(mode)
        if np.abs(np.asarray(eight(grid), int) - np.asarray(grid.convert("RGB"), int)).max() <= SAME:
            return None
    return Conversion(name, eight, _deep(data, mode))


def _printable(text: str) -> str:
    """One short line of a text from a file."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())[:80]


def _colour_grid(mode: str) -> Image.Image:
    """A picture of colours all over the range."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3))


def to_srgb(image: Image.Image, how: Conversion) -> Image.Image:
    """A picture of 8 bits a channel as RGB or RGBA; alpha stays as it is."""
    colours = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("L", "LA") else "RGB"
    converted = how.eight(image.convert(colours) if image.mode != colours else image)
    if image.mode in ("LA", "RGBA"):
        converted.putalpha(image.getchannel("A"))
    return converted


# ---------------------------------------------------------------------------------------------------------- in 16 bits


def _deep(data: bytes, mode: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """The conversion of a profile of curves and a matrix; None for one of tables."""
    try:
        tags = _tags(data)
        if any(name in tags for name in (b"A2B0", b"A2B1")) or mode == "CMYK":
            return None
        if mode == "L":
            grey = _curve(tags[b"kTRC"])
            return lambda values: np.repeat(_encoded(grey(values)), 3, axis=2)
        curves = [_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")]
        columns = [struct.unpack(">3i", tags[name][8:20]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    except (KeyError, struct.error, ValueError, IndexError):
        return None
    matrix = SRGB_FROM_XYZ @ (np.array(columns, np.float32).T / 65536)

    def convert(values: np.ndarray) -> np.ndarray:
        result = np.empty_like(values)
        for i in range(0, len(values), ROWS):
            linear = np.stack([curve(values[i : i + ROWS, :, c]) for c, curve in enumerate(curves)], -1)
            result[i : i + ROWS] = _encoded(linear @ matrix.T)
        return result

    return convert


def _tags(data: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack(">I", data[128:132])
    entries = (struct.unpack(">4sII", data[132 + 12 * i : 144 + 12 * i]) for i in range(min(count, 100)))
    return {name: data[at : at + length] for name, at, length in entries}


def _curve(tag: bytes) -> Curve:
    """The function from a stored value to linear light, both in [0, 1], of a `curv` or `para` tag."""
    if tag[:4] == b"curv":
        (count,) = struct.unpack(">I", tag[8:12])
        if count == 0:
            return lambda x: x
        if count == 1:
            gamma = struct.unpack(">H", tag[12:14])[0] / 256
            return lambda x: x**gamma
        table = np.frombuffer(tag, ">u2", count, 12).astype(np.float32) / 65535
        places = np.linspace(0, 1, count, dtype=np.float32)
        return lambda x: np.interp(x, places, table).astype(np.float32)
    if tag[:4] != b"para":
        raise ValueError("no curve")
    kind = struct.unpack(">H", tag[8:10])[0]
    given = [
        value / 65536 for value in struct.unpack(f">{(1, 3, 4, 5, 7)[kind]}i", tag[12:][: 4 * (1, 3, 4, 5, 7)[kind]])
    ]
    g, a, b, c, d, e, f = [*given, *(1, 1, 0, 0, 0, 0, 0)[len(given) :]]
    if kind in (1, 2):  # (a x + b)^g + c above −b / a, else c
        c, d, e, f = 0, -b / a, c, c
    return lambda x: np.where(x >= d, np.maximum(a * x + b, 0) ** g + e, c * x + f).astype(np.float32)


def _encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB values in [0, 1] of linear light; what lies outside is clipped."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- writing


@functools.cache
def srgb_profile() -> bytes:
    """An sRGB profile, the same bytes always: without the date at which it was made."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + data[36:]
