"""Noise of assets: whose it is, that it goes on, and that a run which is stopped goes on with it."""

from types import SimpleNamespace

import pytest
import torch

from csd3d.cameras import Cameras, look_at
from csd3d.distillation.step import DistillConfig
from csd3d.distillation.surface_noise import BYTES_PER_POINT
from csd3d.engine.phase import Phase
from csd3d.errors import InputError
from csd3d.guidance.asset_noise import CameraNoise, SurfaceNoise, asset_noise, noise_bytes
from csd3d.guidance.assets import AssetPhase, check_noise
from csd3d.guidance.methods import method_runs
from csd3d.guidance.views import ViewsConfig
from csd3d.schema import Chosen, choose
from csd3d.tasks.text_to_3d import TextTo3DConfig

SHAPE = (4, 8, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run_of(name, **settings):
    chosen = choose("method", name, **settings) if settings else Chosen(name)
    (run,) = method_runs([chosen], {}, DistillConfig()).values()
    return run


def made(name, count=3, **settings):
    return asset_noise(run_of(name, **settings), count, SHAPE, 31.0, 1.1, generator())


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


@pytest.mark.parametrize("name", ["cfd", "cfd+csd", "fsd", "fsd+csd"])
def test_the_memory_that_is_counted_is_that_of_the_maps_and_of_the_points_looked_at(name):
    noise = made(name)
    unique = {one.data_ptr(): one.numel() for one in noise.maps}
    points = noise_bytes(run_of(name), 3, 5, SHAPE, 31.0) - 4 * sum(unique.values())
    assert points == (5 * (16 * 8) ** 2 * BYTES_PER_POINT if "cfd" in name else 0)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"method": Chosen("cfd"), "guidance_size": 1024}, "guidance_size 1024 with 1 × 4 views: the noise of cfd"),
        ({"compare": [Chosen("cfd")], "views_per_step": 200}, "guidance_size 128 with 1 × 200 views: the noise of cfd"),
        (
            {"method": Chosen("fsd"), "particles": 8, "views": ViewsConfig(fov_deg=(1, 1))},
            "guidance_size 128 with 8 × 4 views of 1 degrees: the noise of fsd takes",
        ),
    ],
)
def test_noise_that_does_not_fit_is_refused(monkeypatch, keys, told):
    monkeypatch.setattr("csd3d.memory.memory_bytes", lambda: 2**30)
    prior = SimpleNamespace(latent_shape=lambda h, w: (4, h // 8, w // 8), defaults=SimpleNamespace(working_size=128))
    check_noise(TextTo3DConfig(prompt="a"), prior, torch.device("cpu"))
    with pytest.raises(InputError, match=f"{told}.*this machine has 1 GiB; lower guidance_size"):
        check_noise(TextTo3DConfig(prompt="a", **keys), prior, torch.device("cpu"))
