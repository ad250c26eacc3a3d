"""A mesh from a density field: iso-surface, cleaning, decimation, colours, texture and files.

Meshes are made in the scene's frame (right-handed, z up, world units), and written as a `Placement` says.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import fast_simplification
import numpy as np
import torch
import trimesh
from scipy.ndimage import gaussian_filter
from skimage.measure import marching_cubes
from torch import Tensor

from csd3d.engine.logs import logger, progress
from csd3d.errors import InputError
from csd3d.export.clean import drop_flaps, give_normals, is_manifold, remove_slivers, separate
from csd3d.export.ground import remove_ground
from csd3d.export.holes import close_holes, fill_hollows
from csd3d.export.placement import Placement
from csd3d.export.plate import keep_object, remove_plate
from csd3d.export.room import inside_of_room
from csd3d.export.texture import bake_texture, surface_colours, write_ply, write_textured
from csd3d.memory import check_fits
from csd3d.schema import Share, Within

Density = Callable[[Tensor], Tensor]  # positions [S, 3] world -> sigma [S] per world unit
Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # positions, unit directions [S, 3] -> rgb [S, 3], sigma [S]

BYTES_PER_VOXEL = 20  # the densities, their logarithms, and copies while they are filtered
BYTES_PER_TEXEL = 48  # place, normal and colour, and copies while they are baked
CROPS = ("auto", "plate", "box", "none")
LOG_RANGE = 3.0  # nats about the threshold that are kept; densities farther off do not locate the surface
FACTORS = (1, 0.97, 0.94, 0.85, 0.7, 0.5)  # of the face budget that decimation tries
SEEN = 0.15  # quantile of the densities at which rays are half stopped; a low one keeps thin shells whole
PLACED = Placement()
VISIBLE_DEPTH = math.log(2.0)  # optical depth at which half of a ray's light is stopped


@dataclass
class MeshConfig:
    """How a mesh is extracted and coloured."""

    resolution: Annotated[int, Within(8, 1024)] = 160  # density samples along the box's longest side
    # density of the surface, per world unit; null: chosen so that it looks as rendered
    threshold: Annotated[float, Within(1e-6, 1_000_000)] | None = None
    # standard deviation in voxels of a Gaussian filter on the log-density; 0: none
    smoothing: Annotated[float, Within(0, 100)] = 0.7
    keep_fraction: Share = 0.05  # parts with less than this share of the largest part's area are removed
    face_budget: Annotated[int, Within(16, 10_000_000)] = 16_000  # most faces after decimation
    texture_size: Annotated[int, Within(16, 16384)] = 1024  # texels along a side of the texture
    # auto: a captured object without what it stands on, an asset as with plate unless its prompt names one | plate: the
    # largest object, without a plate below it | box: all in the box | none: also what is around it, twice as far
    crop: str = "auto"
    chunk: Annotated[int, Within(1, 2**22)] = 1 << 18  # most field queries at a time; fewer need less memory

    def __post_init__(self):
        if self.crop not in CROPS:
            raise InputError(f"crop is {self.crop!r}: it must be one of {', '.join(CROPS)}")
        if self.texture_size & (self.texture_size - 1):
            power = 2 ** round(math.log2(max(self.texture_size, 16)))
            raise InputError(f"texture_size is {self.texture_size}: it must be a power of two, such as {power}")
        for key, lowest in (("resolution", 8), ("face_budget", 16), ("texture_size", 16), ("chunk", 1)):
            if getattr(self, key) < lowest:
                raise InputError(f"{key} is {getattr(self, key)}: it must be at least {lowest}")
        for key, power, each in (("resolution", 3, BYTES_PER_VOXEL), ("texture_size", 2, BYTES_PER_TEXEL)):
            check_fits(each * getattr(self, key) ** power, f"{key} {getattr(self, key)}", "lower it")
        if self.threshold is not None and not self.threshold > 0:
            raise InputError(f"threshold is {self.threshold}: it must be a positive density, or null for automatic")


def export_mesh(
    density: Density,
    field: Field,
    aabb: Sequence[float] | Tensor,
    folder: Path,
    config: MeshConfig,
    device: str = "cpu",
    name: str = "mesh",
    placement: Placement = PLACED,
    eyes: Tensor | None = None,
    lit: bool = True,
) -> tuple[trimesh.Trimesh, dict[str, float | int | bool | str | None]]:
    """Extract and colour a mesh; write `mesh.glb`, `mesh.obj` + `mesh.mtl` + `mesh.png` and `mesh.ply` into `folder`.

    All files have normals, and the object is called `name` in them; `placement` says where it is in them. Returns the
    textured mesh in the scene's frame (for `render_mesh`) and its figures.  eyes [N, 3]: where cameras stood, for rooms
    that were captured from inside.  lit: the field's colours hold light, as photos do, so that viewers are told to add
    none; else they are the albedo. Raises InputError, before any file is written, if there is no surface.
    """
    start = time.perf_counter()
    mesh = extract_mesh(density, aabb, config, device, eyes)
    voxel = mesh.metadata["voxel"]
    folder = Path(folder)
    colours = surface_colours(field, mesh.vertices, mesh.vertex_normals, voxel, config.chunk, device)
    if unknown := int(np.isnan(colours).any(1).sum()):
        why = "the scene's colours are no numbers there; lower the learning rate"
        logger.warning("mesh: %d of %d vertices are black: %s", unknown, len(colours), why)
    rgb = np.round(255 * np.nan_to_num(colours)).astype(np.uint8)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=rgb)
    write_ply(mesh, folder / "mesh.ply", placement)
    textured = bake_texture(mesh, field, config.texture_size, voxel, config.chunk, device)
    write_textured(textured, folder, name, placement, lit)
    return textured, {
        "faces": len(mesh.faces),
        "vertices": len(mesh.vertices),
        "threshold": mesh.metadata["threshold"],
        "watertight": bool(mesh.is_watertight),
        "pieces": int(mesh.body_count),
        "left_out": mesh.metadata["left_out"],
        "base_colour": "lit" if lit else "albedo",
        "texture_fill": textured.metadata["texture_fill"],
        "seconds": time.perf_counter() - start,
    }


def extract_mesh(
    density: Density,
    aabb: Sequence[float] | Tensor,
    config: MeshConfig,
    device: str = "cpu",
    eyes: Tensor | None = None,
) -> trimesh.Trimesh:
    """Return the iso-surface of the density inside `aabb` (x0, y0, z0, x1, y1, z1), closed at the box, normals outward.

    Marching cubes on log σ clipped to ± 3 about the threshold: fields with exp activation interpolate log σ, and the
    clip stops a near-empty outside from pulling the surface inwards. Left out are with crop "auto" the ground that an
    object stands on, with "plate" all but the largest object, without a plate below it; its hollows are filled.
    `metadata` has the threshold, the voxel side, and which of "ground" and "plate" was left_out, or None. Every edge
    has two faces, and slivers are removed. Raises InputError if the box is invalid or holds no surface.
    """
    low, high = _corners(aabb)
    voxel = float((high - low).max()) / (config.resolution - 1)
    sigma = sample_grid(density, low, high, voxel, config.chunk, device)
    threshold = config.threshold if config.threshold is not None else visible_threshold(sigma, voxel)
    close_holes(sigma, threshold, haze_density(sigma, voxel) / 4)
    left_out = None
    if config.crop == "plate":
        left_out = "plate" if remove_plate(sigma, threshold) else None
        keep_object(sigma, threshold)
        fill_hollows(sigma, threshold)
    room = eyes is not None and inside_of_room(sigma, threshold, low, voxel, eyes.cpu().numpy())
    mesh = _surface(sigma, threshold, low, voxel, config, room)
    if config.crop == "auto" and not room and remove_ground(sigma, low, voxel, threshold, mesh):
        mesh, left_out = _surface(sigma, threshold, low, voxel, config), "ground"
    mesh = decimate(keep_components(mesh, config.keep_fraction, room), config.face_budget)
    mesh = remove_slivers(keep_components(mesh, config.keep_fraction, room))  # decimation may have cut crumbs off
    give_normals(mesh)
    mesh.metadata |= {"threshold": float(threshold), "voxel": voxel, "left_out": left_out}
    return mesh


def _surface(
    sigma: np.ndarray, threshold: float, low: np.ndarray, voxel: float, config: MeshConfig, room: bool = False
) -> trimesh.Trimesh:
    around = LOG_RANGE if room else -LOG_RANGE
    volume = np.pad(_log_density(sigma, threshold, config.smoothing), 1, constant_values=around)
    if not volume.max() > 0:
        _no_surface(sigma, voxel, threshold)
    vertices, faces, _, _ = marching_cubes(volume, 0.0)
    vertices = low + (vertices - 1.0) * voxel
    return trimesh.Trimesh(vertices, faces[:, ::-1], process=True)  # scikit-image winds towards the rising side


def sample_grid(
    density: Density, low: np.ndarray, high: np.ndarray, voxel: float, chunk: int, device: str
) -> np.ndarray:
    """Return σ `[X, Y, Z]` float32 at the points of a regular grid from `low` to `high` with spacing `voxel`."""
    counts = np.maximum(np.round((high - low) / voxel).astype(int) + 1, 2)
    axes = [
        torch.arange(n, device=device, dtype=torch.float32) * voxel + float(lo)
        for n, lo in zip(counts, low, strict=True)
    ]
    out = torch.empty(int(counts.prod()), device=device)
    columns = torch.cartesian_prod(axes[0], axes[1])
    step = max(1, chunk // int(counts[2]))
    with torch.no_grad():
        for i in progress(range(0, len(columns), step), "mesh, density"):
            part = columns[i : i + step]
            points = torch.cat([part.repeat_interleave(counts[2], 0), axes[2].repeat(len(part))[:, None]], 1)
            out[i * counts[2] : i * counts[2] + len(points)] = density(points).reshape(-1)
    return np.nan_to_num(out.reshape(*counts).cpu().numpy(), nan=0.0, posinf=1e9, neginf=0.0)


def haze_density(sigma: np.ndarray, voxel: float) -> float:
    """Return the density that stops half the light within 1/16 of the box; thinner matter counts as empty."""
    return 16.0 * VISIBLE_DEPTH / (max(sigma.shape) * voxel)


def visible_threshold(sigma: np.ndarray, voxel: float) -> float:
    """Return the density at which rays along ±x, ±y, ±z reach optical depth ln 2: where the renderer sees the surface.

    It is the 15 % quantile over the rays, so that thin shells, which stop light at lower densities, stay whole. Haze
    counts as empty unless there is nothing denser; rays that start inside matter at the box's wall are left out.
    Returns 0, for no surface, if no ray is half stopped.
    """
    haze = haze_density(sigma, voxel)
    for field in (np.where(sigma >= haze, sigma, 0.0), sigma):
        slabs = [np.moveaxis(field, axis, 0)[::step] for axis in range(3) for step in (1, -1)]
        found = np.concatenate([_crossing_densities(slab, voxel) for slab in slabs])
        if len(found):
            return float(np.quantile(found, SEEN))
    return 0.0


def _crossing_densities(slab: np.ndarray, voxel: float) -> np.ndarray:
    """Return σ where ∫σ along axis 0 reaches ln 2, for the rays that start in less than half that density.

    σ is linear between samples.
    """
    rays = slab.reshape(len(slab), -1).astype(np.float64)
    cells = 0.5 * voxel * (rays[1:] + rays[:-1])
    depth = np.cumsum(cells, axis=0)
    ray = np.flatnonzero(depth[-1] >= VISIBLE_DEPTH)
    cell = (depth[:, ray] >= VISIBLE_DEPTH).argmax(0)
    s0, s1 = rays[cell, ray], rays[cell + 1, ray]
    rest = (VISIBLE_DEPTH - (depth[cell, ray] - cells[cell, ray])) / voxel  # = s0 u + (s1 - s0) u²/2, u in [0, 1]
    u = 2.0 * rest / (s0 + np.sqrt(np.maximum(s0**2 + 2.0 * (s1 - s0) * rest, 0.0)) + 1e-12)
    crossing = s0 + (s1 - s0) * np.clip(u, 0.0, 1.0)
    return crossing[rays[0, ray] < 0.5 * crossing]


def _log_density(sigma: np.ndarray, threshold: float, smoothing: float) -> np.ndarray:
    if not threshold > 0:
        return np.full(sigma.shape, -LOG_RANGE, np.float32)
    ratio = np.maximum(sigma, 0.0) / threshold
    log = np.log(np.clip(ratio, math.exp(-LOG_RANGE), math.exp(LOG_RANGE)))
    return gaussian_filter(log, smoothing, mode="nearest") if smoothing > 0 else log


def keep_components(mesh: trimesh.Trimesh, fraction: float, inner: bool = False) -> trimesh.Trimesh:
    """Remove floaters (area under `fraction` of the largest component's) and, unless `inner`, shells inside others."""
    label = trimesh.graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    area = np.bincount(label, mesh.area_faces)
    volume = np.bincount(
        label, np.einsum("fi,fi->f", mesh.triangles[:, 0], np.cross(*mesh.triangles[:, 1:].swapaxes(0, 1)))
    )
    outer = (volume > 0) | inner
    if not outer.any():
        outer[:] = True
    keep = outer & (area >= fraction * area[outer].max())
    mesh.update_faces(keep[label])
    mesh.remove_unreferenced_vertices()
    return mesh


def decimate(mesh: trimesh.Trimesh, face_budget: int) -> trimesh.Trimesh:
    """Quadric-error decimation (Garland & Heckbert 1997) to at most `face_budget` faces, to a closed manifold.

    It can pinch thin parts to edges of four faces. Then fewer faces are tried, and if that does not help, the mesh is
    cut apart at such edges, which can add faces.
    """
    drop_flaps(mesh)
    if len(mesh.faces) <= face_budget:
        return separate(mesh) or mesh
    source = mesh.vertices.astype(np.float32), mesh.faces.astype(np.int64)
    pinched = []
    for factor in FACTORS:
        target = int(factor * face_budget)
        found = trimesh.Trimesh(*fast_simplification.simplify(*source, target_count=target)[:2], process=True)
        drop_flaps(found)
        if is_manifold(found):
            return found
        pinched.append(found)
    for found in pinched:
        cut = separate(found)
        if cut is not None and 0 < len(cut.faces) <= face_budget:
            return cut
    logger.warning("mesh: %d faces, not %d: fewer would not be a surface", len(mesh.faces), face_budget)
    return mesh


def _corners(aabb: Sequence[float] | Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([float(x) for x in aabb])
    if values.shape != (6,) or not np.isfinite(values).all() or not (values[3:] > values[:3]).all():
        raise InputError(f"the box is {values.tolist()}: expected x0, y0, z0, x1, y1, z1 with each low < high")
    return values[:3], values[3:]


def _no_surface(sigma: np.ndarray, voxel: float, threshold: float) -> None:
    if float(sigma.min()) >= haze_density(sigma, voxel):
        raise InputError(
            f"mesh: no surface in the box, which is solid: the thinnest of {sigma.size} samples is {sigma.min():.3g}; "
            "set export.mesh.threshold above that, or train longer"
        )
    peak = float(sigma.max())
    opacity = 100.0 * -math.expm1(-max(peak, 0.0) * voxel)
    why = f"the densest of {sigma.size} samples is {peak:.3g} ({opacity:.3g} % opaque a voxel)"
    if peak > threshold > 0:  # some samples are dense enough, but too few together
        why += f", above the threshold {threshold:.3g} but not any more once smoothed"
        right = "lower export.mesh.smoothing, raise export.mesh.resolution, lower export.mesh.threshold"
    else:
        why += f"; the threshold is {threshold:.3g}"
        right = "lower export.mesh.threshold, raise export.mesh.resolution"
    raise InputError(f"mesh: no surface in the box, {why}: {right}, or train longer")
