"""The camera of a picture as what camera-aware UNets take: a vector, and a map beside the latents.

Such a UNet is diffusers' UNet2DConditionModel with `class_embed_type="projection"` and
`projection_class_embeddings_input_dim=CAMERA_WIDTH`; the vector is its `class_labels`. One with `MAP_CHANNELS` more
input channels than its latents have is also shown `camera_map`. Angles are in degrees.
"""

import torch
from torch import Tensor

AZIMUTH_WAVES = 4  # sin and cos of 1, 2, 3 and 4 times the azimuth: fine enough to tell views 20° apart
CAMERA_WIDTH = 2 * AZIMUTH_WAVES + 4
MAP_CHANNELS = 3
MIDDLE_DISTANCE, DISTANCE_SCALE = 4.0, 0.5  # world units; the shipped models were trained with 3.6 to 4.4


def camera_embedding(azimuth_deg: Tensor, elevation_deg: Tensor, distance: Tensor) -> Tensor:
    """Cameras [B] as vectors [B,K], K = `CAMERA_WIDTH`, float32, on the device of the azimuths.

    `azimuth_deg` counts from the object's front, counter-clockwise seen from above, in any range; `elevation_deg` from
    the horizon, −90 to 90; `distance` to the object's centre, in world units. The components are sin kα for k = 1…4,
    cos kα for k = 1…4, sin and cos of the elevation, (distance − 4) / 0.5, and 1, which marks that there is a camera.
    A row of zeros (`no_camera`) means no camera; the models were trained with such rows too.
    """
    azimuth, elevation, distance = torch.broadcast_tensors(azimuth_deg, elevation_deg, distance)
    waves = torch.arange(1, AZIMUTH_WAVES + 1, device=azimuth.device)
    turns = torch.deg2rad(azimuth.float())[:, None] * waves
    height = torch.deg2rad(elevation.float())[:, None]
    far = (distance.float()[:, None] - MIDDLE_DISTANCE) / DISTANCE_SCALE
    return torch.cat((turns.sin(), turns.cos(), height.sin(), height.cos(), far, torch.ones_like(far)), 1)


def view_embedding(view: Tensor | None, count: int, width: int, device: torch.device) -> Tensor:
    """`camera_embedding` of views [count, 3], zeros of `width` without any; ValueError for other shapes."""
    if view is None:
        return torch.zeros(count, width, device=device)
    if view.shape != (count, 3):
        raise ValueError(f"view must be [{count}, 3]: azimuth, elevation, distance; got {tuple(view.shape)}")
    return camera_embedding(*view.to(device, torch.float32).unbind(1))


def no_camera(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Vectors [count,K] that mean no camera: zeros."""
    return torch.zeros(count, CAMERA_WIDTH, device=device)


def mirrored(camera: Tensor) -> Tensor:
    """The vectors [B,K] of the cameras on the other side, at minus their azimuths; what they see of most objects is the
    mirror image."""
    return torch.cat((-camera[:, :AZIMUTH_WAVES], camera[:, AZIMUTH_WAVES:]), 1)


def camera_map(camera: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel is in the object's own axes, [B,3,h,w], from `camera_embedding`s [B,K]; zeros for no camera.

    It is the point of its ray on the plane through the object's centre that faces the camera, seen from afar, in
    twentieths of a picture's side: x to the object's front, z up, as in `csd3d.cameras`. Ray maps do the same for
    others (CAT3D, arXiv 2405.10314). It differs between left and right at every pixel; that a model learns sides
    faster with it than from the vector alone was not found (docs/training.md). Values are large so that the map's
    weights, which begin at zero, need not grow for long.
    """
    sin, cos = camera[:, 0, None, None], camera[:, AZIMUTH_WAVES, None, None]
    sin_height, cos_height = (camera[:, 2 * AZIMUTH_WAVES + k, None, None] for k in (0, 1))
    right = 10 * (torch.arange(width, device=camera.device) * 2 + 1 - width) / width
    up = 10 * (height - 1 - 2 * torch.arange(height, device=camera.device))[:, None] / height
    slope, rise = up * sin_height, (up * cos_height).expand(-1, -1, width)
    return torch.stack((-right * sin - slope * cos, right * cos - slope * sin, rise), 1)
