"""Finding a model: a diffusers folder, one file, or a hub name, whose configs are downloaded before its weights."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from csd3d.errors import InputError
from csd3d.paths import split_number
from csd3d.priors.adapters import Lora, parts_in
from csd3d.priors.libraries import one_line
from csd3d.priors.opening import SETTINGS, ModelFolder, config_name
from csd3d.priors.single_file import SingleFile, model_type
from csd3d.priors.weights import check_shards, preferred, weight_sets, weights_name

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


def find_model(model: str, config: str = "") -> ModelFolder:
    """The folder or file `model`, or the local copy of the hub repository of that name.

    config: where a single file's configs are, a folder or a hub name; "" leaves the hub's to be inferred.  Raises
    InputError where there is no such model, or a `config` for one that has its own; for a hub name, within seconds if
    the hub can't be reached and nothing is cached.
    """
    folder = Path(model).expanduser()
    if folder.is_file():
        return _single_file(folder, config)
    is_folder = bool(model) and folder.is_dir()
    if not is_folder and (not re.fullmatch(HUB_NAME, model) or model.endswith(".safetensors")):
        raise InputError(f"prior.model: {model!r} is neither a folder or file that exists nor a hub name (owner/name)")
    if config:
        raise InputError(f"prior.config: is for a single file only, and prior.model {model!r} is none; leave it out")
    return ModelFolder(folder) if is_folder else _hub_configs(model)


def _single_file(file: Path, config: str) -> SingleFile:
    known, usual, shapes = model_type(file)
    try:
        configs = find_model(config or usual)
    except InputError as error:
        reason = str(error).removeprefix("prior.model: ")
        raise InputError(
            f"prior.config: {file} is taken for a {known!r} model, whose configs and tokenizers are not there: "
            f"{reason}; set prior.config to a diffusers folder of the same kind"
        ) from None
    if isinstance(configs, SingleFile):
        raise InputError(f"prior.config: {config} is a file; give a diffusers folder with configs and tokenizers")
    return SingleFile(configs.path, added={"": file}, file=file, shapes=shapes, configs=configs)


def find_lora(text: str, folder: ModelFolder, parts: Iterable[str]) -> Lora:
    """The file and scale of an entry of `prior.lora`; a hub's is downloaded.

    Raises InputError where there is none, or none for the `parts` of the model in `folder`.
    """
    name, scale = split_number(text)
    place = Path(name).expanduser()
    if place.is_dir():
        file = place / _lora_name([path.name for path in place.iterdir()], name)
    elif not place.is_file() and re.fullmatch(rf"{HUB_NAME}(?<!\.safetensors)(/.+\.safetensors)?", name):
        file = _hub_lora(name)
    else:
        file = place
    if file.suffix != ".safetensors" or not file.is_file():
        raise InputError(f"prior.lora: {name!r} is no .safetensors file, no folder with one, and no hub name")
    if not (given := parts_in(file)) & set(parts):
        theirs = ", ".join(sorted(given)) or "parts that are not named"
        raise InputError(f"prior.lora: {file}: is for another model than {folder}: it has weights for {theirs}")
    return Lora(file, float(scale[1:] or 1))


def _hub_lora(name: str) -> Path:
    repository, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    revision, files, reason = _asked(repository)
    file = file or _lora_name(files or ["pytorch_lora_weights.safetensors"], name)
    return _snapshot(repository, revision, [file], reason, "prior.lora") / file


def _lora_name(names: Iterable[str], place: str) -> str:
    """The LoRA's file among those of a folder."""
    found = [name for name in names if name.endswith(".safetensors")]
    usual = [name for name in found if name == "pytorch_lora_weights.safetensors"]
    if len(usual or found) != 1:
        raise InputError(f"prior.lora: {place}: has {len(found)} .safetensors files; add the name of one to it")
    return (usual or found)[0]


def fetch_weights(folder: ModelFolder, parts: Mapping[str, type], kept: str = "float32") -> None:
    """Download the `parts` of a hub model, and check that no shard is missing, of a folder on disk too."""
    parts = list(parts)
    if isinstance(folder, SingleFile):
        folder, parts = folder.configs, [part for part in parts if part.startswith("tokenizer")]
    if isinstance(folder, HubFolder) and parts:
        _snapshot(folder.name, folder.revision, wanted_files(parts, folder.files, kept), None)
    for part in parts:
        place = folder.part(part)
        sets = weight_sets(weights_name(part), (file.name for file in place.iterdir())) if place.is_dir() else {}
        if sets and not part.startswith("tokenizer"):
            check_shards(place, sets[preferred(sets, kept)])


def wanted_files(parts: Iterable[str], files: Iterable[str], kept: str = "float32") -> list[str]:
    """The files that `parts` are opened from: those of tokenizers, and one set of safetensors for each network.

    If a network has several sets, the one for weights `kept` in that precision is taken, see `weights.preferred`.
    Raises InputError where a shard of it is not among the files.
    """
    files, wanted = sorted(files), []
    for part in parts:
        inside = [name.removeprefix(f"{part}/") for name in files if fnmatch.fnmatch(name, f"{part}/*")]
        if part.startswith("tokenizer"):
            wanted += [f"{part}/{name}" for name in inside]
            continue
        sets = weight_sets(weights_name(part), inside)
        if sets:
            chosen = sets[preferred(sets, kept)]
            if chosen.missing:
                raise InputError(f"prior.model: the shard {part}/{chosen.missing} is missing, of {chosen.count}")
            wanted += [f"{part}/{name}" for name in chosen.files]
    return wanted


def model_files(folder: ModelFolder, parts: Iterable[str], kept: str = "float32") -> dict[str, Path]:
    """The files that a model of these parts is opened from, by their names in it; {} without parts.

    Other files of the folder (other precisions, pictures, a safety checker) are no part of the model.
    """
    parts, found = list(parts), {}
    for part in parts:
        place = folder.part(part)
        names = [f"{part}/{file.name}" for file in place.iterdir()] if place.is_dir() else []
        wanted = [*wanted_files([part], names, kept), f"{part}/{config_name(part)}"]
        found |= {name: place / Path(name).name for name in wanted}
    others = ("model_index.json", SETTINGS, f"scheduler/{config_name('scheduler')}") if parts else ()
    found |= {name: folder.path / name for name in others}
    if parts:
        found |= folder.added
    return {name: path for name, path in found.items() if path.is_file()}


def with_loras(folder: ModelFolder, loras: Iterable[Lora]) -> ModelFolder:
    """The folder with these LoRA among the files that the model depends on."""
    added = {f"lora {number} x {lora.scale!r}": lora.file for number, lora in enumerate(loras)}
    return replace(folder, added={**folder.added, **added})


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
