"""Which latent pixel of one view of a scene shows the same surface as a pixel of another, by the scene's depth.

Views can share along it (`distillation.correspondence`) instead of at the same address of their latents.
"""

import torch
from torch import Tensor

from csd3d.cameras import Cameras, pixel_centres
from csd3d.distillation import Correspondence, flow_correspondence
from csd3d.distillation.correspondence import to_latent
from csd3d.editors.scene import SceneEdit
from csd3d.metrics.consistency import reproject
from csd3d.rendering import Rendered
from csd3d.representations.base import surface_depth


def depth_correspondence(edit: SceneEdit, views: Rendered, rows: Tensor) -> Correspondence:
    """Of the training views `rows` [N] of an edit, rendered as `views`."""
    cameras = edit.capture.cameras[edit.capture.train[rows]].to(views.depth.device)
    size, unit = tuple(edit.source.z.shape[2:]), edit.prior.codec.downscale
    return view_correspondence(cameras, surface_depth(views), size, unit).to(edit.prior.device)


def view_correspondence(
    cameras: Cameras, depths: Tensor, size: tuple[int, int], unit: int, depth_tolerance: float = 0.02
) -> Correspondence:
    """Of N views, from their `depths` [N, H, W], the distance along the ray (`inf`, NaN or ≤ 0: no surface).

    `size` = (h, w) of their latents, `unit` pixels a side each. A pixel without a surface shows nothing that another
    view shows; one that is hidden from the other view neither (`reproject`, which has `depth_tolerance`).
    """
    N, height, width = depths.shape
    if len(cameras) != N or (height, width) != (cameras.height, cameras.width):
        raise ValueError(f"{len(cameras)} cameras of {cameras.height}x{cameras.width} and depths {tuple(depths.shape)}")
    centres = pixel_centres(width, height, depths.device).reshape(height, width, 2)
    flow, share = depths.new_zeros(N, N, *size, 2), depths.new_zeros(N, N, *size)
    for i in range(N):
        for j in range(N):
            if i != j:
                pixels, seen = reproject(depths, cameras, i, j, depth_tolerance)
                flow[i, j], share[i, j] = to_latent(torch.where(seen[..., None], pixels - centres, 0), seen, size, unit)
    return flow_correspondence(flow, share)
