"""Textures: UV unwrapping, baking from a field, and pictures of the textured mesh.

Symbols: F faces, V vertices. UVs have their origin at the picture's lower left (OBJ, trimesh); texel (row r, column
c) has its centre at u = (c + ½) / W, v = 1 − (r + ½) / H.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import trimesh
import xatlas
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.engine.logs import progress
from csd3d.export.placement import Placement
from csd3d.files import write_bytes, write_text
from custom_kernels.meshes import Projected, draw, rasterise

Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # positions, unit directions [S, 3] -> rgb [S, 3], sigma [S]

RAY_SAMPLES = 6
RAY_REACH = 1.5  # voxels before and behind the surface
NEAR = 1e-3  # world units before the camera; faces that come nearer are not drawn
PADDING = 8  # texels by which every chart is grown, so that filtering and mip levels show no seam
UNLIT = "KHR_materials_unlit"  # glTF's extension for colours that hold their light
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963  # glTF's kinds of buffer views


def surface_colours(
    field: Field, positions: np.ndarray, normals: np.ndarray, voxel: float, chunk: int, device: str = "cpu"
) -> np.ndarray:
    """Return the colour at surface points, composited along a short ray inwards, which tolerates inexact points.

        c = Σ_k w_k c(x + s_k n, −n) / Σ_k w_k,   w_k = T_k (1 − e^{−σ_k δ}),   s_k from +1.5 to −1.5 voxels

    positions, normals `[S, 3]` → rgb `[S, 3]` float32 in [0, 1]. Seen along the normal, as the diffuse colour; NaN
    where the field's colour is not finite.
    """
    offsets = voxel * RAY_REACH * torch.linspace(1.0, -1.0, RAY_SAMPLES, device=device)
    spacing = 2.0 * RAY_REACH * voxel / (RAY_SAMPLES - 1)
    out = []
    with torch.no_grad():
        for i in progress(range(0, len(positions), max(1, chunk // RAY_SAMPLES)), "mesh, colours"):
            part = slice(i, i + max(1, chunk // RAY_SAMPLES))
            x, n = (torch.tensor(a[part], dtype=torch.float32, device=device) for a in (positions, normals))
            points = x[:, None] + offsets[:, None] * n[:, None]
            rgb, sigma = field(points.reshape(-1, 3), -n.repeat_interleave(RAY_SAMPLES, 0))
            out.append(_composite(rgb.reshape(points.shape), sigma.reshape(points.shape[:2]), spacing).cpu())
    return torch.cat(out).clamp(0, 1).numpy() if out else np.zeros((0, 3), np.float32)


def _composite(rgb: Tensor, sigma: Tensor, spacing: float) -> Tensor:
    """`[S, K, 3]`, `[S, K]` → `[S, 3]`, weights normalised; the plain mean if the ray is empty."""
    depth = sigma.float().nan_to_num(0.0, posinf=1e9) * spacing  # as in `sample_grid`
    before = torch.cumsum(depth, 1) - depth
    weights = torch.exp(-before) * -torch.expm1(-depth) + 1e-5
    return (weights[..., None] * rgb).sum(1) / weights.sum(1, keepdim=True)


def bake_texture(
    mesh: trimesh.Trimesh, field: Field, size: int, voxel: float, chunk: int, device: str = "cpu"
) -> trimesh.Trimesh:
    """Unwrap the mesh (xatlas) and bake the field's colours into a texture of size × size texels.

    Returns a mesh with `TextureVisuals` and vertices doubled along seams; `metadata` has `texture_fill` (share of
    texels used) and `vertex_source` (index of each vertex in `mesh`).
    """
    source, faces, uv = unwrap(mesh, size)
    texels, face, bary = (np.concatenate(x) for x in zip(*rasterise(uv[faces] * size, size, size), strict=True))
    positions, normals = (
        np.einsum("sk,ski->si", bary, attribute[source][faces[face]])
        for attribute in (mesh.vertices, mesh.vertex_normals)
    )
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    texture = np.zeros((size * size, 3), np.float32)
    filled = np.zeros(size * size, bool)
    texture[texels] = np.nan_to_num(surface_colours(field, positions, normals, voxel, chunk, device))
    filled[texels] = True
    image = grow(texture.reshape(size, size, 3), filled.reshape(size, size), PADDING)[::-1]  # row 0 is v = 1
    picture = Image.fromarray(np.round(255 * image).astype(np.uint8))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=picture, metallicFactor=0.0, roughnessFactor=1.0)
    visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    # normals of the whole surface, so that seams are not creases
    normals = mesh.vertex_normals[source]
    textured = trimesh.Trimesh(mesh.vertices[source], faces, vertex_normals=normals, visual=visual, process=False)
    textured.metadata |= {"texture_fill": float(filled.mean()), "vertex_source": source}
    return textured


def unwrap(mesh: trimesh.Trimesh, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make UV charts (xatlas): source vertex of each new vertex `[V']`, faces `[F, 3]`, uv `[V', 2]` in [0, 1].

    xatlas packs them into a page of about `size` texels a side (1203 × 1202 for 1024). The uv are fractions of that
    page, so in a texture of exactly `size` the charts are a little smaller, 3 texels apart instead of 4.
    """
    atlas = xatlas.Atlas()
    atlas.add_mesh(
        mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32), mesh.vertex_normals.astype(np.float32)
    )
    charts, packing = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_cost = 4.0  # fewer, larger charts than the default's 2
    packing.resolution, packing.padding, packing.bilinear = size, 4, True
    atlas.generate(charts, packing)
    source, faces, uv = atlas[0]
    return source.astype(np.int64), faces.astype(np.int64), uv.astype(np.float64)


