"""Metrics of assets against their text, with a CLIP that sees mean colours and a truth of random pictures."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from csd3d.evaluation import text
from csd3d.evaluation.text import Judge, is_world
from csd3d.metrics import frechet_distance
from csd3d.metrics.clip import WORLD_FOLDER, ClipModel
from csd3d.report.page import METRICS, metric_label

ANGLES = [0.0, 90.0, 180.0, 270.0]


def pictures(prompt, azimuths_deg, elevation_deg, count, size, seed):
    """True renders: uniform noise."""
    return torch.rand(count, len(azimuths_deg), 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(text, "text_truth", lambda prompt: SimpleNamespace(true_renders=pictures) if prompt else None)
    return Judge(ClipModel("CLIP (world)", lambda x: F.normalize(x.mean((2, 3)), dim=-1), lambda texts: None))


def test_a_frechet_distance_comes_with_that_of_as_many_true_renders(judge):
    def found(assets):
        embedded = judge.clip.embed_images(assets.flatten(0, 1)).unflatten(0, assets.shape[:2])
        return judge.fd(embedded, "a red chair", ANGLES, 4, seed=3)

    true = pictures("", ANGLES, 30.0, 2, 4, seed=4)
    assert found(true)["fd"] == found(true)["fd_floor"] > 0  # the floor is drawn from the seed after the run's
    features = (
        judge.clip.embed_images(pictures("", ANGLES, 30.0, n, 4, s).flatten(0, 1)) for n, s in ((2, 4), (16, 3))
    )
    assert found(true)["fd_floor"] == frechet_distance(*features)
    red = true * torch.tensor([1.0, 0.1, 0.1]).view(3, 1, 1)
    assert found(red)["fd"] > 10 * found(red)["fd_floor"]
    nothing = {"fd": None, "fd_floor": None}
    assert judge.fd(torch.eye(3)[None], "", ANGLES[:3], 4, 0) == nothing
    assert judge.fd(torch.eye(3)[None, :1], "a red chair", ANGLES[:1], 4, 0) == nothing  # one picture has no spread


def test_every_figure_by_the_shipped_clip_says_so():
    labels = {key: metric_label(key, "CLIP (world)") for key in METRICS}
    assert labels["fd"] == "FD (world) to true renders"
    assert labels["clip_directional"] == "CLIP (world) directional similarity"
    bare = [s for s in labels.values() if ("CLIP" in s or "FD" in s) and "(world)" not in s]
    assert not bare


def test_the_shipped_clip_is_known_by_its_folder_too(monkeypatch):
    monkeypatch.chdir(WORLD_FOLDER.parent)
    assert all(map(is_world, ("", "world", str(WORLD_FOLDER), "clip")))
    assert not is_world("openai/clip-vit-large-patch14")
