"""Splats as Niantic's `.spz`, version 2 (github.com/nianticlabs/spz): a gzip stream, a tenth of the size of the `.ply`.

A header of 16 bytes, then all positions, opacities, colours, scales, rotations and harmonics: positions as 24-bit fixed
point, the rest in 8 bits. Its axes are glTF's: x to the right, y up.
"""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch

from csd3d.files import write_bytes
from custom_kernels.splats import Splats

MAGIC, VERSION = 0x5053474E, 2
ANTIALIASED = 1  # the only flag
LARGEST = 2**23 - 1  # of a 24-bit fixed-point number
MOST_BITS = 20  # after the point
# of harmonics, of degree 1 and above it, the 5 and 4 highest bits are kept, as in the reference
BUCKETS = (8, 16)


def write_spz(path: Path, splats: Splats, antialiased: bool) -> None:
    """Write the splats, which are in a frame whose y points up.

    Positions are exact to 2⁻²³ of the largest coordinate. Scales are kept within e⁻¹⁰ … e⁶ units.
    """
    parts = [x.detach().cpu().double().numpy() for x in splats]
    means, log_scales, quats, opacities, dc, rest = parts
    bits = int(np.clip(math.log2(LARGEST / max(np.abs(means).max(initial=0), 1e-6)), 0, MOST_BITS))
    fixed = np.round(means * 2.0**bits).clip(-LARGEST, LARGEST).astype("<i4")
    quats = quats / np.linalg.norm(quats, axis=1, keepdims=True).clip(1e-12)
    quats = quats[:, 1:] * np.where(quats[:, :1] < 0, -1, 1)  # w is left out, and is found again as it is positive
    degree = math.isqrt(rest.shape[1] + 1) - 1
    found = [
        struct.pack("<IIIBBBB", MAGIC, VERSION, len(means), degree, bits, ANTIALIASED * antialiased, 0),
        fixed[..., None].view(np.uint8)[..., :3].tobytes(),
        _bytes(255 * torch.from_numpy(opacities).sigmoid().numpy()),
        _bytes(255 * (0.15 * dc + 0.5)),
        _bytes(16 * (log_scales + 10)),
        _bytes(127.5 * (quats + 1)),
        _harmonics(rest),
    ]
    write_bytes(path, gzip.compress(b"".join(found), mtime=0))  # no time: the same splats give the same file


def _bytes(values: np.ndarray) -> bytes:
    return np.round(values).clip(0, 255).astype(np.uint8).tobytes()


def _harmonics(rest: np.ndarray) -> bytes:
    """Coefficients [N, K − 1, 3], within ±1, rounded to the middles of their buckets."""
    bucket = np.where(np.arange(rest.shape[1]) < 3, *BUCKETS)[:, None]
    return _bytes(np.floor((np.round(128 * rest + 128) + bucket / 2) / bucket) * bucket)
