"""Image to 3D as a user runs it, on a tiny random prior: what is left behind, what is refused, and resuming."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny_jobs import start
from tiny_models import save_tiny_pipeline

from csd3d import run as jobs
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.run import read


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image-to-3d")
    pixels = np.full((48, 48, 3), 250, np.uint8)
    pixels[10:40, 14:34] = 200, 30, 30
    Image.fromarray(pixels).save(folder / "chair.png")
    path = folder / "asset.yaml"
    path.write_text(f"""
task: image_to_3d
image: {folder / "chair.png"}
prompt: a red chair
method: sds
views_per_step: 2
guidance_size: 32
prior: {{model: {save_tiny_pipeline(folder / "prior", "text")}}}
asset:
  representation:
    field: {{levels: 4, log2_hashmap_size: 10, max_resolution: 32, hidden: 16, blob_scale: 60}}
    render: {{steps: 48, resolution: 16, warmup: 8, update_every: 4}}
  resolution: [[0, 8], [2, 12]]
  levels: [[0, 2], [2, 4]]
distill: {{steps: 4}}
evaluate: {{views: 2, size: 32}}
export: {{video_frames: 2, mesh: {{resolution: 16, texture_size: 64, face_budget: 400, threshold: 0.5}}}}
save_seconds: 0
""")
    return path


def test_a_run_shows_the_picture_beside_the_asset_and_resumes_to_the_same(config, tmp_path):
    whole = start(config, tmp_path / "whole")
    figures = json.loads((whole / "metrics.json").read_text())["results"]["sds"]
    assert 0 <= figures["front_iou"] <= 1
    assert figures["front_psnr"] > 0
    strip = np.asarray(Image.open(whole / "images" / "front.png"))
    assert strip.shape == (128, 256, 3)
    np.testing.assert_allclose(strip[64, 64], [200, 30, 30], atol=2)
    stop = StopRequest()
    stop.requested = True
    jobs.start(config, [], tmp_path / "broken", None, "cpu", stop=stop)
    jobs.resume(tmp_path / "broken", [], "cpu", stop=StopRequest())
    assert (tmp_path / "broken" / "images" / "front.png").read_bytes() == (whole / "images" / "front.png").read_bytes()


def test_the_report_shows_the_picture_beside_the_assets_front_view(config, tmp_path):
    page = (start(config, tmp_path / "run", "distill.steps=3") / "report.html").read_text()
    views = page[page.index("The views") : page.index("Videos and mesh</h2>")]
    heads = re.findall(r'<div class="cell head"[^>]*>([^<]*)</div>|<h3>([^<]*)</h3>', views)
    sds = "SDS (DreamFusion)"
    assert [head or row for head, row in heads] == ["The picture", sds, "Front view", "0°", "180°", sds, sds]
    first = re.search(r'src="data:image/png;base64,([^"]*)" width="128" height="128" alt="Front view, The pic', views)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1]))))
    np.testing.assert_allclose(shown[64, 64], [200, 30, 30], atol=2)
    assert 'href="images/front.png"' in page


def test_an_own_picture_is_not_held_against_the_worlds_objects(config, tmp_path):
    """The report gave "PSNR on the object" to the nearest object of the world, which the picture does not show."""
    prior = save_tiny_pipeline(tmp_path / "prior", "text")
    (prior / "csd3d.json").write_text('{"knows": "world"}')
    of_world = {"object_psnr", "mask_iou", "chamfer", "fd", "rank"}
    for keys, against in (((), False), (("image=",), True)):
        run = start(config, tmp_path / str(against), "distill.steps=3", f"prior.model={prior}", *keys)
        metrics = json.loads((run / "metrics.json").read_text())
        known = {key for key, value in metrics["results"]["sds"].items() if value is not None}
        assert {"front_psnr", "front_iou", "clip_colour"} <= known
        assert of_world & known == (of_world if against else set())
        assert ("sds" in metrics["nearest"]) == against
        page = (run / "report.html").read_text()
        for said in ("PSNR on the object</dt>", "Among 32 prompts", "earest right", "FD (world)"):
            assert (said in page) == against, said
        if metrics["mesh"]:
            assert (metrics["mesh"]["stray_faces"] is not None) == against


def test_another_picture_is_another_run(config, tmp_path):
    stop = StopRequest()
    stop.requested = True
    jobs.start(config, [], tmp_path / "run", None, "cpu", stop=stop)
    pixels = np.full((48, 48, 3), 250, np.uint8)
    pixels[10:40, 14:34] = 30, 200, 30
    Image.fromarray(pixels).save(tmp_path / "other.png")
    with pytest.raises(InputError, match="image"):
        jobs.resume(tmp_path / "run", [f"image={tmp_path / 'other.png'}"], "cpu", stop=StopRequest())


def test_bad_pictures_and_demos_are_one_line_before_any_work(config, tmp_path):
    Image.fromarray(np.full((48, 48, 3), 250, np.uint8)).save(tmp_path / "empty.png")
    wrong = {
        f"image={tmp_path / 'empty.png'}": "image: .*empty.png: without a foreground",
        f"image={tmp_path / 'none.png'}": "image: .*none.png: no such file",
        "image=": r"demo: .*not in the world's words",
        "front.elevation_deg=100": r"front\.elevation_deg: expected a number from -90 to 90, got 100",
        "front.fill=0": r"front\.fill: expected a number from 0.1 to 1",
    }
    for override, said in wrong.items():
        with pytest.raises(InputError, match=said):
            start(config, tmp_path / "run", override, "demo=a dragon")
        assert not (tmp_path / "run").exists()


def test_the_words_are_given_or_the_demos_or_none(config):
    assert read(config, []).prompt == "a red chair"
    assert read(config, ["prompt="]).prompt == "an object"
    assert read(config, ["prompt=", "image="]).prompt == "a red chair with yellow stripes"
