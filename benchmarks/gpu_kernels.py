"""Kernels of one library against the torch reference on a GPU: `python -m benchmarks.gpu_kernels triton`.

A process of its own for `benchmarks.gpu_check`: a library may compile for minutes, hang, or leave the GPU unusable.
Prints one line, FOUND and the results as JSON. With --rehearse everything is small, and Triton's kernels run in its
interpreter on the CPU, which says nothing about speed.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_tools import difference, milliseconds, tried
from benchmarks.kernels import encode_problem, render_problem
from custom_kernels import hashgrid, libraries, rendering, trials

LIBRARIES = {"triton": libraries.TRITON, "tcnn": libraries.TCNN, "nerfacc": libraries.NERFACC}
SMALL_POINTS, SMALL_RAYS = 256, 32


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how much is measured."""

    device: str
    small: bool

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Mean time of a call; of one call, the first, in a rehearsal."""
        return milliseconds(self.device, run, *((1, 0) if self.small else (10, 2)))


def compare(place: Place, library: str) -> dict:
    """Return the trial's outcome and time; then values, gradients and times of what the library computes."""
    started = time.monotonic()
    if place.small:
        problem = None if trials.interpreting() else "for a GPU"
    else:
        libraries.NERFACC_SECONDS = 120.0
        problem = trials.obstacle(LIBRARIES[library])
    found: dict = {"trial_s": time.monotonic() - started}
    if problem is not None:
        return found | {"skipped": problem}
    if library in hashgrid.BACKENDS:
        found["encode"] = tried(lambda: encoding(place, library))
    if library in rendering.BACKENDS:
        found["march"] = tried(lambda: marching(place, library))
        found["composite"] = tried(lambda: compositing(place, library))
    return found


def encoding(place: Place, library: str) -> dict:
    """2^18 points: forward, and backward to the table and to the positions."""
    positions, table, cotangent, *layout = encode_problem(place.device)
    count = SMALL_POINTS if place.small else len(positions)
    positions, cotangent = positions[:count].clone().requires_grad_(), cotangent[:count]

    def measured(backend: str) -> tuple[dict, list[Tensor]]:
        encode = lambda: hashgrid.hash_encode(positions, table, *layout, backend=backend)  # noqa: E731
        out = encode()
        times = {"forward_ms": place.milliseconds(lambda: encode().detach())}
        gradients = []
        for name, leaf in (("table", table), ("positions", positions)):
            back = lambda leaf=leaf: torch.autograd.grad(out, leaf, cotangent, retain_graph=True)[0]  # noqa: E731
            gradients.append(back())
            times[f"{name}_backward_ms"] = place.milliseconds(back)
        return times, [out, *gradients]

    return against_reference(measured, library, ("forward", "table_gradient", "positions_gradient"))


def marching(place: Place, library: str) -> dict:
    """2^14 rays through a half-full grid, and through three nested ones with growing steps."""
    rays, grid, steps = render_problem(place.device)
    if place.small:
        rays, steps = tuple(x[:SMALL_RAYS] for x in rays), dataclasses.replace(steps, size=8 * steps.size)
    nested = rendering.Grid(grid.occupancy.repeat(3, 1, 1, 1), grid.aabb / 4)
    found = {}
    cases = {"bounded": (grid, steps), "unbounded": (nested, dataclasses.replace(steps, cone_angle=0.015))}
    for name, case in cases.items():

        def measured(backend: str, case: tuple = case) -> tuple[dict, list[Tensor]]:
            march = lambda: rendering.march(*rays, *case, backend=backend)  # noqa: E731
            samples = march()
            # nerfacc steps in single precision and may find other samples, so their number is compared first
            counts = samples.packed_info[:, 1].float()
            return {"ms": place.milliseconds(march), "samples": len(samples.t_starts)}, [counts, samples.t_starts]

        found[name] = against_reference(measured, library, ("samples_of_a_ray", "t_starts"))
    return found


def compositing(place: Place, library: str) -> dict:
    """The samples of the bounded march: forward, and backward to densities and colours."""
    rays, grid, steps = render_problem(place.device)
    rays = tuple(x[:SMALL_RAYS] for x in rays) if place.small else rays
    samples = rendering.march(*rays, grid, steps, backend="reference")
    generator = torch.Generator().manual_seed(1)
    shapes = (len(samples.t_starts),), (len(samples.t_starts), 3)
    leaves = [(torch.rand(s, generator=generator) * 3).to(place.device).requires_grad_() for s in shapes]
    rest = samples.t_starts, samples.t_ends, samples.packed_info

    def measured(backend: str) -> tuple[dict, list[Tensor]]:
        draw = lambda: rendering.composite(*leaves, *rest, backend=backend)  # noqa: E731
        out = draw()
        loss = out.rgb.square().sum() + out.depth.sum() + out.weights.square().sum()
        back = lambda: torch.autograd.grad(loss, leaves, retain_graph=True)  # noqa: E731
        times = {"forward_ms": place.milliseconds(draw), "backward_ms": place.milliseconds(back)}
        return times, [out.rgb, out.depth, out.weights, *back()]

    return against_reference(measured, library, ("rgb", "depth", "weights", "sigmas_gradient", "rgbs_gradient"))


def against_reference(
    measured: Callable[[str], tuple[dict, list[Tensor]]], library: str, names: tuple[str, ...]
) -> dict:
    """Times of the library and of torch, their ratios, and the largest differences of what they computed."""
    (own, got), (torch_times, wanted) = measured(library), measured("reference")
    ratios = {key: torch_times[key] / own[key] for key in own if key.endswith("ms")}
    pairs = zip(names, got, wanted, strict=True)
    differences = {name: difference(a, b) if a.shape == b.shape else "other shapes" for name, a, b in pairs}
    return {library: own, "torch": torch_times, "times_faster": ratios, "difference": differences}


def main() -> None:
    """Compare one library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=list(LIBRARIES))
    parser.add_argument("--rehearse", action="store_true", help="everything small, on the CPU")
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton's import, which is where it is first needed
    place = Place("cpu" if options.rehearse else "cuda", options.rehearse)
    print("FOUND" + json.dumps(compare(place, options.library)))


if __name__ == "__main__":
    main()
