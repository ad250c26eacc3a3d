"""A diffusers folder, and opening one part of it: a network, a tokenizer, a config, a scheduler.

Each is opened by the class that its place in the model calls for, never by one that the folder names, so that a folder
can run no code of its own; weights are safetensors only. All raise InputError in one line that names the file.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import CLIPTokenizer, T5TokenizerFast

from csd3d.errors import InputError
from csd3d.files import read_json

CONFIG = "a part of a diffusers model"  # as messages call a JSON file of it
SETTINGS = "csd3d.json"  # what csd3d itself keeps in a model's folder: {"defaults": ..., "parts": ...}
SHIPPED = Path(__file__).resolve().parents[1] / "assets"
PREDICTORS = ("unet", "transformer")  # what diffusers calls the noise predictor


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder: its parts, and their configs by which families tell what it is.

    A shipped model may share a part with another: {"parts": {"vae": "../ip2p/vae"}} in its csd3d.json. That is refused
    (InputError) for models from elsewhere, which could otherwise point anywhere on the disk.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def part(self, name: str) -> Path:
        """The folder of a part, which need not be there."""
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
        """Whether there is a folder of that part."""
        return self.part(name).is_dir()

    def config(self, name: str) -> dict[str, Any]:
        """A part's config as JSON says it; {} where there is none."""
        path = self.part(name) / ("scheduler_config.json" if name == "scheduler" else "config.json")
        return read_json(path, CONFIG) if path.is_file() else {}

    def index(self) -> dict[str, Any]:
        """model_index.json, of which only plain values are ever used; {} where there is none."""
        path = self.path / "model_index.json"
        return read_json(path, CONFIG) if path.is_file() else {}

    def settings(self) -> dict[str, Any]:
        """csd3d.json; {} where there is none."""
        path = self.path / SETTINGS
        return read_json(path, "what csd3d is told of a model") if path.is_file() else {}


def load_parts(folder: ModelFolder, classes: Mapping[str, type], device: torch.device) -> dict[str, Any]:
    """The networks of a model, in float32 on `device`, and its tokenizers, each by its class."""
    parts: dict[str, Any] = {}
    for part, wanted in classes.items():
        if part.startswith("tokenizer"):
            parts[part] = load_tokenizer(folder, part, wanted)
        else:
            parts[part] = load_network(folder, part, wanted).to(device, torch.float32)
    for part in (part for part in parts if part.startswith("tokenizer")):
        encoder = part.replace("tokenizer", "text_encoder")
        if len(parts[part]) > parts[encoder].config.vocab_size:
            raise InputError(
                f"{folder}: {encoder} ({parts[encoder].config.vocab_size} tokens) does not suit {part} "
                f"({len(parts[part])} tokens)"
            )
    return parts


def check_width(folder: ModelFolder, part: str, takes: int, given: int, what: str = "text") -> None:
    """InputError where a predictor is for text of another width than the text encoders give."""
    if takes != given:
        raise InputError(f"{folder}/{part}: is for {what} of width {takes}, the text encoders give {given}")


def check_channels(folder: ModelFolder, part: str, config: Any, latent: int, editing: bool) -> None:
    """InputError where a predictor does not suit a VAE of so many channels; twice as many in are an editing model's."""
    if config.in_channels not in (latent, 2 * latent if editing else latent) or config.out_channels != latent:
        also = f" or {2 * latent} (editing)" if editing else ""
        raise InputError(
            f"{folder}/{part}: {config.in_channels} channels in and {config.out_channels} out do not suit a VAE "
            f"of {latent}: {latent} (text to image){also} in and {latent} out would"
        )


def load_network(folder: ModelFolder, part: str, wanted: type) -> torch.nn.Module:
    """The network of class `wanted` in `folder`/`part`, with every one of its tensors in the weights."""
    path, config = folder.part(part), read_config(folder, part)
    kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if kind not in (wanted.__name__, None):
        raise InputError(f"{path}/config.json: holds a {kind}, a {wanted.__name__} is needed")
    variant = _find_weights(path, weights_name(part))

    def load() -> tuple[torch.nn.Module, dict[str, Any]]:
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "variant": variant}
        return wanted.from_pretrained(path, **options)

    model, info = opened(path, load)
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"{path}: its weights lack {len(lacking)} of the tensors, {lacking[0]} first")
    return model


