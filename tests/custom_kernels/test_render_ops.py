"""Grid traversal and compositing: the reference against plain loops and closed forms, the C++ against the reference."""

import math

import pytest
import torch

from custom_kernels import native
from custom_kernels.rendering import (
    Grid,
    Samples,
    Steps,
    composite,
    exclusive_sum,
    keep,
    march,
    transmittance,
)
from custom_kernels.rendering_native import composite_backward_native, composite_native, march_native

needs_native = pytest.mark.skipif(native.library() is None, reason="C++ kernels are not built")
AABB = torch.tensor([-1.0, -0.7, -0.5, 0.9, 1.2, 0.8])
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def random_rays(count: int, generator: torch.Generator, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    rays_o = (torch.rand(count, 3, generator=generator) * 2 - 1) * spread
    target = torch.rand(count, 3, generator=generator) - 0.5
    return rays_o, torch.nn.functional.normalize(target - rays_o, dim=1)


def random_grid(generator: torch.Generator, levels: int = 1, resolution: int = 16, share: float = 0.3) -> Grid:
    return Grid(torch.rand(levels, resolution, resolution, resolution, generator=generator) < share, AABB)


def march_args(seed: int, levels: int = 1, rays: int = 37, cone: float = 0.0, share: float = 0.3, cap: int = 2**31 - 1):
    generator = torch.Generator().manual_seed(seed)
    rays_o, rays_d = random_rays(rays, generator)
    jitter = torch.rand(rays, generator=generator)
    t_min = torch.rand(rays, generator=generator) * 0.2
    grid = random_grid(generator, levels, share=share)
    return (rays_o, rays_d, t_min, torch.full((rays,), 5.0), grid, Steps(0.037, cone, cap), jitter)


def occupied_at(grid: Grid, point: list[float]) -> bool:
    """Plain-loop lookup: the finest level whose box holds the point answers."""
    levels, resolution = grid.occupancy.shape[:2]
    lo, hi = grid.aabb[:3].tolist(), grid.aabb[3:].tolist()
    for level in range(levels):
        cell = []
        for x, a, b in zip(point, lo, hi, strict=True):
            centre, half = (a + b) / 2, (b - a) / 2 * 2**level
            cell.append((x - centre + half) / (2 * half) * resolution)
        if all(0 <= c <= resolution for c in cell):
            return bool(grid.occupancy[(level, *(min(int(c), resolution - 1) for c in cell))])
    return False


def brute_force_march(rays_o, rays_d, t_min, t_max, grid, steps, jitter) -> list[list[tuple[float, float]]]:
    def dt(t):
        return max(steps.size, steps.cone_angle * t)

    found = []
    for o, d, near, far, shift in zip(*(x.tolist() for x in (rays_o, rays_d, t_min, t_max, jitter)), strict=True):
        t, samples = near + shift * dt(near), []
        while t + dt(t) / 2 < far and len(samples) < steps.max_samples:
            middle = t + dt(t) / 2
            if occupied_at(grid, [a + b * middle for a, b in zip(o, d, strict=True)]):
                samples.append((t, t + dt(t)))
            t += dt(t)
        found.append(samples)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("levels", "cone", "cap"), [(1, 0.0, 10**6), (3, 0.0, 10**6), (3, 0.02, 10**6), (1, 0.1, 10**6), (2, 0.02, 7)]
)
def test_march_samples_every_occupied_step_and_no_empty_one(backend, levels, cone, cap):
    args = march_args(levels, levels, cone=cone, cap=cap)
    samples = march(*args, backend=backend)
    expected = brute_force_march(*args)
    assert samples.packed_info[:, 1].tolist() == [len(ray) for ray in expected]
    assert (
        samples.packed_info[:, 0].tolist() == (samples.packed_info[:, 1].cumsum(0) - samples.packed_info[:, 1]).tolist()
    )
    flat = torch.tensor([pair for ray in expected for pair in ray])
    torch.testing.assert_close(torch.stack([samples.t_starts, samples.t_ends], 1), flat, rtol=1e-6, atol=1e-6)
    rays = [r for r, ray in enumerate(expected) for _ in ray]
    assert samples.ray_indices.tolist() == rays
    assert len(set(rays)) > 10


