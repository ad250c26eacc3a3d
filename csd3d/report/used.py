"""What a job is made of, by the titles of the registry: its model, its representation, the reader of its capture."""

from pathlib import Path
from typing import Any

from csd3d import registry


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
