"""What a run says when memory is used up: where that was, and which settings to lower."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from csd3d.errors import InputError
from csd3d.identity import defining_values
from csd3d.memory import card_bytes, size_text
from csd3d.schema import Chosen

HOST = "can't allocate memory"  # in torch's RuntimeError where this machine's memory is used up
# Where the memory was asked for, by the frames of the traceback, and the keys that make that smaller: the first that
# matches counts. {phase} is reconstruct, or fit while a scene is edited.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("priors/loading.py", ("prior.drop_text_encoder",)),
    ("priors/autoencoder.py", ("prior.vae_slicing", "guidance_size", "working_size", "size", "views_per_step")),
    ("priors/", ("prior.micro_batch", "prior.vae_slicing")),
    ("export/", ("export.mesh.resolution", "export.mesh.texture_size")),
    ("evaluation/", ("evaluate.size", "evaluate.views", "scene.downscale")),
    ("representations/fit.py", ("{phase}.samples", "{phase}.rays", "{phase}.patches")),
    ("fit_step", ("{phase}.samples", "{phase}.rays", "representation.count", "scene.downscale")),
    ("representations/batch.py", ("asset.resolution", "views_per_step", "particles", "guidance_size")),
    ("distillation/", ("editors.csd_edit.edit.batch", "views_per_step", "particles", "guidance_size", "size")),
    ("datasets/", ("scene.downscale",)),
)
OTHERWISE = (  # of every task, those that its config has
    "prior.micro_batch", "guidance_size", "views_per_step", "asset.resolution", "working_size", "scene.downscale",
    "fit.samples", "particles", "size", "window",
)  # fmt: skip


@contextmanager
def told_memory(config: Any, device: torch.device, job: Any = None) -> Iterator[None]:
    """Turn memory that is used up inside into an InputError of one line, that names the settings to lower.

    job: the running `Job`, whose phase and folder are told; None while it is being opened.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        on_card = isinstance(error, torch.OutOfMemoryError)
        if not on_card and not isinstance(error, MemoryError) and HOST not in str(error):
            raise
        raise InputError(_told(error, config, device if on_card else None, job)) from error


def _told(error: BaseException, config: Any, card: torch.device | None, job: Any) -> str:
    where = "while the job was opened" if job is None else f"phase {job.phase or 'opening'}"
    place = "this machine's memory" if card is None else f"the memory of {card}, {size_text(card_bytes(card))},"
    keys = _to_lower(error, config, job)
    told = f"{where}: {place} is used up; {' or '.join(map(_advice, keys, keys.values()))}"
    if job is None:
        return told
    # a checkpoint takes no other value of a key that changes results
    free = [key for key in keys if key not in defining_values(config)]
    if free:
        value = "true" if keys[free[0]] is False else "LESS"
        return f"{told}. It goes on with --resume {job.folder} {free[0]}={value}"
    return f"{told}, and start it again; where there is more memory it goes on with --resume {job.folder}"


def _advice(key: str, value: Any) -> str:
    return f"set {key}=true" if value is False else f"lower {key}, which is {value}"


def _to_lower(error: BaseException, config: Any, job: Any) -> dict[str, Any]:
    """The keys that make smaller what did not fit, with their values."""
    frames = [f"{frame.filename} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    phase = "reconstruct" if job is not None and job.phase == "reconstruct" else "fit"
    for part, keys in (*RULES, ("", OTHERWISE)):
        if any(part in frame for frame in frames):
            values = {key: _value(config, key) for key in (key.format(phase=phase) for key in keys)}
            found = {key: value for key, value in values.items() if value is not None and value is not True}
            if found:
                return dict(list(found.items())[:3])
    return {}


def _value(config: Any, key: str) -> Any:
    """The value at a dotted key; None where the config has none, or leaves it to the model."""
    for name in key.split("."):
        config = config.thing if isinstance(config, Chosen) else config
        config = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return config
