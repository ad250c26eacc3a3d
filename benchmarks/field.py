"""Speed of the compiled field and ray loop against torch's networks: `python -m benchmarks.field --json FILE`.

The shipped scene, fitted for some steps; then in turn, on one thread, by the processor's time: the field alone on the
samples of a real step (forward and backward), a step of reconstruction, a 128² view. "before" is the path of torch's
networks: every marched sample's density, all lit samples again, and in pictures the coloured ones again. The limit is
the rate of multiply-adds on registers, measured in the same rounds.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from csd3d.datasets import load_capture
from csd3d.datasets.capture import SceneConfig
from csd3d.fields import FieldConfig, RadianceField
from csd3d.rendering import render
from csd3d.representations.fit import FitConfig, Pictures
from csd3d.representations.hashgrid import HashGrid, HashGridScene, draw_rays
from custom_kernels import native

SCENE = Path("csd3d/assets/scene")
FIT_STEPS = 100
PEAK_ROUNDS = 400_000


def field_flops(config: FieldConfig) -> int:
    """Multiplications and additions that the networks need for a sample, forward and backward.

    Two a weight forward and four backward, less the gradients of spherical harmonics.
    """
    width, encoded = config.hidden, config.levels * config.features_per_level
    harmonics = config.sh_degree**2
    density = encoded * width + width * (1 + config.geo_features)
    colour = (harmonics + config.geo_features) * width + (config.colour_layers - 1) * width**2 + width * 3
    return 6 * (density + colour) - 2 * harmonics * width


@contextlib.contextmanager
def before() -> Iterator[None]:
    """The field by torch's networks on the compiled encoding, as it was before they were compiled."""

    def visible(field, rays_o, rays_d, samples, least):
        positions, directions = render._points(rays_o, rays_d, samples)
        sigmas = field.density(positions)[0]
        light = render.kernels.transmittance(sigmas, samples.t_starts, samples.t_ends, samples.packed_info)
        weights = -light * torch.expm1(-sigmas * (samples.t_ends - samples.t_starts))
        return render._colours(field, positions, directions, (weights > least).nonzero()[:, 0]), sigmas

    kept = RadianceField.fused, render._visible_colours
    RadianceField.fused, render._visible_colours = lambda self, *inputs: None, visible
    try:
        yield
    finally:
        RadianceField.fused, render._visible_colours = kept


def fitted(steps: int = FIT_STEPS, representation: HashGrid | None = None) -> tuple[HashGridScene, Pictures]:
    """The shipped scene after `steps` steps, and its training pictures."""
    capture = load_capture(SceneConfig(path=str(SCENE)))
    generator = torch.Generator().manual_seed(0)
    scene = (representation or HashGrid()).open(capture.aabb, generator, capture.unbounded)
    pictures = Pictures(capture.images, capture.cameras, capture.masks, capture.train)
    config = FitConfig()
    optimiser = scene.start_fit(config)
    for step in range(steps):
        scene.fit_step(optimiser, pictures, config, step, generator)
    return scene, pictures


def processor_seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least processor time of each of `runs`, which take turns; one round to warm up."""
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if i:
                best[name] = min(best[name], time.process_time() - start)
    return best


def peak_run() -> tuple[Callable[[], object], float]:
    """A run of multiply-adds in registers, and the operations that it does."""
    function = native.require_library().multiply_add_peak
    function.restype = ctypes.c_double
    count = ctypes.c_int64(PEAK_ROUNDS)
    return lambda: function(count), function(count)


def field_runs(scene: HashGridScene, pictures: Pictures) -> tuple[dict[str, Callable[[], object]], int]:
    """The field's forward and backward on the lit samples of a step, both ways, and the number of samples."""
    generator = torch.Generator().manual_seed(1)
    views, pixels = draw_rays(pictures, FitConfig(), 4096, generator)
    rays_o, rays_d = pictures.cameras.rays(views, pixels + 0.5)
    samples = scene.grid.march(rays_o, rays_d, torch.rand(len(views), generator=generator))
    samples = render._lit(scene.field, rays_o, rays_d, samples, scene.render_config.early_stop)
    points, directions = render._points(rays_o, rays_d, samples)
    cotangents = torch.randn(len(points), 3, generator=generator), torch.randn(len(points), generator=generator)

    def run() -> None:
        scene.field.zero_grad()
        torch.autograd.backward(scene.field(points, directions), cotangents)

    def run_before() -> None:
        with before():
            run()

    return {"field": run, "field_before": run_before}, len(points)


def step_runs(scene: HashGridScene, pictures: Pictures) -> dict[str, Callable[[], object]]:
    """A step of reconstruction, both ways, each on its own copy of the scene."""
    config = FitConfig()

    def stepper() -> Callable[[], object]:
        own, generator = copy.deepcopy(scene), torch.Generator().manual_seed(2)
        optimiser = own.start_fit(config)
        own.samples_per_ray = scene.samples_per_ray
        return lambda: own.fit_step(optimiser, pictures, config, 101, generator)

    after, earlier = stepper(), stepper()

    def run_before() -> None:
        with before():
            earlier()

    return {"step": after, "step_before": run_before}


def view_runs(scene: HashGridScene, pictures: Pictures) -> dict[str, Callable[[], object]]:
    """The first training view, of 128², both ways."""

    def run() -> None:
        scene.render_views(pictures.cameras, pictures.views[:1])

    def run_before() -> None:
        with before():
            run()

    return {"view": run, "view_before": run_before}


def measure(rounds: int = 7) -> dict[str, float]:
    """Shares of the limit and ratios to `before`, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scene, pictures = fitted()
        peak, peak_flops = peak_run()
        runs, count = field_runs(scene, pictures)
        runs |= {"peak": peak} | step_runs(scene, pictures) | view_runs(scene, pictures)
        seconds = processor_seconds(runs, rounds)
    finally:
        torch.set_num_threads(threads)
    limit = peak_flops / seconds["peak"]
    flops = field_flops(scene.field.config) * count
    return {
        "peak_gflop_per_s": limit / 1e9,
        "field_share_of_peak_fp32": flops / seconds["field"] / limit,
        "field_share_of_peak_before": flops / seconds["field_before"] / limit,
        "field_ratio": seconds["field_before"] / seconds["field"],
        "reconstruct_step_ratio": seconds["step_before"] / seconds["step"],
        "view_ratio": seconds["view_before"] / seconds["view"],
        "samples": count,
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }


def main() -> None:
    """Measure, print, and write --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all measurements")
    arguments = parser.parse_args()
    results = measure(arguments.rounds)
    for name, value in results.items():
        print(f"{name:32} {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
