"""Finding a model: a diffusers folder on disk, or a hub name that is downloaded as one, configs first."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from csd3d.errors import InputError
from csd3d.priors.opening import SETTINGS, ModelFolder, one_line, weight_files, weights_name

HUB_TIMEOUT_S = 5.0
CONFIGS = ["model_index.json", SETTINGS, "*/*.json"]


@dataclass(frozen=True)
class HubFolder(ModelFolder):
    """The local copy of a hub's repository, of which only the configs are there until `fetch_weights`.

    revision, files: the commit and what it holds, None and () where the hub is out of reach.
    """

    name: str = ""
    revision: str | None = None
    files: tuple[str, ...] = field(default=(), repr=False)


def find_model(model: str) -> ModelFolder:
    """The folder of a model: itself if it is one, else the local copy of the hub's repository of that name.

    Raises InputError where it is neither; for a hub name, when the hub can't be reached and nothing is cached (known
    within seconds).
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return ModelFolder(folder)
    if folder.is_file():
        raise InputError(f"prior.model: {model} is a file; give the diffusers folder that holds unet, vae and the rest")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return _hub_configs(model)
    raise InputError(f"prior.model: {model!r} is neither a folder that exists nor a hub name (owner/name)")


def fetch_weights(folder: ModelFolder, parts: Mapping[str, type]) -> None:
    """Downloads what a family opens of a hub's model, its weights once; nothing to do for any other folder."""
    if isinstance(folder, HubFolder):
        wanted = wanted_files(parts, folder.files)
        _snapshot(folder.name, folder.revision, wanted, None)


def wanted_files(parts: Iterable[str], files: Iterable[str]) -> list[str]:
    """Of a repository's files those that `parts` are opened from: tokenizers, and one set of safetensors a network.

    Where a network is there in several forms, `weight_files` says which comes first: no form is taken beside another.
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


def _hub_configs(name: str) -> HubFolder:
    # by its version, the hub's library fails through requests, httpx or OSError: to the user each is the same one line
    revision, files, reason = None, (), None
    try:
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        revision, files = info.sha, tuple(file.rfilename for file in info.siblings or ())
    except Exception as error:
        reason = error
    return HubFolder(_snapshot(name, revision, CONFIGS, reason), name, revision, files)


def _snapshot(name: str, revision: str | None, patterns: list[str], reason: Exception | None) -> Path:
    try:  # with no answer from the hub, a copy from an earlier run will do
        offline = revision is None
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:
        raise InputError(
            f"prior.model: there is no folder {name!r}, and the hub did not give a model of that name "
            f"({one_line(reason or error)}); point prior.model to a local folder that holds it"
        ) from None