def weights_name(part: str) -> str:
    """What a part's weights are called, less the suffix: by transformers for text encoders, else by diffusers."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_files(stem: str) -> dict[str | None, tuple[str, str, str]]:
    """By variant, the best first: the file of all weights, the pattern of their shards and the shards' index.

    A plain file is preferred to one in half precision, None being the plain variant.
    """
    return {
        None: (f"{stem}.safetensors", f"{stem}-0*-of-*.safetensors", f"{stem}.safetensors.index.json"),
        "fp16": (f"{stem}.fp16.safetensors", f"{stem}.fp16-0*-of-*.safetensors", f"{stem}.safetensors.index.fp16.json"),
    }


def _find_weights(folder: Path, stem: str) -> str | None:
    """The variant of the safetensors weights that are there (None: the plain ones); InputError where there are none."""
    for variant, (whole, _, index) in weight_files(stem).items():
        if (folder / whole).is_file() or (folder / index).is_file():
            return variant
    if pickles := [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]:
        raise InputError(
            f"{folder}: has only {pickles[0].name}, a pickle, which can run code and is not opened; save the pipeline "
            "again with save_pretrained(folder, safe_serialization=True)"
        )
    raise InputError(f"{folder}: {stem}.safetensors is missing")


def load_tokenizer(folder: ModelFolder, part: str, wanted: type) -> Any:
    """The tokenizer of class `wanted`, CLIP's or T5's, in `folder`/`part`."""
    path = folder.part(part)
    files = {file.name for file in path.iterdir()} if path.is_dir() else set()
    # transformers makes an empty vocabulary where files are missing, and says nothing
    if wanted is CLIPTokenizer and "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise InputError(f"{path}: missing; needs tokenizer.json, or vocab.json with merges.txt")
    if wanted is T5TokenizerFast and "tokenizer.json" not in files:
        if "spiece.model" not in files:
            raise InputError(f"{path}: missing; needs tokenizer.json or spiece.model")
        if importlib.util.find_spec("sentencepiece") is None:
            raise InputError(f"{path}: has spiece.model but no tokenizer.json, which needs: pip install sentencepiece")
    return opened(path, lambda: wanted.from_pretrained(path, local_files_only=True))


def load_noise_schedule(folder: ModelFolder) -> DDIMScheduler:
    """The noise schedule as a DDIM scheduler, which reads every β-schedule that these models were trained with."""
    config = read_config(folder, "scheduler")
    kind, prediction = config.get("_class_name", ""), config.get("prediction_type", "epsilon")
    if "Flow" in kind or "EDM" in kind or prediction not in ("epsilon", "v_prediction", "sample"):
        raise InputError(
            f"{folder}/scheduler/scheduler_config.json: {kind} with prediction_type {prediction!r} is not supported; "
            "epsilon, v_prediction and sample are"
        )
    return opened(folder.part("scheduler"), lambda: DDIMScheduler.from_config(config))


def load_flow_schedule(folder: ModelFolder) -> FlowMatchEulerDiscreteScheduler:
    """The times of a flow-matching model."""
    config = read_config(folder, "scheduler")
    kind = config.get("_class_name", "")
    if "FlowMatch" not in kind or config.get("invert_sigmas"):
        raise InputError(
            f"{folder}/scheduler/scheduler_config.json: {kind} with invert_sigmas "
            f"{config.get('invert_sigmas', False)} is not supported for a transformer; FlowMatchEulerDiscreteScheduler "
            "with invert_sigmas false is"
        )
    return opened(folder.part("scheduler"), lambda: FlowMatchEulerDiscreteScheduler.from_config(config))


def read_config(folder: ModelFolder, part: str) -> dict[str, Any]:
    """A part's config as JSON says it; InputError where there is none."""
    if config := folder.config(part):
        return config
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    raise InputError(f"prior.model: {folder} lacks {part}/{name}; give a complete diffusers folder")


def opened(path: Path, load: Callable[[], Any]) -> Any:
    """What `load` returns, opening `path`."""
    try:
        return load()
    except Exception as error:  # a broken file shows up as any of a dozen libraries' errors
        raise InputError(f"{path}: could not be opened ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """An error in at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silences loaders, which report each tensor in bars and tables; what matters of it is checked and raised here."""
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
