"""Jobs with models that append the source picture's tokens: FLUX.1 Kontext and Qwen-Image-Edit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_flux, save_tiny_qwen_edit

import launch
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.tiled import TiledVae

CANVAS = """
editors: {csd_edit: {passes: 1, edit: {steps: 3, batch: 4}}}
compare: [ip2p, ip2p_downscaled, ip2p_multidiffusion]
sampling: {steps: 2}
save_seconds: 0
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    found = {"kontext": save_tiny_flux(home / "kontext"), "qwen": save_tiny_qwen_edit(home / "qwen")}
    for folder in found.values():
        (folder / "csd3d.json").write_text(json.dumps({"defaults": {"working_size": 64}}))
    return found


def run(tmp_path, text, *more):
    (tmp_path / "job.yaml").write_text(text)
    code = launch.main(["--config", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "run"), *more])
    metrics = tmp_path / "run" / "metrics.json"
    return code, json.loads(metrics.read_text())["results"] if metrics.is_file() else None


def photo(tmp_path, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return f"image: {tmp_path / 'photo.png'}\n"


@pytest.mark.parametrize(("model", "size", "wrap"), [("kontext", (37, 53), False), ("qwen", (66, 130), True)])
def test_pictures_of_odd_sizes_are_edited(tmp_path, models, model, size, wrap):
    text = f"task: edit_panorama\nprompt: a red it\nwrap: {wrap}\nprior: {{model: {models[model]}}}\n"
    code, results = run(tmp_path, text + photo(tmp_path, *size) + CANVAS)
    assert code == 0
    assert results.keys() == {"csd_edit", "ip2p", "ip2p_downscaled", "ip2p_multidiffusion"}
    assert Image.open(tmp_path / "run" / "result.png").size == size[::-1]


@pytest.mark.parametrize(
    ("model", "override", "said"),
    [
        ("qwen", "editors.csd_edit.image_scale=1.5", "editors.csd_edit.image_scale: 1.5, but Qwen-Image-Edit has no"),
        ("qwen", "sampling.image_scale=2", "sampling.image_scale: 2, but Qwen-Image-Edit has no prediction without"),
        ("kontext", "window=7", "window: 7 latent pixels: FLUX.1 Kontext takes multiples of 2"),
        ("kontext", "compare=[pix2video]", "compare names 'pix2video'"),
    ],
)
def test_keys_that_do_not_suit_the_model_are_told_before_any_work(tmp_path, models, capsys, model, override, said):
    text = f"task: edit_image\nprompt: a red it\nprior: {{model: {models[model]}}}\n{photo(tmp_path, 37, 53)}{CANVAS}"
    assert run(tmp_path, text, override) == (2, None)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("model", ["kontext", "qwen"])
def test_large_pictures_are_cut_into_tiles(models, model):
    prior = load_prior(PriorConfig(str(models[model]), device="cpu"))
    pictures = torch.rand(1, 3, 60, 620, generator=torch.Generator().manual_seed(0))
    whole, tiled = TiledVae(prior, 2**20), TiledVae(prior, 2**14, tile=2**14)
    z, expected = tiled.encode(pictures), whole.encode(pictures)
    assert z.shape == expected.shape == (1, *prior.latent_shape(60, 620))
    # attention stays within a tile, which these random weights hardly show
    assert (z - expected).norm() / expected.norm() < 0.03
    decoded, expected = tiled.decode(z, (60, 620)), whole.decode(z, (60, 620))
    assert (decoded - expected).norm() / expected.norm() < 0.03
    wrapped = TiledVae(prior, 2**14, wrap=True, tile=2**14)
    assert wrapped.encode(pictures[..., :608]).shape[-1] == 76
