"""The field's parts against closed forms."""

import math

import numpy as np
import pytest
import torch

from csd3d.fields import Background, FieldConfig, RadianceField, contract, spherical_harmonics, trunc_exp

BOX = torch.tensor([-1.0, -1, -1, 1, 1, 1])
SMALL = dict(levels=3, log2_hashmap_size=10, base_resolution=4, max_resolution=16, hidden=8, geo_features=3)


def field(unbounded=False, seed=0, **options):
    return RadianceField(FieldConfig(**SMALL | options), BOX, unbounded, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_spherical_harmonics_are_orthonormal(degree):
    """∫ Y_a Y_b dω = δ_ab, by Gauss-Legendre in z and a uniform rule in azimuth: exact for these polynomials."""
    z, wz = np.polynomial.legendre.leggauss(8)
    phi = 2 * math.pi * np.arange(16) / 16
    r = np.sqrt(1 - z**2)[:, None]
    points = np.stack([r * np.cos(phi), r * np.sin(phi), np.broadcast_to(z[:, None], (8, 16))], -1).reshape(-1, 3)
    weights = np.repeat(wz * 2 * math.pi / 16, 16)
    basis = spherical_harmonics(torch.from_numpy(points), degree).numpy()
    np.testing.assert_allclose((basis * weights[:, None]).T @ basis, np.eye(degree**2), atol=1e-12)


def test_contraction_is_the_identity_inside_continuous_and_reaches_two():
    inside = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(contract(inside), inside)
    assert torch.allclose(contract(torch.tensor([[1e9, 0.0, 0.0]])), torch.tensor([[2.0, 0, 0]]))
    assert torch.allclose(contract(torch.tensor([[2.0, 1.0, 0.0]])), torch.tensor([[1.5, 0.75, 0.0]]))
    edge = torch.tensor([[1.0, 0.3, -0.2]])
    assert torch.allclose(contract(edge * 1.00001), edge, atol=1e-4)


def test_trunc_exp_is_exp_with_a_bounded_gradient():
    x = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(trunc_exp, x)
    far = torch.tensor([-1e3, 1e3], requires_grad=True)
    trunc_exp(far).sum().backward()
    assert torch.allclose(far.grad, torch.tensor([-15.0, 15.0]).exp())


def test_bounded_field_ends_at_its_box_and_unbounded_does_not():
    outside = torch.tensor([[1.5, 0.0, 0.0], [0.0, 0.0, -7.0]])
    assert field().density(outside)[0].eq(0).all()
    assert field(unbounded=True).density(outside)[0].gt(0).all()


def test_fresh_density_is_scale_over_e_per_side_of_the_box():
    sigma = field(density_scale=6.0).density(torch.zeros(4, 3))[0]
    assert torch.allclose(sigma, torch.full((4,), 6.0 / 2 / math.e), rtol=1e-2)


def test_field_is_fixed_by_its_generator_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, second, third = field(seed=1), field(seed=1), field(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    x, d = torch.rand(9, 3) - 0.5, torch.nn.functional.normalize(torch.rand(9, 3), dim=1)
    assert torch.equal(first(x, d)[0], second(x, d)[0])
    assert not torch.equal(first(x, d)[0], third(x, d)[0])


def test_colour_depends_on_the_direction_and_density_does_not():
    model = field()
    x = torch.rand(50, 3) - 0.5
    one, other = (torch.nn.functional.normalize(torch.randn(50, 3), dim=1) for _ in range(2))
    assert not torch.allclose(model(x, one)[0], model(x, other)[0])
    assert torch.equal(model(x, one)[1], model(x, other)[1])


def test_field_learns_a_coloured_ball():
    generator = torch.Generator().manual_seed(0)
    model = field()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    direction = torch.tensor([[0.0, 0.0, 1.0]])
    for _ in range(300):
        x = torch.rand(512, 3, generator=generator) * 2 - 1
        inside = x.norm(dim=1) < 0.6
        rgb, sigma = model(x, direction.expand(512, 3))
        loss = (1 - torch.exp(-0.1 * sigma) - 0.9 * inside).square().mean()
        loss = loss + (rgb - torch.sigmoid(3 * x))[inside].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x = torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.2, 0.1], [0.8, 0.6, 0.0], [0.0, -0.9, 0.5]])
    rgb, sigma = model(x, direction.expand(4, 3))
    assert sigma[:2].min() > 5 * sigma[2:].max()
    assert torch.allclose(rgb[:2], torch.sigmoid(3 * x[:2]), atol=0.1)