@needs_native
@pytest.mark.parametrize(("levels", "cone"), [(1, 0.0), (4, 0.0), (4, 0.004)])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_native_march_equals_reference(levels, cone, share):
    args = march_args(3, levels, rays=501, cone=cone, share=share)
    fast, slow = march(*args, backend="native"), march(*args, backend="reference")
    assert torch.equal(fast.packed_info, slow.packed_info)
    assert torch.equal(fast.ray_indices, slow.ray_indices)
    torch.testing.assert_close(fast.t_starts, slow.t_starts, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fast.t_ends, slow.t_ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_march_along_the_axes_and_through_cell_corners(backend):
    """Rays parallel to walls, through corners and outwards: dyadic numbers, so that midpoints are exact."""
    grid = Grid(torch.zeros(1, 4, 4, 4, dtype=torch.bool), torch.tensor([-1.0, -1, -1, 1, 1, 1]))
    grid.occupancy[0, 1, 1, 1] = True  # [-0.5, 0]^3
    rays_o = torch.tensor([[-2.0, -0.25, -0.25], [-0.25, 2, -0.25], [-2, -0.25, 0.25], [-2, -2, -2], [2.0, 0.25, 0.25]])
    rays_d = torch.tensor([[1.0, 0, 0], [0, -1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]])
    ends = torch.zeros(5), torch.full((5,), math.inf)
    samples = march(rays_o, rays_d, *ends, grid, Steps(0.125), backend=backend)
    assert samples.packed_info[:, 1].tolist() == [4, 4, 0, 4, 0]
    assert samples.t_starts.tolist() == [1.5, 1.625, 1.75, 1.875, 2.0, 2.125, 2.25, 2.375, 1.5, 1.625, 1.75, 1.875]


@pytest.mark.parametrize("backend", BACKENDS)
def test_march_of_nothing(backend):
    grid, steps = random_grid(torch.Generator().manual_seed(0), share=1.0), Steps(0.1)
    empty = march(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0), grid, steps, backend=backend)
    assert [tuple(x.shape) for x in empty] == [(0,), (0,), (0,), (0, 2)]
    assert empty.ray_indices.dtype == empty.packed_info.dtype == torch.int64
    up = torch.tensor([[0.0, 0, 1]] * 4)
    far_away = torch.tensor([[5.0, 5, 5], [0, 0, 3], [math.nan, 0, 0], [0, 0, 0]])
    t_max = torch.tensor([9.0, 9, 9, -1])
    missed = march(far_away, up, torch.zeros(4), t_max, grid, steps, backend=backend)
    assert missed.packed_info.tolist() == [[0, 0]] * 4
    assert len(missed.t_starts) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_march_takes_non_contiguous_input(backend):
    rays_o, rays_d, t_min, t_max, grid, steps, jitter = march_args(5)
    strided = [x.t().contiguous().t() for x in (rays_o, rays_d)] + [
        torch.stack([x, x], 1)[:, 0] for x in (t_min, t_max)
    ]
    turned = Grid(grid.occupancy.transpose(1, 3).contiguous().transpose(1, 3), grid.aabb)
    expected = march(rays_o, rays_d, t_min, t_max, grid, steps, jitter, backend=backend)
    for a, b in zip(march(*strided, turned, steps, jitter, backend=backend), expected, strict=True):
        assert torch.equal(a, b)


def test_march_refuses_what_it_cannot_do():
    args = march_args(0)
    with pytest.raises(ValueError, match="size > 0"):
        Steps(0.0)
    with pytest.raises(ValueError, match="divisible by 16"):
        Grid(torch.ones(2, 6, 6, 6, dtype=torch.bool), AABB)
    with pytest.raises(ValueError, match=r"levels, G, G, G"):
        Grid(torch.ones(1, 4, 4, 5, dtype=torch.bool), AABB)
    with pytest.raises(ValueError, match=r"\(36,\)"):
        march(*args[:3], args[3][:-1], *args[4:])
    with pytest.raises(ValueError, match="'fastest'"):
        march(*args, backend="fastest")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="nerfacc computes on a GPU, got tensors on cpu"):
            march(*args, backend="nerfacc")


# ---- composite


