"""Posed captures in: a reader a format (`readers`), one way from there on (`capture`)."""

from csd3d.datasets.capture import Capture, SceneConfig, load_capture

__all__ = ["Capture", "SceneConfig", "load_capture"]
