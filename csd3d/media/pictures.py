"""Reading and writing pictures: PNG (8 and 16 bits a channel, exactly), JPEG, WebP, TIFF, BMP.

Values are in [0, 1]: v / 255 for 8-bit files, v / 65535 for 16-bit files. Sizes are checked in the header, before any
pixel is decoded; every error of a decoder becomes one InputError that names the file.
"""

import io
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from csd3d.errors import InputError, one_line
from csd3d.files import write_whole

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")  # some others, such as EPS, run external programs
MAX_PIXELS = 100_000_000  # 1.2 GB as float32
EXIF_ORIENTATION = 0x0112
_ENCODERS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
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
    a channel, 8 or 16."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    bits: int = 8


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a picture and apply its EXIF orientation; the first frame of an animated file.

    Grey becomes rgb. Colours of transparent pixels stay as stored, not multiplied by alpha. Raises InputError naming
    the file if it is missing, a folder, damaged, of another format, or has more than `max_pixels`.
    """
    with opened(path, max_pixels) as image:
        values, bits = channels(image, turned=True)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: holds pixels that are not finite")
    alpha = np.ascontiguousarray(values[:, :, -1]) if values.shape[2] in (2, 4) else None
    rgb = values if alpha is None else values[:, :, :-1]
    return Picture(np.ascontiguousarray(np.broadcast_to(rgb, (*rgb.shape[:2], 3))), alpha, bits)


@contextmanager
def opened(path: str | Path, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open a picture, reading its header; every error of the decoder, then or later, becomes one InputError."""
    check_file(path, "a picture")
    bytes_ = os.path.getsize(path)
    if max_pixels is not None and bytes_ > 16 * max_pixels + 2**20:  # some decoders read a whole file at once
        raise InputError(f"{path}: {bytes_} bytes; too many for a picture of at most {max_pixels} pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is `max_pixels`
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if max_pixels is not None and width * height > max_pixels:
                    raise InputError(f"{path}: {width}x{height} pixels; at most {max_pixels} are read")
                yield image
    except InputError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = one_line(error, 160)
        raise InputError(f"{path}: cannot be decoded ({reason}); expected a whole {', '.join(FORMATS)} file") from error


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
    a channel; `turned` applies the EXIF orientation."""
    values, bits = _decode(image)
    return upright(values, orientation(image)) if turned else values, bits


def _decode(image: Image.Image) -> tuple[np.ndarray, int]:
    if image.mode == "F":
        return np.asarray(image)[:, :, None].clip(0, 1), 16
    deep = _sixteen_bits(image)
    if deep is not None:
        return _with_colour_key(deep, image.info.get("transparency")), 16
    if image.mode == "PA" or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")
    values = np.asarray(image, np.float32) / 255
    return values if values.ndim == 3 else values[:, :, None], 8


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


def _with_colour_key(values: np.ndarray, key: int | tuple | None) -> np.ndarray:
    """Convert uint16 to float32 in [0, 1]; pixels of colour `key` (tRNS of a PNG) become transparent."""
    scaled = values.astype(np.float32) / 65535
    if key is None or values.shape[2] not in (1, 3):
        return scaled
    shown = (values != np.asarray(key)).any(axis=2, keepdims=True)
    return np.concatenate([scaled, shown.astype(np.float32)], axis=2)


# ------------------------------------------------------------------------------------------------------------- writing


def write_image(path: str | Path, rgb: np.ndarray, alpha: np.ndarray | None = None, bits: int = 8) -> None:
    """Write `rgb` [H, W, 3] and `alpha` [H, W], floats in [0, 1], as PNG (`bits` 8 or 16), JPEG or WebP by the suffix;
    the file appears complete or not at all. PNG and WebP are lossless.

    Raises InputError for another suffix, transparency in a JPEG, 16 bits outside PNG, or a full disk; ValueError for
    another shape.
    """
    path = Path(path)
    kind = _ENCODERS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: pictures are written as {', '.join(_ENCODERS)}")
    if kind == "JPEG" and alpha is not None:
        raise InputError(f"{path}: JPEG holds no transparency; write a .png or .webp")
    if bits not in (8, 16) or (bits == 16 and kind != "PNG"):
        raise InputError(f"{path}: {bits} bits a channel; 8, or 16 in a .png")
    data = _encoded(_levels(rgb, alpha, bits), kind)
    try:
        write_whole(path, lambda partial: partial.write_bytes(data))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _levels(rgb: np.ndarray, alpha: np.ndarray | None, bits: int) -> np.ndarray:
    """[H, W, 3 | 4] uint8 or uint16, rounded; NaN becomes 0."""
    rgb = np.asarray(rgb, np.float32)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or (alpha is not None and np.shape(alpha) != rgb.shape[:2]):
        raise ValueError(f"expected rgb [H, W, 3] and alpha [H, W], got {rgb.shape} and {np.shape(alpha)}")
    if alpha is not None:
        rgb = np.concatenate([rgb, np.asarray(alpha, np.float32)[:, :, None]], axis=2)
    top = 2**bits - 1
    return np.round(np.nan_to_num(rgb).clip(0, 1) * top).astype(np.uint16 if bits == 16 else np.uint8)


def _encoded(levels: np.ndarray, kind: str) -> bytes:
    if levels.dtype == np.uint16:
        return _png16(levels)
    buffer = io.BytesIO()
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}
    Image.fromarray(levels).save(buffer, kind, **options.get(kind, {}))
    return buffer.getvalue()


def _png16(levels: np.ndarray) -> bytes:
    """A PNG of [H, W, 3 | 4] uint16, which Pillow cannot write; each row stores its difference from the one above."""
    height, width, count = levels.shape
    rows = levels.astype(">u2").view(np.uint8).reshape(height, -1)
    rows = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    data = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[count], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