def packed_samples(counts: list[int], seed: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """sigmas, rgbs, t_starts, t_ends, packed_info of rays with `counts` samples, gaps between some of them."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.tensor(counts)
    packed = torch.stack([number.cumsum(0) - number, number], 1)
    size = int(number.sum())
    sigmas, dt, gap = (torch.rand(size, generator=generator, dtype=dtype) for _ in range(3))
    rgbs = torch.rand(size, 3, generator=generator, dtype=dtype)
    t_ends = exclusive_sum(dt + gap, packed).to(dtype) + dt + gap
    return sigmas * 3, rgbs, t_ends - dt, t_ends, packed


def brute_force_composite(sigmas, rgbs, t_starts, t_ends, packed):
    """Double loop over rays and samples, in Python floats."""
    rgb, depth, opacity, weights = [], [], [], []
    for first, count in packed.tolist():
        left, colour, distance, total = 1.0, [0.0] * 3, 0.0, 0.0
        for k in range(first, first + count):
            alpha = 1 - math.exp(-sigmas[k].item() * (t_ends[k].item() - t_starts[k].item()))
            w, left = left * alpha, left * (1 - alpha)
            colour = [c + w * x for c, x in zip(colour, rgbs[k].tolist(), strict=True)]
            distance += w * (t_starts[k].item() + t_ends[k].item()) / 2
            total += w
            weights.append(w)
        rgb.append(colour), depth.append(distance), opacity.append(total)
    return [torch.tensor(x, dtype=torch.float64) for x in (rgb, depth, opacity, weights)]


COUNTS = [0, 5, 1, 0, 131, 17, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_composite_against_double_loop(backend):
    inputs = packed_samples(COUNTS, 0)
    for value, expected in zip(composite(*inputs, backend=backend), brute_force_composite(*inputs), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.7, 40.0])
def test_composite_of_constant_density_is_beer_lambert(backend, sigma):
    """opacity = 1 - exp(-sigma L); depth = integral of t sigma exp(-sigma (t - a)), to the quadrature's error."""
    edges = torch.linspace(1.0, 3.0, 2001, dtype=torch.float64)
    t_starts, t_ends = edges[:-1].float(), edges[1:].float()
    colour = torch.tensor([0.2, 0.5, 0.9])
    packed = torch.tensor([[0, 2000]])
    result = composite(torch.full((2000,), sigma), colour.expand(2000, 3), t_starts, t_ends, packed, backend=backend)
    opacity = -math.expm1(-2 * sigma)
    depth = 0.0 if sigma == 0 else 1 * opacity + (1 - (1 + 2 * sigma) * math.exp(-2 * sigma)) / sigma
    torch.testing.assert_close(result.opacity, torch.tensor([opacity]), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.depth, torch.tensor([depth]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.rgb[0], colour * opacity, rtol=1e-4, atol=1e-7)


def test_reference_gradients_in_float64():
    sigmas, rgbs, t_starts, t_ends, packed = packed_samples([0, 4, 1, 6], 1, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (sigmas, rgbs, t_starts, t_ends)]
    assert torch.autograd.gradcheck(lambda *x: tuple(composite(*x, packed, backend="reference")), leaves)


def vjp(backend: str, inputs, cotangents, dtype=torch.float32):
    sigmas, rgbs = (x.to(dtype).clone().requires_grad_() for x in inputs[:2])
    outputs = composite(sigmas, rgbs, *(x.to(dtype) for x in inputs[2:4]), inputs[4], backend=backend)
    return [*outputs, *torch.autograd.grad(outputs, (sigmas, rgbs), [x.to(dtype) for x in cotangents])]


def random_cotangents(inputs, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator) for x in composite(*inputs, backend="reference")]


@needs_native
@pytest.mark.parametrize("counts", [COUNTS, [1], [3, 0], [129] * 7, [0, 0]])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3, 1e30])
def test_native_composite_and_gradient_against_float64_reference(counts, scale):
    sigmas, *rest = packed_samples(counts, 2)
    inputs = [sigmas * scale, *rest]
    cotangents = random_cotangents(inputs, 3)
    expected = vjp("reference", inputs, cotangents, torch.float64)
    for value, target in zip(vjp("native", inputs, cotangents), expected, strict=True):
        torch.testing.assert_close(value.double(), target, rtol=1e-4, atol=1e-5)


