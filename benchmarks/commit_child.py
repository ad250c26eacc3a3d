"""Times one tree's field, step and view, as asked for on standard input. Run by benchmarks/commits.py in that tree.

It imports only what the tree has, and knows the layouts since c559e0b. A line names a run; the answer is its processor
time in seconds. The first answer is the number of samples of "field".
"""

import sys
import time
from pathlib import Path

import torch


def open_old(steps):
    """Fit the shipped scene for some steps, in trees up to the move of scenes to representations."""
    from csd3d.fields import FieldConfig
    from csd3d.rendering import RenderConfig
    from csd3d.scenes import SceneConfig, load_capture  # isort: skip
    from csd3d.tasks import scene_model as old

    capture, generator = load_capture(SceneConfig(path="csd3d/assets/scene")), torch.Generator().manual_seed(0)
    scene = old.SceneModel(FieldConfig(), RenderConfig(), capture.aabb, generator, capture.unbounded)
    pictures = old.Pictures(capture.images, capture.cameras, capture.masks, capture.train)
    config, state = old.FitConfig(), {"step": 0, "samples_per_ray": 512.0}
    optimiser = old.make_optimiser(scene, config)

    def step():
        for group in optimiser.param_groups:
            group["lr"] = old.learning_rate(config, state["step"], config.steps)
        scene.grid.update(state["step"], scene.field, generator)
        report = old.fit_step(scene, optimiser, pictures, config, generator, state["samples_per_ray"])
        state.update(step=state["step"] + 1, samples_per_ray=report["samples_per_ray"])

    for _ in range(steps):
        step()
    return scene, pictures, step, old.draw_rays, config


def open_new(steps):
    """The same in trees that have csd3d.representations."""
    from csd3d.datasets import load_capture
    from csd3d.datasets.capture import SceneConfig
    from csd3d.representations.fit import FitConfig, Pictures
    from csd3d.representations.hashgrid import HashGrid, draw_rays

    capture, generator = load_capture(SceneConfig(path="csd3d/assets/scene")), torch.Generator().manual_seed(0)
    scene, config, done = HashGrid().open(capture.aabb, generator, capture.unbounded), FitConfig(), [0]
    pictures = Pictures(capture.images, capture.cameras, capture.masks, capture.train)
    optimiser = scene.start_fit(config)

    def step():
        scene.fit_step(optimiser, pictures, config, done[0], generator)
        done[0] += 1

    for _ in range(steps):
        step()
    return scene, pictures, step, draw_rays, config


def main(steps):
    """Fit, then answer."""
    from csd3d.rendering import render

    torch.set_num_threads(1)
    # asked of the folder, since an editable installation would find another tree's package
    opened = open_new if Path("csd3d/representations").exists() else open_old
    scene, pictures, step, draw_rays, config = opened(steps)
    generator = torch.Generator().manual_seed(1)
    views, pixels = draw_rays(pictures, config, 4096, generator)
    rays = pictures.cameras.rays(views, pixels + 0.5)
    samples = scene.grid.march(*rays, torch.rand(len(views), generator=generator))
    samples = render._lit(scene.field, *rays, samples, scene.render_config.early_stop)
    points, directions = render._points(*rays, samples)
    cotangents = torch.randn(len(points), 3, generator=generator), torch.randn(len(points), generator=generator)

    def field():
        scene.field.zero_grad()
        torch.autograd.backward(scene.field(points, directions)[:2], cotangents)

    runs = {
        "field": field,
        "step": step,
        "view": lambda: scene.render_views(pictures.cameras, pictures.views[:1]),
    }
    print(len(points), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        runs[line.strip()]()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
