"""Splats in the standard `.ply` of 3DGS: read without trusting them, written, moved from frame to frame; their views.

Symbols: N splats, K harmonics, R a rotation, s a scale.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csd3d.cameras import OPENGL, Cameras, fold_radius
from csd3d.datasets.points import ply_header
from csd3d.errors import InputError
from csd3d.files import write_bytes
from custom_kernels.splats import Splats, View, harmonics

log = logging.getLogger("csd3d")

MAX_SPLATS = 5_000_000
FAR = 1e4  # sizes of a scene between it and the origin from which the float32 of the format is too coarse
HIGHEST = {0: 0, 9: 1, 24: 2, 45: 3}  # number of f_rest columns: degree of the harmonics


def read_splats(path: Path, where: str) -> Splats:
    """The splats of a binary PLY file as 3DGS writes it.

    where: begins every message. Raises InputError, one line: another kind of PLY, too many splats, one cut short, or
    values that are not finite.
    """
    try:
        with path.open("rb") as file:
            order, count, columns = ply_header(file, f"{where}: {path}", MAX_SPLATS, "splats")
            names = [name for name, _ in columns]
            degree = _check_kind(names, f"{where}: {path}")
            if not order:
                raise InputError(f"{where}: {path} is an ASCII file; expected the binary PLY of 3D Gaussian splatting")
            row = np.dtype([(name, order + kind) for name, kind in columns])
            if file.tell() + count * row.itemsize > path.stat().st_size:
                raise InputError(f"{where}: {path} ends before its {count} splats do")
            table = np.fromfile(file, row, count)
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror})") from error
    return _checked(_taken_apart(table, degree), f"{where}: {path}")


def _check_kind(names: list[str], at: str) -> int:
    """The degree of the harmonics; InputError if the columns are not those of splats."""
    wanted = [*_numbered("f_dc", 3), "opacity", *_numbered("scale", 3), *_numbered("rot", 4)]
    if missing := [name for name in wanted if name not in names]:
        raise InputError(f"{at} holds no Gaussian splats: its points have no {missing[0]}")
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest not in HIGHEST or not set(_numbered("f_rest", rest)) <= set(names):
        raise InputError(f"{at}: has {rest} columns f_rest_*; expected 0, 9, 24 or 45, of harmonics up to degree 3")
    return HIGHEST[rest]


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{i}" for i in range(count)]


def _taken_apart(table: np.ndarray, degree: int) -> Splats:
    def columns(names: list[str]) -> Tensor:
        found = np.empty((len(table), len(names)), np.float32)
        for i, name in enumerate(names):
            found[:, i] = table[name]
        return torch.from_numpy(found)

    others = (degree + 1) ** 2 - 1
    rest = (
        columns(_numbered("f_rest", 3 * others)).view(len(table), 3, others).mT.contiguous()
    )  # the file has channel by channel
    shape = columns(_numbered("scale", 3)), columns(_numbered("rot", 4)), columns(["opacity"])[:, 0]
    return Splats(columns(list("xyz")), *shape, columns(_numbered("f_dc", 3)), rest)


def _checked(splats: Splats, at: str) -> Splats:
    good = torch.stack(
        [torch.isfinite(x).flatten(1).all(1) for x in splats._replace(opacities=splats.opacities[:, None])]
    )
    bad = len(splats.means) - int(good.all(0).sum())
    if bad:
        raise InputError(f"{at}: {bad} of {len(splats.means)} splats hold numbers that are not finite; remove them")
    if len(splats.means) == 0:
        raise InputError(f"{at}: holds no splats")
    if splats.means.abs().max() > 1e9 or splats.log_scales.max() > 20:
        raise InputError(f"{at}: holds splats that are too far away or too large for single precision")
    return splats


def write_splats(path: Path, splats: Splats, comment: str) -> None:
    """Write the binary PLY that viewers of 3DGS read; warn where its float32 is too coarse for such coordinates."""
    if _is_far(splats):
        log.warning("the scene is so far from the origin of its coordinates that %s, in float32, is coarse", path.name)
    count, others = splats.rest.shape[:2]
    names = [*"xyz", "nx", "ny", "nz", *_numbered("f_dc", 3), *_numbered("f_rest", 3 * others), "opacity"]
    names += [*_numbered("scale", 3), *_numbered("rot", 4)]
    quats = torch.nn.functional.normalize(splats.quats, dim=1, eps=1e-12)
    parts = (splats.means, torch.zeros(count, 3), splats.dc, splats.rest.mT.reshape(count, 3 * others))
    parts += (splats.opacities[:, None], splats.log_scales, quats)
    table = torch.cat([part.detach().cpu().float() for part in parts], 1).numpy().astype("<f4")
    head = ["ply", "format binary_little_endian 1.0", f"comment csd3d: {comment}", f"element vertex {count}"]
    head += [*(f"property float {name}" for name in names), "end_header\n"]
    write_bytes(path, "\n".join(head).encode() + table.tobytes())


def _is_far(splats: Splats) -> bool:
    """Whether a scene is small beside its distance from the origin; a single splat is as large as it is seen."""
    if not len(splats.means):
        return False
    size = (splats.means.amax(0) - splats.means.amin(0)).max() + splats.log_scales.exp().max()
    return bool(splats.means.abs().max() > FAR * size)


def poses_frame(splats: Splats, transform: np.ndarray, scale: float) -> Splats:
    """Splats of a capture's own frame in that of its poses, x' = a (A x + b), [A | b] = `transform`, a = `scale`."""
    rotation, shift = torch.from_numpy(transform[:3, :3]), torch.from_numpy(scale * transform[:3, 3])
    return moved(splats, rotation, scale, shift)


@torch.no_grad()
def moved(splats: Splats, rotation: Tensor, scale: float, shift: Tensor) -> Splats:
    """The splats under x → s R x + t; rotation R [3, 3] and shift t [3] are float64. Colours turn with them."""
    means = scale * (splats.means.double()[:, None] * rotation).sum(2) + shift
    quats = _multiply(quaternion(rotation), splats.quats.double())
    rest = _rotated(splats.rest.double(), rotation)
    log_scales = splats.log_scales.double() + np.log(scale)
    kept = splats.opacities, splats.dc
    return Splats(means.float(), log_scales.float(), quats.float(), *kept, rest.float())


def quaternion(rotation: Tensor) -> Tensor:
    """The unit quaternion [4] (w, x, y, z) of a rotation [3, 3]: the eigenvector of Bar-Itzhack's matrix (2000)."""
    r = rotation.double()
    k = torch.zeros(4, 4, dtype=torch.float64)
    k[0, 1:] = torch.stack((r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]))
    k[1:, 0], k[0, 0] = k[0, 1:], r.trace()
    k[1:, 1:] = r + r.T - r.trace() * torch.eye(3, dtype=torch.float64)
    return torch.linalg.eigh(k)[1][:, -1]


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton's product of a [4] with each of b [N, 4]."""
    w, x, y, z = a.tolist()
    matrix = [[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]]
    return b @ torch.tensor(matrix, dtype=b.dtype).T


