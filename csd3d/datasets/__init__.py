"""Posed captures in: nerfstudio and instant-ngp transforms.json, Blender synthetic."""

from csd3d.datasets.capture import Capture, SceneConfig, load_capture

__all__ = ["Capture", "SceneConfig", "load_capture"]
