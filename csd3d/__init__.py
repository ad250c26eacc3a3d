"""csd3d: text-to-3D and editing of captured 3D scenes by Collaborative Score Distillation (arXiv 2307.04787)."""

__version__ = "0.1.0"
