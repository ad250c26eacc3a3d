"""All figures of speed in one run: `python -m benchmarks.speed --json FILE` (about ten minutes; `--quick`: two).

One thread, the processor's time, the ways taking turns, the least of several rounds. In order: the limits of a core,
the fused field, a step and a view against earlier commits (needs the git history and a compiler), the peers,
the runtimes of the denoiser, the fit of splats, costs against numbers. `--jobs` also runs whole jobs.
"""

import argparse
import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import commits, field, kernels, runtimes, scaling, speed_jobs, splat_fit
from benchmarks.runs import provenance
from csd3d.files import write_text
from custom_kernels import hashgrid

ROOFLINE = Path(__file__).with_name("roofline.cpp")
PEER_POINTS = 2**16
BARS = {  # key: (the least that is asked for, or the most if negative, unit)
    "field_share_of_peak_fp32": (0.40, ""),
    "field_share_of_peak_bf16": (0.60, ""),
    "reconstruct_step_ratio": (2.3, "×"),
    "view_ratio": (3.0, "×"),
    "splats.held_out_psnr": (36.0, " dB"),
    "splats.cpu_seconds": (-20.0, " s"),
    "splats.peak_gib": (-1.0, " GiB"),
}


def roofline() -> dict[str, float] | None:
    """The limits of one core, by a program that is compiled here; None without a compiler."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError, subprocess.CalledProcessError):
        program = Path(folder) / "roofline"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-trapping-math", "-Wno-psabi"]
        subprocess.run(["c++", *flags, str(ROOFLINE), "-o", str(program)], check=True, capture_output=True)
        return json.loads(subprocess.run([program], check=True, capture_output=True).stdout)
    return None


def why_no_bf16(limits: dict[str, float] | None) -> str:
    """Why `field_share_of_peak_bf16` is null on this machine."""
    if limits is None:
        return "no compiler: the bf16 peak was not measured, and no bf16 kernels are built"
    if not limits["bf16_gflop_per_s"]:
        return "this processor has no vdpbf16ps, and no bf16 kernels are built"
    share = limits["bf16_gflop_per_s"] / limits["fp32_gflop_per_s"]
    return f"no bf16 kernels are built: on this processor vdpbf16ps reaches {share:.0%} of the fp32 multiply-adds' rate"


# ---- peers


def nerfstudio_encode(points: Tensor, table: Tensor, resolutions: Tensor, entries: int) -> Tensor:
    """nerfstudio's hash encoding in torch (HashEncoding.pytorch_fwd): every level hashed, all levels at once.

    points [S, 3] in [0, 1], table [L · entries, F], resolutions [L]: features [S, L · F].
    """
    scaled = points[:, None] * resolutions[:, None]
    high, low = scaled.ceil().long(), scaled.floor().long()
    rest = scaled - low
    start = torch.arange(len(resolutions)) * entries
    primes = torch.tensor(hashgrid.PRIMES)

    def corner(x: int, y: int, z: int) -> Tensor:
        cell = torch.stack([(low, high)[k][..., axis] for axis, k in enumerate((x, y, z))], -1) * primes
        return table[(cell[..., 0] ^ cell[..., 1] ^ cell[..., 2]) % entries + start]

    x, y, z = (rest[..., axis, None] for axis in range(3))
    edges = [corner(0, b, c) * (1 - x) + corner(1, b, c) * x for b in (0, 1) for c in (0, 1)]
    faces = [edges[k] * (1 - z) + edges[k + 1] * z for k in (0, 2)]
    return (faces[0] * (1 - y) + faces[1] * y).flatten(1)


def peers(rounds: int, limits: dict[str, float] | None) -> dict[str, Any]:
    """The encoding, forward and backward to the table, against nerfstudio's in torch and against the cache's limit.

    A level, which is read alone, has 512 KiB at most.
    """
    offsets, resolutions = hashgrid.grid_layout(kernels.LEVELS, kernels.BASE, kernels.FINEST, kernels.LOG2_ENTRIES)
    points, entries = torch.rand(PEER_POINTS, 3), 2**kernels.LOG2_ENTRIES
    own = torch.randn(offsets[-1], 2, requires_grad=True)
    theirs = torch.randn(kernels.LEVELS * entries, 2, requires_grad=True)
    sizes, cotangent = torch.tensor(resolutions).floor(), torch.randn(PEER_POINTS, kernels.LEVELS * 2)
    runs = {
        "own_forward": lambda: hashgrid.hash_encode(points, own.detach(), offsets, resolutions),
        "own": lambda: hashgrid.hash_encode(points, own, offsets, resolutions).backward(cotangent),
        "nerfstudio_torch": lambda: nerfstudio_encode(points, theirs, sizes, entries).backward(cotangent),
    }
    seconds = field.processor_seconds(runs, rounds)
    reads = PEER_POINTS * kernels.LEVELS * kernels.CORNERS / seconds["own_forward"] / 1e6
    return {
        "nerfstudio_torch_encoding_ratio": seconds["nerfstudio_torch"] / seconds["own"],
        "encode_forward_share_of_random_reads": limits and reads / limits["random_reads_m_per_s_512_kib"],
        "nanoseconds_per_point": {name: s / PEER_POINTS * 1e9 for name, s in seconds.items()},
        "gsplat": None if not torch.cuda.is_available() else "python -m benchmarks.gpu_check",
        "nerfacc": None if not torch.cuda.is_available() else "python -m benchmarks.kernels",
        "opensplat": None,
        "why_null": "gsplat and nerfacc run on a CUDA card only; OpenSplat is in no package registry",
    }


# ---- all


def earlier(rounds: int) -> dict[str, Any]:
    """`commits.compare`, or why it could not be done."""
    try:
        return commits.compare(rounds)
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        return {"why_null": f"the earlier commits cannot be built here: {error}"}


def measure(rounds: int, quick: bool) -> tuple[dict[str, Any], dict[str, scaling.Series]]:
    """Everything but jobs."""
    torch.set_num_threads(1)
    limits = roofline()
    print("limits:", json.dumps(limits), flush=True)
    found = field.measure(rounds)
    inner = {key: found[key] for key in ("field_ratio", "reconstruct_step_ratio", "view_ratio")}
    results: dict[str, Any] = {
        "field_share_of_peak_fp32": found["field_share_of_peak_fp32"],
        "field_share_of_peak_bf16": None,
        "field_share_of_peak_bf16_why_null": why_no_bf16(limits),
        "ratios_against": "torch's networks in this tree",
        **inner,
        "field": found,
        "roofline": limits,
    }
    results["commits"] = None if quick else earlier(rounds)
    if results["commits"] and commits.BASELINE in results["commits"]:
        old, today = results["commits"][commits.BASELINE], results["commits"]["today"]
        results["ratios_against"] = commits.BASELINE
        results["reconstruct_step_ratio"] = old["step_ms"] / today["step_ms"]
        results["view_ratio"] = old["view_ms"] / today["view_ms"]
    print("commits:", json.dumps(results["commits"]), flush=True)
    results["peers"] = peers(2 if quick else 5, limits)
    results["splats"] = splat_fit.alone(1 if quick else 2)
    print("splats:", json.dumps(results["splats"]), flush=True)
    priors = runtimes.open_priors()
    turns = 2 if quick else 7
    results["noise"] = {f"{rows} rows": runtimes.noise(priors, rows, turns) for rows in (16, 3)}
    results["vae"] = runtimes.autoencoder(priors, 8, turns)
    scene, pictures = field.fitted(20 if quick else field.FIT_STEPS)
    curves = scaling.measure(scene, pictures, priors[runtimes.FIRST], 1 if quick else 3, 2 if quick else None)
    return results | {"scaling_ms": curves}, curves


def value(results: dict[str, Any], key: str) -> Any:
    """The figure at a dotted key, None if there is none."""
    for part in key.split("."):
        results = (results or {}).get(part)
    return results


def print_bars(results: dict[str, Any]) -> None:
    """Each bar, what was measured, and whether it is reached."""
    print(f"ratios against {results['ratios_against']}")
    for key, (bar, unit) in BARS.items():
        found = value(results, key)
        reached = found is not None and (found >= bar if bar > 0 else found <= -bar)
        shown = "null" if found is None else f"{found:.3g}{unit}"
        print(f"{key:28} {shown:>10}   {'≥' if bar > 0 else '≤'} {abs(bar):g}{unit}   {'yes' if reached else 'NO'}")


def main() -> None:
    """Measure, print, and write --json and --plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to write the costs against numbers, as an SVG")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the field, the steps and the views")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no earlier commits")
    parser.add_argument(
        "--jobs", nargs="*", choices=list(speed_jobs.JOBS), help="whole jobs to run too; none named: all"
    )
    parser.add_argument("--fox", type=Path, help="instant-ngp's fox, for the jobs of that name")
    options = parser.parse_args()
    results, curves = measure(2 if options.quick else options.rounds, options.quick)
    if options.jobs is not None:
        with tempfile.TemporaryDirectory() as folder:
            results["jobs"] = speed_jobs.run_jobs(options.jobs or list(speed_jobs.JOBS), options.fox, Path(folder))
    print_bars(results)
    for name, job in (results.get("jobs") or {}).items():
        print(f"{name:28} {'not run' if job is None else job['reached']}")
    if options.json:
        write_text(options.json, json.dumps(provenance("speed") | results, indent=2) + "\n")
    if options.plot:
        write_text(options.plot, scaling.plot(curves))


if __name__ == "__main__":
    main()
