"""What a job is made of, by the titles of the registry: its model, its representation, the reader of its capture."""

from pathlib import Path
from typing import Any

import torch

from csd3d import registry
from csd3d.engine.environment import read_environment
from csd3d.engine.phase import peak_memory


def used(job: Any) -> str:
    """Return one line for the banner and the report, such as "Model: InstructPix2Pix (ip2p) · Scene: Hash-grid NeRF".

    Parts that a job does not have are left out.
    """
    config = job.config
    model = config.prior.model
    called = Path(model).name if Path(model).is_dir() else model
    chosen = getattr(config, "representation", None) or getattr(getattr(config, "asset", None), "representation", None)
    found = {
        "Model": f"{job.prior.family} ({called})" if getattr(job.prior, "family", "") else called,
        "Scene": registry.title("representation", chosen.name) if chosen else "",
        "Capture": getattr(getattr(job, "capture", None), "reader", ""),
    }
    return " · ".join(f"{what}: {title}" for what, title in found.items() if title)


def environment_of(run_folder: Path, device: torch.device) -> dict[str, Any]:
    """Return what the report shows of the machine: environment.json, and the memory that the run took so far."""
    memory = {key: round(value, 2) for key, value in peak_memory(device).items()}
    return read_environment(run_folder) | {"device": str(device)} | memory
