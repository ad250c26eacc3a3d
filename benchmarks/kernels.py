"""Speed of the kernels, every backend in one run: `python -m benchmarks.kernels --json FILE`.

Encoding: 2^18 random points, 12 levels of at most 2^16 entries, 2 features, gradient to the table. Rendering: march a
half-full grid, composite its samples, gradients to density and colour. Turntable: frames of a textured mesh, on the
CPU. Each number is the best of several runs, after a warm-up run; rates are per second of wall clock.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import trimesh
from torch import Tensor

from custom_kernels import hashgrid, meshes, native, rendering

POINTS, LEVELS, BASE, FINEST, LOG2_ENTRIES, FEATURES = 2**18, 12, 16, 1024, 16, 2
RAYS, CELLS = 2**14, 64
CORNERS = 8


def best_seconds(run: Callable[[], object], budget: float, device: str) -> float:
    """Return the least time of `run` in seconds, over as many runs as fit in `budget` seconds (2 to 30)."""
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    seconds: list[float] = []
    while len(seconds) < 2 or (sum(seconds) < budget and len(seconds) < 30):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def usable(backends: tuple[str, ...], check: Callable[[str], object]) -> list[str]:
    """Return the backends that `check` accepts; print why the others are refused."""
    found = []
    for backend in backends:
        try:
            check(backend)
            found.append(backend)
        except (RuntimeError, ValueError) as error:
            print(f"  {backend}: not here ({str(error).splitlines()[0]})")
    return found


# ---- encoding


def encode_problem(device: str) -> tuple[Tensor, Tensor, Tensor, list[int], list[float]]:
    """Positions [S, 3], table [T, F], cotangent [S, L·F] and the layout."""
    generator = torch.Generator().manual_seed(0)
    offsets, resolutions = hashgrid.grid_layout(LEVELS, BASE, FINEST, LOG2_ENTRIES)
    positions = torch.rand(POINTS, 3, generator=generator)
    table = torch.randn(offsets[-1], FEATURES, generator=generator)
    cotangent = torch.randn(POINTS, LEVELS * FEATURES, generator=generator)
    return positions.to(device), table.to(device).requires_grad_(), cotangent.to(device), offsets, resolutions


def bench_encode(device: str, budget: float) -> dict[str, dict[str, float]]:
    """Measure points a second of each backend, forward and backward (to the table)."""
    positions, table, cotangent, offsets, resolutions = encode_problem(device)

    def encode(backend: str) -> Tensor:
        return hashgrid.hash_encode(positions, table, offsets, resolutions, backend=backend)

    results = {}
    names = ("reference", "native", "triton", "tcnn")
    for backend in usable(names, lambda name: hashgrid.choose_backend(name, positions, table)):
        with torch.no_grad():
            forward = best_seconds(lambda name=backend: encode(name), budget, device)
        out = encode(backend)
        backward = best_seconds(
            lambda out=out: torch.autograd.grad(out, table, cotangent, retain_graph=True), budget, device
        )
        results[backend] = {"forward_points_per_s": POINTS / forward, "backward_points_per_s": POINTS / backward}
    return results


def encode_error(device: str) -> dict[str, dict[str, float]]:
    """Largest |error| − 1e-4 |value| of each backend against a float64 reference (at most 1e-5 is within tolerance)."""
    positions, table, cotangent, offsets, resolutions = encode_problem(device)
    positions, cotangent = positions[: POINTS // 16], cotangent[: POINTS // 16]
    doubles = table.detach().double().requires_grad_()
    truth = hashgrid.hash_encode_reference(positions, doubles, offsets, resolutions)
    (truth_grad,) = torch.autograd.grad(truth, doubles, cotangent.double())
    results = {}
    for backend in ("reference", "native", "triton", "tcnn"):
        try:
            out = hashgrid.hash_encode(positions, table, offsets, resolutions, backend=backend)
        except RuntimeError:
            continue
        (grad,) = torch.autograd.grad(out, table, cotangent)
        results[backend] = {"forward": _excess(out, truth), "backward": _excess(grad, truth_grad)}
    return results


def _excess(got: Tensor, truth: Tensor) -> float:
    got, truth = got.detach().double(), truth.detach()
    return float(((got - truth).abs() - 1e-4 * truth.abs()).max())


def floor_points_per_s(device: str, budget: float) -> dict[str, float]:
    """Measure this machine's limits for the encoding by torch: its arithmetic and its memory traffic.

    A point and level cost about 90 operations forward, 80 backward, against the rate of a matrix product; memory moves
    the positions, the features and every corner's entry once (twice backward), against a large copy. The entries mostly
    come from cache, so the second is no strict bound.
    """
    a = torch.rand(1024, 1024, device=device)
    flops = 2 * 1024**3 / best_seconds(lambda: a @ a, budget, device)
    source, target = torch.rand(2**25, device=device), torch.empty(2**25, device=device)
    bandwidth = 2 * 4 * 2**25 / best_seconds(lambda: target.copy_(source), budget, device)
    entries, features = LEVELS * CORNERS * FEATURES * 4, LEVELS * FEATURES * 4
    return {
        "gflop_per_s": flops / 1e9,
        "gbyte_per_s": bandwidth / 1e9,
        "forward_arithmetic": flops / (90 * LEVELS),
        "backward_arithmetic": flops / (80 * LEVELS),
        "forward_memory": bandwidth / (12 + features + entries),
        "backward_memory": bandwidth / (12 + 3 * features + 2 * entries),
    }


# ---- rendering


def render_problem(device: str) -> tuple[tuple[Tensor, ...], rendering.Grid, rendering.Steps]:
    """Rays from a sphere through a half-full grid of 64³ cells: (rays_o, rays_d, t_min, t_max), grid, steps."""
    generator = torch.Generator().manual_seed(0)
    rays_o = 2.5 * torch.nn.functional.normalize(torch.randn(RAYS, 3, generator=generator), dim=1)
    rays_d = torch.nn.functional.normalize(0.5 * torch.randn(RAYS, 3, generator=generator) - rays_o, dim=1)
    occupied = torch.rand(1, CELLS // 8, CELLS // 8, CELLS // 8, generator=generator) < 0.5
    for axis in (1, 2, 3):
        occupied = occupied.repeat_interleave(8, dim=axis)
    aabb = torch.tensor([-1.0, -1, -1, 1, 1, 1])
    rays = (rays_o, rays_d, torch.zeros(RAYS), torch.full((RAYS,), 5.0))
    grid = rendering.Grid(occupied.to(device), aabb.to(device))
    return tuple(r.to(device) for r in rays), grid, rendering.Steps(2 * 3**0.5 / 256)


def bench_render(device: str, budget: float) -> dict[str, dict[str, float]]:
    """Measure rays a second marched and samples a second composited, forward and backward, of each backend."""
    rays, grid, steps = render_problem(device)
    samples = rendering.march(*rays, grid, steps, backend="reference")
    count = len(samples.t_starts)
    generator = torch.Generator().manual_seed(1)
    sigmas = (3 * torch.rand(count, generator=generator)).to(device).requires_grad_()
    rgbs = torch.rand(count, 3, generator=generator).to(device).requires_grad_()
    rest = (samples.t_starts, samples.t_ends, samples.packed_info)
    results = {}
    names = ("reference", "native", "triton", "nerfacc")
    for backend in usable(names, lambda name: rendering.march(*rays, grid, steps, backend=name)):
        march = best_seconds(lambda name=backend: rendering.march(*rays, grid, steps, backend=name), budget, device)
        with torch.no_grad():
            forward = best_seconds(
                lambda name=backend: rendering.composite(sigmas, rgbs, *rest, backend=name), budget, device
            )
        loss = rendering.composite(sigmas, rgbs, *rest, backend=backend).rgb.square().sum()
        backward = best_seconds(
            lambda loss=loss: torch.autograd.grad(loss, (sigmas, rgbs), retain_graph=True), budget, device
        )
        results[backend] = {
            "march_rays_per_s": RAYS / march,
            "march_samples_per_s": count / march,
            "composite_forward_samples_per_s": count / forward,
            "composite_backward_samples_per_s": count / backward,
        }
    return results


# ---- pictures of meshes


def bench_draw(budget: float, side: int = 576, samples: int = 2) -> dict[str, dict[str, float]]:
    """Measure frames a second of a turntable: a textured sphere of 20 480 triangles, in C++ and in numpy."""
    sphere = trimesh.creation.icosphere(subdivisions=5)
    depth = 3 - sphere.vertices[:, 2]
    screen = side / 2 * (1 + 2.4 * sphere.vertices[:, :2] / depth[:, None] * [1, -1])
    texture = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    mesh = meshes.Projected(screen, 1 / depth, sphere.faces, (1 + sphere.vertices[:, :2]) / 2, texture)
    ways = {"reference": meshes.draw_reference, "native": meshes.draw}
    return {
        name: {"frames_per_s": 1 / best_seconds(lambda way=way: way(mesh, side, side, samples), budget, "cpu")}
        for name, way in ways.items()
        if name == "reference" or native.library() is not None
    }


# ---- report


def describe_machine(device: str) -> dict[str, object]:
    """The machine and the versions."""
    loaded = native.library()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "library": None if loaded is None else Path(loaded._name).stem,
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    """Rates in millions a second, and as multiples of the reference."""
    print(title)
    for backend, rates in results.items():
        for name, rate in rates.items():
            ratio = rate / results["reference"][name] if "reference" in results else float("nan")
            print(f"  {backend:10} {name:34} {rate / 1e6:9.3f} M/s  {ratio:8.1f} x reference")


def print_floor(encode: dict[str, dict[str, float]], floor: dict[str, float]) -> None:
    """The fastest backend as a share of the machine's limits."""
    print(f"machine: {floor['gflop_per_s']:.0f} Gflop/s, {floor['gbyte_per_s']:.1f} GB/s copied")
    for way in ("forward", "backward"):
        rate = max(rates[f"{way}_points_per_s"] for rates in encode.values())
        bounds = ", ".join(
            f"{rate / floor[f'{way}_{kind}']:.0%} of the {kind} bound {floor[f'{way}_{kind}'] / 1e6:.1f} M/s"
            for kind in ("arithmetic", "memory")
        )
        print(f"  {way}: {rate / 1e6:.1f} M/s is {bounds}")


def main() -> None:
    """Measure everything, print it, and write it to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each measurement")
    arguments = parser.parse_args()
    device, budget = arguments.device, arguments.seconds
    report = describe_machine(device)
    print(f"{report['device']}, {report['threads']} threads, {report['library']}, load {report['load']:.1f}")
    report["encode"] = bench_encode(device, budget)
    print_table(f"hash encoding, {POINTS} points, {LEVELS} levels, 2^{LOG2_ENTRIES} entries", report["encode"])
    report["encode_excess_error"] = encode_error(device)
    report["encode_floor"] = floor_points_per_s(device, budget)
    print_floor(report["encode"], report["encode_floor"])
    report["render"] = bench_render(device, budget)
    print_table(f"rendering, {RAYS} rays", report["render"])
    report["draw"] = bench_draw(budget)
    for name, rates in report["draw"].items():
        ratio = rates["frames_per_s"] / report["draw"]["reference"]["frames_per_s"]
        print(f"turntable  {name:10} {rates['frames_per_s']:7.2f} frames/s  {ratio:6.1f} x reference")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
