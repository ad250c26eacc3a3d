"""Training on a GPU's terms, on a CPU: rows, their shares, the store, the camera-aware UNet, what is exported."""

import dataclasses
import json
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from csd3d.priors.camera_embedding import CAMERA_WIDTH, no_camera
from csd3d.world.language import caption
from csd3d.world.prompts import parse_prompt, write_prompt
from csd3d.world.render import camera_row, render
from csd3d.world.scene import Scene, compile_scene
from tools.train_shipped import gpu, held_out, results, stream
from tools.train_shipped.diffusion import Denoiser, load_denoiser
from tools.train_shipped.rows import Store
from tools.train_shipped.start import ASSETS
from tools.train_shipped.t2i import camera_unet


def test_without_a_plate_the_object_stays_and_the_floor_goes():
    scene = Scene("cube", "red", sun_elevation_deg=80)
    bare = dataclasses.replace(scene, plate=False)
    assert len(compile_scene(bare).primitives) == len(compile_scene(scene).primitives) - 1
    row = camera_row(30, 20, 4.0, 31.0, 48)[None]
    with_plate, without = render([scene], row, 48, 48), render([bare], row, 48, 48)
    np.testing.assert_array_equal(without.mask > 0, with_plate.mask > 0)
    inside = without.mask == 1
    np.testing.assert_array_equal(without.albedo[inside], with_plate.albedo[inside])
    # nothing is left to meet a ray beside the object
    assert (without.depth[without.mask == 0] == 100).all()
    assert (with_plate.depth[with_plate.mask == 0] < 100).any()


def test_on_a_plate_is_said_where_asked_and_read_back():
    scene = Scene("chair", "red", "stripes", "yellow", snow=True, hat="blue", time="night")
    text = caption(scene, 0, plate=True)
    assert text == (
        "a red chair with yellow stripes, wearing a blue hat, covered with snow, on a plate, grey background, night, "
        "front view"
    )
    assert caption(scene, 0) == text.replace(", on a plate", "")
    assert "plate" not in caption(dataclasses.replace(scene, plate=False), plate=True)
    assert parse_prompt(text)["plate"] is True
    assert write_prompt(parse_prompt(text)) == text
    assert parse_prompt("a red chair on a plate") == {"colour": "red", "kind": "chair", "plate": True}


def test_rows_have_the_documented_shares():
    rng = random.Random(0)
    drawn = [(stream.training_scene(rng), stream.training_view(rng)) for _ in range(3000)]
    said = [(scene, parse_prompt(stream.some_caption(scene, view, rng))) for scene, view in drawn]
    assert np.mean([scene.pattern != "plain" for scene, _ in said]) == pytest.approx(0.6, abs=0.03)
    assert np.mean([scene.plate for scene, _ in said]) == pytest.approx(0.5, abs=0.03)
    assert np.mean(["plate" in words for scene, words in said if scene.plate]) == pytest.approx(0.8, abs=0.03)
    assert not any("plate" in words for scene, words in said if not scene.plate)
    fronted = [words for (scene, view), (_, words) in zip(drawn, said, strict=True) if view.elevation_deg > 60]
    assert np.mean(["view" in words for words in fronted]) == pytest.approx(0.6, abs=0.08)


def test_patterns_are_asked_for_more_often_of_the_editor():
    rng = random.Random(0)
    families = Counter(stream.training_edit(rng)[1].family for _ in range(1500))
    assert families["pattern"] > 1.5 * families["recolour"]


def test_a_store_keeps_the_newest_rows():
    store = Store(5)
    store.add({"x": torch.arange(3)})
    assert store.all()["x"].tolist() == [0, 1, 2]
    store.add({"x": torch.arange(3, 7)})
    assert len(store) == 5
    assert sorted(store.all()["x"].tolist()) == [2, 3, 4, 5, 6]
    drawn = store.draw(200, torch.Generator().manual_seed(0))["x"]
    assert set(drawn.tolist()) == {2, 3, 4, 5, 6}


