"""Loading posed captures: one reader for each format (`readers`), then the same steps for all (`capture`)."""

from csd3d.datasets.capture import Capture, SceneConfig, load_capture

__all__ = ["Capture", "SceneConfig", "load_capture"]