def _rotated(rest: Tensor, rotation: Tensor) -> Tensor:
    """Coefficients [N, K − 1, 3] of f'(d) = f(Rᵀ d): each degree turns into itself, which many directions determine."""
    degree = {(d + 1) ** 2 - 1: d for d in range(4)}[rest.shape[1]]
    if degree == 0:
        return rest
    directions = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(directions, dim=1)
    before, after = (harmonics(d, degree)[:, 1:] for d in (directions @ rotation.double(), directions))
    # rounded, and without BLAS, whose last digits depend on where the numbers lie in memory
    turn = torch.linalg.lstsq(after, before).solution.round(decimals=12)
    return sum(turn[:, k, None] * rest[:, k : k + 1] for k in range(len(turn)))


def view_of(cameras: Cameras, index: int) -> View:
    """Camera `index` as the kernels take it."""
    c2w = cameras.camera_to_world[index]
    rotation = (c2w[:, :3] * c2w.new_tensor(OPENGL)).T
    fx, fy, cx, cy = (float(x[index]) for x in (cameras.fx, cameras.fy, cameras.cx, cameras.cy))
    k = None if cameras.distortion is None else cameras.distortion[index]
    bent = k is not None and bool(k.any())
    reach = [(-cx / fx, (cameras.width - cx) / fx), (-cy / fy, (cameras.height - cy) / fy)]
    if bent and not cameras.fisheye:  # slopes of the borders through the lens
        edge = torch.linspace(0, 1, 9)
        zero, one = torch.zeros(9), torch.ones(9)
        border = torch.cat([torch.stack(pair, 1) for pair in ((edge, zero), (edge, one), (zero, edge), (one, edge))])
        pixels = border * torch.tensor([cameras.width, cameras.height])
        rays = cameras.rays(torch.full((len(pixels),), index), pixels.to(c2w))[1] @ rotation.T
        slopes = rays[:, :2] / rays[:, 2:]
        reach = list(zip(slopes.amin(0).tolist(), slopes.amax(0).tolist(), strict=True))
    limits = tuple(x for low, high in reach for x in (low - 0.15 * (high - low), high + 0.15 * (high - low)))
    lens = tuple(k.tolist()) if bent else ()
    fold = fold_radius(k) if bent else math.inf
    size = (cameras.width, cameras.height)
    return View(rotation, c2w[:, 3], (fx, fy), (cx, cy), *size, lens, cameras.fisheye, fold, limits)
