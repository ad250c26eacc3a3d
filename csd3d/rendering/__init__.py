"""From a field and cameras to colour, depth and opacity: occupancy grid, ray marching, compositing."""

from csd3d.rendering.occupancy import OccupancyGrid, RenderConfig
from csd3d.rendering.render import Rendered, distortion_loss, render_image, render_rays
from csd3d.rendering.shading import ShadedField, Shading

__all__ = [
    "OccupancyGrid",
    "RenderConfig",
    "Rendered",
    "ShadedField",
    "Shading",
    "distortion_loss",
    "render_image",
    "render_rays",
]
