"""Reading pictures: PNG (8 and 16 bits a channel, exactly), JPEG, WebP, TIFF, BMP, AVIF.

Values are sRGB in [0, 1]: v / 255 for 8-bit files, v / 65535 for 16-bit files; those with another colour profile are
converted. Sizes are checked in the header, before any
pixel is decoded; every error of a decoder becomes one InputError that names the file.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

from csd3d.errors import InputError, one_line
from csd3d.media.colour import Conversion, colour_note, conversion, to_srgb

log = logging.getLogger("csd3d")

HAS_AVIF = "avif" in features.modules and features.check("avif")  # Pillow 11.3 and newer
# some other formats, such as EPS, run external programs
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", *(("AVIF",) if HAS_AVIF else ()))
MAX_PIXELS = 100_000_000  # 1.2 GB as float32
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
OVERSHOOT = (
    1.5  # floats up to here are in [0, 1], with the overshoot of a sharp filter; larger ones are 0..255, 0..65535
)
EXIF_ORIENTATION = 0x0112
_logged: set[str] = set()  # the notes that `channels` has logged
# Pillow keeps only the high byte of 16-bit colours. Unpacking in the other byte order keeps the low byte.
_NATIVE_LOW = "B" if sys.byteorder == "little" else "L"
_LOW_BYTE = {
    f"{mode};16{order}": f"{mode};16{low}"
    for mode in ("RGB", "RGBA")
    for order, low in (("B", "L"), ("L", "B"), ("N", _NATIVE_LOW))
}


@dataclass(frozen=True)
class Picture:
    """A decoded upright picture: `rgb` [H, W, 3] and `alpha` [H, W] or None, float32 in [0, 1], and the file's `bits`
    a channel, 8 or 16; `notes` say what was converted."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    bits: int = 8
    notes: tuple[str, ...] = ()


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a picture and apply its EXIF orientation; the first frame of an animated file.

    Grey becomes rgb. Colours of transparent pixels stay as stored, not multiplied by alpha. Raises InputError naming
    the file if it is missing, a folder, damaged, of another format, or has more than `max_pixels`.
    """
    with opened(path, max_pixels) as image:
        values, bits, notes = _decode(image)
        values = upright(values, orientation(image))
    if not np.isfinite(values).all():
        raise InputError(f"{path}: holds pixels that are not finite")
    alpha = np.ascontiguousarray(values[:, :, -1]) if values.shape[2] in (2, 4) else None
    rgb = values if alpha is None else values[:, :, :-1]
    return Picture(np.ascontiguousarray(np.broadcast_to(rgb, (*rgb.shape[:2], 3))), alpha, bits, notes)


@contextmanager
def opened(path: str | Path, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open a picture, reading its header; every error of the decoder, then or later, becomes one InputError."""
    check_file(path, "a picture")
    bytes_ = os.path.getsize(path)
    if max_pixels is not None and bytes_ > 16 * max_pixels + 2**20:  # some decoders read a whole file at once
        raise InputError(f"{path}: {bytes_} bytes; too many for a picture of at most {max_pixels} pixels (max_pixels)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is `max_pixels`
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of damage, which one line tells if it matters
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if max_pixels is not None and width * height > max_pixels:
                    raise InputError(f"{path}: {width}x{height} pixels; at most {max_pixels} are read (max_pixels)")
                yield image
    except InputError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        expected = f"expected a whole {', '.join(FORMATS)} file"
        reason = f"cannot be decoded ({one_line(error, 160)}); {expected}"
        raise InputError(f"{path}: {modern_format(path) or reason}") from error


def modern_format(path: str | Path) -> str | None:
    """What to do with a HEIC or AVIF file that cannot be decoded; None for other files, and damaged AVIF.

    HEIC is not read, since the libraries that do come with GPL code.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    brands = start[8 : max(16, min(64, int.from_bytes(start[:4], "big")))]
    if start[4:8] != b"ftyp":
        return None
    if b"avif" in brands or b"avis" in brands:
        return None if HAS_AVIF else "AVIF is read with Pillow 11.3 or newer: pip install -U pillow"
    if any(brand in brands for brand in HEIC_BRANDS):
        how = "heif-convert IN.heic OUT.png, or on a Mac sips -s format png IN.heic --out OUT.png"
        return f"HEIC pictures are not read; convert it to PNG or JPEG ({how})"
    return None


def check_file(path: str | Path, what: str) -> None:
    """Raise InputError unless `path` is a file (not a folder, a pipe or a device)."""
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder; expected {what}")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; expected {what}")
    if not os.path.isfile(path):
        raise InputError(f"{path}: not a regular file; expected {what}")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture as displayed, after its EXIF orientation."""
    return image.size[::-1] if orientation(image) >= 5 else image.size


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if it is missing or invalid."""
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def upright(values: np.ndarray, how: int) -> np.ndarray:
    """A view of [H, W, ...], stored with EXIF orientation `how`, as displayed."""
    if how >= 5:
        values = values.swapaxes(0, 1)
    if how in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if how in (2, 3, 6, 7) else values


def channels(image: Image.Image, turned: bool) -> tuple[np.ndarray, int]:
    """Decode an opened picture to [H, W, 1 | 2 | 3 | 4] float32 in [0, 1] (grey, grey + alpha, RGB, RGBA), and its bits
    a channel; `turned` applies the EXIF orientation. What is converted is logged, once for pictures that are alike."""
    values, bits, notes = _decode(image)
    for note in notes:
        _log_once(note, image.filename)
    return upright(values, orientation(image)) if turned else values, bits


def _log_once(note: str, path: str) -> None:
    if note not in _logged:
        _logged.add(note)
        log.warning("%s, and any others alike: %s", path, note)


def _decode(image: Image.Image) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """Return the values as in `channels`, the bits a channel, and what was converted."""
    how, note = conversion(image), colour_note(image)
    notes = (note,) if note else ()
    with _quiet_tiff(image):
        if image.mode == "F":
            return _floats(np.asarray(image)[:, :, None])
        deep = _sixteen_bits(image)
        if deep is not None and (not isinstance(how, Conversion) or how.deep):
            return _with_colour_key(deep, image.info.get("transparency"), how), 16, notes
        if image.mode == "PA" or "transparency" in image.info:
            image = image.convert("RGBA")
        elif image.mode not in ("L", "LA", "RGB", "RGBA") and not (
            image.mode == "CMYK" and isinstance(how, Conversion)
        ):
            image = image.convert("RGB")
        else:
            image.load()
    if isinstance(how, Conversion):
        image = to_srgb(image, how)
    values = np.asarray(image, np.float32) / 255
    return values if values.ndim == 3 else values[:, :, None], 8, notes


@contextmanager
def _quiet_tiff(image: Image.Image) -> Iterator[None]:
    """Keep libtiff from writing its complaints to stderr; what is wrong Pillow raises as well."""
    with ExitStack() as undo:
        if image.format == "TIFF":
            kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            undo.callback(os.close, kept)
            undo.callback(os.close, nowhere)
            undo.callback(os.dup2, kept, 2)
            os.dup2(nowhere, 2)
        yield


def _floats(values: np.ndarray) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """As `_decode`, of floats in [0, 1], [0, 255] or [0, 65535]; what the range is, their largest value tells."""
    most = float(np.max(values, initial=0))
    if most <= OVERSHOOT or not np.isfinite(most):  # the latter is refused later
        return values.clip(0, 1), 16, ()
    top = 255 if most <= 255 else 65535
    if most > top:
        raise ValueError(f"floats up to {most:g}, but 0..1, 0..255 or 0..65535 are expected")
    return (values / top).clip(0, 1).astype(np.float32), 16, (f"its floats go beyond 1: taken as 0..{top}",)


def _sixteen_bits(image: Image.Image) -> np.ndarray | None:
    """[H, W, C] uint16 of a picture stored with 16 bits a channel, else None."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # I: 16 bits in wider storage
        return np.asarray(image)[:, :, None].clip(0, 65535).astype(np.uint16)
    raw = _raw_mode(image.tile[0][3]) if image.tile else ""
    if raw == "LA;16B":
        _unpack_as(image, {raw: "RGBA"})  # four bytes a pixel: high and low of grey, high and low of alpha
        return np.ascontiguousarray(image).view(">u2").astype(np.uint16)
    if raw not in _LOW_BYTE:
        return None
    with Image.open(image.filename, formats=FORMATS) as again:
        _unpack_as(again, _LOW_BYTE)
        low = np.asarray(again)
    return np.asarray(image).astype(np.uint16) << 8 | low


def _raw_mode(arguments: str | tuple) -> str:
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _unpack_as(image: Image.Image, mapping: dict[str, str]) -> None:
    """Load `image` with Pillow, unpacking its stored bytes as another raw mode."""
    for i, tile in enumerate(image.tile):
        raw = mapping[_raw_mode(tile[3])]
        changed = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
        image.tile[i] = tile._replace(args=changed) if hasattr(tile, "_replace") else (*tile[:3], changed)
    image.load()  # not left to numpy, which hides some errors


def _with_colour_key(values: np.ndarray, key: int | tuple | None, how: Conversion | str | None) -> np.ndarray:
    """Convert uint16 to float32 in [0, 1], sRGB; pixels of colour `key` (tRNS of a PNG) become transparent."""
    scaled = values.astype(np.float32) / 65535
    if isinstance(how, Conversion):
        colours = 1 if values.shape[2] <= 2 else 3
        scaled = np.concatenate([how.deep(scaled[:, :, :colours]), scaled[:, :, colours:]], axis=2)
    if key is None or values.shape[2] not in (1, 3):
        return scaled
    shown = (values != np.asarray(key)).any(axis=2, keepdims=True)
    return np.concatenate([scaled, shown.astype(np.float32)], axis=2)
