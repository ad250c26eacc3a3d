"""A diffusers folder, and opening one part of it: a network, a tokenizer, a config, a scheduler.

The family says which class opens a part, never the folder, so a folder cannot run code of its own; weights are
safetensors only. All functions raise InputError in one line that names the file.

diffusers and transformers take seconds to import, so they are imported where a model is opened.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from csd3d.errors import InputError
from csd3d.files import read_json

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

Class = type | str  # a class, or its full name: "diffusers.AutoencoderKL"
CONFIG = "a part of a diffusers model"  # how error messages describe a JSON file of it
SETTINGS = "csd3d.json"  # csd3d's own file in a model's folder: {"defaults": ..., "knows": ..., "parts": ...}
SHIPPED = Path(__file__).resolve().parents[1] / "assets"
PREDICTORS = ("unet", "transformer")  # what diffusers calls the noise predictor


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder: its parts, and their configs, by which families recognise it.

    A shipped model may share a part with another: {"parts": {"vae": "../ip2p/vae"}} in its csd3d.json. In any other
    model this is an InputError, because it could point anywhere on the disk.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def part(self, name: str) -> Path:
        """The folder of a part; it may not exist."""
        shared = self.settings().get("parts", {})
        if not isinstance(shared, dict) or not all(isinstance(place, str) for place in shared.values()):
            raise InputError(f"{self.path / SETTINGS}: parts must say a folder for each part, is {shared!r}")
        if name not in shared:
            return self.path / name
        place = (self.path / shared[name]).resolve()
        if not all(path.is_relative_to(SHIPPED) for path in (place, self.path.resolve())):
            raise InputError(
                f"{self.path / SETTINGS}: parts.{name}: only models in {SHIPPED} may share parts; "
                f"copy the part to {self.path / name} and drop the key"
            )
        return place

    def has(self, name: str) -> bool:
        """Whether the folder of that part exists."""
        return self.part(name).is_dir()

    def config(self, name: str) -> dict[str, Any]:
        """The JSON config of a part; {} without one."""
        return _json(self.part(name) / config_name(name), CONFIG)

    def index(self) -> dict[str, Any]:
        """model_index.json, of which only plain values are ever used; {} without one."""
        return _json(self.path / "model_index.json", CONFIG)

    def settings(self) -> dict[str, Any]:
        """csd3d.json; {} without one."""
        return _json(self.path / SETTINGS, "csd3d's settings of a model")


def _json(path: Path, what: str) -> dict[str, Any]:
    return read_json(path, what) if path.is_file() else {}


def config_name(part: str) -> str:
    """The file name of a part's config."""
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def load_parts(folder: ModelFolder, classes: Mapping[str, Class], device: torch.device) -> dict[str, Any]:
    """Open every part of a model with its class: networks in float32 on `device`, and tokenizers."""
    parts: dict[str, Any] = {}
    for part, cls in classes.items():
        if part.startswith("tokenizer"):
            parts[part] = open_tokenizer(folder.part(part), class_of(cls))
        else:
            parts[part] = load_network(folder, part, class_of(cls)).to(device, torch.float32)
    for part in (part for part in parts if part.startswith("tokenizer")):
        encoder = part.replace("tokenizer", "text_encoder")
        known = parts[encoder].config.get_text_config().vocab_size
        if len(parts[part]) > known:
            raise InputError(f"{folder}: {encoder} ({known} tokens) does not suit {part} ({len(parts[part])} tokens)")
    return parts


def class_of(cls: Class) -> type:
    """The class of that full name, imported now; a class is returned as it is. InputError where it is too new."""
    if isinstance(cls, type):
        return cls
    module, _, name = cls.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise InputError(f"prior.model: it needs a {module} that has {name}: pip install -U {module}") from None


def check_width(folder: ModelFolder, part: str, takes: int, given: int, what: str = "text") -> None:
    """Raise InputError unless the text encoders give text of the width that the predictor takes."""
    if takes != given:
        raise InputError(f"{folder}/{part}: is for {what} of width {takes}, the text encoders give {given}")


def check_channels(folder: ModelFolder, part: str, *editing: int) -> None:
    """Raise InputError, by the configs alone, unless the predictor takes and gives as many channels as the VAE's z has.

    An editing model takes one of `editing` times as many. Channels that a config does not say are diffusers' own.
    """
    usual = 4 if part == "unet" else 16
    latent = read_config(folder, "vae").get("latent_channels", 4)
    config = read_config(folder, part)
    takes, gives = (config.get(key, usual) for key in ("in_channels", "out_channels"))
    if not isinstance(latent, int) or takes not in (latent, *(times * latent for times in editing)) or gives != latent:
        also = "".join(f" or {times}x" for times in editing) + (" (editing)" if editing else "")
        raise InputError(
            f"{folder}/{part}/config.json: {takes!r} channels in and {gives!r} out do not suit a VAE of {latent!r}: as "
            f"many (text to image){also} in and as many out would"
        )


def load_network(folder: ModelFolder, part: str, cls: type) -> torch.nn.Module:
    """The network of class `cls` in `folder`/`part`."""
    path, config = folder.part(part), read_config(folder, part)
    listed = config.get("architectures")
    kind = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    if kind not in (cls.__name__, None):
        raise InputError(f"{path}/config.json: holds a {kind}, a {cls.__name__} is needed")
    return open_network(path, cls, weights_name(part))


