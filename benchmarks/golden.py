"""Compare short runs of every task with a record of them, to see whether a change alters results.

`python -m benchmarks.golden record DIR [--job NAME …]`
`python -m benchmarks.golden compare DIR_OR_JSON [--job NAME …] [--jobs-from FILE]`

Each job of golden.yaml is a launch.py process with one thread. DIR/golden.json holds its exit code, the figures of its
metrics.json without times and memory, its pictures and videos (SHA-256 of the pixels, mean, standard deviation, a
16 × 16 thumbnail), and the vertices and bounds of its meshes; the files are in DIR/runs. `compare` repeats the jobs on
the present tree and exits with 1 if anything differs, which it also does on another kind of processor.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import trimesh
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
VOLATILE = ("seconds", "peak_memory_gib", "peak_gpu_memory_gib")  # keys of metrics.json that are left out
TOLERANCE = 1e-6  # relative, of figures
EVERY_JOB = ("save_seconds=600",)  # a checkpoint or preview every few seconds would depend on the machine's load


def read_jobs(path: Path) -> dict[str, str]:
    """Read {name: config and overrides} of a file like golden.yaml; parts are filled in, $capture is not."""
    table = yaml.safe_load(path.read_text())
    filled: dict[str, str] = {}
    for name, text in (table.get("parts") or {}).items():  # a part may use the ones above it
        filled[name] = string.Template(text).safe_substitute(filled)
    return {name: string.Template(text).safe_substitute(filled) for name, text in table["jobs"].items()}


def write_capture(folder: Path) -> None:
    """Write six training and two test pictures of the shipped scene, so that a run takes seconds."""
    shutil.copytree(ROOT / "csd3d" / "assets" / "scene", folder)
    capture = json.loads((folder / "transforms.json").read_text())
    capture["frames"] = capture["frames"][::5][:8]
    (folder / "transforms.json").write_text(json.dumps(capture))


def run_job(job: str, folder: Path) -> dict:
    """Run a job in `folder`; return its part of the record."""
    config, *keys = shlex.split(job)
    command = [sys.executable, "launch.py", "--device", "cpu", "--config", f"configs/{config}.yaml", "--output"]
    command += [str(folder.resolve()), *keys, *EVERY_JOB]
    before = os.times()
    process = subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    cpu_seconds = sum(os.times()[2:4]) - sum(before[2:4])  # of children: the same on a busy machine
    found: dict = {"rc": process.returncode, "cpu_seconds": round(cpu_seconds, 1)}
    if process.returncode:
        return found | {"error": process.stderr.strip().split("\n")[-1]}
    found["figures"] = figures(json.loads((folder / "metrics.json").read_text()))
    for kind, (describe, suffixes) in KINDS.items():
        paths = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)
        found[kind] = {path.relative_to(folder).as_posix(): describe(path) for path in paths}
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def figures(value: object, key: str = "") -> dict[str, object]:
    """Flatten nested dicts and lists to {dotted key: value}, without `VOLATILE` keys."""
    if not isinstance(value, (dict, list)):
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    kept = (figures(item, f"{key}.{part}".lstrip(".")) for part, item in items if part not in VOLATILE)
    return {name: figure for part in kept for name, figure in part.items()}


def decode(path: Path) -> np.ndarray:
    """The frames [F, H, W, ...] of a picture or a video."""
    return iio.imread(path, plugin="FFMPEG") if path.suffix == ".mp4" else iio.imread(path)[None]


def frames_of(path: Path) -> dict:
    """The record of a picture or a video; the thumbnail is its mean frame in grey."""
    pixels = np.ascontiguousarray(decode(path))
    grey = pixels[..., :3].mean((0, 3)) if pixels.ndim == 4 else pixels.mean(0)
    small = Image.fromarray(grey.astype(np.float32)).resize((16, 16), Image.Resampling.BOX)
    found = {"shape": list(pixels.shape), "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
    found |= {"mean": round(pixels.mean().item(), 4), "std": round(pixels.std().item(), 4)}
    return found | {"thumbnail": np.asarray(small).round().astype(int).ravel().tolist()}


def mesh_of(path: Path) -> dict[str, object]:
    """The record of a mesh: vertices, faces and bounds."""
    mesh = trimesh.load(path, force="mesh", process=False)
    return figures({"vertices": len(mesh.vertices), "faces": len(mesh.faces), "bounds": mesh.bounds.tolist()})


KINDS = {  # kind of file: (function that records it, suffixes)
    "pictures": (frames_of, (".png",)),
    "videos": (frames_of, (".mp4",)),
    "meshes": (mesh_of, (".glb", ".obj", ".ply")),
}


def differences(old: dict, new: dict, runs: tuple[Path, Path]) -> list[str]:
    """List the differences between two results of a job; `runs`: both folders, of which the first may be missing."""
    lines = changed(*({key: result.get(key) for key in ("rc", "error")} for result in (old, new)))
    lines += changed(*(result.get("figures", {}) for result in (old, new)))
    for kind in KINDS:
        before, now = old.get(kind, {}), new.get(kind, {})
        lines += [f"{name}: {'missing' if name in before else 'new'}" for name in before.keys() ^ now.keys()]
        for name in sorted(before.keys() & now.keys()):
            if kind == "meshes":
                lines += [f"{name}: {line}" for line in changed(before[name], now[name])]
            elif before[name]["sha256"] != now[name]["sha256"]:
                lines.append(f"{name}: {distance(before[name], now[name], *(run / name for run in runs))}")
    return lines


def changed(old: dict, new: dict) -> list[str]:
    """The figures that differ by more than TOLERANCE, or are in one only."""
    pairs = {key: (old.get(key, "none"), new.get(key, "none")) for key in old | new}
    return [f"{key}: {one} -> {other}" for key, (one, other) in pairs.items() if not same(one, other)]


def same(one: object, other: object) -> bool:
    """Whether two values are equal, numbers within TOLERANCE; nan equals nan."""
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return str(one) == str(other) or (numbers and math.isclose(one, other, rel_tol=TOLERANCE))


def distance(old: dict, new: dict, *paths: Path) -> str:
    """The difference of two pictures or videos: of their pixels if both files exist, else of the thumbnails."""
    if old["shape"] != new["shape"]:
        return f"shape {old['shape']} -> {new['shape']}"
    if all(path.exists() for path in paths):
        what, one, other = "pixels", *(decode(path).astype(int) for path in paths)
    else:
        what = "thumbnail" if "thumbnail" in old else "mean"
        one, other = old[what], new[what]
    return f"pixels differ, greatest difference of {what} {np.abs(np.subtract(one, other)).max():g}"


def run_all(jobs: dict[str, str], folder: Path) -> Iterator[tuple[str, dict]]:
    """Run the jobs in `folder`; yield each name and result."""
    write_capture(capture := folder.resolve() / "_capture")
    for name, job in jobs.items():
        result = {"command": job} | run_job(job.replace("$capture", str(capture)), folder / name)
        print(f"{name}: rc {result['rc']}, {result['cpu_seconds']} s {result.get('error', '')}", flush=True)
        yield name, result


def record(jobs: dict[str, str], folder: Path) -> bool:
    """Write DIR/golden.json, and DIR/figures.json without thumbnails; return False if a job failed."""
    results = dict(run_all(jobs, folder / "runs"))
    environment = json.loads(next(folder.glob("runs/*/environment.json")).read_text())
    found = {"environment": environment, "jobs": results}
    (folder / "golden.json").write_text(json.dumps(found, indent=1) + "\n")
    for described in (d for r in results.values() for kind in KINDS for d in r.get(kind, {}).values()):
        described.pop("thumbnail", None)
    (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    return not any(result["rc"] for result in results.values())


def compare(jobs: dict[str, str], path: Path) -> bool:
    """Run the jobs and print the differences from the record at `path`; return True if there are none."""
    path = path / "golden.json" if path.is_dir() else path  # a JSON alone has no pictures beside it
    before, alike = json.loads(path.read_text())["jobs"], True
    with tempfile.TemporaryDirectory() as temporary:
        for name, result in run_all(jobs, Path(temporary)):
            lines = differences(before.get(name, {}), result, (path.parent / "runs" / name, Path(temporary) / name))
            print(f"  {len(lines)} differences" if lines else "  the same", *lines, sep="\n    ", flush=True)
            alike &= not lines
    return alike


def main() -> int:
    """The command line; return 1 if something differs or a recorded job failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("path", type=Path, metavar="DIR_OR_JSON")
    parser.add_argument("--job", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--jobs-from", type=Path, metavar="FILE", default=Path(__file__).with_suffix(".yaml"))
    args = parser.parse_args()
    jobs = read_jobs(args.jobs_from)
    if unknown := set(args.job or ()) - set(jobs):
        parser.error(f"no such job: {', '.join(sorted(unknown))}; there are {', '.join(jobs)}")
    jobs = {name: jobs[name] for name in args.job or jobs}
    return int(not {"record": record, "compare": compare}[args.action](jobs, args.path))


if __name__ == "__main__":
    sys.exit(main())
