"""The compiled radiance field against csd3d's torch modules in float64, forward and all gradients."""

import pytest
import torch

from csd3d.fields import FieldConfig, RadianceField
from tests.custom_kernels.test_hashgrid import needs_native

pytestmark = needs_native
BOX = torch.tensor([-1.0, -0.5, -1, 1, 1.5, 2])
SMALL = dict(levels=5, log2_hashmap_size=9, base_resolution=4, max_resolution=40, hidden=32, geo_features=5)
SHAPES = {
    "default": {},
    "default sizes": dict(levels=12, log2_hashmap_size=12, hidden=64, geo_features=15),
    "narrow": dict(hidden=16, geo_features=1, sh_degree=1, levels=1),
    "wide": dict(hidden=128, colour_layers=3, geo_features=20, sh_degree=3),
    "three vectors": dict(hidden=48, colour_layers=1, sh_degree=2, levels=20),
    "blob": dict(blob_scale=4.0, blob_radius=0.7),
}


def field(unbounded=False, **options):
    generator = torch.Generator().manual_seed(0)
    found = RadianceField(FieldConfig(**SMALL | options), BOX, unbounded, generator)
    torch.nn.init.normal_(found.table, std=0.5, generator=generator)
    return found


def samples(count, seed=0):
    """Positions in and around the box; directions that neighbours share, as along rays."""
    generator = torch.Generator().manual_seed(seed)
    positions = BOX[:3] + (BOX[3:] - BOX[:3]) * (1.2 * torch.rand(count, 3, generator=generator) - 0.1)
    directions = torch.nn.functional.normalize(torch.randn(count // 5 + 1, 3, generator=generator), dim=1)
    return positions, directions.repeat_interleave(5, dim=0)[:count]


def results(found, positions, directions, seed=7):
    """rgb, sigma, then the gradients of all parameters under a random cotangent."""
    generator = torch.Generator().manual_seed(seed)
    count = len(positions)
    cotangents = torch.randn(count, 3, generator=generator), torch.randn(count, generator=generator)
    rgb, sigma = found(positions, directions)
    found.zero_grad()
    torch.autograd.backward((rgb, sigma), [g.to(rgb.dtype) for g in cotangents])
    return [rgb.detach(), sigma.detach(), *(p.grad.clone() for p in found.parameters())]


def truth(found, positions, directions):
    other = RadianceField(found.config, BOX, found.unbounded).double()
    other.load_state_dict(found.state_dict())
    other.active_levels = found.active_levels
    return results(other, positions.double(), directions.double())


def assert_close(got, expected, tolerance):
    """Every tensor within `tolerance` of its largest number."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        scale = b.abs().max().clamp_min(1e-3) if b.numel() else 1.0
        torch.testing.assert_close(a.double() / scale, b.double() / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("unbounded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_torch_in_float64(shape, unbounded):
    found, (positions, directions) = field(unbounded, **SHAPES[shape]), samples(203)
    assert found.fused(positions, directions) is not None
    assert_close(results(found, positions, directions), truth(found, positions, directions), 5e-5)


@pytest.mark.parametrize("count", [0, 1, 15, 48, 49, 7001])
def test_any_number_of_samples(count):
    found, (positions, directions) = field(), samples(count)
    assert_close(results(found, positions, directions), truth(found, positions, directions), 5e-5)


def test_levels_that_are_not_active():
    found, (positions, directions) = field(), samples(100)
    found.active_levels = 2
    got = results(found, positions, directions)
    assert_close(got, truth(found, positions, directions), 5e-5)
    assert got[2][found.offsets[2] :].eq(0).all()


def test_density_is_zero_outside_even_where_the_network_overflows():
    found = field()
    with torch.no_grad():
        found.density_net[2].weight *= 1e4
    sigma = found.density(torch.tensor([[1.01, 0.0, 0.0], [0.0, 9.0, 0.0]]))[0]
    assert sigma.eq(0).all()


def test_a_gradient_of_exp_is_cut_and_a_nan_shows():
    """trunc_exp's gradient stops growing at exp(15); NaN weights must not look healthy."""
    found, (positions, directions) = field(), samples(60)
    with torch.no_grad():
        found.density_net[2].weight *= 30
    assert_close(results(found, positions, directions)[2:], truth(found, positions, directions)[2:], 5e-4)
    with torch.no_grad():
        found.density_net[0].weight[3, 1] = float("nan")
    inside = positions[found.normalise(positions)[1]]
    assert found.density(inside)[0].isnan().all()


def test_density_and_colour_apart_are_the_whole():
    """Also with features that were copied out of the density network's padded rows, and with gradients through them."""
    found, (positions, directions) = field(), samples(150)
    whole = results(found, positions, directions)

    def apart(positions, directions):
        sigma, features = found.density(positions)
        return found.colour(features.clone(), directions), sigma

    apart.zero_grad, apart.parameters = found.zero_grad, found.parameters
    parts = results(apart, positions, directions)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    with torch.no_grad():
        kept = torch.tensor([3, 77, 149])
        sigma, features = found.density(positions)
        assert torch.equal(found.colour(features[kept], directions[kept]), whole[0][kept])
        assert torch.equal(sigma, whole[1])


def test_raw_density_has_a_gradient():
    """Normals by differences go through it."""
    found, (positions, _) = field(), samples(40)
    other = RadianceField(found.config, BOX).double()
    other.load_state_dict(found.state_dict())
    gradients = []
    for model, at in ((found, positions), (other, positions.double())):
        model.normals(at, 0.05)[:, 1].sum().backward()
        gradients.append(model.table.grad)
    assert_close(gradients[:1], gradients[1:], 1e-3)


def test_bytes_do_not_depend_on_the_threads(threads_restored):
    found, (positions, directions) = field(levels=3), samples(20_000)
    torch.set_num_threads(1)
    one = results(found, positions, directions)
    torch.set_num_threads(4)
    four = results(found, positions, directions)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.fixture
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set():
    for options in (dict(hidden=48), dict(hidden=64, geo_features=15)):
        found, (positions, directions) = field(**options), samples(101)
        assert_close(results(found, positions, directions), truth(found, positions, directions), 5e-5)


def test_torch_takes_over_where_the_kernels_cannot():
    positions, directions = samples(10)
    for options in (dict(features_per_level=4), dict(hidden=24), dict(hidden=512), dict(backend="reference")):
        assert field(**options).fused(positions, directions) is None
    found = field()
    assert found.fused(positions.requires_grad_()) is None
    found(positions, directions)[1].sum().backward()
    assert positions.grad.abs().sum() > 0
    assert found.double().fused(positions.detach().double()) is None
