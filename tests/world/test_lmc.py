"""Training of LMC-SDS's b_ψ: against the closed form for a Gaussian prior, and through the command line.

For z ~ N(μ, s²) the exact denoiser gives ẑ_0(z_t) = μ + k (z_t − √ᾱ μ) with k = √ᾱ s²/(ᾱ s² + 1 − ᾱ), hence
E[ẑ_0 | z] = μ + √ᾱ k (z − μ) and Var[ẑ_0 | z] = k² (1 − ᾱ).
"""

import json
import random

import pytest
import torch
from tiny_models import save_tiny_pipeline, save_tiny_sdxl

from csd3d.distillation.noise import add_noise, implied_noise
from csd3d.priors import Condition, GaussianMixturePrior
from csd3d.priors.expected import ExpectedReconstruction, load_expected
from tools.train_shipped import lmc as training
from tools.train_shipped import stream
from tools.train_shipped.__main__ import main
from tools.train_shipped.diffusion import velocity_weight

MEAN = torch.tensor([0.5, -1.0, 0.0, 1.0])[:, None, None].expand(4, 4, 4)
SPREAD = 0.7
PRIOR = GaussianMixturePrior(MEAN[None], torch.tensor([SPREAD]))
ALPHAS = PRIOR.alphas_cumprod


def predict(z_t, t):
    return PRIOR.predict_noise(z_t, t, Condition(PRIOR.embed([""]).expand(len(z_t), -1, -1)))


def pull(alpha_bar):
    """k of the module's docstring."""
    return alpha_bar.sqrt() * SPREAD**2 / (alpha_bar * SPREAD**2 + 1 - alpha_bar)


def expected(z, t):
    alpha_bar = ALPHAS[torch.as_tensor(t).expand(len(z))][:, None, None, None]
    return MEAN + alpha_bar.sqrt() * pull(alpha_bar) * (z - MEAN)


def pictures(count, generator):
    return MEAN + SPREAD * torch.randn(count, 4, 4, 4, generator=generator)


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ExpectedReconstruction(width=32, blocks=1)
    optimiser, generator, steps = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(1), 250
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimiser.zero_grad()
        training.lmc_loss(model, predict, pictures(64, generator), ALPHAS, generator)["loss"].backward()
        optimiser.step()
        decay.step()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(("t", "tolerance"), [(50, 0.1), (300, 0.02), (600, 0.02), (900, 0.02)])
def test_training_finds_the_closed_form(trained, t, tolerance):
    """What is left of the squared distance between z, where b_ψ starts, and the exact E[ẑ_0 | z]."""
    z = pictures(256, torch.Generator().manual_seed(5))
    exact = expected(z, t)
    assert (trained(z, t) - exact).square().mean() < tolerance * (z - exact).square().mean()


def test_the_loss_of_the_exact_expectation_is_the_variance_and_nothing_beats_it():
    generator, z = torch.Generator().manual_seed(0), pictures(20_000, torch.Generator().manual_seed(2))
    found = training.lmc_loss(expected, predict, z, ALPHAS, generator)
    a = ALPHAS[20:981]
    variance = training.reconstruction_weight(a) * pull(a).square() * (1 - a)
    assert found["loss"].item() == pytest.approx(variance.mean().item(), rel=0.02)
    for factor in (0.9, 1.1):
        shrunk = lambda z, t, factor=factor: MEAN + factor * (expected(z, t) - MEAN)  # noqa: E731
        assert training.lmc_loss(shrunk, predict, z, ALPHAS, torch.Generator().manual_seed(0))["loss"] > found["loss"]
    identity = training.lmc_loss(lambda z, t: z, predict, z, ALPHAS, torch.Generator().manual_seed(0))
    assert identity["loss"].item() == found["sds"].item()


@pytest.mark.parametrize("t", [300, 800])
def test_with_it_the_direction_has_no_bias_at_a_picture_where_sds_blurs(trained, t):
    """The point of the method: averaged over ε, LMC's Δ vanishes wherever z is, SDS's pulls z towards the mean."""
    z = pictures(1, torch.Generator().manual_seed(8)).expand(4096, -1, -1, -1)
    noise, alpha_bar = torch.randn(z.shape, generator=torch.Generator().manual_seed(9)), ALPHAS[t].item()
    noisy = add_noise(z, noise, alpha_bar)
    eps = predict(noisy, t)
    blur = (eps - noise).mean(0).square().mean().sqrt()
    assert blur > 0.1
    assert (eps - implied_noise(noisy, expected(z, t), alpha_bar)).mean(0).square().mean().sqrt() < 0.05 * blur
    assert (eps - implied_noise(noisy, trained(z[:1], t), alpha_bar)).mean(0).square().mean().sqrt() < 0.2 * blur


