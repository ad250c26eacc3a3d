import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from csd3d.metrics import dilate, psnr, psnr_outside, ssim


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 24, 31, 3, generator=generator)
    return (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(0, 1), target


def test_psnr_of_a_constant_offset_is_known():
    target = torch.full((2, 8, 9, 3), 0.5)
    offsets = torch.tensor([0.1, 0.01])
    assert torch.allclose(psnr(target + offsets[:, None, None, None], target), torch.tensor([20.0, 40.0]), atol=1e-3)
    assert psnr(target[0] + 0.1, target[0]).shape == ()


def test_identical_images_score_finite_bounds(pair):
    assert torch.equal(psnr(pair[1], pair[1]), torch.full((3,), 100.0))
    assert torch.allclose(ssim(pair[1], pair[1]), torch.ones(3), atol=1e-5)


def test_ssim_agrees_with_scikit_image(pair):
    reference = [
        structural_similarity(
            a.numpy().astype(np.float64), b.numpy().astype(np.float64), channel_axis=2, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for a, b in zip(*pair, strict=True)
    ]  # fmt: skip
    assert torch.allclose(ssim(*pair), torch.tensor(reference, dtype=torch.float32), rtol=0, atol=1e-4)


def test_outside_ignores_the_mask_and_its_rim():
    source = torch.full((1, 16, 16, 3), 0.5)
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 6:10, 6:10] = True
    edited = torch.where(dilate(mask, 2)[..., None], 1.0, 0.6).expand_as(source)
    assert psnr_outside(edited, source, mask, dilation=2).item() == pytest.approx(20.0, abs=1e-3)
    assert psnr_outside(edited, source, mask, dilation=1).item() < 16.0  # the rim now counts


def test_outside_equals_a_loop_over_pixels(pair):
    mask = torch.rand(3, 24, 31, generator=torch.Generator().manual_seed(1)) < 0.3
    for index, value in enumerate(psnr_outside(*pair, mask, dilation=0)):
        errors = [
            float((pair[0][index, y, x] - pair[1][index, y, x]).double().square().mean())
            for y in range(24) for x in range(31) if not mask[index, y, x]
        ]  # fmt: skip
        assert value.item() == pytest.approx(-10 * math.log10(np.mean(errors)), abs=1e-3)


def test_a_mask_that_leaves_nothing_is_nan(pair):
    mask = torch.zeros(3, 24, 31, dtype=torch.bool)
    mask[1] = True
    value = psnr_outside(*pair, mask)
    assert value.isnan().tolist() == [False, True, False]
    assert torch.nanmean(value).isfinite()


def test_dilation_grows_by_exactly_n_pixels():
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[4, 4] = True
    assert dilate(mask, 3).sum() == 49
    assert torch.equal(dilate(mask, 0), mask)


def test_shapes_are_checked(pair):
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(pair[0], pair[1][:, :-1])
    with pytest.raises(ValueError, match="11"):
        ssim(pair[0][:, :8], pair[1][:, :8])
    with pytest.raises(ValueError, match="edited_mask"):
        psnr_outside(*pair, torch.zeros(3, 24, 30, dtype=torch.bool))
