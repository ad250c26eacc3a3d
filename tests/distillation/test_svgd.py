"""svgd_combine against its double-loop definition, its limits, and what Stein variational gradient descent must do."""

import math
from dataclasses import replace

import pytest
import torch
from tensor_sizes import LargestTensor
from torch import Tensor

from csd3d.distillation import SVGDConfig, svgd_combine, svgd_diagnostics
from csd3d.distillation.kernel import kernel_matrix
from csd3d.distillation.noise import add_noise, draw_noise
from csd3d.distillation.svgd import combine as combine_and_report
from csd3d.distillation.svgd import feature_force


def combine(*args, **options) -> Tensor:
    """G alone."""
    return combine_and_report(*args, **options)[0]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scalar_kernel(a: Tensor, b: Tensor, kernel: str, gamma: float) -> Tensor:
    squared = (a - b).square().mean()
    return torch.exp(-gamma * squared) if kernel == "rbf" else (1 + gamma * squared) ** -0.5


def lower_median(squared: list[float]) -> float:
    return sorted(squared)[(len(squared) - 1) // 2]


def double_loop(
    directions: Tensor, z: Tensor, sigma: float, kernel: str, gamma: float, repulsion: float, normalize: str
) -> Tensor:
    """The definition: for every i, a sum over j with ∇_{z_j} k by autograd."""
    G = torch.zeros_like(directions)
    for i in range(len(z)):
        total_k = 0.0
        for j in range(len(z)):
            z_j = z[j].clone().requires_grad_()
            k = scalar_kernel(z_j, z[i], kernel, gamma)
            (grad_k,) = torch.autograd.grad(k, z_j)
            G[i] += k.detach() * directions[j] - repulsion * sigma * grad_k
            total_k += k.item()
        G[i] /= len(z) if normalize == "mean" else total_k
    return G


def pair_distances(z: Tensor, everything: bool = False) -> list[float]:
    N = range(len(z))
    return [(z[i] - z[j]).square().mean().item() for i in N for j in N if everything or i != j]


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("normalize", ["mean", "row"])
@pytest.mark.parametrize("N", [2, 3, 6])
def test_equals_the_double_loop(kernel, normalize, N):
    directions, z = random(N, 2, 3, seed=1), 3 + random(N, 2, 3, seed=2)
    gamma = math.log(N + 1) / lower_median(pair_distances(z))
    expected = double_loop(directions, z, 0.7, kernel, gamma, 1.3, normalize)
    actual = svgd_combine(directions, z, sigma=0.7, kernel=kernel, repulsion=1.3, normalize=normalize)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("bandwidth", "scale"), [(0.37, 1.0), (0.37, 10.0), ("median", 10.0), ("median_all", 1.0)])
def test_bandwidth_rules(bandwidth, scale):
    directions, z = random(5, 4, seed=3), random(5, 4, seed=4)
    median = lower_median(pair_distances(z, everything=bandwidth == "median_all"))
    gamma = (bandwidth if isinstance(bandwidth, float) else math.log(6) / median) / scale
    expected = double_loop(directions, z, 0.5, "rbf", gamma, 1.0, "mean")
    actual = svgd_combine(directions, z, sigma=0.5, bandwidth=bandwidth, bandwidth_scale=scale)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_float32_is_close_to_float64_far_from_the_origin():
    directions, z = random(8, 4, 16, 16, seed=5), 50 + random(8, 4, 16, 16, seed=6)
    exact = svgd_combine(directions, z.float().double(), sigma=0.9)
    torch.testing.assert_close(
        svgd_combine(directions.float(), z.float(), sigma=0.9).double(), exact, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"normalize": "row"}, {"bandwidth": 3.0, "repulsion": 2.0}, {"kernel": "imq"}])
def test_one_particle_is_sds_bit_for_bit(dtype, options):
    directions = random(1, 4, 8, 8, seed=7).to(dtype)
    assert torch.equal(svgd_combine(directions, 1e3 * directions, sigma=0.3, **options), directions)


