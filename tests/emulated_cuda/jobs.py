"""Every task's job cut to a few steps: `python jobs.py DEVICE FOLDER` writes FOLDER/figures.json.

FOLDER/jobs.json holds {name: [config, overrides]}: those of `JOBS`, or benchmarks/emulated.py's.
"""

import collections
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from csd3d import run as jobs
from csd3d.engine.phase import Job, Phase
from csd3d.interrupt import StopRequest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# The same operations on both devices: the native kernels round otherwise than the torch reference.
REFERENCE = ["representation.render.backend=reference", "representation.field.backend=reference"]
MESH = ["export.mesh.resolution=24", "export.mesh.texture_size=64", "export.mesh.face_budget=400"]
FIT = ["rays=128", "samples=2048", "warmup=1"]
CANVAS = ["sampling.steps=1", "editors.csd_edit.passes=1", "editors.csd_edit.edit.steps=2"]
DISTILL = ["distill.steps=2", "methods.vsd.rank=1", "methods.esd.rank=1"]
JOBS: dict[str, tuple[str, list[str]]] = {
    "edit_scene": ("csd-edit-scene", [
        *REFERENCE, *MESH, "scene.downscale=8",
        *(f"representation.render.{key}" for key in ("steps=24", "resolution=16")),
        "representation.field.levels=2", "representation.field.hidden=16", "export.mesh.threshold=1",
        *(f"reconstruct.{key}" for key in ("steps=6", *FIT)),
        *(f"fit.{key}" for key in ("steps=4", "patches=1", "patch_size=8", "distortion_weight=0.01", *FIT)),
        *(f"editors.csd_edit.{key}" for key in ("edit_every=2", "edit.steps=1", "later_steps=1")),
        "editors.csd_edit.match=1", "editors.csd_edit.views=3",
        "editors.in2n.edit_rate=2", "editors.in2n.ddim_steps=1", "export.video_frames=2",
    ]),
    "edit_image": ("csd-edit-image", [*CANVAS, "compare=[ip2p]", "world.width=64"]),
    "edit_regions": ("csd-edit-regions", [
        *CANVAS, "regions=[{prompt: paint it red}, {prompt: ''}]", "world.width=128",
    ]),
    "edit_video": ("csd-edit-video", [
        *CANVAS, "editors.csd_edit.edit.batch=3", "world.frames=3",
    ]),
    "edit_panorama": ("csd-edit-panorama", [*CANVAS, "world.width=256", "compare=[ip2p_multidiffusion]"]),
    "text_to_3d": ("csd-text-to-3d", [
        *MESH, *DISTILL, "method=vsd+csd", "views_per_step=2", "export.mesh.threshold=1", "asset.resolution=[[0,16]]",
        "asset.representation.render={backend: reference, steps: 16, finer: 1, resolution: 16}",
        "asset.representation.field={backend: reference, levels: 2, max_resolution: 40}", "asset.levels=[[0,2]]",
        "evaluate.views=2", "evaluate.size=32", "guidance_size=64",
        "losses.orientation=0.1", "losses.opacity=0.1", "losses.distortion=0.1", "losses.smoothness=0.1",
        "export.video_frames=2",
    ]),
    "splats": ("sds", [
        *MESH, "distill.steps=2", "method={type: cfd, fresh: 0.1}", "asset.representation.type=splats",
        "asset.representation.backend=reference",
        "asset.representation.count=16", "asset.resolution=[[0,16]]", "losses.opacity=0", "losses.distortion=0",
        "losses.smoothness=0",
        "export.mesh.threshold=1", "evaluate.views=2", "evaluate.size=24", "guidance_size=64", "export.video_frames=1",
    ]),
    "text_to_image": ("text-to-image", [*DISTILL, "particles=2", "size=64", "prompt=a blue duck", "distill.steps=1"]),
}  # fmt: skip


def figures_of(config: str, overrides: list[str], device: str, folder: Path) -> dict:
    """Runs a job; its results, or the traceback it died of, and what made the host wait under the emulation."""
    started, counted = time.monotonic(), Waits()
    try:
        with counted:
            jobs.start(CONFIGS / f"{config}.yaml", overrides, folder, 0, device, stop=StopRequest())
    except Exception:
        return {"error": traceback.format_exc(), "took": time.monotonic() - started}
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = {key: metrics.get(key) for key in ("results", "reconstruction", "mesh")}
    return kept | {"took": time.monotonic() - started, "waits": counted.found()}


class Waits:
    """What made the host wait in a job, by the emulation's counts: in all, in each phase's step, and by line."""

    def __init__(self) -> None:
        emulate = sys.modules.get("emulate")  # emulate.py gives itself this name; not there on the CPU
        self.places = emulate.PLACES if emulate else collections.Counter()
        self.steps: dict[str, list[int]] = {}
        self.phase = ""

    def __enter__(self) -> None:
        self.before, self.last = self.places.copy(), self.places.total()
        self.announce, self.note = Job.announce, Phase.note

        def announce(job: Job, name: str, *args, **options) -> None:
            self.phase, self.last = name, self.places.total()
            self.announce(job, name, *args, **options)

        def note(phase: Phase, report: dict) -> None:
            self.steps.setdefault(self.phase, []).append(self.places.total() - self.last)
            self.note(phase, report)
            self.last = self.places.total()

        Job.announce, Phase.note = announce, note

    def __exit__(self, *_) -> None:
        Job.announce, Phase.note = self.announce, self.note

    def found(self) -> dict:
        """The count of the whole job, that of each step by phase, and the lines that waited most."""
        during = self.places - self.before
        return {"all": during.total(), "steps": self.steps, "lines": dict(during.most_common(12))}


def main() -> None:
    """All jobs of FOLDER/jobs.json, one after another."""
    device, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)  # the other device's jobs run beside these
    found = {}
    for name, (config, overrides) in json.loads((folder / "jobs.json").read_text()).items():
        found[name] = figures_of(config, overrides, device, folder / name)
        (folder / "figures.json").write_text(json.dumps(found, indent=2))
        print(name, f"{found[name]['took']:.1f} s", found[name].get("error", "ends"), flush=True)


if __name__ == "__main__":
    main()
