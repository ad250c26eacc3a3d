"""The hash-grid NeRF and Gaussian splats at equal CPU time: `python -m benchmarks.representations --json FILE`.

Six scenes of the procedural world and, with --fox, instant-ngp's fox are reconstructed by each, for a series of
budgets of CPU time. A budget is a number of steps, chosen from the pace of an earlier fit, with its own complete
learning-rate schedule; the time in the table is what the fit then took. One thread, CPU time of the process (fit and
optimiser; not loading, not the rendering of held-out views). Each fit runs in a process of its own, whose peak memory
above what it had at its start is told. Fits that FILE has are not repeated. Prints the Markdown tables of
docs/results.md. --views FOLDER keeps held-out views of every fit.
"""

import argparse
import dataclasses
import json
import multiprocessing
import resource
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import torch
from torch import Tensor

from benchmarks.referee import protocol
from benchmarks.runs import cell, provenance
from csd3d.config import load_config
from csd3d.datasets import Capture, SceneConfig, load_capture
from csd3d.evaluation.scene import evaluate_reconstruction, render_judged
from csd3d.files import write_text
from csd3d.representations.base import open_scene
from csd3d.representations.fit import Pictures
from csd3d.tasks.edit_scene import EditSceneConfig
from csd3d.world.dataset import write_capture
from csd3d.world.scene import Scene

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = "hashgrid, small steps"
FIRST_STEPS = {"hashgrid": 40, SMALL: 60, "splats": 100}  # of the fit that measures the pace for the first budget
GOAL = 27.0  # dB held out, for the fox
SHOWN = 2  # held-out views that --views keeps of a fit
SCENES = {
    **{name: protocol.SCENES[name] for name in ("duck", "mug", "chair", "robot")},
    "donut": Scene("donut", "purple", "checks", "yellow", "metal", "mint", azimuth_deg=45, sun_azimuth_deg=200),
    "house": Scene("house", "red", "stripes", time="sunset", sky="gradient", azimuth_deg=60, sun_elevation_deg=25),
}


@dataclass(frozen=True)
class Subject:
    """What is reconstructed, with the config of each representation and the budgets in CPU seconds."""

    configs: dict[str, tuple[str, ...]]  # by representation: a config's name, then overrides
    budgets: tuple[float, ...]
    downscale: float = 1.0


FEW = "reconstruct.samples="  # a step; the configs have few, the field's own default is 65536
MANY = ("representation.count=12000", "representation.max_count=24000", "reconstruct.learning_rate=5e-3")
WORLD = Subject(
    {"hashgrid": ("csd-edit-scene", FEW + "65536"), SMALL: ("csd-edit-scene",), "splats": ("csd-edit-splats",)},
    (10, 24),
)
REAL = {
    "hashgrid": ("csd-edit-capture", FEW + "65536"),
    SMALL: ("csd-edit-capture",),
    "splats": ("csd-edit-capture", "representation.type=splats", *MANY),
}
SUBJECTS = {name: WORLD for name in SCENES} | {
    "fox 135x240": Subject(REAL, (25, 60, 75), 2.0),
    "fox 270x480": Subject(REAL, (160,)),  # not run yet
}


@cache
def capture_of(name: str, work: Path, fox: Path | None) -> Capture:
    """The capture of a subject; a scene of the world is written into `work` first."""
    if name not in SCENES:
        return load_capture(SceneConfig(path=str(fox), downscale=SUBJECTS[name].downscale))
    folder = work / "captures" / name
    if not (folder / "world.json").exists():
        write_capture(folder, SCENES[name], seed=3)
    return load_capture(SceneConfig(path=str(folder)))


def fit(
    capture: Capture, config: EditSceneConfig, steps: int, pictures: Path | None = None, judge: bool = True
) -> dict:
    """Reconstruct the capture in `steps` steps; return the figures, of which `judge=False` leaves out those of views.

    Held-out views are written to `pictures`, if that is given.
    """
    before = peak_mib()
    settings = dataclasses.replace(config.reconstruct, steps=steps)
    generator = torch.Generator().manual_seed(config.seed)
    known = {"points": capture.points, "cameras": capture.cameras[capture.train], "splats": capture.splats}
    start = time.process_time()
    parts = (capture.aabb, generator, capture.unbounded)
    model = open_scene(config.representation.thing, *parts, hints=known)
    optimiser = model.start_fit(settings)
    views = Pictures(capture.images, capture.cameras, capture.masks, capture.train)
    for step in range(steps):
        model.fit_step(optimiser, views, settings, step, generator)
    seconds, memory = time.process_time() - start, peak_mib() - before
    if not judge:
        return {"steps": steps, "cpu_seconds": seconds}
    start = time.process_time()
    found = evaluate_reconstruction(render_judged(model, capture, "held out"), capture)
    view_ms = (time.process_time() - start) / max(len(capture.test), 1) * 1e3
    if pictures is not None:
        pictures.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(pictures, strip(model, capture))
    return {"steps": steps, "cpu_seconds": seconds, **found, "view_ms": view_ms, "memory_mib": memory}


