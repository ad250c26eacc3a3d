"""Writing pictures: PNG (8 and 16 bits a channel), JPEG and WebP, from floats in [0, 1], tagged as sRGB."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from csd3d.errors import InputError
from csd3d.files import write_whole
from csd3d.media.colour import srgb_profile

SRGB_CHUNK = b"sRGB", b"\0"  # of a PNG: its colours are sRGB
ENCODERS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def write_image(path: str | Path, rgb: np.ndarray, alpha: np.ndarray | None = None, bits: int = 8) -> None:
    """Write `rgb` [H, W, 3] and `alpha` [H, W], floats in [0, 1], as PNG (`bits` 8 or 16), JPEG or WebP by the suffix;
    the file appears complete or not at all. PNG and WebP are lossless. The file is tagged as sRGB.

    Raises InputError for another suffix, transparency in a JPEG, 16 bits outside PNG, or a full disk; ValueError for
    another shape.
    """
    path = Path(path)
    kind = ENCODERS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: pictures are written as {', '.join(ENCODERS)}")
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
    tags = PngImagePlugin.PngInfo()
    tags.add(*SRGB_CHUNK)
    options = {
        "PNG": {"pnginfo": tags},
        "JPEG": {"quality": 95, "subsampling": 0, "icc_profile": srgb_profile()},
        "WEBP": {"lossless": True, "exact": True, "icc_profile": srgb_profile()},
    }
    Image.fromarray(levels).save(buffer, kind, **options[kind])
    return buffer.getvalue()


def _png16(levels: np.ndarray) -> bytes:
    """A PNG of [H, W, 3 | 4] uint16, which Pillow cannot write; each row stores its difference from the one above."""
    height, width, count = levels.shape
    rows = levels.astype(">u2").view(np.uint8).reshape(height, -1)
    rows = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    data = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[count], 0, 0, 0)
    parts = ((b"IHDR", header), SRGB_CHUNK, (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