@pytest.mark.parametrize("bandwidth", ["median", "median_all", 0.0, 2.0])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_identical_particles_average_their_directions(bandwidth, kernel, dtype):
    z = (100 * random(1, 4, 8, 8, seed=8)).to(dtype).expand(5, -1, -1, -1)
    directions = random(5, 4, 8, 8, seed=9).to(dtype)
    G = svgd_combine(directions, z, sigma=1.0, bandwidth=bandwidth, kernel=kernel)
    expected = directions.float().mean(0, keepdim=True).expand(5, -1, -1, -1).to(dtype)
    torch.testing.assert_close(G, expected, rtol=1e-3, atol=1e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bandwidth", ["median", "median_all"])
def test_two_particles_are_finite_at_any_distance(scale, dtype, bandwidth):
    z = torch.stack([torch.zeros(4, 8, 8), scale * torch.ones(4, 8, 8)]).to(dtype)
    G = svgd_combine(random(2, 4, 8, 8).to(dtype), z, sigma=1.0, bandwidth=bandwidth)
    assert G.dtype == dtype
    assert torch.isfinite(G).all()


def test_repulsion_fades_where_particles_are_one_up_to_rounding():
    """The median rule alone repels as 2 ln(N+1)/d, without bound; below 1e-3 rms the floor makes it fall with d."""
    force = []
    for d in (1e-2, 1e-3, 1e-5):
        z = torch.stack([torch.zeros(256), torch.full((256,), d)])
        force.append(svgd_combine(torch.zeros(2, 256), z, sigma=1.0).norm())
    assert force[0] < force[1]
    assert force[2] < 0.1 * force[1]


def test_fp16_sums_do_not_overflow():
    directions, z = torch.full((64, 4096), 60000.0), 200 * random(64, 4096, seed=10)
    G = svgd_combine(directions.half(), z.half(), sigma=1.0, bandwidth=0.0)
    torch.testing.assert_close(G, directions.half(), rtol=1e-3, atol=0.0)


def test_mostly_coinciding_particles_stay_in_range():
    z = 10 * torch.ones(8, 32)
    z[7] = -10
    G = svgd_combine(torch.zeros(8, 32), z, sigma=1.0)
    torch.testing.assert_close(G[:7], torch.zeros(7, 32), rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_without_directions_descending_drives_particles_apart(kernel):
    z = random(6, 3, seed=11)
    before = torch.pdist(z).clone()
    for _ in range(20):
        z = z - 0.1 * svgd_combine(torch.zeros_like(z), z, sigma=1.0, kernel=kernel)
    assert (torch.pdist(z).mean() > 1.05 * before.mean()).item()
    pair = torch.tensor([[0.0], [1.0]])
    G = svgd_combine(torch.zeros(2, 1), pair, sigma=1.0, kernel=kernel)
    assert G[0] > 0 > G[1]  # descending: the left one goes left, the right one right


def test_permuting_particles_permutes_the_result():
    directions, z, order = random(7, 5, seed=12), random(7, 5, seed=13), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    permuted = svgd_combine(directions[order], z[order], sigma=0.6)
    torch.testing.assert_close(permuted, svgd_combine(directions, z, sigma=0.6)[order], rtol=1e-12, atol=1e-12)


def test_row_normalised_step_carries_across_particle_counts():
    for N in (2, 5, 17):
        agreeing = torch.ones(N, 6, dtype=torch.float64)
        G = svgd_combine(agreeing, random(N, 6, seed=N), sigma=1.0, repulsion=0.0, normalize="row")
        torch.testing.assert_close(G, agreeing, rtol=1e-12, atol=0.0)


def test_memory_holds_no_pairwise_differences():
    """Not one N × N × D tensor: every intermediate result is at most N × D."""
    N, D = 64, 4096
    with LargestTensor() as watch:
        svgd_combine(torch.ones(N, D), torch.ones(N, D), sigma=1.0)
    assert watch.largest == N * D


# What SVGD is for.


def gaussian_eps(z_t: Tensor, alpha_bar: float, mean: Tensor, variance: float) -> Tensor:
    return math.sqrt(1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar) * (z_t - math.sqrt(alpha_bar) * mean)


@pytest.mark.parametrize("alpha_bar", [0.96, 0.36])
def test_particles_take_the_variance_of_the_noised_density(alpha_bar):
    """With Δ = −σ × score the fixed point is p_t itself; a coefficient of 1 for σ would give another variance."""
    mean, variance, sigma = torch.tensor([1.0, -2.0]), 0.3, math.sqrt(1 - alpha_bar)
    z_t = 0.1 * random(40, 2, seed=14, dtype=torch.float32)
    for _ in range(1500):
        z_t = z_t - 0.5 * svgd_combine(gaussian_eps(z_t, alpha_bar, mean, variance), z_t, sigma=sigma)
    torch.testing.assert_close(z_t.mean(0), math.sqrt(alpha_bar) * mean, rtol=0.02, atol=0.02)
    expected = torch.full((2,), alpha_bar * variance + 1 - alpha_bar)
    torch.testing.assert_close(z_t.var(0), expected, rtol=0.2, atol=0.0)


MODES = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])


