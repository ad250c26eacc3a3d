"""The world's renderer in torch: the same results as `custom_kernels/cpu/world.cpp`, slower, without a compiler.

Symbols: R rays, P primitives, points [R,3] world units. Layouts of the arrays: `csd3d.world.scene`.
"""

import numpy as np
import torch
from torch import Tensor

from csd3d.world.render import FAR, Pictures
from csd3d.world.scene import PATTERNS, SHAPES, Arrays

BOUND, HIT, STEPS = 1.45, 4e-4, 128


def shape_distance(shape: str, size: Tensor, p: Tensor) -> Tensor:
    """Signed distance [R] of local points [R,3] to one primitive of `size` [4]; sizes as in `csd3d.world.shapes`."""
    x, y, z = p.unbind(1)
    if shape == "sphere":
        return p.norm(dim=1) - size[0]
    if shape == "box":
        q = p.abs() - size[:3] + size[3]
        return q.clamp_min(0).norm(dim=1) + q.amax(1).clamp_max(0) - size[3]
    q = torch.hypot(x, y)
    if shape == "cylinder":
        return _extrude(q - size[0] + size[2], z.abs() - size[1] + size[2], size[2])
    if shape == "cone":
        return _cone(q, z, *size[:3])
    if shape == "torus":
        return torch.hypot(q - size[0], z) - size[1]
    if shape == "capsule":
        return torch.stack((x, y, z - torch.minimum(torch.maximum(z, -size[1]), size[1])), 1).norm(dim=1) - size[0]
    return _extrude((q - size[0]).abs() - size[1], z.abs() - size[2], torch.zeros(()))


def _extrude(a: Tensor, b: Tensor, rounding: Tensor) -> Tensor:
    return torch.maximum(a, b).clamp_max(0) + torch.hypot(a.clamp_min(0), b.clamp_min(0)) - rounding


def _cone(q: Tensor, z: Tensor, below: Tensor, above: Tensor, half: Tensor) -> Tensor:
    k1, k2 = above - below, 2 * half
    ax, ay = q - torch.minimum(q, torch.where(z < 0, below, above)), z.abs() - half
    along = (((above - q) * k1 + (half - z) * k2) / (k1 * k1 + k2 * k2)).clamp(0, 1)
    bx, by = q - above + k1 * along, z - half + k2 * along
    sign = torch.where((bx < 0) & (ay < 0), -1.0, 1.0)
    return sign * torch.minimum(ax * ax + ay * ay, bx * bx + by * by).sqrt()


