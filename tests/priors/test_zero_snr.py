"""Models whose schedule ends at pure noise, ᾱ_T = 0 (arXiv 2305.08891): v-prediction works, epsilon is refused."""

import json
import shutil

import pytest
import torch
from tiny_models import save_tiny_pipeline

from csd3d.distillation.ddim import ddim_sample, ddim_timesteps
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.parameterisation import network_target, to_epsilon


def rescaled(folder, **changes):
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True} | changes))
    return folder


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory):
    return rescaled(save_tiny_pipeline(tmp_path_factory.mktemp("zero") / "edit", "edit", "v_prediction"))


def test_the_picture_at_pure_noise_is_minus_v(zero_snr):
    """At ᾱ = 0, v = −z: the picture that a network sees in pure noise is its negative output."""
    prior = load_prior(PriorConfig(str(zero_snr), device="cpu"))
    last = prior.num_train_timesteps - 1
    assert 0 < prior.alphas_cumprod[last] < 1e-7
    z, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for t in (last, last - 1, 500):
        alpha_bar = prior.alphas_cumprod[t]
        z_t = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
        v = network_target(z, noise, alpha_bar.expand(2), "v_prediction")
        eps = to_epsilon(v, z_t, alpha_bar.expand(2), "v_prediction")
        seen = (z_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        torch.testing.assert_close(seen, z, rtol=0, atol=2e-3)


def test_sampling_from_pure_noise_is_finite_and_follows_the_network(zero_snr):
    prior = load_prior(PriorConfig(str(zero_snr), device="cpu"))
    z_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = prior.condition(["red"], torch.zeros_like(z_t))
    last = prior.num_train_timesteps - 1
    with torch.no_grad():
        v = prior.output(z_t, torch.tensor([last]), condition)
    predict = lambda z, t: prior.predict_noise(z, t, condition)  # noqa: E731
    one = ddim_sample(predict, z_t, prior.alphas_cumprod, [last])
    torch.testing.assert_close(one, -v, rtol=0, atol=5e-3)
    several = ddim_sample(predict, z_t, prior.alphas_cumprod, ddim_timesteps(last, 3))
    assert several.isfinite().all()
    assert several.std() > 1e-3


def test_epsilon_with_zero_snr_is_refused(zero_snr, tmp_path):
    folder = rescaled(shutil.copytree(zero_snr, tmp_path / "prior"), prediction_type="epsilon")
    with pytest.raises(InputError, match="epsilon with zero terminal SNR") as error:
        load_prior(PriorConfig(str(folder), device="cpu"))
    assert "\n" not in str(error.value)


def test_betas_that_make_no_schedule_are_refused(zero_snr, tmp_path):
    folder = rescaled(shutil.copytree(zero_snr, tmp_path / "prior"), rescale_betas_zero_snr=False, beta_end=-3.0)
    with pytest.raises(InputError, match="scheduler"):
        load_prior(PriorConfig(str(folder), device="cpu"))
