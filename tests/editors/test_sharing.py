"""SVGD along correspondences: against dense matrices and autograd, its limits in plain SVGD, and what it is for."""

import math
from dataclasses import replace

import pytest
import torch
from correspondences import (
    C,
    H,
    N,
    W,
    along_flow,
    bring,
    canvas_windows,
    dense,
    identity,
    pairs,
    random,
    random_correspondence,
    unrelated,
    windows_at,
)
from tensor_sizes import LargestTensor
from torch import Tensor

from csd3d.canvas.latents import pixel_grid
from csd3d.distillation import SVGDConfig, svgd_combine, svgd_diagnostics
from csd3d.distillation.edit_loop import CollaborativeEditConfig, collaborative_edit, edit_step
from csd3d.distillation.methods.csd_edit import CSDEdit
from csd3d.distillation.methods.sds import SDS
from csd3d.distillation.noise import add_noise
from csd3d.distillation.step import DistillConfig, distill_step
from csd3d.distillation.svgd import combine
from csd3d.editors.correspondence import Correspondence

D = C * H * W  # coordinates of a particle, which distances are means over

# SVGD along them.


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("normalize", ["mean", "row"])
@pytest.mark.parametrize("bandwidth", ["median", "median_all", 0.3])
def test_identities_are_plain_svgd(kernel, normalize, bandwidth):
    directions, z = random(N, C, H, W, seed=10), random(N, C, H, W, seed=11)
    options = {"sigma": 0.7, "kernel": kernel, "normalize": normalize, "bandwidth": bandwidth, "bandwidth_scale": 2.0}
    plain = svgd_combine(directions, z, **options)
    brought = svgd_combine(directions, z, **options, correspondence=identity())
    torch.testing.assert_close(brought, plain, rtol=1e-12, atol=1e-13)


def scalar_kernel(squared: Tensor, kernel: str, gamma: float) -> Tensor:
    return torch.exp(-gamma * squared) if kernel == "rbf" else (1 + gamma * squared) ** -0.5


def brought_kernel(z_i: Tensor, y_j: Tensor, validity: Tensor, kernel: str, gamma: float) -> Tensor:
    """k of d² = what is shown, and in proportion to it a guess of what is not, held fixed."""
    shown = (validity * (z_i - y_j).square()).sum() / z_i.numel()
    return scalar_kernel(shown + (shown * (validity.numel() / validity.sum() - 1)).detach(), kernel, gamma)


