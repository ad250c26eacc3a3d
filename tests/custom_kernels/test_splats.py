"""Gaussian splats: the compiled kernel against the float64 reference, which is checked against closed forms."""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from custom_kernels import native
from custom_kernels import splats as kernels
from custom_kernels.splats import C0, Splats, View, harmonics, render, rotation_matrices

needs_native = pytest.mark.skipif(native.library() is None, reason="the kernels are not compiled")
LENSES = {
    "pinhole": {},
    "lens": {"lens": (0.1, -0.05, 0.01, 0.0, 0.002, -0.003), "fold": 2.0},
    "rational": {"lens": (0.2, 0.05, 0.01, 0.0, 0.001, 0.002, 0.1, 0.02, 0.003), "fold": 2.0},
    "fisheye": {"lens": (0.05, -0.01, 0.002, 0.0), "fisheye": True, "fold": 1.5},
}


def camera(width=37, height=29, **changes):
    """A camera at (0.3, −0.2, −3) that looks along +z, turned a little."""
    turn = rotation_matrices(torch.tensor([[1.0, 0.05, -0.08, 0.1]]))[0]
    limits = (-0.6, 0.6, -0.5, 0.5)
    at = torch.tensor([0.3, -0.2, -3.0])
    return View(turn, at, (32.0, 30.0), (width / 2 + 0.7, height / 2), width, height, **{"limits": limits} | changes)


def scene(count=60, degree=3, seed=0, spread=0.8):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rest = (degree + 1) ** 2 - 1
    sizes = 0.4 * normal(count, 3) - 2.0
    parts = spread * normal(count, 3), sizes, normal(count, 4), normal(count) + 0.5, 0.5 * normal(count, 3)
    return Splats(*parts, 0.2 * normal(count, rest, 3))


