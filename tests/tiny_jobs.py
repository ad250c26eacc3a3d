"""Jobs of every task that take seconds, for tests and for benchmarks/kills.py."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from csd3d import run as jobs
from csd3d.interrupt import StopRequest

SCENE = """
representation:
  field: {levels: 4, log2_hashmap_size: 10, max_resolution: 32, hidden: 16}
  render: {steps: 64, resolution: 16, warmup: 16, update_every: 4}
reconstruct: {steps: 40, samples: 4096, rays: 256}
fit: {steps: 12, samples: 2048, rays: 64, patches: 1, patch_size: 16}
editors:
  csd_edit: {edit_every: 6, later_steps: 1, text_scale: 3, image_scale: 1, edit: {steps: 2}}
  in2n: {edit_rate: 4, ddim_steps: 2}
compare: [in2n]
export: {video_frames: 3, mesh: {resolution: 16, texture_size: 64, face_budget: 400, threshold: 0.5}}
save_seconds: 0
"""
CANVAS = """
editors: {csd_edit: {passes: 2, edit: {steps: 3, batch: 4}}}
sampling: {steps: 2}
save_seconds: 0
"""
CASES = {
    "edit_image": "prompt: a red it\nimage: photo.png\ncompare: [ip2p]\n" + CANVAS,
    "edit_panorama": "prompt: a red it\nimage: photo.png\nwrap: true\ncompare: [ip2p, ip2p_downscaled]\n" + CANVAS,
    "edit_video": "prompt: a red it\nvideo: frames\ncompare: [ip2p, pix2video]\n" + CANVAS,
    "text_to_image": """
prompts: [a red chair, a blue ball]
method: [csd, vsd]
particles: 2
size: 32
distill: {steps: 3}
save_seconds: 0
""",
    "text_to_3d": """
prompt: a red chair
compare: [sds]
views_per_step: 2
guidance_size: 32
asset:
  representation:
    field: {levels: 4, log2_hashmap_size: 10, max_resolution: 32, hidden: 16, blob_scale: 60}
    render: {steps: 48, resolution: 16, warmup: 8, update_every: 4}
  resolution: [[0, 8]]
  levels: [[0, 4]]
distill: {steps: 3}
evaluate: {views: 4, size: 32}
export: {video_frames: 3, mesh: {resolution: 16, texture_size: 64, face_budget: 400, threshold: 0.5}}
save_seconds: 0
""",
    "edit_scene": f"name: tiny\nprompt: paint it a bright colour\nscene: {{path: scene}}\n{SCENE}",
}
ASSET = CASES["text_to_3d"].partition("guidance_size")[2]
MORE = {  # methods and editors with state of their own, for benchmarks/kills.py; named TASK+WORD
    "text_to_3d+networks": f"""
prompt: a red chair
method: vsd
compare: [esd, fsd]
methods: {{vsd: {{rank: 2}}, esd: {{rank: 2}}}}
views_per_step: 2
optim: {{ema: 0.9}}
guidance_size{ASSET}""",
    "text_to_3d+diverse": f"""
prompt: a red chair
compare: [rsd]
particles: 3
views_per_step: 1
shading: {{start: 1, lambertian: 0.5}}
losses: {{orientation: 0.01, opacity: [1, 0, 2, 3], distortion: 0.1}}
guidance_size{ASSET}""".replace(
        "distill: {steps: 3}",
        "distill: {steps: 4, svgd: {space: features, bandwidth: median, repulsion: 100}}",
    ),
    "text_to_image+lmc": """
prior: {model: csd3d/assets/t2i}
prompt: a red chair
method: [lmc, sdi, esd, vsd+csd]
particles: 2
size: 32
distill: {steps: 4}
save_seconds: 0.1
""",
    "text_to_image+source": """
prompt: a blue chair
source: {image: scene/images/000.png, prompt: a red chair}
method: [dds, pds]
space: pixel
particles: 2
size: 32
distill: {steps: 4}
save_seconds: 0
""",
    "edit_image+regions": """
image: photo.png
regions: [{box: [0, 0, 20, 24], prompt: a red it}, {box: [20, 0, 40, 24], prompt: a blue it}]
"""
    + CANVAS,
    "edit_panorama+baselines": """
prompt: a red it
image: photo.png
wrap: true
compare: [ip2p, ip2p_downscaled, ip2p_multidiffusion, csd_edit+scaled]
editors:
  csd_edit: {passes: 2, edit: {steps: 3, batch: 4}}
  csd_edit+scaled: {passes: 2, edit: {steps: 3, batch: 4, noise: independent, svgd: {space: scaled}}}
sampling: {steps: 3}
save_seconds: 0.1
""",
    "edit_video+attention": """
prompt: a red it
video: frames
compare: [pix2video, fatezero]
editors: {csd_edit: {passes: 2, edit: {steps: 4, batch: 2, svgd: {repulsion: 1}}}}
sampling: {steps: 3}
save_seconds: 0
""",
    "edit_scene+matches": f"""
name: tiny
prompt: paint it a bright colour
scene: {{path: scene}}
{SCENE}""".replace("csd_edit: {", "csd_edit: {match: 1, rounds: 3, ").replace("save_seconds: 0", "save_seconds: 0.1"),
}
INPUTS = {  # the keys of a job that name files, and those files
    "edit_image": {"image": "photo.png", "prior.model": "prior"},
    "edit_panorama": {"image": "photo.png", "prior.model": "prior"},
    "edit_video": {"video": "frames", "prior.model": "prior"},
    "edit_scene": {"scene.path": "scene", "prior.model": "prior"},
    "text_to_image": {"prior.model": "prior"},
    "text_to_3d": {"prior.model": "prior"},
}


def write_job(home: Path, name: str, priors: dict[str, Path], capture: Path) -> Path:
    """Write a job's config and inputs, relative to `home`, the folder it is to be started in; return the config.

    name: of a job in CASES or MORE.
    priors: an editing and a text-to-image model, by "edit" and "text".
    """
    task, job = name.partition("+")[0], (CASES | MORE)[name]
    home.mkdir(parents=True)
    shutil.copytree(priors["text" if task.startswith("text") else "edit"], home / "prior")
    shutil.copytree(capture, home / "scene")
    for path in ("photo.png", "frames/0.png", "frames/1.png"):
        (home / path).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(len(path)).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / path)
    config, prior = home / "config.yaml", "" if "\nprior:" in job else "prior: {model: prior}\n"
    config.write_text(f"task: {task}\n{prior}{job}")
    return config


def start(config, folder, *overrides, stop=None):
    """Run a job on the CPU, with overrides of its config; return its folder."""
    return jobs.start(config, list(overrides), folder, None, "cpu", stop=stop or StopRequest())


def metrics_of(folder):
    """metrics.json without what a clock or the system measured at the end."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("encode", "export", "evaluate", "total"):
        metrics["seconds"].pop(key, None)
    metrics.pop("peak_memory_gib")
    metrics.pop("peak_gpu_memory_gib", None)
    if metrics.get("mesh"):
        metrics["mesh"].pop("seconds")
    return metrics


def files_of(folder):
    """Every result but the report and the binary curves, by name."""
    kept = (p for p in folder.rglob("*") if p.suffix in (".png", ".mp4", ".obj", ".ply", ".glb", ".jsonl", ".json"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.name != "metrics.json"}