def scene_distance(arrays: Arrays, points: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance [R] to the nearest primitive, and that primitive's material [R]."""
    rows = torch.from_numpy(arrays.primitives)
    distances = []
    for row in rows:
        local = (points - row[2:5]) @ row[5:14].reshape(3, 3).T
        distances.append(shape_distance(SHAPES[int(row[0])], row[14:18], local))
    nearest, index = torch.stack(distances).min(0)
    return nearest, rows[index, 1].long()


def trace(arrays: Arrays, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Sphere tracing: distances [R] along unit rays [R,3] from `origin` [3], and whether they hit a surface [R]."""
    b = directions @ origin
    discriminant = b * b - (origin @ origin - BOUND**2)
    root = discriminant.clamp_min(0).sqrt()
    t, last = (-b - root).clamp_min(0), -b + root
    alive = (discriminant > 0) & (last > 0)
    hit = torch.zeros_like(alive)
    for _ in range(STEPS):
        distance, _ = scene_distance(arrays, origin + t[:, None] * directions)
        hit |= alive & (distance < HIT)
        alive &= (distance >= HIT) & (t < last)
        t = torch.where(alive, t + distance, t)
    return t, hit


def normals(arrays: Arrays, points: Tensor) -> Tensor:
    """Unit normals [R,3] by differences at the corners of a tetrahedron."""
    corners = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    total = sum(k * scene_distance(arrays, points + 1e-3 * k)[0][:, None] for k in corners)
    return total / total.norm(dim=1, keepdim=True).clamp_min(1e-12)


def shadow(arrays: Arrays, points: Tensor, normal: Tensor, sun: Tensor) -> Tensor:
    """Share [R] of the sun at the points: a soft shadow by the smallest distance / t along the ray to the sun."""
    t, share = torch.full((len(points),), 0.02), torch.ones(len(points))
    for _ in range(24):
        distance, _ = scene_distance(arrays, points + 0.01 * normal + t[:, None] * sun)
        share = torch.minimum(share, (0.5 + 5 * distance / t).clamp(0, 1))
        t = t + distance.clamp_min(0.02)
    return share * share * (3 - 2 * share)


def occlusion(arrays: Arrays, points: Tensor, normal: Tensor) -> Tensor:
    """Ambient occlusion [R], from the distance field at three steps along the normal."""
    left = torch.ones(len(points))
    for k in (1, 2, 3):
        h = 0.08 * k
        distance, _ = scene_distance(arrays, points + h * normal)
        left = left - 0.9 / 2**k * ((h - distance) / h).clamp(0, 1)
    return left


def pattern_weight(pattern: int, p: Tensor, n: Tensor) -> Tensor:
    """Weight [R] of the pattern's colour at points and normals [R,3] of the object's frame."""
    name = PATTERNS[pattern]
    if name == "stripes":
        u = (p[:, 2] + 0.5 * p[:, :2].norm(dim=1)) / 0.56  # the same from every azimuth
        return (u - u.floor() < 0.5).float()
    if name == "checks":
        total = (p / 0.48 + torch.tensor([0.5, 0.5, 0.25])).floor().sum(1)
        return total.remainder(2)
    if name == "dots":
        a = n.abs()
        u = torch.where((a[:, 0] >= a[:, 1]) & (a[:, 0] >= a[:, 2]), p[:, 1], p[:, 0]) / 0.38 + 0.5
        v = torch.where((a[:, 2] > a[:, 0]) & (a[:, 2] > a[:, 1]), p[:, 1], p[:, 2]) / 0.38 + 0.5
        i, j = u.floor(), v.floor()
        near = (u - i - 0.5).square() + (v - j - 0.5).square() < 0.18
        return (near & ((i + j).remainder(2) == 0)).float()
    return torch.zeros(len(p))


def background(world: Tensor, directions: Tensor) -> Tensor:
    """Colour [R,3] behind the scene along unit directions [R,3]."""
    if world[15] < 0.5:
        return world[9:12].expand(len(directions), 3)
    width = 0.6 if world[15] < 1.5 else 0.03
    return torch.lerp(world[12:15], world[9:12], _smoothstep(-width, width, directions[:, 2:]))


def albedo(material: Tensor, world: Tensor, points: Tensor, normal: Tensor) -> Tensor:
    """Base colour [R,3] of points with `material` rows [R,11]."""
    turn = torch.stack((torch.stack((world[16], world[17])), torch.stack((-world[17], world[16]))))
    local = torch.cat((points[:, :2] @ turn.T, points[:, 2:] - world[19]), 1) * world[18]
    turned = torch.cat((normal[:, :2] @ turn.T, normal[:, 2:]), 1)
    weight = torch.zeros(len(points))
    for pattern in material[:, 6].unique().int().tolist():
        weight = torch.where(material[:, 6] == pattern, pattern_weight(pattern, local, turned), weight)
    snow = material[:, 9:10] * _smoothstep(0.15, 0.5, normal[:, 2:])
    colour = torch.lerp(material[:, :3], material[:, 3:6], weight[:, None])
    return torch.lerp(colour, torch.tensor(0.96), snow)


def shade(material: Tensor, world: Tensor, colour: Tensor, light: dict[str, Tensor]) -> Tensor:
    """Radiance [R,3] of surfaces: sun, ambient light, highlight, and for metal the reflection of a fixed room."""
    n, d, lit = light["normal"], light["direction"], light["shadow"]
    facing = (n @ world[:3]).clamp_min(0) * lit
    r = d - 2 * (d * n).sum(1, keepdim=True) * n
    glint = ((r @ world[:3]).clamp_min(0) ** 24 * lit)[:, None]
    down, up = 0.45 - 0.33 * (-r[:, 2:]).clamp(0, 1), 0.75 + 0.3 * r[:, 2:].clamp(0, 1)
    mirror = torch.lerp(down, up, _smoothstep(-0.12, 0.12, r[:, 2:]))
    arriving = world[6:9] * (light["occlusion"] * (0.7 + 0.3 * n[:, 2]))[:, None] + world[3:6] * facing[:, None]
    matte = colour * arriving
    metal = torch.lerp(colour, torch.tensor(0.75), 0.55) * mirror
    metal = metal * (0.4 * arriving + 0.6 * (world[3:6] + world[6:9]) * 0.8)
    gloss = material[:, 7:8] * 0.55 + material[:, 8:9] * 0.4
    return (torch.lerp(matte, metal, material[:, 8:9]) + gloss * glint * world[3:6]).clamp(0, 1)


def _smoothstep(low: float, high: float, x: Tensor) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def render_rays(arrays: Arrays, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rgb, albedo [R,3], depth (`FAR`: background), object [R] (0 or 1) of unit rays [R,3] from `origin` [3]."""
    world, materials = torch.from_numpy(arrays.globals), torch.from_numpy(arrays.materials)
    rgb = background(world, directions).clone()
    base, depth, on_object = rgb.clone(), torch.full((len(rgb),), FAR), torch.zeros(len(rgb))
    t, hit = trace(arrays, origin, directions)
    if not hit.any():
        return rgb, base, depth, on_object
    d = directions[hit]
    points = origin + t[hit, None] * d
    material = materials[scene_distance(arrays, points)[1]]
    n = normals(arrays, points)
    light = {
        "normal": n,
        "direction": d,
        "shadow": shadow(arrays, points, n, world[:3]),
        "occlusion": occlusion(arrays, points, n),
    }
    base[hit] = albedo(material, world, points, n)
    rgb[hit] = shade(material, world, base[hit], light)
    depth[hit], on_object[hit] = t[hit], material[:, 10]
    return rgb, base, depth, on_object


def render_reference(arrays: list[Arrays], cameras: np.ndarray, width: int, height: int, samples: int = 2) -> Pictures:
    """`csd3d.world.render.render` for compiled scenes."""
    results = [
        _render_one(a, torch.from_numpy(c).float(), width, height, samples)
        for a, c in zip(arrays, cameras, strict=True)
    ]
    return Pictures(*(np.stack([result[i] for result in results]) for i in range(4)))


def _render_one(arrays: Arrays, camera: Tensor, width: int, height: int, samples: int) -> list[np.ndarray]:
    pose, (fx, fy, cx, cy) = camera[:12].reshape(3, 4), camera[12:]
    offsets = (torch.arange(samples) + 0.5) / samples
    v, u = torch.arange(height)[:, None] + offsets, torch.arange(width)[:, None] + offsets
    v, u = v.reshape(height, 1, samples, 1), u.reshape(1, width, 1, samples)
    v, u = torch.broadcast_tensors((cy - v) / fy, (u - cx) / fx)
    local = torch.stack((u, v, -torch.ones_like(u)), -1).reshape(-1, 3)
    directions = torch.nn.functional.normalize(local @ pose[:, :3].T, dim=1)
    rgb, base, depth, on_object = render_rays(arrays, pose[:, 3], directions)
    shape = (height, width, samples * samples)
    means = [x.reshape(*shape, -1).mean(2).squeeze(-1).numpy() for x in (rgb, base, on_object)]
    return [means[0], means[1], depth.reshape(shape).amin(2).numpy(), means[2]]