def mixture_eps(z_t: Tensor, alpha_bar: float, variance: float = 0.25) -> Tensor:
    """Exact ε = −σ ∇log p_t of four equal Gaussians at MODES."""
    offset = z_t[:, None] - math.sqrt(alpha_bar) * MODES
    noised = alpha_bar * variance + 1 - alpha_bar
    weight = torch.softmax(-offset.square().sum(-1) / (2 * noised), dim=1)
    return math.sqrt(1 - alpha_bar) / noised * (weight[..., None] * offset).sum(1)


def anneal(combiner, seed: int, steps: int = 300) -> Tensor:
    """Score distillation from near (1, 1) with noise shared by the particles; how many end nearest to each mode."""
    generator = torch.Generator().manual_seed(seed)
    z = 1 + 0.3 * torch.randn(16, 2, generator=generator)
    for step in range(steps):
        alpha_bar = math.cos(math.pi / 2 * (0.8 - 0.78 * step / steps)) ** 2
        noise = draw_noise(z, "shared", generator)
        z_t = add_noise(z, noise, alpha_bar)
        directions = mixture_eps(z_t, alpha_bar) - noise
        z = z - 0.5 * (1 - alpha_bar) * combiner(directions, z_t, math.sqrt(1 - alpha_bar))
    return torch.cdist(z, MODES).argmin(1).bincount(minlength=4)


@pytest.mark.parametrize("seed", [0, 1])
def test_covers_the_modes_that_independent_particles_collapse_onto(seed):
    assert anneal(lambda directions, z_t, sigma: directions, seed).max() == 16
    covered = anneal(lambda directions, z_t, sigma: svgd_combine(directions, z_t, sigma=sigma), seed)
    assert covered.min() >= 2


def test_noise_baseline_repels_once_by_itself():
    """Stein's lemma, E[k ε_j] = σ E[∇_{x_j} k], by quadrature: the baseline −ε alone does what λ = 1 does."""
    import numpy as np

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
    weights, sigma = weights / weights.sum(), 0.8
    centres = torch.tensor([[0.0], [0.7]], dtype=torch.float64)
    by_baseline, by_repulsion = torch.zeros(2, 1), torch.zeros(2, 1)
    for a, wa in zip(nodes, weights, strict=True):
        for b, wb in zip(nodes, weights, strict=True):
            eps = torch.stack([a, b])[:, None]
            x, w = centres + sigma * eps, wa * wb
            by_baseline = by_baseline + w * svgd_combine(-eps, x, sigma=sigma, bandwidth=0.5, repulsion=0.0)
            by_repulsion = by_repulsion + w * svgd_combine(0 * eps, x, sigma=sigma, bandwidth=0.5)
    assert by_repulsion.abs().min() > 0.01
    torch.testing.assert_close(by_baseline, by_repulsion, rtol=1e-8, atol=1e-10)


# Settings: clean latents, features, compat, diagnostics.


def noised(N: int, kind: str, alpha_bar: float) -> tuple[Tensor, Tensor]:
    clean = random(N, 4, 6, seed=15)
    eps = draw_noise(clean, kind, torch.Generator().manual_seed(16))
    return add_noise(clean, eps, alpha_bar), clean