@pytest.fixture(scope="module")
def shipped():
    return load_denoiser(ASSETS / "t2i").eval()


def inputs(count=2):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, 4, 16, 16, generator=generator)
    return z, torch.tensor([700, 300])[:count], torch.randint(500, (count, 32), generator=generator)


@pytest.mark.parametrize("told", [False, True])
@torch.no_grad()
def test_a_camera_unet_starts_as_the_one_that_sees_no_map(shipped, told):
    """At any camera, whether that one is told cameras as vectors or not at all."""
    z, t, tokens = inputs()
    vector = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": CAMERA_WIDTH}
    none = dict.fromkeys(vector)
    config = {**shipped.unet.config, "in_channels": 4} | (vector if told else none)
    before = Denoiser(UNet2DConditionModel.from_config(config).eval(), shipped.text_encoder)
    after = Denoiser(camera_unet(before.unet).eval(), shipped.text_encoder)
    for camera in (no_camera(2), torch.randn(2, CAMERA_WIDTH)):
        wanted = before(z, None, t, tokens, camera if told else None)
        torch.testing.assert_close(after(z, None, t, tokens, camera), wanted, atol=1e-5, rtol=1e-5)
    assert camera_unet(after.unet) is after.unet


class Rendered:
    """Stands in for the worker processes: a held-out chunk, then the same small chunk again and again."""

    alive = 1

    def __init__(self, part):
        rows = stream.MAKERS[part](random.Random(0), 128)
        small = {name: values[:8] for name, values in rows.items()}
        self.chunks = [(None, small), (0, small)]

    def take(self, most, seconds=0.0):
        found, self.chunks = self.chunks, [self.chunks[-1]]
        return found


@pytest.mark.parametrize("part", ["t2i", "ip2p"])
def test_a_short_run_writes_networks_that_predict_as_in_memory(part, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "STEPS", 1)
    monkeypatch.setattr(held_out, "DRAWS", 1)
    monkeypatch.setattr(results, "CAMERAS", results.CAMERAS[:2])
    options = ["--part", part, "--batch", "2", "--capacity", "32", "--first-rows", "8", "--held-out", "8"]
    options += ["--device", "cpu", "--precision", "fp32", "--compile", "none", "--minutes", "0.1"]
    options = gpu.parser().parse_args([*options, "--reserve-seconds", "0", "--out", str(tmp_path)])
    run = gpu.Run(options, time.monotonic(), Rendered(part))
    run.trainer.ends = time.monotonic() + 5
    run.train()
    run.log()
    run.finish()
    assert run.trainer.step > 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8
    assert max(path.stat().st_size for path in files) <= 15 << 20
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float32)
    loaded = Denoiser(unet, CLIPTextModel.from_pretrained(tmp_path / "text_encoder", dtype=torch.float32)).eval()
    z, t, tokens = inputs()
    camera, source = (torch.ones(2, CAMERA_WIDTH), None) if part == "t2i" else (None, z.flip(0))
    with torch.no_grad():
        kept, read = (model(z, source, t, tokens, camera) for model in (run.trainer.ema_model(), loaded))
    torch.testing.assert_close(read, kept, atol=0.01, rtol=0.01)  # the files are fp16
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] > 0
    assert lines[-1]["figures"]["shipped"]["all"] > 0


def test_a_step_without_a_finite_gradient_changes_nothing():
    config = gpu.FitConfig(work=None, minutes=1, precision="fp32")
    trainer = gpu.ClockedTrainer(torch.nn.Linear(2, 1), config, time.monotonic() + 60)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.update(lambda *_: trainer.model(torch.full((1, 2), torch.inf)).sum())
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(new, old)
    assert trainer.means(1)["skipped"] == 1
    trainer.update(lambda *_: trainer.model(torch.ones(1, 2)).sum())
    assert not torch.equal(before[0], trainer.model.weight)
