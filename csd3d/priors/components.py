"""Opening one component of a diffusers folder: a network, a tokenizer, a config, a scheduler.

Each is opened by the class that its place in the model calls for, never by one that the folder names, so that a folder
can run no code of its own; weights are safetensors only. All raise InputError in one line that names the file.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import CLIPTokenizer, T5TokenizerFast

from csd3d.errors import InputError


def load_network(folder: Path, part: str, wanted: type) -> torch.nn.Module:
    """The network of class `wanted` in `folder`/`part`, with every one of its tensors in the weights."""
    config = read_config(folder, part)
    kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if kind not in (wanted.__name__, None):
        raise InputError(f"{folder / part}/config.json: holds a {kind}, a {wanted.__name__} is needed")
    variant = _find_weights(folder / part, weights_name(part))

    def load() -> tuple[torch.nn.Module, dict[str, Any]]:
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "variant": variant}
        return wanted.from_pretrained(folder / part, **options)

    model, info = opened(folder / part, load)
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"{folder / part}: its weights lack {len(lacking)} of the tensors, {lacking[0]} first")
    return model


def weights_name(part: str) -> str:
    """What a part's weights are called, less the suffix: by transformers for text encoders, else by diffusers."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def _find_weights(folder: Path, stem: str) -> str | None:
    """The variant of the safetensors weights that are there (None: the plain ones); InputError where there are none."""
    if any((folder / f"{stem}{suffix}").is_file() for suffix in (".safetensors", ".safetensors.index.json")):
        return None
    if (folder / f"{stem}.fp16.safetensors").is_file():
        return "fp16"
    if pickles := [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]:
        raise InputError(
            f"{folder}: has only {pickles[0].name}, a pickle, which can run code and is not opened; save the pipeline "
            "again with save_pretrained(folder, safe_serialization=True)"
        )
    raise InputError(f"{folder}: {stem}.safetensors is missing")


def load_tokenizer(folder: Path, part: str, wanted: type) -> Any:
    """The tokenizer of class `wanted`, CLIP's or T5's, in `folder`/`part`."""
    path = folder / part
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


def load_noise_schedule(folder: Path) -> DDIMScheduler:
    """The noise schedule as a DDIM scheduler, which reads every β-schedule that these models were trained with."""
    config = read_config(folder, "scheduler")
    kind, prediction = config.get("_class_name", ""), config.get("prediction_type", "epsilon")
    if "Flow" in kind or "EDM" in kind or prediction not in ("epsilon", "v_prediction", "sample"):
        raise InputError(
            f"{folder}/scheduler/scheduler_config.json: {kind} with prediction_type {prediction!r} is not supported; "
            "epsilon, v_prediction and sample are"
        )
    return opened(folder / "scheduler", lambda: DDIMScheduler.from_config(config))


def load_flow_schedule(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The times of a flow-matching model."""
    config = read_config(folder, "scheduler")
    kind = config.get("_class_name", "")
    if "FlowMatch" not in kind or config.get("invert_sigmas"):
        raise InputError(
            f"{folder}/scheduler/scheduler_config.json: {kind} with invert_sigmas "
            f"{config.get('invert_sigmas', False)} is not supported for a transformer; FlowMatchEulerDiscreteScheduler "
            "with invert_sigmas false is"
        )
    return opened(folder / "scheduler", lambda: FlowMatchEulerDiscreteScheduler.from_config(config))


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """A part's config as JSON says it."""
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not path.is_file():
        raise InputError(f"prior.model: {folder} lacks {path.relative_to(folder)}; give a complete diffusers folder")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold a JSON object, holds a {type(config).__name__}")
    return config


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
