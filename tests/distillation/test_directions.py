"""Directions and guidance: the limits in which they must vanish or become one another."""

import torch

from csd3d.distillation import cfg, csd_edit, ip2p_guidance, sds


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
