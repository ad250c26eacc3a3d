"""csd3d.json, csd3d's own file in a model's folder: what suits the model, what it knows, and the parts that it shares.

{"defaults": {"guidance_scale": 3.0, "working_size": 128}, "knows": "world", "parts": {"vae": "../ip2p/vae"}}
"""

from collections.abc import Collection, Mapping
from typing import Any

from csd3d import registry
from csd3d.convert import BadValue, build
from csd3d.errors import InputError, closest
from csd3d.priors.opening import PREDICTORS, SETTINGS, ModelFolder
from csd3d.priors.options import LEAST_SIDE, MOST_SIDE, Defaults

KEYS = ("defaults", "knows", "parts")


def read_defaults(folder: ModelFolder, parts: Collection[str]) -> dict[str, Any]:
    """The `defaults` of a model's csd3d.json, of which all is checked; InputError names the file and the key.

    parts: those that the model's family opens.
    """
    path, settings = folder.path / SETTINGS, folder.settings()
    for key in settings:
        if key not in KEYS:
            raise InputError(f"{path}: {key}: there is no such key; did you mean {closest(key, KEYS)}?")
    shared = settings.get("parts", {})
    for part in shared if isinstance(shared, Mapping) else ():  # another type is told by `ModelFolder.part`
        if parts and part not in parts:
            raise InputError(f"{path}: parts.{part}: the model has no such part; known: {', '.join(parts)}")
    known = settings.get("knows", "")
    worlds = registry.names("ground_truth")
    if known != "" and known not in worlds:
        raise InputError(f"{path}: knows: {known!r} is no ground truth; leave it out, or give {' or '.join(worlds)}")
    defaults = settings.get("defaults", {})
    if not isinstance(defaults, dict):
        raise InputError(f"{path}: defaults must be an object, is a {type(defaults).__name__}")
    try:
        found = build(Defaults, defaults, "defaults", None)
    except BadValue as error:
        raise InputError(f"{path}: {error.key}: {error}") from None
    return {key: getattr(found, key) for key in defaults}


def check_working_size(folder: ModelFolder, size: Any) -> None:
    """Raise InputError where a predictor's config says a size of pictures that cannot be, and csd3d.json none."""
    if type(size) is int and LEAST_SIDE <= size <= MOST_SIDE:
        return
    part = next((part for part in PREDICTORS if folder.config(part)), PREDICTORS[0])
    said = folder.config(part).get("sample_size")
    raise InputError(
        f"{folder}/{part}/config.json: sample_size: {said!r} makes no pictures of {LEAST_SIDE} to {MOST_SIDE} pixels a "
        f"side; correct it, or give defaults.working_size in {SETTINGS}"
    )