def test_a_reconstruction_from_the_true_noise_is_the_picture():
    z, noise = (
        torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1)
    )
    t = torch.tensor([20, 500, 980])
    found = training.reconstruct(lambda z_t, t: noise, z, noise, t, ALPHAS[t].double())
    torch.testing.assert_close(found, z, rtol=1e-10, atol=1e-10)


def test_times_cover_their_range_and_no_gradient_passes_the_target():
    seen, scale = [], torch.ones((), requires_grad=True)

    def watched(z_t, t):
        seen.append(t)
        return scale * predict(z_t, t)

    z, gain = pictures(20_000, torch.Generator().manual_seed(0)), torch.ones((), requires_grad=True)
    training.lmc_loss(lambda z, t: gain * z, watched, z, ALPHAS, torch.Generator().manual_seed(0))["loss"].backward()
    assert (seen[0].min(), seen[0].max()) == (20, 980)
    assert scale.grad is None
    assert gain.grad is not None


def test_the_weight_is_bounded_and_as_its_docstring_says():
    snr = ALPHAS / (1 - ALPHAS)
    weight = training.reconstruction_weight(ALPHAS)
    torch.testing.assert_close(weight, (snr + 1) * velocity_weight(ALPHAS), rtol=1e-3, atol=0)
    assert weight.min() >= 1
    assert weight.max() == 6
    assert (1 / snr[980]).item() == pytest.approx(170, rel=0.01)
    assert snr[20].item() == pytest.approx(50, rel=0.1)


def options(base, work, steps):
    small = ["--batch", "4", "--precision", "fp32", "--threads", "1", "--steps", str(steps), "--warmup", "1"]
    return ["lmc", "--base", str(base), "--work", str(work), "--out", str(work / "b"), "--first-rows", "4", *small]


def test_the_command_line_trains_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 4)
    base, texts, priors = save_tiny_pipeline(tmp_path / "text", "text", "v_prediction"), [], []

    def opened(config, require):
        priors.append(load_prior(config, require))
        whole = priors[-1].predict_noise
        monkeypatch.setattr(priors[-1], "predict_noise", lambda z, t, c: (texts.append(c.text), whole(z, t, c))[1])
        return priors[-1]

    load_prior = training.load_prior
    monkeypatch.setattr(training, "load_prior", opened)
    assert main(options(base, tmp_path / "w", 2)) == 0
    first, z = load_expected(tmp_path / "w/b"), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(first(z, 900), z)
    assert first.config["channels"] == 4
    rows = stream.MAKERS["t2i"](random.Random("0/0"), 8)["texts"]
    captions = priors[0].embed([text for row in rows for text in row[:-1]])
    used = torch.cat(texts).flatten(1)
    assert len(used) == 8
    assert torch.cdist(used, captions.flatten(1)).amin(1).max() < 1e-3
    assert main(options(base, tmp_path / "w", 3)) == 0
    assert not torch.equal(load_expected(tmp_path / "w/b")(z, 900), first(z, 900))
    assert len(texts) == 3  # one more step, not three
    steps = [json.loads(line)["step"] for line in (tmp_path / "w/log.jsonl").read_text().splitlines()]
    assert steps == [2, 3]


def test_a_base_of_another_kind_is_refused_in_one_line(tmp_path, capsys):
    edit, sdxl = save_tiny_pipeline(tmp_path / "edit", "edit"), save_tiny_sdxl(tmp_path / "sdxl")
    capsys.readouterr()
    assert main(options(edit, tmp_path / "w", 1)) == 2
    assert main(options(sdxl, tmp_path / "w", 1)) == 2
    assert main(options(tmp_path / "nowhere", tmp_path / "w", 1)) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 3
    assert "text-to-image" in errors
    assert "one CLIP" in errors