def value_and_gradients(splats, view, backend, degree=3, antialiased=True, dtype=torch.float32):
    leaves = Splats(*(x.to(dtype).requires_grad_() for x in splats))
    image = render(leaves, view, degree=degree, antialiased=antialiased, depth=True, backend=backend)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=generator).to(dtype) for x in image[:2]]
    loss = sum((x * w).sum() for x, w in zip(image, weights, strict=False))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return image, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def assert_alike(got, truth, rtol=2e-4):
    """Pictures within 1e-4, gradients within `rtol` of their norm."""
    (image, gradients), (image_t, gradients_t) = got, truth
    for a, b in zip(image, image_t, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    for name, a, b in zip(Splats._fields, gradients, gradients_t, strict=True):
        assert torch.isfinite(a).all(), name
        assert (a.double() - b).norm() <= rtol * b.norm() + 1e-9, name


# ---- reference


def test_one_splat_is_its_closed_form():
    """A round splat on the axis: a 2D Gaussian of standard deviation f s / z, its colour, and its distance."""
    size, z, focal = 0.2, 4.0, 40.0
    splats = Splats(
        torch.tensor([[0.0, 0, z]]),
        torch.full((1, 3), math.log(size)),
        torch.tensor([[2.0, 0, 0, 0]]),
        torch.tensor([0.4]),
        torch.tensor([[1.0, 0.5, -0.5]]),
        torch.zeros(1, 0, 3),
    )
    view = View(torch.eye(3), torch.zeros(3), (focal, focal), (10.5, 10.5), 21, 21)
    image = kernels.render_reference(
        Splats(*(x.double() for x in splats)), view, degree=0, antialiased=False, depth=True
    )
    variance = (focal * size / z) ** 2 + kernels.BLUR
    u = torch.arange(21).double() - 10
    square = u[:, None] ** 2 + u**2
    alpha = torch.tensor(0.4).double().sigmoid() * torch.exp(-0.5 * square / variance)
    alpha = torch.where(alpha >= 1 / 255, alpha, 0)
    torch.testing.assert_close(1 - image.light, alpha)
    torch.testing.assert_close(image.rgb[10, 10], alpha[10, 10] * (0.5 + C0 * torch.tensor([1.0, 0.5, -0.5])).double())
    torch.testing.assert_close(image.depth, alpha * z)
    filtered = kernels.render_reference(splats, view, degree=0, antialiased=True)
    ratio = (variance - kernels.BLUR) / variance  # of the determinants' roots
    assert (1 - filtered.light)[10, 10].item() == pytest.approx(ratio * alpha[10, 10].item(), rel=1e-4)


def test_harmonics_are_orthonormal():
    """∫ Y_i Y_j over the sphere is 1 for i = j, else 0: by a rule that is exact for their products."""
    nodes = torch.linspace(0, math.pi, 401, dtype=torch.float64)
    azimuth = torch.arange(16, dtype=torch.float64) * math.tau / 16
    theta, phi = torch.meshgrid(nodes, azimuth, indexing="ij")
    directions = torch.stack((theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()), -1)
    basis = harmonics(directions, 3).flatten(0, 1)
    weight = (theta.sin() * (nodes[1] - nodes[0]) * math.tau / 16).flatten()
    torch.testing.assert_close(basis.T @ (weight[:, None] * basis), torch.eye(16).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("lens", LENSES)
def test_reference_gradients_are_right(lens):
    splats, view = scene(4, degree=2, spread=0.4), camera(9, 8, **LENSES[lens])
    view = replace(view, focal=(8.0, 8.0), centre=(4.5, 4.0))
    leaves = [x.double().requires_grad_() for x in splats]

    def function(*parts):
        return kernels.render_reference(Splats(*parts), view, degree=2)[:2]

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-4, fast_mode=True)


# ---- native


@needs_native
@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("antialiased", [True, False])
def test_native_matches_the_reference(lens, antialiased):
    splats, view = scene(), camera(**LENSES[lens])
    got = value_and_gradients(splats, view, "native", antialiased=antialiased)
    assert_alike(got, value_and_gradients(splats, view, "reference", antialiased=antialiased, dtype=torch.float64))
    assert got[0].light.min() < 0.5  # something is seen


@needs_native
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_lower_degrees_leave_the_other_harmonics_alone(degree):
    splats, view = scene(33), camera()
    got = value_and_gradients(splats, view, "native", degree)
    assert_alike(got, value_and_gradients(splats, view, "reference", degree, dtype=torch.float64))
    assert not got[1][5][:, (degree + 1) ** 2 - 1 :].any()


@needs_native
@pytest.mark.parametrize(("count", "size"), [(1, (1, 1)), (16, (17, 3)), (47, (64, 5))])
def test_tails(count, size):
    """Numbers of splats and pictures that fill no vector and no tile."""
    splats, view = scene(count), camera(*size)
    truth = value_and_gradients(splats, view, "reference", dtype=torch.float64)
    assert_alike(value_and_gradients(splats, view, "native"), truth)


@needs_native
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_splats_show_nothing(backend):
    image = render(scene(0), camera(), degree=3, depth=True, backend=backend)
    assert image.light.eq(1).all()
    assert not image.rgb.any()
    assert not image.depth.any()


@needs_native
@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_computes_the_same():
    splats, view = scene(40), camera(**LENSES["lens"])
    truth = value_and_gradients(splats, view, "reference", dtype=torch.float64)
    assert_alike(value_and_gradients(splats, view, "native"), truth)


@needs_native
def test_splats_behind_or_degenerate_are_not_seen_and_get_no_gradient():
    splats, view = scene(9), camera(width=24, height=24)
    splats.means[0] = torch.tensor([0.3, -0.2, -4.0])  # behind
    splats.means[1] = view.position  # in the camera
    splats.means[2, 1] = math.nan
    splats.log_scales[3] = math.inf
    splats.quats[4] = 0  # no rotation at all
    splats.opacities[5] = -20
    splats.log_scales[6] = -40  # a point
    splats.dc[7] = math.nan
    image, gradients = value_and_gradients(splats, view, "native")
    alone = Splats(*(x[[4, 8]] for x in splats))
    other, _ = value_and_gradients(alone, view, "native")
    torch.testing.assert_close(image.rgb, other.rgb)
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
        assert not gradient[[0, 1, 2, 3, 5, 7]].any()


@needs_native
def test_light_that_is_gone_stops_the_splats_behind():
    """Forty opaque splats in a row: what is behind the first dozen gets no gradient, and all is as in the reference."""
    splats = scene(40, spread=0.0)
    splats.means[:, 2] = torch.linspace(-1, 1, 40)
    splats.opacities[:] = 6.0
    view = camera(20, 20)
    got = value_and_gradients(splats, view, "native")
    assert_alike(got, value_and_gradients(splats, view, "reference", dtype=torch.float64), rtol=2e-3)
    assert got[0].light.min() < 2e-4
    middle = replace(view, width=2, height=2, centre=(1.0 + 0.7, 1.0))
    assert not value_and_gradients(splats, middle, "native")[1][4][-15:].any()


@needs_native
@pytest.mark.parametrize("lens", ["pinhole", "fisheye"])
def test_any_number_of_threads_gives_the_same_bytes(lens):
    splats, view = scene(900), camera(75, 61, **LENSES[lens])
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        image, gradients = value_and_gradients(splats, view, "native")
        found.append([*image, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_native
def test_too_many_pairs_are_refused(monkeypatch):
    """Splats over the whole of a large picture would need more memory than there is."""
    count = 70_000
    far = torch.tensor([[0.0, 0, 5.0]]).repeat(count, 1)
    parts = torch.full((count, 3), 3.0), torch.ones(count, 4), torch.zeros(count), torch.zeros(count, 3)
    view = View(torch.eye(3), torch.zeros(3), (900.0, 900.0), (512.0, 512.0), 1024, 1024)
    with pytest.raises(RuntimeError, match=r"70000 splats reach more than 2\^28 tiles"):
        render(Splats(far, *parts, torch.zeros(count, 0, 3)), view, degree=0, backend="native")


# ---- choice of backend


def test_wrong_shapes_and_backends_are_refused(monkeypatch):
    splats, view = scene(3), camera()
    with pytest.raises(ValueError, match="harmonics of degree 3"):
        render(splats._replace(rest=splats.rest[:, :8]), view, degree=3)
    with pytest.raises(ValueError, match="expected"):
        render(splats._replace(quats=splats.means), view, degree=0)
    with pytest.raises(ValueError, match="unknown backend"):
        render(splats, view, degree=0, backend="cuda")
    monkeypatch.setitem(sys.modules, "gsplat", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install .*"\.\[gsplat\]"'):
        render(splats, view, degree=0, backend="gsplat")
    doubles = Splats(*(x.double() for x in splats))
    assert kernels.choose_backend("auto", doubles, view) == "reference"


def test_gsplat_gets_what_it_asks_for(monkeypatch):
    """The call, by a stand-in for the package that renders by the reference."""
    view = replace(camera(16, 16), limits=(-1e3, 1e3, -1e3, 1e3))

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):
        assert (options["render_mode"], options["rasterize_mode"]) == ("RGB+D", "antialiased")
        parts = means, scales.log(), quats, opacities.logit(), colors[:, 0], colors[:, 1:]
        position = -viewmats[0, :3, :3].T @ viewmats[0, :3, 3]
        focal, centre = (Ks[0, 0, 0].item(), Ks[0, 1, 1].item()), (Ks[0, 0, 2].item(), Ks[0, 1, 2].item())
        own = View(viewmats[0, :3, :3], position, focal, centre, width, height)
        image = kernels.render_reference(Splats(*parts), own, degree=options["sh_degree"], depth=True)
        return torch.cat((image.rgb, image.depth[..., None]), -1)[None], (1 - image.light)[None, ..., None], {}

    monkeypatch.setitem(sys.modules, "gsplat", types.SimpleNamespace(rasterization=rasterization))
    got = kernels.render_gsplat(scene(12), view, 2, True, True)
    for a, b in zip(got, kernels.render_reference(scene(12), view, degree=2, depth=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
