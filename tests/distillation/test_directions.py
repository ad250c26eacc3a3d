"""Directions and guidance: the limits in which they must vanish or become one another."""

import pytest
import torch

from csd3d.distillation import cfg, csd_edit, ip2p_guidance, sds
from csd3d.distillation.directions import bridge, dds, lmc, nfsd, pds, pds_coefficients, vsd
from csd3d.distillation.noise import add_noise
from csd3d.distillation.schedules import step_weight
from csd3d.priors import Condition, GaussianMixturePrior
from csd3d.priors.base import scaled_linear_alphas


def predictions(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return list(torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_cfg_is_exact_at_zero_and_one_and_linear_beyond():
    for dtype in (torch.float32, torch.float16):
        uncond, cond = predictions(2, dtype)
        assert torch.equal(cfg(uncond, cond, 0.0), uncond)
        assert torch.equal(cfg(uncond, cond, 1.0), cond)
    uncond, cond = predictions(2, torch.float64)
    torch.testing.assert_close(cfg(uncond, cond, 7.5), uncond + 7.5 * (cond - uncond), rtol=1e-12, atol=1e-12)


def test_ip2p_guidance_is_the_formula():
    null, image, full = predictions(3, torch.float64)
    expected = null + 1.5 * (image - null) + 7.5 * (full - image)
    torch.testing.assert_close(ip2p_guidance(null, image, full, 7.5, 1.5), expected, rtol=1e-12, atol=1e-12)


def test_sds_vanishes_where_the_prior_sees_the_noise_that_was_added():
    eps, other = predictions(2)
    assert torch.equal(sds(eps, eps), torch.zeros_like(eps))
    assert torch.equal(sds(other, eps), other - eps)


def test_csd_edit_is_exactly_zero_when_the_text_has_no_effect():
    null, image = predictions(2)
    for text_scale in (0.0, 7.5):
        guided = ip2p_guidance(null, image, image, text_scale, 1.0)
        assert torch.equal(csd_edit(guided, image), torch.zeros_like(image))


def test_csd_edit_keeps_the_excess_of_image_guidance():
    """What the docstring says remains at image scale ω_s without an effect of the text."""
    null, image = predictions(2, torch.float64)
    delta = csd_edit(ip2p_guidance(null, image, image, 7.5, 1.5), image)
    torch.testing.assert_close(delta, 0.5 * (image - null), rtol=1e-12, atol=1e-12)


ALPHAS = scaled_linear_alphas()


def two_gaussians() -> GaussianMixturePrior:
    """Two answers in 2-D; the prompts "left" and "right" each mean one of them alone, of standard deviation 0.3."""
    prompts = {"left": torch.tensor([1.0, 0.0]), "right": torch.tensor([0.0, 1.0])}
    means = torch.tensor([[-1.0, 0.5], [2.0, -0.5]], dtype=torch.float64)
    return GaussianMixturePrior(means, torch.tensor([0.3, 0.3]), prompts=prompts)


def predict(prior: GaussianMixturePrior, z_t: torch.Tensor, t: int, prompt: str) -> torch.Tensor:
    return prior.predict_noise(z_t, t, Condition(prior.embed([prompt]).expand(len(z_t), -1, -1)))


def test_dds_moves_a_particle_by_the_distance_between_the_answers():
    """For N(μ, s²), ε = σ (z_t − √ᾱ μ)/v: at z = z̃ Δ = σ √ᾱ (μ_source − μ_target)/v, and 0 at z̃ + μ_t − μ_s."""
    prior, t = two_gaussians(), 400
    a = prior.alphas_cumprod[t].item()
    z, eps = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    source = predict(prior, add_noise(z, eps, a), t, "left")
    delta = dds(predict(prior, add_noise(z, eps, a), t, "right"), source)
    shift = prior.means[1] - prior.means[0]
    v = a * 0.09 + 1 - a
    torch.testing.assert_close(delta, (-(((1 - a) * a) ** 0.5) / v * shift).expand(5, 2), rtol=1e-6, atol=1e-9)
    moved = predict(prior, add_noise(z + shift, eps, a), t, "right")
    torch.testing.assert_close(dds(moved, source), torch.zeros(5, 2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [2, 101, 401, 701, 999])
def test_a_consistent_posterior_has_no_identity_term(t):
    for previous in (t - 1, t - 2, 0):
        psi, chi = pds_coefficients(ALPHAS[t].item(), ALPHAS[previous].item())
        assert abs(psi) < 1e-6 * chi


@pytest.mark.parametrize(("t", "ratio"), [(101, 2.7), (401, 0.61), (701, 0.16), (901, 0.06)])
def test_the_authors_mixed_steps_make_one(t, ratio):
    single = (ALPHAS[t] / ALPHAS[t - 1]).item()
    psi, chi = pds_coefficients(ALPHAS[t].item(), ALPHAS[t - 2].item(), single)
    assert psi / chi == pytest.approx(ratio, rel=0.06)


def test_pds_is_the_difference_of_stochastic_latents():
    """s = (x_t' − μ(x_t, x̂_0))/σ computed step by step for target and source, with shared ε_t and ε_t'."""
    a, a_before, step = ALPHAS[400].item(), ALPHAS[398].item(), 0.985
    g = torch.Generator().manual_seed(1)
    z, source, eps, eps_before, eps_z, eps_source = torch.randn(6, 3, 4, generator=g, dtype=torch.float64)

    def stochastic(latent, predicted):
        x_t, x_before = add_noise(latent, eps, a), add_noise(latent, eps_before, a_before)
        x0 = (x_t - (1 - a) ** 0.5 * predicted) / a**0.5
        mean = (a_before**0.5 * (1 - step) * x0 + step**0.5 * (1 - a_before) * x_t) / (1 - a)
        return (x_before - mean) / ((1 - a_before) / (1 - a) * (1 - step)) ** 0.5

    psi, chi = pds_coefficients(a, a_before, step)
    expected = stochastic(z, eps_z) - stochastic(source, eps_source)
    torch.testing.assert_close(pds(z, source, eps_z, eps_source, psi, chi), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(pds(z, source, eps_z, eps_source, 0.0, 2.0), 2 * dds(eps_z, eps_source))


def test_bridge_descends_from_the_source_words_to_the_target_words():
    prior, t = two_gaussians(), 500
    a = prior.alphas_cumprod[t].item()
    g = torch.Generator().manual_seed(2)
    z = prior.means[:1] + 0.3 * torch.randn(64, 2, generator=g, dtype=torch.float64)
    for _ in range(200):
        z_t = add_noise(z, torch.randn(z.shape, generator=g, dtype=torch.float64), a)
        z = z - 0.05 * bridge(predict(prior, z_t, t, "right"), predict(prior, z_t, t, "left"))
    # its Δ is the constant −σ √ᾱ (μ_right − μ_left)/v: a straight line, which nothing stops
    shift = prior.means[1] - prior.means[0]
    step = ((1 - a) * a) ** 0.5 / (a * 0.09 + 1 - a)
    torch.testing.assert_close(
        (z.mean(0) - prior.means[0]) / shift, torch.full((2,), 10 * step).to(z), rtol=0.1, atol=0
    )


def test_nfsd_drops_the_noise_and_tells_its_domain_term_from_it():
    null, text, negative = predictions(3, torch.float64)
    torch.testing.assert_close(nfsd(null, text, None, 7.5), null + 7.5 * (text - null))
    torch.testing.assert_close(nfsd(null, text, negative, 7.5), null - negative + 7.5 * (text - null))
    # without the noise it subtracts, sds is nfsd at low t
    noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(sds(cfg(null, text, 7.5), noise) + noise, nfsd(null, text, None, 7.5))


def test_vsd_vanishes_where_the_renders_are_the_priors_own_samples():
    prior, t = two_gaussians(), 300
    z_t = torch.randn(4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    eps = predict(prior, z_t, t, "right")
    assert torch.equal(vsd(eps, eps.clone()), torch.zeros_like(eps))
    # renders that are all one point μ' have the score of N(√ᾱ μ', σ²): Δ then points to the prior, not to its mean
    at = torch.tensor([0.5, 0.5], dtype=torch.float64)
    a = prior.alphas_cumprod[t].item()
    own = (z_t - a**0.5 * at) / (1 - a) ** 0.5
    v = a * 0.09 + 1 - a
    expected = (1 - a) ** 0.5 * (z_t - a**0.5 * prior.means[1]) / v - own
    torch.testing.assert_close(vsd(eps, own), expected, rtol=1e-6, atol=1e-9)


def test_lmc_with_a_perfect_reconstruction_is_sds_and_in_units_of_the_latent_what_the_paper_says():
    a = ALPHAS[350].item()
    z, eps, guided, expected = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z_t = add_noise(z, eps, a)
    torch.testing.assert_close(lmc(guided, z, z_t, a), sds(guided, eps), rtol=1e-9, atol=1e-9)
    denoised = (z_t - (1 - a) ** 0.5 * guided) / a**0.5
    in_latents = step_weight("x0", a) * lmc(guided, expected, z_t, a)
    torch.testing.assert_close(in_latents, expected - denoised, rtol=1e-9, atol=1e-9)
