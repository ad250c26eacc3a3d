"""docs/extending.md: its examples are complete, and do what they say."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_flux

from csd3d import registry
from csd3d.cameras import orbit
from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.representations.base import open_scene
from csd3d.representations.fit import FitConfig, Pictures
from csd3d.run import read

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
HEADER, *BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    for kind in registry.PACKAGES:
        registry.names(kind)
    monkeypatch.setattr(registry, "_entries", {kind: dict(found) for kind, found in registry._entries.items()})


def example(tmp_path, name: str):
    """The example that registers `name`, loaded as a plugin of one file."""
    (block,) = [block for block in BLOCKS if f'"{name}"' in block]
    (tmp_path / f"{name}.py").write_text(HEADER + block, encoding="utf-8")
    registry.load_plugins([str(tmp_path / f"{name}.py")])


def test_every_kind_of_the_table_is_one_of_the_registry():
    for kind in re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE):
        assert kind in registry.PACKAGES


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r'@register\("\w+", "(\w+)"', block)[1])
def test_examples_register_what_they_show(block, tmp_path):
    kind, name = re.search(r'@register\("(\w+)", "(\w+)"', block).groups()
    example(tmp_path, name)
    assert registry.get(kind, name).thing.__doc__


def test_the_config_is_read_as_it_stands(tmp_path):
    (config,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "try.yaml").write_text(config, encoding="utf-8")
    example(tmp_path, "my_nfsd")
    (tmp_path / "my_nfsd.py").rename(tmp_path / "my_method.py")
    registry._entries["method"].pop("my_nfsd")
    assert list(read(tmp_path / "try.yaml", []).runs) == ["my_nfsd", "sds"]


def test_the_representation_finds_what_its_pictures_show(tmp_path):
    example(tmp_path, "my_voxels")
    voxels, generator = registry.get("representation", "my_voxels").thing(side=8), torch.Generator().manual_seed(0)
    true, found = (open_scene(voxels, torch.tensor([-1.0, -1, -1, 1, 1, 1]), generator) for _ in range(2))
    with torch.no_grad():
        true.grid[:, 0] = -5.0
        true.grid[0, :, 3:5, 3:5, 4:6] = torch.tensor([4.0, 4.0, -4.0, -4.0]).view(4, 1, 1, 1)  # a red block, x from 0
    cameras, views = orbit(6, 3.0, 30.0, 45.0, 24, 16), torch.arange(6)
    pictures = Pictures(true.render_views(cameras, views).rgb, cameras, None, views)
    config = FitConfig(steps=120, learning_rate=0.2, final_learning_rate=0.02)
    optimiser = found.start_fit(config)
    reports = [found.fit_step(optimiser, pictures, config, step, generator) for step in range(120)]
    assert reports[-1]["psnr"] > 25 > reports[0]["psnr"] + 5
    red, _ = found.radiance(torch.tensor([[0.4, 0.0, 0.0]]))
    assert red[0, 0] - red[0, 1:].max() > 0.4
    assert found.density(torch.tensor([[0.2, 0.0, 0.0], [-0.7, 0.0, 0.0], [2.0, 0.0, 0.0]])).argmax() == 0
    seen = true.render(cameras[0], background=torch.zeros_like)
    assert 2.4 < seen.depth[0, 8, 12] < 3.2  # the camera stands 3 from the middle
    assert seen.rgb[0, 0, 0].max() < 0.05  # nothing but the background
    assert seen.opacity[0, 8, 12] > 0.8


def test_the_reader_reads(tmp_path):
    example(tmp_path, "my_poses")
    cameras = orbit(4, 4.0, 30.0, 45.0, 12, 8)
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    last = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(4, 1, 4)
    np.save(tmp_path / "poses.npy", torch.cat((cameras.camera_to_world, last), 1).numpy())
    capture = load_capture(SceneConfig(str(tmp_path), orientation="none", centre="none", auto_scale=False))
    assert torch.allclose(capture.cameras.camera_to_world, cameras.camera_to_world, atol=1e-6)


def test_the_family_predicts_as_csd3ds_own(tmp_path):
    example(tmp_path, "my_kontext")
    folder = str(save_tiny_flux(tmp_path / "kontext"))
    with pytest.raises(InputError, match=r"flux_kontext .* and my_kontext .*prior\.family=NAME"):
        load_prior(PriorConfig(folder, device="cpu"))
    theirs = load_prior(PriorConfig(folder, family="my_kontext", device="cpu"), "edit")
    own = load_prior(PriorConfig(folder, family="flux_kontext", device="cpu", distilled_guidance=1.0), "edit")
    z = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    picture = theirs.encode_condition(torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)))
    seen = Query(z, 500, ("red", "blue"), picture)
    asked = {"seen": seen, "unseen": replace(seen, image=None), "other": replace(seen, image=-picture)}
    eps, expected = theirs.predict(asked), own.predict(asked)
    for name in asked:
        torch.testing.assert_close(eps[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(eps["seen"], eps["other"])
    assert not torch.allclose(eps["seen"], eps["unseen"])
