"""Run every config, cut to a few steps, on an emulated CUDA, and compare with the CPU.

`python -m benchmarks.emulated [--job NAME …] [--no-half] [--json FILE]`

The emulation (tests/emulated_cuda/emulate.py) raises at the first operation that CUDA would refuse. Each job of
emulated.yaml runs on the CPU and on the emulation in float32, where all its figures must agree within 1e-4, and on the
emulation in float16 (autocast), where it must end. The record also has what made the host wait: in the whole job, in
each step (the median), and by line. Speed and memory of a card can't be had this way. Exits with 1 if a job fails.
"""

import argparse
import json
import os
import shlex
import statistics
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.golden import ROOT, figures, read_jobs, write_capture
from csd3d.engine.environment import environment

sys.path.insert(0, str(ROOT / "tests"))

import tiny_models  # of the tests

EMULATED = ROOT / "tests" / "emulated_cuda"
TOLERANCE = 1e-4  # of figures, relative and absolute
JUMPS = ("mesh.texture_fill",)  # how charts are packed jumps with the last digit of a vertex
# working sizes, pixels
SIDES = {"ip2p": 32, "sd": 32, "sdxl": 32, "sdxl-edit": 32, "deepfloyd": 8, "sd3": 32, "kontext": 32}


def write_inputs(folder: Path) -> dict[str, str]:
    """Write the capture, pictures and models that jobs refer to; return their places by name."""
    write_capture(folder / "capture")
    rng = np.random.default_rng(0)
    for path in ("photo.png", "film/0.png", "film/1.png", "film/2.png"):
        (folder / path).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(folder / path)
    models = folder / "models"
    tiny_models.save_tiny_pipeline(models / "ip2p")
    tiny_models.save_tiny_pipeline(models / "sd", "text")
    tiny_models.save_tiny_sdxl(models / "sdxl")
    tiny_models.save_tiny_sdxl(models / "sdxl-edit", 8)
    tiny_models.save_tiny_if(models / "deepfloyd")
    tiny_models.save_tiny_sd3(models / "sd3")
    tiny_models.save_tiny_flux(models / "kontext")
    for name, side in SIDES.items():
        (models / name / "csd3d.json").write_text(json.dumps({"defaults": {"working_size": side}}))
    return {"capture": str(folder / "capture"), "photo": str(folder / "photo.png"), "film": str(folder / "film")} | {
        "models": str(models)
    }


def chosen_jobs(names: list[str] | None, places: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
    """{name: (config, overrides)} of the jobs to run."""
    table = read_jobs(Path(__file__).with_suffix(".yaml"))
    found = {name: shlex.split(string.Template(table[name]).substitute(places)) for name in names or table}
    return {name: (config, keys) for name, (config, *keys) in found.items()}


def run_jobs(folder: Path, jobs: dict[str, tuple[str, list[str]]], device: str, dtype: str) -> dict[str, dict]:
    """Run the jobs in a process of their own; what jobs.py found of each."""
    folder.mkdir()
    jobs = {name: (config, [*keys, f"prior.dtype={dtype}"]) for name, (config, keys) in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(EMULATED / "emulate.py")] if device == "cuda" else []
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, *command, str(EMULATED / "jobs.py"), device, str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, check=True,
    )  # fmt: skip
    return json.loads((folder / "figures.json").read_text())


def compared(cpu: dict, cuda: dict, half: dict | None) -> dict:
    """The record of one job: whether it ended, how far its figures are from the CPU's, and the host's waits."""
    runs = {"cpu": cpu, "cuda": cuda, "float16": half or {}}
    errors = {where: one["error"] for where, one in runs.items() if "error" in one}
    if errors:
        return {"ok": False, "error": {where: text.strip().split("\n")[-1] for where, text in errors.items()}}
    left_out = ("took", "waits")
    wanted, got = (figures({k: v for k, v in one.items() if k not in left_out}) for one in (cpu, cuda))
    apart = {key: difference(wanted.get(key), got.get(key)) for key in wanted | got if key not in JUMPS}
    worst = max(apart, key=apart.get)
    waits = cuda["waits"]
    steps = {phase: statistics.median_low(counts) for phase, counts in waits["steps"].items()}
    return {
        "ok": apart[worst] <= TOLERANCE,
        "figures": len(apart),
        "greatest_difference": {worst: apart[worst]},
        "float16": half is not None,
        "waits": waits["all"],
        "waits_a_step": steps,
        "lines": waits["lines"],
    }


def difference(one: object, other: object) -> float:
    """Of two numbers, relative where they are above 1; 0 of equal values, infinite of others."""
    if one == other or str(one) == str(other):
        return 0.0
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return abs(one - other) / max(abs(one), 1.0) if numbers else float("inf")


def write_record(path: Path, found: dict[str, dict], made: dict) -> None:
    """Write the record, or renew these jobs of the one that is there; each job has the commit that it ran at."""
    before = json.loads(path.read_text())["jobs"] if path.exists() else {}
    jobs = before | {name: {"commit": made["git"]} | one for name, one in found.items()}
    record = {
        "tolerance": TOLERANCE,
        "python": made["python"],
        "packages": made["packages"],
    }
    path.write_text(json.dumps(record | {"jobs": jobs}, indent=1) + "\n")


def main() -> int:
    """The command line; return 1 if a job failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--no-half", action="store_true", help="leave float16 out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write or renew the record here")
    args, made = parser.parse_args(), environment()  # at the start: the tree may change meanwhile
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        jobs = chosen_jobs(args.job, write_inputs(folder))
        cpu = run_jobs(folder / "cpu", jobs, "cpu", "float32")
        cuda = run_jobs(folder / "cuda", jobs, "cuda", "float32")
        half = {} if args.no_half else run_jobs(folder / "half", jobs, "cuda", "float16")
    found = {name: compared(cpu[name], cuda[name], half.get(name)) for name in jobs}
    for name, one in found.items():
        told = one.get("error") or f"{one['greatest_difference']}, waits a step {one['waits_a_step']}"
        print("ok    " if one["ok"] else "FAILED", name, told)
    if args.json:
        write_record(args.json, found, made)
    return int(not all(one["ok"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