def test_clean_and_noisy_space_are_one_when_the_noise_is_shared():
    directions, (noisy, clean) = random(5, 4, 6, seed=17), noised(5, "shared", 0.4)
    G_noisy, G_clean = (
        combine(directions, noisy, clean, alpha_bar=0.4, config=SVGDConfig(space=s)) for s in ("noisy", "clean")
    )
    torch.testing.assert_close(G_clean, G_noisy, rtol=1e-6, atol=1e-7)  # the float32 noise was cast
    by_hand = svgd_combine(directions, clean, sigma=math.sqrt(0.6 / 0.4))
    torch.testing.assert_close(G_clean, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bandwidth", ["median", 3.0])
def test_scaled_space_is_what_noisy_space_is_where_noise_is_shared(bandwidth):
    """With independent noise the distances in noisy space are those of the noise; scaled space has none."""
    directions, (noisy, clean) = random(5, 4, 6, seed=17), noised(5, "shared", 0.4)
    other = noised(5, "independent", 0.4)[0]
    of_noisy, of_scaled = (SVGDConfig(space=space, bandwidth=bandwidth) for space in ("noisy", "scaled"))
    expected = combine(directions, noisy, clean, alpha_bar=0.4, config=of_noisy)[0]
    found = combine(directions, other, clean, alpha_bar=0.4, config=of_scaled)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_official_compat_has_coefficient_one_and_the_median_over_everything():
    directions, (noisy, clean) = random(4, 4, 6, seed=18), noised(4, "independent", 0.9)
    G = combine(directions, noisy, clean, alpha_bar=0.9, config=SVGDConfig(compat="official"))
    gamma = math.log(5) / lower_median(pair_distances(noisy, everything=True))
    torch.testing.assert_close(G, double_loop(directions, noisy, 1.0, "rbf", gamma, 1.0, "mean"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compat", ["corrected", "official"])
def test_features_equal_to_particles_give_svgd_combine(compat):
    directions, z = random(4, 3, seed=19), random(4, 3, seed=20)
    config = SVGDConfig(space="features", normalize="row", repulsion=0.7, compat=compat, kernel="imq")
    shared = combine(directions, z + 1, z - 1, alpha_bar=0.4, config=config, features=z)
    G = shared + feature_force(z, alpha_bar=0.4, config=config)
    sigma, bandwidth = (math.sqrt(0.6), "median") if compat == "corrected" else (1.0, "median_all")
    options = {"kernel": "imq", "bandwidth": bandwidth, "normalize": "row", "repulsion": 0.7}
    torch.testing.assert_close(G, svgd_combine(directions, z, sigma=sigma, **options), rtol=1e-12, atol=1e-12)
    report = svgd_diagnostics(directions, z + 1, z - 1, alpha_bar=0.4, config=config, features=z)
    assert report == pytest.approx(
        svgd_diagnostics(directions, z, z - 1, alpha_bar=0.4, config=replace(config, space="noisy")), rel=1e-12
    )


def test_features_repel_through_the_feature_jacobian():
    """λ σ ∇_{x_i} Σ_j k(φ_i, φ_j) / N by autograd of the kernel itself, through a nonlinear φ of anything x."""
    x, mix = random(4, 3, seed=21).requires_grad_(), random(3, 5, seed=22)
    phi = torch.tanh(x @ mix)
    config = SVGDConfig(space="features", bandwidth=0.8, repulsion=1.5)
    force = feature_force(phi.detach(), alpha_bar=0.75, config=config)
    (pulled,) = torch.autograd.grad(phi, x, force, retain_graph=True)
    for i in range(4):
        fixed = phi.detach()
        total = sum(scalar_kernel(phi[i], fixed[j], "rbf", 0.8) for j in range(4))
        (grad,) = torch.autograd.grad(total, x, retain_graph=True)
        torch.testing.assert_close(pulled[i].double(), 1.5 * 0.5 * grad[i] / 4, rtol=1e-6, atol=1e-7)


def test_features_of_one_particle_change_nothing_and_missing_ones_are_asked_for():
    config, one = SVGDConfig(space="features"), random(1, 3, seed=30)
    assert torch.equal(combine(one, one, one, alpha_bar=0.5, config=config, features=2 * one), one)
    assert torch.equal(feature_force(one, alpha_bar=0.5, config=config), torch.zeros(1, 3))
    two = random(2, 3, seed=31)
    with pytest.raises(ValueError, match=r'"features": it needs features'):
        combine(two, two, two, alpha_bar=0.5, config=config)


def test_coarse_particles_repel_by_the_means_of_their_pixels():
    """λ σ_t / √ᾱ_t ∇_{z_i} Σ_j k(φ_i, φ_j) by autograd of the kernel between hand-made means, and its diagnostics."""
    directions, clean = random(3, 2, 8, 8, seed=28), random(3, 2, 8, 8, seed=29)
    config = SVGDConfig(space="coarse", bandwidth=0.3, repulsion=2.0, normalize="row")
    z = clean.clone().requires_grad_()
    means = z.view(3, 2, 2, 4, 2, 4).mean((3, 5)).flatten(1)
    K = torch.stack([torch.stack([scalar_kernel(a, b.detach(), "rbf", 0.3) for b in means]) for a in means])
    weights = K.detach() / K.detach().sum(1, keepdim=True)
    score = (weights @ directions.flatten(1)).view_as(directions)
    (grad,) = torch.autograd.grad((K.sum(1) / K.detach().sum(1)).sum(), z)
    force = 2.0 * math.sqrt(0.6 / 0.4) * grad
    G = combine(directions, random(3, 2, 8, 8), clean, alpha_bar=0.4, config=config)
    torch.testing.assert_close(G, score + force, rtol=1e-9, atol=1e-9)
    report = svgd_diagnostics(directions, clean, clean, alpha_bar=0.4, config=replace(config, normalize="mean"))
    assert 0 < report["kernel_mean"] == pytest.approx(K[~torch.eye(3, dtype=torch.bool)].mean().item(), rel=1e-9)
    by_row = K.detach().sum(1)[:, None, None, None]
    assert report["repulsion_ratio"] == pytest.approx(
        ((force * by_row).norm() / (score * by_row).norm()).item(), rel=1e-9
    )


def test_diagnostics_see_content_only_through_shared_noise():
    """4096 dimensions: independent noise pins every off-diagonal k near 1/(N+1), shared noise does not."""
    clean = random(8, 1, seed=23) * torch.ones(8, 4096, dtype=torch.float64)
    spread = {}
    for kind in ("independent", "shared"):
        noisy = add_noise(clean, draw_noise(clean, kind, torch.Generator().manual_seed(24)), 0.05)
        report = svgd_diagnostics(clean, noisy, clean, alpha_bar=0.05, config=SVGDConfig())
        spread[kind] = report["kernel_spread"]
        K, _ = kernel_matrix(noisy, SVGDConfig())
        off = K[~torch.eye(8, dtype=torch.bool)]
        assert report["kernel_mean"] == pytest.approx(off.mean().item(), rel=1e-9)
        assert spread[kind] == pytest.approx(off.std(correction=0).item(), rel=1e-9)
    assert spread["independent"] < 0.05 < 0.2 < spread["shared"]


def test_diagnostics_report_repulsion_against_score():
    directions, (noisy, clean) = random(4, 4, 6, seed=25), noised(4, "shared", 0.4)
    report = svgd_diagnostics(directions, noisy, clean, alpha_bar=0.4, config=SVGDConfig(repulsion=3.0))
    score = svgd_combine(directions, noisy, sigma=1.0, repulsion=0.0)
    force = svgd_combine(0 * directions, noisy, sigma=math.sqrt(0.6), repulsion=3.0)
    assert report["repulsion_ratio"] == pytest.approx((force.norm() / score.norm()).item(), rel=1e-6)
    alone = svgd_diagnostics(directions[:1], noisy[:1], clean[:1], alpha_bar=0.4, config=SVGDConfig())
    assert set(alone.values()) == {0.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel": "gauss"}, "kernel is 'gauss'"),
        ({"bandwidth": "mean"}, "bandwidth is 'mean'"),
        ({"bandwidth": -1.0}, "bandwidth is -1.0"),
        ({"bandwidth_scale": 0.0}, "bandwidth_scale is 0.0"),
        ({"normalize": "sum"}, "normalize is 'sum'"),
        ({"repulsion": math.nan}, "repulsion is nan"),
        ({"space": "pixel"}, "space is 'pixel'"),
        ({"compat": "paper"}, "compat is 'paper'"),
    ],
)
def test_config_names_the_wrong_key(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        SVGDConfig(**wrong)
    assert "\n" not in str(caught.value)


def test_one_bandwidth_means_the_same_at_any_size():
    """γ is of the mean squared difference: the same picture with every pixel four times has the same kernel."""
    small = random(4, 4, 8, 8, seed=32)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    config = SVGDConfig(bandwidth=0.7)
    torch.testing.assert_close(kernel_matrix(large, config)[0], kernel_matrix(small, config)[0], rtol=1e-12, atol=0.0)


def test_what_was_a_hundredth_of_the_sum_over_4x16x16_is_now_10_24_of_the_mean():
    z = 0.3 * random(3, 4, 16, 16, seed=33)
    by_sum = torch.exp(-0.01 * torch.cdist(z.flatten(1), z.flatten(1)).square())
    torch.testing.assert_close(kernel_matrix(z, SVGDConfig(bandwidth=10.24))[0], by_sum, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("space", ["noisy", "clean", "features"])
@pytest.mark.parametrize("normalize", ["mean", "row"])
def test_without_sharing_particles_keep_their_directions_and_repel_as_before(space, normalize):
    directions, (noisy, clean) = random(5, 4, 6, seed=34), noised(5, "independent", 0.4)
    options = {"alpha_bar": 0.4, "features": clean + 1}
    config = SVGDConfig(space=space, normalize=normalize, repulsion=2.0)
    force = combine(torch.zeros_like(directions), noisy, clean, config=config, **options)
    found = combine(directions, noisy, clean, config=replace(config, share=False), **options)
    torch.testing.assert_close(found, directions + force, rtol=1e-12, atol=1e-12)
    assert (force == 0).all() == (space == "features")


def test_official_is_also_asked_for_the_image_condition():
    assert SVGDConfig(compat="official").official
    assert not SVGDConfig().official


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3\)"):
        svgd_combine(torch.zeros(2, 3), torch.zeros(3, 3), sigma=1.0)
