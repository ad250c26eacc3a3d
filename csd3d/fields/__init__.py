"""Radiance fields: hash encoding and small networks from a position and a direction to colour and density."""

from csd3d.fields.background import Background
from csd3d.fields.encoding import contract, spherical_harmonics, trunc_exp
from csd3d.fields.radiance import FieldConfig, RadianceField

__all__ = ["Background", "FieldConfig", "RadianceField", "contract", "spherical_harmonics", "trunc_exp"]
