"""What things cost against their number, for `benchmarks.speed`: particles, pixels, frames, samples, splats.

Milliseconds of processor time on one thread, the least of several rounds, and one SVG of all curves.
"""

import math
from collections.abc import Callable, Mapping

import torch

from benchmarks.field import processor_seconds
from csd3d.datasets.splat_files import view_of
from csd3d.distillation.kernel import SVGDConfig
from csd3d.distillation.svgd import combine
from csd3d.priors import Prior
from csd3d.report.charts import HEIGHT, WIDTH, Curves, chart_svg
from csd3d.representations.fit import Pictures
from csd3d.representations.hashgrid import HashGridScene
from csd3d.representations.splat_growth import new_splats, random_points
from custom_kernels import splats as kernels

Series = dict[int, float]  # number -> milliseconds
TITLES = {
    "samples": "field, forward and backward, by samples",
    "view pixels": "a NeRF's view, by pixels",
    "splat view pixels": "a view of 5 000 splats, by pixels",
    "splats": "a 128² view, forward and backward, by splats",
    "particles": "SVGD of 4×16×16 latents, by particles",
    "frames": "noise of frames of 128², by frames",
}
STYLE = (
    "text{font:11px sans-serif;fill:#555}.line{fill:none;stroke-width:2}.s0{stroke:#1f6fb4}"
    ".gridline{stroke:#ddd}.axis{stroke:#999}.title{font-size:13px;fill:#222}"
)


def measure(
    scene: HashGridScene, pictures: Pictures, prior: Prior, rounds: int, most: int | None = None
) -> dict[str, Series]:
    """All curves; `most` limits the points of each, the smallest numbers first."""
    makers: dict[str, tuple[Callable[[int], Callable[[], object]], tuple[int, ...]]] = {
        "samples": (lambda n: _field(scene, n), (4096, 16384, 65536, 262144)),
        "view pixels": (lambda n: _view(scene, pictures, n), (32**2, 64**2, 128**2, 256**2)),
        "splat view pixels": (lambda n: _splats(scene, pictures, 5000, math.isqrt(n), False), (64**2, 128**2, 512**2)),
        "splats": (lambda n: _splats(scene, pictures, n, 128, True), (1000, 5000, 20_000, 100_000)),
        "particles": (_particles, (4, 16, 64, 240)),
        "frames": (lambda n: _frames(prior, n), (1, 4, 16, 48)),
    }
    found = {}
    for name, (make, numbers) in makers.items():
        runs = {str(n): make(n) for n in numbers[:most]}
        found[name] = {int(n): s * 1e3 for n, s in processor_seconds(runs, rounds).items()}
    return found


def _field(scene: HashGridScene, count: int) -> Callable[[], object]:
    low, high = scene.field.aabb[:3], scene.field.aabb[3:]
    points = low + torch.rand(count, 3) * (high - low)
    directions = torch.nn.functional.normalize(torch.randn(count, 3), dim=1)
    cotangents = torch.randn(count, 3), torch.randn(count)
    return lambda: torch.autograd.backward(scene.field(points, directions), cotangents)


def _view(scene: HashGridScene, pictures: Pictures, pixels: int) -> Callable[[], object]:
    side = math.isqrt(pixels)
    return lambda: scene.render_views(pictures.cameras.resized(side, side), pictures.views[:1])


def _splats(scene: HashGridScene, pictures: Pictures, count: int, side: int, backward: bool) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    xyz = random_points(scene.field.aabb, count, pictures.cameras, False, generator)
    splats = new_splats(xyz, torch.rand(count, 3, generator=generator), 3, 2.0)
    splats = kernels.Splats(*(x.requires_grad_(backward) for x in splats))
    view = view_of(pictures.cameras.resized(side, side), int(pictures.views[0]))

    def run() -> None:
        image = kernels.render(splats, view, degree=3)
        if backward:
            (image.rgb.sum() + image.light.sum()).backward()

    return run


def _particles(count: int) -> Callable[[], object]:
    directions, noisy, clean = torch.randn(3, count, 4, 16, 16)
    return lambda: combine(directions, noisy, clean, alpha_bar=0.5, config=SVGDConfig())


def _frames(prior: Prior, count: int) -> Callable[[], object]:
    z, image = torch.randn(2, count, *prior.latent_shape(128, 128))
    condition = prior.condition(["paint it a bright colour"] * count, image)
    return lambda: prior.predict_noise(z, 400, condition)


def plot(curves: Mapping[str, Series]) -> str:
    """One SVG: a panel a curve, both axes logarithmic."""
    columns, gap = 2, 26
    body = []
    for k, (name, series) in enumerate(curves.items()):
        x, y = k % columns * (WIDTH + 20), k // columns * (HEIGHT + gap)
        points = [math.log10(n) for n in series], list(series.values())
        chart = chart_svg(Curves(TITLES[name], {name: points}, "log₁₀ n", log=True))
        place = f'<svg x="{x}" y="{y + gap}" width="{WIDTH}" height="{HEIGHT}" '
        body += [f'<text class="title" x="{x + 8}" y="{y + 18}">{TITLES[name]}: ms</text>', place + chart[5:]]
    rows = -(-len(curves) // columns)
    size = f'viewBox="0 0 {columns * (WIDTH + 20)} {rows * (HEIGHT + gap)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
