"""Where a picture is seen from, as the vector that camera-aware UNets are told it by.

Such a UNet is diffusers' UNet2DConditionModel with `class_embed_type="projection"` and
`projection_class_embeddings_input_dim=CAMERA_WIDTH`; the vector is its `class_labels`. Angles are in degrees.
"""

import torch
from torch import Tensor

AZIMUTH_WAVES = 4  # sin and cos of 1, 2, 3 and 4 times the azimuth: fine enough to tell views 20° apart
CAMERA_WIDTH = 2 * AZIMUTH_WAVES + 4
MIDDLE_DISTANCE, DISTANCE_SCALE = 4.0, 0.5  # world units; the shipped models saw 3.6 to 4.4


def camera_embedding(azimuth_deg: Tensor, elevation_deg: Tensor, distance: Tensor) -> Tensor:
    """Cameras [B] as vectors [B,K], K = `CAMERA_WIDTH`, float32, on the device of the azimuths.

    `azimuth_deg` counts from the object's front, counter-clockwise seen from above, any range; `elevation_deg` from the
    horizon, −90 to 90; `distance` to the object's middle, in world units. The components: sin kα for k = 1…4, cos kα
    alike, sin and cos of the elevation, (distance − 4) / 0.5, and a 1 that says that a camera is told. A row of zeros
    (`no_camera`) says that none is: a part of the training pictures had that, so a model draws without one too.
    """
    azimuth, elevation, distance = torch.broadcast_tensors(azimuth_deg, elevation_deg, distance)
    waves = torch.arange(1, AZIMUTH_WAVES + 1, device=azimuth.device)
    turns = torch.deg2rad(azimuth.float())[:, None] * waves
    height = torch.deg2rad(elevation.float())[:, None]
    far = (distance.float()[:, None] - MIDDLE_DISTANCE) / DISTANCE_SCALE
    return torch.cat((turns.sin(), turns.cos(), height.sin(), height.cos(), far, torch.ones_like(far)), 1)


def no_camera(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Vectors [count,K] that tell no camera: zeros."""
    return torch.zeros(count, CAMERA_WIDTH, device=device)
