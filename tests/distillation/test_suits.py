"""A config's nulls become the model's numbers, its own numbers stay; and views share as much whatever their size."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import sharing
from csd3d.distillation.edit_loop import inner_edit
from csd3d.distillation.kernel import SVGDConfig, kernel_matrix
from csd3d.distillation.step import DistillConfig
from csd3d.distillation.suits import suited
from csd3d.priors import Defaults

MODEL = Defaults(guidance_scale=9.0, guidance_final=3.0, t_min=0.1, t_max=0.6, bandwidth=4.0)


def test_what_is_null_is_the_models():
    config = suited(DistillConfig(guidance_scale=None, t_min=None, t_max=None, svgd=SVGDConfig("rbf", "model")), MODEL)
    assert (config.guidance_scale, config.guidance_final, config.t_min, config.t_max) == (9.0, 3.0, 0.1, 0.6)
    assert config.svgd.bandwidth == 4.0
    assert suited(DistillConfig(guidance_scale=None), Defaults()).guidance_final is None


def test_numbers_of_the_config_win():
    config = DistillConfig(guidance_scale=5.0, t_max=0.9, svgd=SVGDConfig(bandwidth="median"))
    assert suited(config, MODEL) is config


def test_a_number_that_contradicts_the_models_is_refused():
    with pytest.raises(ValueError, match=r"t_min is 0.7: give at most 0.6"):
        suited(DistillConfig(t_min=0.7, t_max=None), MODEL)


def test_a_kernel_of_no_model_is_refused():
    with pytest.raises(ValueError, match='bandwidth is "model"'):
        kernel_matrix(torch.randn(3, 4), SVGDConfig(bandwidth="model"))


@pytest.fixture(scope="module")
def views():
    prior, photos = sharing.shipped(views=4)
    return prior, photos, prior.encode(photos)


def test_views_share_alike_at_4x16x16_and_at_4x64x64(views):
    """The kernel compares coordinates on average, so larger latents of the same content share as much."""
    prior, photos, small = views
    svgd = suited(inner_edit(), prior.defaults).svgd
    of_small, of_large = sharing.measure(prior, photos, 128), sharing.measure(prior, photos, 512)
    for t in sharing.TIMES:
        alpha_bar = prior.alphas_cumprod[round(1000 * t)].item()
        enlarged = sharing.shared_weight(F.interpolate(small, scale_factor=4), alpha_bar, svgd)
        assert enlarged == pytest.approx(of_small[str(t)], abs=1e-3)
        # encoded at 512², latents differ by a fifth more: that is the autoencoder's, and shows at little noise
        assert of_large[str(t)] == pytest.approx(of_small[str(t)], abs=0.05 if t > 0.5 else 0.1)
        assert of_large[str(t)] > 0.2