def grow(texture: np.ndarray, filled: np.ndarray, pixels: int) -> np.ndarray:
    """Give empty texels within `pixels` of a chart the nearest chart colour, others the mean, which compresses well."""
    if not filled.any():
        return texture
    distance, (rows, columns) = distance_transform_edt(~filled, return_indices=True)
    return np.where((distance <= pixels)[..., None], texture[rows, columns], texture[filled].mean(0))


def write_ply(mesh: trimesh.Trimesh, path: Path, placement: Placement) -> None:
    """Write a binary PLY with a float64 position, a normal and a uint8 colour for each vertex, in the own frame."""
    vertex = [*((axis, "<f8") for axis in "xyz"), *((axis, "<f4") for axis in ("nx", "ny", "nz"))]
    vertex += [(channel, "u1") for channel in ("red", "green", "blue", "alpha")]
    table = np.empty(len(mesh.vertices), vertex)
    values = np.concatenate((placement.own(mesh.vertices), mesh.vertex_normals @ placement.rotation.T), axis=1)
    for (column, _), numbers in zip(vertex, (*values.T, *mesh.visual.vertex_colors.T), strict=True):
        table[column] = numbers
    faces = np.empty(len(mesh.faces), [("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, mesh.faces
    kinds = {"<f8": "double", "<f4": "float", "u1": "uchar"}
    lines = ["ply", "format binary_little_endian 1.0", f"comment csd3d: {placement.frame}"]
    lines += [f"element vertex {len(table)}", *(f"property {kinds[kind]} {column}" for column, kind in vertex)]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header\n"]
    data = "\n".join(lines).encode() + table.tobytes() + faces.tobytes()
    write_bytes(Path(path), data)


def write_textured(mesh: trimesh.Trimesh, folder: Path, name: str, placement: Placement, lit: bool = True) -> None:
    """Write a baked mesh to mesh.glb (y up) and to mesh.obj + mesh.mtl + mesh.png (the own frame of `placement`).

    Its object, node and material are called `name`. If the colours are lit, the materials ask for no more light: GLB by
    KHR_materials_unlit, MTL by illum 0.
    """
    folder = Path(folder)
    write_bytes(folder / "mesh.glb", _glb(mesh, name, placement, lit))
    texture = io.BytesIO()
    mesh.visual.material.baseColorTexture.save(texture, "PNG")
    write_bytes(folder / "mesh.png", texture.getvalue())
    material = f"newmtl {name}\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nillum {0 if lit else 1}\nmap_Kd mesh.png\n"
    write_text(folder / "mesh.mtl", material)
    write_text(folder / "mesh.obj", _obj(mesh, name, placement))


def _glb(mesh: trimesh.Trimesh, name: str, placement: Placement, lit: bool) -> bytes:
    """Return binary glTF, y up. Its asset's extras hold the offset, in the own frame, that was subtracted."""
    visual = mesh.visual.copy()
    visual.material.name = name
    # a new mesh, as a transformed copy loses the given normals
    normals = mesh.vertex_normals @ (placement.axes @ placement.rotation).T
    turned = trimesh.Trimesh(
        placement.gltf(mesh.vertices), mesh.faces, vertex_normals=normals, visual=visual, process=False
    )
    scene = trimesh.Scene()
    scene.add_geometry(turned, node_name=name, geom_name=name)

    def sign(tree: dict) -> None:
        tree["asset"]["generator"] = "csd3d"
        for primitive in (part for found in tree["meshes"] for part in found["primitives"]):
            for accessor in (*primitive["attributes"].values(), primitive["indices"]):
                view = tree["bufferViews"][tree["accessors"][accessor]["bufferView"]]
                view["target"] = ELEMENT_ARRAY_BUFFER if accessor == primitive["indices"] else ARRAY_BUFFER
        if lit:
            tree["extensionsUsed"] = [*tree.get("extensionsUsed", []), UNLIT]
            for material in tree["materials"]:
                material["extensions"] = material.get("extensions", {}) | {UNLIT: {}}
        if placement.offset.any():
            tree["asset"]["extras"] = {"offset": placement.offset.tolist()}

    return trimesh.exchange.gltf.export_glb(scene, include_normals=True, tree_postprocessor=sign)


def _obj(mesh: trimesh.Trimesh, name: str, placement: Placement) -> str:
    """Return Wavefront text. Positions and normals are shared across seams, so that the surface stays closed."""
    source = mesh.metadata["vertex_source"]
    positions, normals = np.zeros((2, source.max() + 1, 3))
    positions[source] = placement.own(mesh.vertices)
    normals[source] = mesh.vertex_normals @ placement.rotation.T
    decimals = max(0, 6 - math.floor(math.log10(np.ptp(positions, axis=0).max())))  # a millionth of its size
    position, uv = source[mesh.faces] + 1, mesh.faces + 1
    lines = [f"# csd3d: {placement.frame}\nmtllib mesh.mtl\no {name}\nusemtl {name}"]
    lines += [f"v {x:.{decimals}f} {y:.{decimals}f} {z:.{decimals}f}" for x, y, z in positions.tolist()]
    lines += [f"vt {u:.6f} {v:.6f}" for u, v in mesh.visual.uv.tolist()]
    lines += [f"vn {x:.4f} {y:.4f} {z:.4f}" for x, y, z in normals.tolist()]
    corners = np.stack([position, uv], -1).reshape(-1, 6).tolist()
    lines += [f"f {a}/{i}/{a} {b}/{j}/{b} {c}/{k}/{c}" for a, i, b, j, c, k in corners]
    return "\n".join(lines) + "\n"


def render_mesh(
    mesh: trimesh.Trimesh, cameras: Cameras, index: int, background: float = 1.0, samples: int = 2
) -> np.ndarray:
    """Render a baked mesh, unlit, to `[H, W, 3]` uint8 before a grey `background` in [0, 1]; samples² per pixel.

    Back faces are left out, as the mesh is assumed closed. Lens distortion acts on vertices only.
    """
    pixels, depth = cameras.project(torch.as_tensor(mesh.vertices, dtype=torch.float32), index)
    pixels, depth = pixels.double().cpu().numpy(), depth.double().cpu().numpy()
    inverse = np.divide(1.0, depth, out=np.zeros_like(depth), where=depth > NEAR)
    texture = np.asarray(mesh.visual.material.baseColorTexture)
    projected = Projected(pixels, inverse, mesh.faces, mesh.visual.uv, texture)
    return draw(projected, cameras.width, cameras.height, samples, round(255 * background))
