"""From a field and cameras to colour, depth and opacity: occupancy grid, ray marching, compositing."""

from csd3d.rendering.occupancy import OccupancyGrid, RenderConfig
from csd3d.rendering.render import Rendered, distortion_loss, render_image, render_rays

__all__ = ["OccupancyGrid", "RenderConfig", "Rendered", "distortion_loss", "render_image", "render_rays"]
