"""Finding a model: a diffusers folder on disk, or a hub name, whose configs are downloaded before its weights."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from csd3d.errors import InputError
from csd3d.priors.opening import SETTINGS, ModelFolder, config_name, one_line, weight_files, weights_name

HUB_TIMEOUT_S = 5.0
HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"  # owner/name
CONFIGS = ["model_index.json", SETTINGS, "*/*.json"]


@dataclass(frozen=True)
class HubFolder(ModelFolder):
    """The local copy of a hub repository; it holds only configs until `fetch_weights`.

    revision, files: the commit and its files; None and () if the hub cannot be reached.
    """

    name: str = ""
    revision: str | None = None
    files: tuple[str, ...] = field(default=(), repr=False)


def find_model(model: str) -> ModelFolder:
    """The folder `model`, or the local copy of the hub repository of that name.

    Raises InputError where it is neither; for a hub name, within seconds if the hub can't be reached and nothing is
    cached.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return ModelFolder(folder)
    if folder.is_file():
        raise InputError(f"prior.model: {model} is a file; give the diffusers folder that holds unet, vae and the rest")
    if re.fullmatch(HUB_NAME, model):
        return _hub_configs(model)
    raise InputError(f"prior.model: {model!r} is neither a folder that exists nor a hub name (owner/name)")


def fetch_weights(folder: ModelFolder, parts: Mapping[str, type]) -> None:
    """Download the `parts` of a hub model; does nothing for a folder on disk."""
    if isinstance(folder, HubFolder):
        _snapshot(folder.name, folder.revision, wanted_files(parts, folder.files), None)


def wanted_files(parts: Iterable[str], files: Iterable[str]) -> list[str]:
    """The files that `parts` are opened from: those of tokenizers, and one set of safetensors for each network.

    If a network has several sets, the first in the order of `weight_files` is taken.
    """
    files, wanted = sorted(files), []
    for part in parts:
        if part.startswith("tokenizer"):
            wanted += [name for name in files if fnmatch.fnmatch(name, f"{part}/*")]
            continue
        for whole, shards, index in weight_files(weights_name(part)).values():
            if f"{part}/{whole}" in files:
                wanted.append(f"{part}/{whole}")
                break
            if found := fnmatch.filter(files, f"{part}/{shards}"):
                wanted += [*found, f"{part}/{index}"]
                break
    return wanted


def model_files(folder: ModelFolder, parts: Iterable[str]) -> dict[str, Path]:
    """The files that a model of these parts is opened from, by their names in it; {} without parts.

    Other files of the folder (other precisions, pictures, a safety checker) are no part of the model.
    """
    parts, found = list(parts), {}
    for part in parts:
        place = folder.part(part)
        names = [f"{part}/{file.name}" for file in place.iterdir()] if place.is_dir() else []
        wanted = [*wanted_files([part], names), f"{part}/{config_name(part)}"]
        found |= {name: place / Path(name).name for name in wanted}
    others = ("model_index.json", SETTINGS, f"scheduler/{config_name('scheduler')}") if parts else ()
    found |= {name: folder.path / name for name in others}
    return {name: path for name, path in found.items() if path.is_file()}


def fetch_folder(name: str, patterns: Sequence[str], key: str) -> Path:
    """The local copy of a hub repository's files that match `patterns`; `key`: what names it, for the InputError."""
    revision, _, reason = _asked(name)
    return _snapshot(name, revision, list(patterns), reason, key)


def _hub_configs(name: str) -> HubFolder:
    revision, files, reason = _asked(name)
    return HubFolder(_snapshot(name, revision, CONFIGS, reason), name, revision, files)


def _asked(name: str) -> tuple[str | None, tuple[str, ...], Exception | None]:
    """The commit of a repository and its files, or None, () and why the hub did not say."""
    # depending on its version, the hub's library raises errors of requests, httpx or OSError
    try:
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        return None, (), error
    return info.sha, tuple(file.rfilename for file in info.siblings or ()), None


def _snapshot(
    name: str, revision: str | None, patterns: list[str], reason: Exception | None, key: str = "prior.model"
) -> Path:
    try:  # if the hub does not answer, use a copy from an earlier run
        offline = revision is None
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:
        raise InputError(
            f"{key}: there is no folder {name!r}, and the hub did not give a model of that name "
            f"({one_line(reason or error)}); point {key} to a local folder that holds it"
        ) from None
