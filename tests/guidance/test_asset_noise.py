"""Noise of assets: whose it is, that it goes on, and that a run which is stopped goes on with it."""

from types import SimpleNamespace

import pytest
import torch

from csd3d.cameras import Cameras, look_at
from csd3d.distillation.step import DistillConfig
from csd3d.engine.phase import Phase
from csd3d.guidance.asset_noise import CameraNoise, SurfaceNoise, asset_noise
from csd3d.guidance.assets import AssetPhase
from csd3d.guidance.methods import method_runs
from csd3d.schema import Chosen, choose

SHAPE = (4, 8, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(name, count=3, **settings):
    chosen = choose("method", name, **settings) if settings else Chosen(name)
    (run,) = method_runs([chosen], {}, DistillConfig()).values()
    return asset_noise(run, count, SHAPE, 31.0, 1.1, generator())


def shown(count=1):
    """A disc that faces two cameras, of each of `count` assets."""
    pose = look_at(torch.tensor([[4.0, 0, 0], [0.0, 4, 0]]), torch.zeros(2, 3))
    focal, middle = torch.full((2,), 60.0), torch.full((2,), 16.0)
    cameras = Cameras(pose, focal, focal, middle, middle, 32, 32)
    opacity = torch.zeros(2, 32, 32)
    opacity[:, 8:24, 8:24] = 1
    rendered = [SimpleNamespace(depth=torch.full((2, 32, 32), 3.5), opacity=opacity) for _ in range(count)]
    return SimpleNamespace(rendered=rendered, cameras=cameras)


def test_each_method_has_its_kind():
    assert made("sds") is None
    assert isinstance(made("fsd"), CameraNoise)
    assert isinstance(made("cfd"), SurfaceNoise)


def test_assets_have_noise_of_their_own_unless_they_collaborate():
    own, shared = (made(name)(None, shown(3), SHAPE[1:]) for name in ("cfd", "cfd+csd"))
    assert own.shape == shared.shape == (6, *SHAPE)
    assert torch.equal(shared[:2], shared[2:4])
    assert not torch.isclose(own[2:4], own[:2]).any()


def test_the_middle_is_the_surfaces_and_the_rest_what_lies_behind():
    noise = made("cfd", 1)
    eps = noise(None, shown(), SHAPE[1:])
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[2:6, 2:6] = False
    assert torch.equal(eps[..., outside], noise.behind[0][:, outside].expand(2, -1, -1))
    assert not torch.isclose(eps[..., ~outside], noise.behind[0][:, ~outside]).any()


@pytest.mark.parametrize("fresh", [0.0, 0.25, 1.0])
def test_a_share_is_drawn_anew_each_step(fresh):
    noise = made("cfd", 1, fresh=fresh)
    before, behind = noise.maps.clone(), noise.behind.clone()
    noise.renew(generator(5))
    alike = (before * noise.maps).mean() / noise.maps.square().mean()
    assert alike == pytest.approx((1 - fresh) ** 0.5, abs=0.02)
    assert noise.maps.var() == pytest.approx(1, abs=0.02)
    assert torch.equal(noise.behind, behind) == (fresh == 0)


def test_noise_that_changes_is_in_the_checkpoint(tmp_path):
    def phase():
        noise = made("cfd", 1, fresh=0.1)
        return AssetPhase(generator(1), model=noise, optimiser=torch.optim.Adam(noise.buffers()), noise=noise)

    first, second = phase(), phase()
    first.noise.renew(first.generator)
    Phase.save(first, tmp_path, "cfd", {})
    assert not torch.equal(second.noise.maps, first.noise.maps)
    second.load(tmp_path, "cfd", {})
    assert torch.equal(second.noise.maps, first.noise.maps)
    assert torch.equal(second.noise.behind, first.noise.behind)
