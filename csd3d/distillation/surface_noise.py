"""Noise that lies on a surface: every camera sees the same noise on the same part of it (CFD, arXiv 2501.05445)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = 4  # shells around the origin with noise of their own, so that near and far parts of a thing differ
FINE = 16  # points of the surface that are looked at, along a side of a latent pixel
SIDE = 4  # texels of half a sphere along its side, for each latent pixel along that of a view
BYTES_PER_POINT = 140  # measured at the peak, of each point that is looked at: its place, its texel and its pixel


def texel_count(size: tuple[int, int]) -> int:
    """Texels of a noise map for views of `size` = (h, w) latents."""
    return LAYERS * 2 * (SIDE * max(size)) ** 2


def working_bytes(views: int, size: tuple[int, int]) -> int:
    """The memory that `surface_noise` takes for views of `size` = (h, w) latents, beside its noise map."""
    return BYTES_PER_POINT * views * (size[0] * FINE) * (size[1] * FINE)


def texel_of(points: Tensor, texels: int) -> Tensor:
    """The number [...] in 0 … texels − 1 of the part of space around each of `points` [..., 3]; 1 is the far shell.

    A shell is two halves, and each half a square of texels of equal area (Shirley and Chiu's concentric map).
    """
    side = math.isqrt(texels // (2 * LAYERS))
    far = points.norm(dim=-1)
    x, y, z = (points / far.clamp_min(1e-9)[..., None]).unbind(-1)
    radius, angle = (1 - z.abs()).clamp_min(0).sqrt(), torch.atan2(y, x)
    quarter = (angle / (math.pi / 2)).round()
    along = radius * (angle - quarter * (math.pi / 2)) * (4 / math.pi)
    turn = quarter.long() % 4  # (radius, along) is turned by as many right angles
    u = torch.where(turn % 2 == 0, radius, along) * torch.where((turn == 1) | (turn == 2), -1, 1)
    v = torch.where(turn % 2 == 0, along, radius) * torch.where(turn > 1, -1, 1)
    column, row = (((one + 1) / 2 * side).long().clamp(0, side - 1) for one in (u, v))
    shell = (far * LAYERS).long().clamp(0, LAYERS - 1)
    return ((shell * 2 + (z < 0)) * side + row) * side + column


def surface_noise(noise_map: Tensor, behind: Tensor, points: Tensor, seen: Tensor) -> Tensor:
    """Standard normal ε [V, C, h, w] of V views that see `points` [V, H, W, 3] of a surface where `seen` [V, H, W].

    noise_map: [T, C], standard normal, T a `texel_count`; behind: [C, h, w], ε of latent pixels that see no surface.
    Lengths are in units of the far shell.

    A latent pixel has ΣW_k/√n over the n texels that its part of the surface covers, so two views whose pixels cover
    the same texels have the same ε there. Of one view, a texel belongs to one pixel, so ε is white. The authors
    rasterise the pixels' corners into maps of six sides; here points between them are looked up in one.
    """
    views, (channels, height, width), texels = len(points), behind.shape, len(noise_map)
    size, cells = (height * FINE, width * FINE), height * width
    shown = seen[:, None].to(points.dtype)
    there = F.interpolate(shown, size, mode="bilinear", align_corners=False)[:, 0]
    between = F.interpolate(points.movedim(-1, 1) * shown, size, mode="bilinear", align_corners=False).movedim(1, -1)
    texel, hit = texel_of(between / there.clamp_min(1e-6)[..., None], texels), there > 0.5

    row, column = (torch.arange(n, device=points.device) // FINE for n in size)
    view = torch.arange(views, device=points.device)[:, None, None]
    cell = (view * cells + row[:, None] * width + column)[hit]
    none = views * cells
    owner = torch.full((views * texels,), none, device=points.device)
    owner = owner.scatter_reduce(0, (view * texels + texel)[hit], cell, "amin")
    owned = (owner < none).nonzero()[:, 0]
    count = owner[owned].bincount(minlength=none)
    total = noise_map.new_zeros(none, channels).index_add(0, owner[owned], noise_map[owned % texels])

    share = F.avg_pool2d(hit[:, None].float(), FINE).flatten()
    covered = ((share >= 0.5) & (count > 0)).view(views, 1, height, width)
    eps = (total / count.clamp_min(1).sqrt()[:, None]).view(views, height, width, channels).movedim(-1, 1)
    return torch.where(covered, eps, behind)
