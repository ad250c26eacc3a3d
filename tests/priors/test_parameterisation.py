"""What networks say against algebra, in float64."""

import pytest
import torch

from csd3d.priors import scaled_linear_alphas
from csd3d.priors.parameterisation import network_target, to_epsilon


def noise(seed):
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_conversions_against_algebra():
    z, eps, alpha_bar = noise(1), noise(2), scaled_linear_alphas()[[0, 1, 250, 500, 750, 999]]
    a, sigma = alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    z_t = a * z + sigma * eps
    said = {"epsilon": eps, "v_prediction": a * eps - sigma * z, "sample": z, "flow": eps - z}
    for kind, output in said.items():
        torch.testing.assert_close(to_epsilon(output, z_t, alpha_bar, kind), eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(network_target(z, eps, alpha_bar, kind), output, rtol=1e-12, atol=1e-12)
    for function in (to_epsilon, network_target):
        with pytest.raises(ValueError, match="'velocity'"):
            function(eps, z_t, alpha_bar, "velocity")