@needs_native
def test_native_composite_takes_strided_input_and_partial_gradients():
    sigmas, rgbs, t_starts, t_ends, packed = packed_samples(COUNTS, 4)
    strided = [torch.stack([x, x], 1)[:, 0] for x in (sigmas, t_starts, t_ends)]
    leaves = [strided[0].requires_grad_(), rgbs.t().contiguous().t().requires_grad_()]
    out = composite(leaves[0], leaves[1], *strided[1:], packed.t().contiguous().t(), backend="native")
    grads = torch.autograd.grad(out.depth.sum(), leaves)
    plain = [sigmas.clone().requires_grad_(), rgbs.clone().requires_grad_()]
    expected = composite(*plain, t_starts, t_ends, packed, backend="reference")
    torch.testing.assert_close(out.rgb, expected.rgb, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], torch.autograd.grad(expected.depth.sum(), plain[0])[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(grads[1], torch.zeros_like(rgbs))


@needs_native
def test_native_composite_says_what_it_lacks():
    sigmas, rgbs, t_starts, t_ends, packed = packed_samples([3], 0)
    with pytest.raises(ValueError, match="no gradient for t_starts"):
        composite(sigmas, rgbs, t_starts.requires_grad_(), t_ends, packed, backend="native")
    composite(sigmas, rgbs, t_starts, t_ends, packed).depth.sum().backward()  # auto falls back to the reference
    assert t_starts.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="float32"):
        composite(sigmas.double(), rgbs, t_starts.detach(), t_ends, packed, backend="native")


@needs_native
def test_native_is_the_same_for_any_number_of_threads():
    args = march_args(9, 2, rays=1031, cone=0.004)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            samples = march(*args, backend="native")
            generator = torch.Generator().manual_seed(0)
            size = len(samples.t_starts)
            inputs = [torch.rand(size, generator=generator) * 9, torch.rand(size, 3, generator=generator), *samples[:2]]
            inputs.append(samples.packed_info)
            results.append([*samples, *vjp("native", inputs, random_cotangents(inputs, 1))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_opcheck():
    sigmas, rgbs, *rest, packed = packed_samples(COUNTS, 5)
    torch.library.opcheck(composite_native, (sigmas.requires_grad_(), rgbs.requires_grad_(), *rest, packed))
    inputs = (sigmas.detach(), rgbs.detach(), *rest, packed)
    *outputs, weights, left = composite_native(*inputs)
    cotangents = [torch.randn_like(x) for x in (*outputs, weights)]
    torch.library.opcheck(composite_backward_native, (inputs[1], *rest, packed, weights, left, *cotangents))
    rays_o, rays_d, t_min, t_max, grid, steps, jitter = march_args(0, rays=5)
    rays = (rays_o, rays_d, t_min, t_max, jitter, grid.occupancy, grid.blocks, grid.aabb)
    torch.library.opcheck(march_native, (*rays, steps.size, steps.cone_angle, steps.max_samples))


# ---- helpers on packed samples


def test_transmittance_and_exclusive_sum_stay_within_a_ray():
    packed = torch.tensor([[0, 2], [2, 0], [2, 3]])
    values = torch.tensor([1e30, 2.0, 1.0, 2.0, 3.0])
    assert exclusive_sum(values[1:], torch.tensor([[0, 1], [1, 3]])).tolist() == [0, 0, 1, 3]
    expected = torch.tensor([1.0, 0.0, 1.0, math.exp(-1), math.exp(-3)])
    torch.testing.assert_close(
        transmittance(values, torch.zeros(5), torch.ones(5), packed), expected, rtol=1e-6, atol=1e-12
    )


def test_keep_packs_again():
    samples = Samples(
        torch.arange(5.0), torch.arange(5.0) + 1, torch.tensor([0, 0, 2, 2, 2]), torch.tensor([[0, 2], [2, 0], [2, 3]])
    )
    kept = keep(samples, torch.tensor([False, False, True, False, True]))
    assert kept.t_starts.tolist() == [2, 4]
    assert kept.ray_indices.tolist() == [2, 2]
    assert kept.packed_info.tolist() == [[0, 0], [0, 0], [0, 2]]
