"""Shading of a ball in closed form: what the lamp lights, which side counts as turned away."""

import pytest
import torch

from csd3d.rendering import OccupancyGrid, RenderConfig, ShadedField, Shading, render_rays
from csd3d.rendering.shading import lambert

AABB = torch.tensor([-1.0, -1, -1, 1, 1, 1])


class Ball:
    """A dense ball of radius 0.6 with exact normals and a colour of its own, as RadianceField's methods give them."""

    def __init__(self, inward: bool = False) -> None:
        self.sign = -1.0 if inward else 1.0

    def density(self, positions):
        return 300.0 * (positions.norm(dim=-1) < 0.6), positions[:, :1]

    def colour(self, features, directions):
        return torch.tensor([0.8, 0.4, 0.2]).expand(len(features), 3)

    def normals(self, positions, step=None):
        return self.sign * torch.nn.functional.normalize(positions, dim=-1)


def seen(shading, inward=False, at=(0.0, 0.0)):
    """The pixel where a ray along −x from (2, *at) meets the ball, black behind, and its penalty."""
    grid = OccupancyGrid(RenderConfig(steps=512), AABB)
    rays_o, rays_d = torch.tensor([[2.0, *at]]), torch.tensor([[-1.0, 0.0, 0.0]])
    field = ShadedField(Ball(inward), shading)
    return render_rays(field, lambda d: torch.zeros_like(d), grid, rays_o, rays_d, grid.config)


def test_albedo_is_the_fields_own_colour():
    assert torch.allclose(seen(Shading()).rgb, torch.tensor([[0.8, 0.4, 0.2]]), atol=1e-3)
    assert seen(Shading()).penalty is None


def test_lamp_at_the_camera_lights_by_the_cosine_of_the_view():
    """At height z the surface faces the camera with cosine √(1 − z²/0.36)."""
    for z in (0.0, 0.3, 0.5):
        cosine = (1 - z**2 / 0.36) ** 0.5
        found = seen(Shading("textureless", ambient=0.2), at=(0.0, z)).rgb
        assert torch.allclose(found, torch.full((1, 3), 0.2 + 0.8 * cosine), atol=0.02)
    lit = seen(Shading("lambertian", ambient=0.2), at=(0.0, 0.3)).rgb
    assert torch.allclose(lit, (0.2 + 0.8 * (1 - 0.25) ** 0.5) * torch.tensor([[0.8, 0.4, 0.2]]), atol=0.02)


def test_lamp_from_above_lights_what_faces_up():
    above = Shading("textureless", lamp=(1.0, 0.0, 1.0))  # at the surface: cancels the way to the camera, leaves up
    d = torch.tensor([[-1.0, 0.0, 0.0]]).repeat(3, 1)
    normals = torch.tensor([[0.0, 0, 1], [1.0, 0, 0], [0.0, 0, -1]])
    towards = torch.tensor([2.0, 0.0, 1.0]) / 5**0.5
    expected = 0.3 + 0.7 * (normals @ towards).clamp_min(0)
    assert torch.allclose(lambert(normals, d, above)[:, 0], expected)


def test_normals_as_colour():
    assert torch.allclose(seen(Shading("normal")).rgb, torch.tensor([[1.0, 0.5, 0.5]]), atol=0.02)


def test_orientation_penalises_surfaces_that_face_away():
    """Weights sum to the opacity, 1, so the penalty is (n·d)² of the point seen; 0 for one that faces the camera."""
    shading = Shading(orientation=True)
    with torch.enable_grad():
        assert seen(shading).penalty.item() == pytest.approx(0, abs=1e-6)
        assert seen(shading, inward=True).penalty.item() == pytest.approx(1, abs=0.01)
        z = 0.3
        assert seen(shading, inward=True, at=(0.0, z)).penalty.item() == pytest.approx(1 - z**2 / 0.36, abs=0.02)


def test_unknown_shading_is_refused():
    with pytest.raises(ValueError, match="textureless"):
        Shading("phong")