def loop_over_dense_operators(
    directions: Tensor, z: Tensor, maps: Correspondence, kernel: str, gamma: float, repulsion: float, normalize: str
) -> Tensor:
    """The definition, with A_ij as matrices and ∇_{y_j} k by autograd."""
    G = torch.zeros_like(z)
    for i in range(len(z)):
        total, weights, ks = 0, torch.zeros(H, W, dtype=torch.float64), 0.0
        for j in range(len(z)):
            A, validity = dense(maps, j, i), maps.validity[i, j]
            B = A / A.sum(1, keepdim=True).clamp_min(1e-300)
            back = dense(maps, i, j)
            back = back / back.sum(1, keepdim=True).clamp_min(1e-300)  # rows of what i does not show stay 0
            y_j = (z[j].flatten(1) @ B.T).view_as(z[j]).requires_grad_()
            k = brought_kernel(z[i], y_j, validity, kernel, gamma)
            (grad_k,) = torch.autograd.grad(k, y_j)
            k = k.item()
            differs = (directions[j].flatten(1) - directions[i].flatten(1) @ back.T) * (back.sum(1) > 0)
            score = validity * directions[i] + (differs @ A.T).view_as(z[j])
            total = total + k * score - repulsion * grad_k
            weights, ks = weights + k * validity, ks + k
        G[i] = total / (weights / ks * (len(z) if normalize == "mean" else ks))
    return G


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("normalize", ["mean", "row"])
def test_equals_the_loop_over_dense_operators(kernel, normalize):
    directions, z, maps = random(N, C, H, W, seed=12), random(N, C, H, W, seed=13), random_correspondence(seed=4)
    expected = loop_over_dense_operators(directions, z, maps, kernel, 0.004 * D, 0.9 * 0.7, normalize)
    actual = svgd_combine(
        directions, z, sigma=0.7, kernel=kernel, bandwidth=0.004 * D, repulsion=0.9, normalize=normalize,
        correspondence=maps,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_the_force_is_the_kernels_gradient_before_the_adjoint_spreads_it_over_js_pixels():
    """∇_{z_j} k(z_j(x_ij), z_i) by autograd through the operator is A_ijᵀ of 2 s (z_i − y_j), the force undivided."""
    z, maps, gamma = random(2, C, H, W, seed=14), random_correspondence(seed=5, count=2), 0.01 * D
    K, slope = maps.kernel(z, SVGDConfig(bandwidth=gamma))
    z_j = z[1].clone().requires_grad_()
    y_j = maps.sample(torch.stack([z[0], z_j]), 0)[1]
    k = brought_kernel(z[0], y_j, maps.validity[0, 1], "rbf", gamma)
    (grad,) = torch.autograd.grad(k, z_j)
    torch.testing.assert_close(k.detach(), K[0, 1], rtol=1e-12, atol=0.0)
    force = 2 * slope[0, 1] * (z[0] - y_j.detach())
    spread = (force.flatten(1) @ dense(maps, j=1, i=0)).view_as(grad)
    torch.testing.assert_close(spread, grad, rtol=1e-10, atol=1e-12)


def test_distances_are_means_over_the_common_part():
    z = torch.zeros(2, C, H, W)
    z[1] = 2.0
    validity = torch.zeros(2, 2, H, W)
    validity[:, :, 1, 1:4] = 1.0  # three pixels
    maps = along_flow(torch.zeros(2, 2, H, W, 2), validity)
    K, _ = maps.kernel(z, SVGDConfig(bandwidth=0.1))
    assert K[0, 1].item() == pytest.approx(math.exp(-0.1 * 4), rel=1e-5)


def test_one_particle_gets_its_direction_back_bit_for_bit():
    directions = random(1, C, H, W, seed=15).half()
    assert torch.equal(svgd_combine(directions, directions, sigma=1.0, correspondence=identity(1)), directions)


@pytest.mark.parametrize("bandwidth", ["median", "median_all", 0.0, 2.0])
def test_who_shares_nothing_keeps_its_own_direction(bandwidth):
    """Under "row"; under "mean" divided by N, as plain SVGD has it for a particle infinitely far from all others."""
    directions, z = random(N, C, H, W, seed=16), random(N, C, H, W, seed=17)
    options = {"sigma": 1.0, "bandwidth": bandwidth, "correspondence": unrelated()}
    row = svgd_combine(directions, z, normalize="row", **options)
    torch.testing.assert_close(row, directions, rtol=1e-12, atol=0.0)
    mean = svgd_combine(directions, z, normalize="mean", **options)
    torch.testing.assert_close(mean, directions / N, rtol=1e-12, atol=0.0)
    far = svgd_combine(directions, 1e6 * z, sigma=1.0, bandwidth=2.0, normalize="mean")
    torch.testing.assert_close(mean, far, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("normalize", ["mean", "row"])
def test_a_pixel_that_nobody_else_shows_keeps_its_own_direction(normalize):
    directions, z, maps = random(N, C, H, W, seed=18), random(N, C, H, W, seed=19), identity()
    maps.validity[:, :, 2] = torch.eye(N)[:, :, None]
    G = svgd_combine(directions, z, sigma=1.0, repulsion=0.0, normalize=normalize, correspondence=maps)
    K, _ = maps.kernel(z, SVGDConfig())
    step = K.sum(1)[:, None, None] / N if normalize == "mean" else 1.0
    torch.testing.assert_close(G[:, :, 2], step * directions[:, :, 2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", ["mean", "row"])
def test_agreeing_directions_move_all_of_a_particle_alike(normalize):
    """However many show a pixel: no seam where an overlap ends. With "mean" by as much as in the plain form."""
    z, maps = random(N, C, H, W, seed=20), random_correspondence(seed=6)
    G = svgd_combine(torch.ones_like(z), z, sigma=1.0, repulsion=0.0, normalize=normalize, correspondence=maps)
    K, _ = maps.kernel(z, SVGDConfig())
    step = K.sum(1) / N if normalize == "mean" else torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(G, step[:, None, None, None].expand_as(G), rtol=1e-12, atol=1e-12)


def test_repulsion_drives_apart_and_does_not_grow_as_the_overlap_shrinks():
    z = torch.zeros(2, C, H, W)
    z[0] = 1.0
    for shown in (W, 1):
        validity = torch.zeros(2, 2, H, W)
        validity[:, :, :, :shown] = 1.0
        maps = along_flow(torch.zeros(2, 2, H, W, 2), validity)
        G = svgd_combine(torch.zeros_like(z), z, sigma=1.0, bandwidth=1e-3 * D, normalize="row", correspondence=maps)
        k = math.exp(-1e-3 * D)
        expected = -2e-3 * k / (1 + k)  # descended: the upper one goes up
        torch.testing.assert_close(G[0, :, :, 0], torch.full((C, H), expected), rtol=1e-5, atol=0.0)
        assert (G[1, :, :, 0] > 0).all()
        assert (G[:, :, :, shown:] == 0).all()


def test_memory_holds_no_dense_operator_and_no_pairwise_particles():
    count, side = 6, 24
    z, maps = torch.ones(count, 4, side, side), identity(count, side, side)
    with LargestTensor() as watch:
        svgd_combine(z, z, sigma=1.0, correspondence=maps)
    assert watch.largest == 2 * count * 4 * side**2  # directions and particles side by side


def test_half_precision_directions_come_back_as_such():
    directions, z = random(N, C, H, W, seed=21), random(N, C, H, W, seed=22)
    exact = svgd_combine(directions, z, sigma=0.5, correspondence=random_correspondence())
    half = svgd_combine(directions.half(), z.half(), sigma=0.5, correspondence=random_correspondence())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=5e-3)


# Settings handed through, and noise.


def moving(frames: int = 5, speed: int = 2, side: int = 8, seed: int = 23) -> tuple[Tensor, Correspondence]:
    """Windows that slide over a random canvas: frames of a moving picture."""
    canvas, left = random(2, side, side + speed * frames, seed=seed), [speed * f for f in range(frames)]
    maps = windows_at([0] * frames, left, (side, side))
    return canvas_windows(canvas, [0] * frames, left, side, side), maps


def test_noise_shared_by_address_does_not_hide_moving_content():
    clean, maps = moving()
    noise = random(1, *clean.shape[1:], seed=24).expand_as(clean)
    noisy = add_noise(clean, noise, 0.3)
    config = SVGDConfig(bandwidth=1.28)
    options = {"alpha_bar": 0.3, "config": config, "sharing": maps}
    assert svgd_diagnostics(clean, 0.3**0.5 * clean, clean, **options)["kernel_mean"] == pytest.approx(1.0)
    assert svgd_diagnostics(clean, noisy, clean, **options)["kernel_mean"] < 0.5


def test_noise_free_latents_have_the_plain_kernel_of_shared_noise():
    clean = random(N, C, H, W, seed=25)
    noisy = add_noise(clean, random(1, C, H, W, seed=26).expand_as(clean), 0.3)
    with_noise, _ = combine(clean, noisy, clean, alpha_bar=0.3, config=SVGDConfig())
    options = {"alpha_bar": 0.3, "config": SVGDConfig(), "sharing": identity()}
    without, _ = combine(clean, 0.3**0.5 * clean, clean, **options)
    torch.testing.assert_close(without, with_noise, rtol=1e-10, atol=1e-12)


def test_diagnostics_count_pairs_that_have_something_in_common():
    z, maps = random(N, C, H, W, seed=27), random_correspondence(seed=7)
    maps.validity[0, 1:] = 0.0
    maps.validity[1:, 0] = 0.0
    report = svgd_diagnostics(z, z, z, alpha_bar=0.3, config=SVGDConfig(), sharing=maps)
    K, _ = maps.kernel(z, SVGDConfig())
    known = K[1:, 1:][~torch.eye(N - 1, dtype=torch.bool)]
    assert (K[0, 1:] == 0).all()
    assert report["kernel_mean"] == pytest.approx(known.mean().item(), rel=1e-12)
    assert report["kernel_spread"] == pytest.approx(known.std(correction=0).item(), rel=1e-12)
    others = maps.validity[~torch.eye(N, dtype=torch.bool)]
    assert report["shared_pixels"] == pytest.approx(others.mean().item(), rel=1e-12)
    alone = svgd_diagnostics(z, z, z, alpha_bar=0.3, config=SVGDConfig(), sharing=unrelated())
    assert set(alone.values()) == {0.0}


def schedule() -> Tensor:
    return torch.linspace(0.999, 0.01, 100, dtype=torch.float64)


def towards_zero(asked: dict) -> dict[str, Tensor]:
    """A toy network whose branches differ by a constant and by the place."""

    def answer(query):
        offset = len(query.prompts[0]) + (query.image is not None)
        return query.z_t * torch.linspace(0.5, 1.0, query.z_t.shape[-1], dtype=query.z_t.dtype) + offset

    return {name: answer(query) for name, query in asked.items()}


def one_edit_step(config: CollaborativeEditConfig, z: Tensor, correspond=None, source=None) -> tuple[Tensor, dict]:
    generator, source = torch.Generator().manual_seed(0), 0.5 * z if source is None else source
    options = {"prompts": "red", "correspond": correspond}
    return edit_step(towards_zero, CSDEdit(), z, source, source, 3, config, schedule(), generator, **options)[::2]


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_an_edit_along_identities_is_the_plain_edit(noise):
    """Where the sources are the same picture, as identities say."""
    z, source = random(6, C, H, W, seed=28), random(1, C, H, W, seed=34).expand(6, -1, -1, -1)
    config, asked = CollaborativeEditConfig(batch=4, noise=noise), []
    plain, _ = one_edit_step(config, z, source=source)
    along, report = one_edit_step(
        config, z, lambda indices: asked.append(indices) or identity(len(indices)), source=source
    )
    torch.testing.assert_close(along, plain, rtol=1e-6, atol=1e-7)
    assert [len(indices) for indices in asked] == [4]
    assert report["shared_pixels"] == 1.0


def test_an_edit_asks_for_the_particles_of_its_batch():
    z, maps, drawn = random(6, C, H, W, seed=29), random_correspondence(seed=8, count=6), []

    def network(asked: dict) -> dict[str, Tensor]:
        drawn.append(asked["0/full"].image[:, 0, 0, 0].long())  # an image that is its particle's number
        return towards_zero(asked)

    config, asked = CollaborativeEditConfig(batch=4), []
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(6.0)[:, None, None, None].expand(6, C, H, W)
    edit_step(network, CSDEdit(), z, 0.5 * z, numbers, 3, config, schedule(), generator,
              correspond=lambda rows: asked.append(rows) or maps.select(rows))  # fmt: skip
    assert torch.equal(drawn[0], asked[0])
    assert not torch.equal(drawn[0], torch.arange(4))
    along, plain = one_edit_step(config, z, maps.select)[0], one_edit_step(config, z)[0]
    assert not torch.allclose(along[drawn[0]], plain[drawn[0]])


def test_shared_noise_leaves_the_kernel_of_an_edit_its_content():
    """The kernel is 1 where frames show the same, whatever noise was added, in `edit_step` and in `distill_step`."""
    clean, maps = moving()
    svgd = SVGDConfig(bandwidth=1.28)
    _, edit_report = one_edit_step(CollaborativeEditConfig(noise="shared", svgd=svgd), clean, maps.select)
    config, generator = DistillConfig(noise="shared", svgd=svgd), torch.Generator().manual_seed(0)
    _, report = distill_step(towards_zero, SDS(), clean, 0, config, schedule(), generator, sharing=maps)
    assert edit_report["kernel_mean"] == report["kernel_mean"] == pytest.approx(1.0)


def test_groups_of_a_distillation_share_within_themselves_along_their_part():
    z, maps, groups = random(N, C, H, W, seed=30), random_correspondence(seed=9), torch.tensor([0, 1, 0, 1])
    config = DistillConfig(svgd=SVGDConfig(normalize="row"), t_min=0.5, t_max=0.5)

    def step(rows: Tensor, **context) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        noise = random(N, C, H, W, seed=31)[rows]
        camera = replace(config, noise="camera")
        return distill_step(
            towards_zero, SDS(), z[rows], 0, camera, schedule(), generator, camera_noise=noise, **context
        )[0]

    together = step(torch.arange(N), groups=groups, sharing=maps)
    for group in (0, 1):
        rows = (groups == group).nonzero()[:, 0]
        alone = step(rows, sharing=maps.select(rows))
        torch.testing.assert_close(together[rows], alone, rtol=1e-12, atol=1e-12)


# What it is for.


@pytest.mark.parametrize("along", [True, False])
def test_what_moves_makes_one_choice_along_a_correspondence(along):
    """Every pixel of a canvas must become +1 or −1 and the frames start undecided, each with noise of its own. Sharing
    along the motion, what frames have in common ends alike in all of them; sharing by address, it does not."""
    content, maps = moving(frames=5, speed=2, side=8)
    z = 0.1 * content + 0.1 * random(*content.shape, seed=32)
    for _ in range(60):
        directions = z - torch.tanh(4 * z)
        options = {"bandwidth": 0.128, "normalize": "row", "repulsion": 0.0}
        z = z - 0.3 * svgd_combine(directions, z, sigma=1.0, **options, correspondence=maps if along else None)
    differ = [
        (z[i].sign() - bring(maps, z.sign(), j, i)).abs()[:, maps.validity[i, j] > 0] > 0 for i, j in pairs(5) if i != j
    ]
    share = torch.cat([d.flatten() for d in differ]).double().mean().item()
    assert share < 0.01 if along else share > 0.25


def wave(frames: int, speed: float, seed: int) -> tuple[Tensor, Correspondence]:
    """Frames of a few waves that move by a fraction of a pixel, each sampled exactly; and how they correspond."""
    x, y = pixel_grid(H, 2 * W).double().unbind(-1)
    phase, turn = (math.pi * random(C, 3, 1, 1, 1, seed=seed + k) for k in (0, 1))
    shift = speed * torch.arange(frames, dtype=torch.float64)[None, :, None, None]
    parts = [torch.sin(1.7 * (x - shift) + turn[:, k] * y + phase[:, k]) for k in range(3)]  # [C, frames, H, W]
    gap = torch.arange(frames)[None, :] - torch.arange(frames)[:, None]
    flow = (speed * gap)[:, :, None, None, None] * torch.tensor([1.0, 0.0])
    return sum(parts).transpose(0, 1), along_flow(flow.expand(-1, -1, H, 2 * W, -1), torch.ones(1).expand(
        frames, frames, H, 2 * W))  # fmt: skip


def test_directions_that_agree_come_out_as_sharp_as_they_are():
    """What interpolation makes of one frame's directions is what the next one's are: nothing is left to bring."""
    directions, maps = wave(3, 0.4, seed=40)
    z, inner = torch.zeros_like(directions), slice(3, -3)
    agreeing = torch.stack([directions[0], bring(maps, directions, j=0, i=1)])
    maps = maps.select(torch.tensor([0, 1]))
    found = svgd_combine(agreeing, z[:2], sigma=1.0, bandwidth=0.0, normalize="row", correspondence=maps)
    torch.testing.assert_close(found[0, ..., inner], agreeing[0, ..., inner], rtol=1e-12, atol=1e-12)
    blurred = bring(maps, agreeing, j=1, i=0)
    assert (blurred - agreeing[0])[..., inner].square().mean().sqrt() > 0.1


def test_others_count_as_far_as_the_source_follows():
    """s² against s² + ρ², pixel by pixel; windows on one canvas follow it exactly and keep all their weight."""
    source, maps = random(2, C, H, W, seed=41), identity(2)
    found = maps.weighed(source, 0.3)
    rho = (source[0] - source[1]).square().mean(0)
    torch.testing.assert_close(found.validity[0, 1], (0.3 / (0.3 + rho)).float())
    assert torch.equal(found.validity[0, 1], found.validity[1, 0])
    assert (found.validity[0, 0] == 1).all()
    windows, exact = moving()
    assert torch.equal(exact.weighed(windows, 1e-3).validity, exact.validity)


@pytest.mark.parametrize("along", [True, False])
def test_frames_with_details_of_their_own_choose_alike_and_keep_them(along):
    """An exact prior that knows two answers for every frame: what moves plus or minus a colour, and the frame's own.
    Alone, frames choose differently. Along the motion they choose alike, and end at that answer, not at their mean."""
    content, maps = wave(6, 0.4, seed=42)
    source = content + 0.3 * random(*content.shape, seed=44)
    own, colour = 0.3 * random(*content.shape, seed=45), 0.2 * random(C, 1, 1, seed=46).sign()
    answers = torch.stack([0.3 * content + sign * colour + own for sign in (1, -1)])

    def mean_to(z_t: Tensor, mean: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
        variance, away = alpha_bar * 0.15**2 + 1 - alpha_bar, z_t - alpha_bar**0.5 * mean
        return (1 - alpha_bar) ** 0.5 / variance * away, -away.square().sum((-3, -2, -1)) / (2 * variance)

    def predict(asked: dict) -> dict[str, Tensor]:
        found = {}
        for name, query in asked.items():
            means = answers if query.prompts[0] == "change it" else source[None]
            eps, likely = mean_to(query.z_t, means, schedule()[query.t].item())
            found[name] = (likely.softmax(0)[..., None, None, None] * eps).sum(0)
        return found

    config = CollaborativeEditConfig(
        steps=24, lr=1.0, lr_decay=1.0, weight="x0", schedule="annealed", t_max=0.97, noise="independent",
        svgd=SVGDConfig(bandwidth=0.21, normalize="row", repulsion=0.0),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    config = config if along else replace(config, svgd=None)
    z = collaborative_edit(predict, CSDEdit(1.0, 1.0), source, source, config, schedule(), generator,
                           prompts="change it", correspond=maps.select)  # fmt: skip
    error = (z - answers).square().mean((2, 3, 4))
    if along:
        assert (error.argmin(0) == error.argmin(0)[0]).all()
        assert error.min(0).values.max() < 0.02**2
    else:
        assert error.argmin(0).double().std() > 0