def strip(model: Any, capture: Capture) -> Tensor:
    """Held-out photos above their renders, [2 H, SHOWN W, 3] uint8."""
    chosen = capture.test[torch.linspace(0, len(capture.test) - 1, SHOWN).long()]
    rows = (capture.images[chosen], model.render_views(capture.cameras, chosen).rgb.cpu().clamp(0, 1))
    return (torch.cat([torch.cat(list(row), 1) for row in rows]) * 255).round().byte().numpy()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(*job: Any) -> dict[str, Any]:
    """`fit` in a process of its own, which begins with what is loaded here."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(fit, job)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Do the fits that are wanted and not yet in the JSON, which is written after each; return all."""
    done = json.loads(options.json.read_text())["fits"] if options.json.exists() else []
    paces: dict[tuple[str, str], float] = {}  # CPU seconds a step
    plan = [(budget, name) for name in options.subjects for budget in SUBJECTS[name].budgets]
    # budget by budget, so that an interrupted series has all scenes
    for budget, name in sorted(plan, key=lambda job: (job[1] not in SCENES, job[0])):
        kind = "world" if name in SCENES else name
        for way, (config_name, *overrides) in SUBJECTS[name].configs.items():
            key = {"subject": name, "representation": way, "budget": budget}
            known = next((f for f in done if key.items() <= f.items()), None)
            if known is None:
                capture = capture_of(name, options.work, options.fox)
                config = load_config(CONFIGS / f"{config_name}.yaml", overrides, EditSceneConfig)
                if (kind, way) not in paces:
                    first = apart(capture, config, FIRST_STEPS[way], None, False)
                    paces[kind, way] = first["cpu_seconds"] / first["steps"]
                picture = options.views and options.views / f"{name}-{budget:g}-{way}.png".replace(", ", "-").replace(
                    " ", "-"
                )
                known = key | apart(capture, config, max(round(budget / paces[kind, way]), 1), picture)
                done.append(known)
                write_text(options.json, json.dumps({**provenance("representations"), "fits": done}, indent=2) + "\n")
                print(*(f"{value:.4g}" if isinstance(value, float) else value for value in known.values()))
            paces[kind, way] = known["cpu_seconds"] / known["steps"]
    return done


def table(fits: list[dict[str, Any]]) -> str:
    """Markdown: a row for the mean of the world scenes at each budget, then for each fit of other subjects."""
    lines = ["| | budget, s of CPU | " + " | ".join(f"{way}: took, PSNR, SSIM, MiB" for way in FIRST_STEPS) + " |"]
    lines.append("|" + "---|" * (2 + len(FIRST_STEPS)))
    groups: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for one in fits:
        for name in (one["subject"], *(["mean of the scenes"] if one["subject"] in SCENES else [])):
            groups.setdefault((name, one["budget"]), {}).setdefault(one["representation"], []).append(one)
    figures = [("cpu_seconds", 1), ("psnr", 2), ("ssim", 3), ("memory_mib", 0)]
    for (name, budget), ways in sorted(groups.items()):
        cells = []
        for way in FIRST_STEPS:
            found = ways.get(way, [])
            partial = name.startswith("mean") and len(found) < len(SCENES)  # no mean of some of the scenes
            values = [None if partial or not found else mean([f[key] for f in found]) for key, _ in figures]
            cells.append(", ".join(cell(x, digits) for x, (_, digits) in zip(values, figures, strict=True)))
        lines.append(f"| {name} | {budget:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--fox", type=Path, help="folder of instant-ngp's fox, with transforms.json")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, help="default: the scenes, and the fox if given")
    parser.add_argument("--views", type=Path, help="folder for held-out views")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-representations"))
    options = parser.parse_args()
    options.subjects = options.subjects or [name for name in SUBJECTS if name in SCENES or options.fox]
    torch.set_num_threads(1)
    print(table(run(options)))


if __name__ == "__main__":
    main()