def open_network(path: Path, cls: type, stem: str) -> torch.nn.Module:
    """The network of class `cls` in a folder, from weights called `stem` that hold every one of its tensors."""
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    variant = find_weights(path, stem)
    model, info = opened(path, lambda: cls.from_pretrained(path, variant=variant, **options))
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"{path}: its weights lack {len(lacking)} of the tensors, {lacking[0]} first")
    return model


def weights_name(part: str) -> str:
    """The file name of a part's weights without its suffix; transformers names text encoders, diffusers the rest."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_files(stem: str) -> dict[str | None, tuple[str, str, str]]:
    """By variant, best first: the whole file, the pattern of its shards, the shards' index. None is full precision."""
    return {
        None: (f"{stem}.safetensors", f"{stem}-0*-of-*.safetensors", f"{stem}.safetensors.index.json"),
        "fp16": (f"{stem}.fp16.safetensors", f"{stem}.fp16-0*-of-*.safetensors", f"{stem}.safetensors.index.fp16.json"),
    }


def find_weights(folder: Path, stem: str) -> str | None:
    """The best variant of the safetensors weights in a folder; InputError where there are none."""
    for variant, (whole, _, index) in weight_files(stem).items():
        if (folder / whole).is_file() or (folder / index).is_file():
            return variant
    if pickles := [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]:
        raise InputError(
            f"{folder}: has only {pickles[0].name}, a pickle, which can run code and is not opened; save the pipeline "
            "again with save_pretrained(folder, safe_serialization=True)"
        )
    raise InputError(f"{folder}: {stem}.safetensors is missing")


def open_tokenizer(path: Path, cls: type) -> Any:
    """The tokenizer of class `cls`, CLIP's, T5's or Qwen2's, in a folder."""
    from transformers import CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

    files = {file.name for file in path.iterdir()} if path.is_dir() else set()
    # where files are missing, transformers silently makes an empty vocabulary
    if (
        cls in (CLIPTokenizer, Qwen2Tokenizer)
        and "tokenizer.json" not in files
        and not {"vocab.json", "merges.txt"} <= files
    ):
        raise InputError(f"{path}: missing; needs tokenizer.json, or vocab.json with merges.txt")
    if cls is T5TokenizerFast and "tokenizer.json" not in files:
        if "spiece.model" not in files:
            raise InputError(f"{path}: missing; needs tokenizer.json or spiece.model")
        if importlib.util.find_spec("sentencepiece") is None:
            raise InputError(f"{path}: has spiece.model but no tokenizer.json, which needs: pip install sentencepiece")
    tokenizer = opened(path, lambda: cls.from_pretrained(path, local_files_only=True))
    if not isinstance(tokenizer.model_max_length, (int, float)) or tokenizer.model_max_length < 2:
        raise InputError(f"{path}: model_max_length is {tokenizer.model_max_length!r}; expected a number of tokens")
    return tokenizer


def load_noise_schedule(folder: ModelFolder) -> "DDIMScheduler":
    """The noise schedule as a DDIM scheduler, which reads every β-schedule that these models were trained with."""
    from diffusers import DDIMScheduler

    config = read_config(folder, "scheduler")
    kind, prediction = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    if "Flow" in kind or "EDM" in kind or prediction not in ("epsilon", "v_prediction", "sample"):
        raise InputError(
            f"{folder}/scheduler/scheduler_config.json: {kind} with prediction_type {prediction!r} is not supported; "
            "epsilon, v_prediction and sample are"
        )
    return opened(folder.part("scheduler"), lambda: DDIMScheduler.from_config(config))


def load_flow_schedule(folder: ModelFolder) -> "FlowMatchEulerDiscreteScheduler":
    """The times of a flow-matching model."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = read_config(folder, "scheduler")
    kind = str(config.get("_class_name", ""))
    if "FlowMatch" not in kind or config.get("invert_sigmas"):
        raise InputError(
            f"{folder}/scheduler/scheduler_config.json: {kind} with invert_sigmas "
            f"{config.get('invert_sigmas', False)} is not supported for a transformer; FlowMatchEulerDiscreteScheduler "
            "with invert_sigmas false is"
        )
    return opened(folder.part("scheduler"), lambda: FlowMatchEulerDiscreteScheduler.from_config(config))


def read_config(folder: ModelFolder, part: str) -> dict[str, Any]:
    """The JSON config of a part; InputError without one."""
    if config := folder.config(part):
        return config
    raise InputError(f"prior.model: {folder} lacks {part}/{config_name(part)}; give a complete diffusers folder")


def opened(path: Path, load: Callable[[], Any]) -> Any:
    """The result of `load`; any error becomes an InputError that names `path`."""
    try:
        return load()
    except Exception as error:  # a broken file can raise the errors of a dozen libraries
        raise InputError(f"{path}: could not be opened ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """An error in at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and tables of the loaders; what matters in them is checked here."""
    import diffusers
    import transformers

    logs = (transformers.utils.logging, diffusers.utils.logging)
    levels, bars = [log.get_verbosity() for log in logs], transformers.utils.logging.is_progress_bar_enabled()
    for log in logs:
        log.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
