"""Files for other programs: mesh and texture, videos."""

from csd3d.export.mesh import MeshConfig, export_mesh, extract_mesh
from csd3d.export.placement import Placement, capture_placement, write_scene_json
from csd3d.export.texture import bake_texture, render_mesh
from csd3d.export.video import side_by_side, to_uint8, write_video

__all__ = [
    "MeshConfig",
    "Placement",
    "bake_texture",
    "capture_placement",
    "export_mesh",
    "extract_mesh",
    "render_mesh",
    "side_by_side",
    "to_uint8",
    "write_scene_json",
    "write_video",
]
