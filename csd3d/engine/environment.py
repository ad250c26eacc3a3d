"""The environment of a run, in environment.json: versions, machine and git commit, as needed to repeat it."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from csd3d.engine.logs import logger
from csd3d.errors import InputError
from csd3d.files import read_json

PACKAGES = (
    "csd3d",
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "safetensors",
    "nerfacc",
    "kornia",
    "openvino",
    "onnxruntime",
    "trimesh",
    "xatlas",
    "omegaconf",
)


def read_environment(run_folder: Path) -> dict[str, Any]:
    """Return environment.json of a run; {} and a warning if it is missing or damaged, as only the report shows it."""
    try:
        return read_json(run_folder / "environment.json", "the environment that a run was started in")
    except InputError as error:
        logger.warning("the report does not say where the run was made: %s", error)
        return {}


def another_version(run_folder: Path) -> str | None:
    """Name the version of csd3d that a run was made with; None if that is this one, or is not known."""
    try:
        made = read_json(run_folder / "environment.json", "the environment that a run was started in")
    except InputError:
        return None
    packages = made.get("packages")
    commit, release = made.get("git"), packages.get("csd3d") if isinstance(packages, dict) else None
    same = [commit, release] == [_git_commit(Path(__file__).parent), _version("csd3d")]
    if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{7,64}(-dirty)?", commit):
        # two runs with changed files may have been made by different ones
        return None if same and not commit.endswith("-dirty") else f"another version of csd3d (commit {commit})"
    return None if same or not isinstance(release, str) else f"another version of csd3d ({release:.40})"


def environment() -> dict[str, Any]:
    """Return versions, processor, threads, graphics card and git commit, as needed to repeat a run."""
    import torch

    from csd3d import ranks
    from custom_kernels import native

    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": native.num_threads(),
        "processes": ranks.count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **_card(),
        "git": _git_commit(Path(__file__).parent),
    }


def _card() -> dict[str, Any]:
    """Return what torch needs of a graphics card and how much memory that has, where there is one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return {"cuda_version": torch.version.cuda, "gpu_memory_gib": round(total / 2**30, 1)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit(folder: Path) -> str | None:
    """Return the commit csd3d runs from, with `-dirty` if tracked files were changed; None outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=True, start_new_session=True
        ).stdout.strip()  # a session of its own: Ctrl+C is for this process alone
    except (OSError, subprocess.SubprocessError):
        return None