def test_backgrounds():
    directions = torch.nn.functional.normalize(torch.randn(7, 3), dim=1)
    assert Background("white")(directions).eq(1).all()
    assert Background("black")(directions).eq(0).all()
    assert torch.equal(Background((0.1, 0.2, 0.3))(directions), torch.tensor([[0.1, 0.2, 0.3]]).expand(7, 3))
    learned = Background("learned", torch.Generator().manual_seed(0))(directions)
    assert learned.shape == (7, 3)
    assert learned.std() > 1e-3
    with pytest.raises(ValueError, match="learned, white, black"):
        Background("blue")


@pytest.mark.parametrize(
    ("key", "value"), [("levels", 0), ("sh_degree", 5), ("backend", "cuda"), ("density_scale", 0.0)]
)
def test_bad_settings_are_named(key, value):
    with pytest.raises(ValueError, match=key if key != "levels" else "levels"):
        FieldConfig(**{key: value})


def blob(**options):
    """A field that is its blob alone: its density network says nothing."""
    found = field(blob_scale=8.0, blob_radius=0.8, **options)
    torch.nn.init.zeros_(found.density_net[-1].weight)
    return found


def points(count=50, seed=3):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) - 0.5


def test_blob_is_a_cone_of_log_density():
    """log σ = log(scale/side) − 1 + 8 (1 − r/0.8), of half the box's side."""
    at = torch.tensor([[0.0, 0, 0], [0.4, 0, 0], [0.0, 0.8, 0], [0.9, 0.9, 0.0]])
    raw = blob().density(at)[0].log() + 1 - math.log(5.0 / 2)
    assert torch.allclose(raw, torch.tensor([8.0, 4.0, 0.0, 8 - 9 * 2**0.5]), atol=1e-5)


@pytest.mark.parametrize("step", [None, 5e-3])
def test_normals_of_a_ball_point_outwards(step):
    at = points()
    at = at[at.norm(dim=1) > 0.2]  # near the tip of the cone a step is not small
    assert torch.allclose(blob().normals(at, step), at / at.norm(dim=1, keepdim=True), atol=0.02)


def test_normals_by_differences_are_the_analytic_ones_and_teach_the_table():
    """One dense level: within its cells the encoding is smooth."""
    found = field(levels=1, base_resolution=4)
    torch.nn.init.normal_(found.table, std=0.5, generator=torch.Generator().manual_seed(1))
    at = points(200)
    analytic, differences = found.normals(at), found.normals(at, 1e-4)
    assert (analytic * differences).sum(1).median() > 0.999
    assert not analytic.requires_grad
    differences.square().sum().backward()  # of unit vectors: no gradient ...
    assert found.table.grad.abs().max() < 1e-3
    found.normals(at, 1e-2)[:, 2].sum().backward()  # ... but turning them has one
    assert found.table.grad.abs().max() > 1e-2


def test_levels_that_are_not_active_count_for_nothing():
    found, at = field(), points()
    torch.nn.init.normal_(found.table, generator=torch.Generator().manual_seed(1))
    full = found.density(at)[0]
    found.active_levels = 2
    coarse = found.density(at)[0]
    assert not torch.allclose(full, coarse)
    with torch.no_grad():
        found.table[found.offsets[2] :] = 7.0
    again = found.density(at)[0]
    assert torch.equal(again, coarse)
    again.sum().backward()
    assert found.table.grad[found.offsets[2] :].eq(0).all()
    found.active_levels = 3
    assert not torch.allclose(found.density(at)[0], coarse)
