"""Opening a prior: a diffusers folder on disk, or a hub name that is downloaded as one.

Components are opened one by one by their own classes, never through model_index.json, so that a folder can run no code
of its own; weights are safetensors only.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import HfApi, snapshot_download
from transformers import CLIPTextModel, CLIPTokenizer

from csd3d.errors import InputError
from csd3d.priors.diffusers_prior import DiffusersPrior

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
CONFIGS = {"scheduler": "scheduler_config.json"} | {part: "config.json" for part in WEIGHTS}
CLASSES = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
HUB_TIMEOUT_S = 5.0
HUB_FILES = ["*/*.json", "tokenizer/*"] + [
    f"{part}/{stem}{suffix}" for part, stem in WEIGHTS.items() for suffix in (".safetensors", "-0*-of-*.safetensors")
]


@dataclass
class PriorConfig:
    """Which diffusion model, and how it runs.

    model: a diffusers folder (Stable Diffusion's or InstructPix2Pix's) or a hub name such as timbrooks/instruct-pix2pix
    device: auto (CUDA if there is one) | cpu | cuda | cuda:N
    dtype: of the UNet's matrix products: auto (float32 on the CPU, float16 on CUDA) | float32 | bfloat16 | float16
    micro_batch: most elements sent through a network at once; less needs less memory
    """

    model: str = ""
    device: str = "auto"
    dtype: str = "auto"
    micro_batch: int = 16

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(f"prior.dtype: {self.dtype!r} is none of auto, {', '.join(DTYPES)}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"prior.device: {self.device!r} is none of auto, cpu, cuda, cuda:N")
        if self.micro_batch < 1:
            raise InputError(f"prior.micro_batch: must be at least 1, got {self.micro_batch}")


def load_prior(config: PriorConfig, require: Literal["edit", "text"] | None = None) -> DiffusersPrior:
    """Opens a prior on its device, frozen; `require` says what it must be good for: editing images, or text alone.

    Raises InputError naming the folder, and the part of it that is missing, broken or of the wrong kind; for a hub
    name, when the hub can't be reached and nothing is cached (known within seconds).
    """
    device, dtype = choose_device(config.device), config.dtype
    if dtype == "auto":
        dtype = "float16" if device.type == "cuda" else "float32"
    if dtype == "float16" and device.type == "cpu":
        raise InputError("prior.dtype: float16 needs CUDA; on the CPU use float32 or bfloat16")
    folder = find_model(config.model)
    with _quiet():
        networks = {part: _load_network(folder, part).to(device, torch.float32) for part in CLASSES}
        tokenizer = _load_tokenizer(folder)
        schedule = _load_schedule(folder)
    _check_fit(folder, networks, tokenizer, require)
    return DiffusersPrior(
        **networks,
        tokenizer=tokenizer,
        alphas_cumprod=schedule.alphas_cumprod,
        prediction_type=schedule.config.prediction_type,
        unet_dtype=DTYPES[dtype],
        micro_batch=config.micro_batch,
    )


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for; InputError where it is not there."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"prior.device: {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def find_model(model: str) -> Path:
    """The folder of a model: itself if it is one, else the local copy of the hub's repository of that name."""
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if folder.is_file():
        raise InputError(f"prior.model: {model} is a file; give the diffusers folder that holds {', '.join(CLASSES)}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return _hub_snapshot(model)
    raise InputError(f"prior.model: {model!r} is neither a folder that exists nor a hub name (owner/name)")


def _hub_snapshot(name: str) -> Path:
    # by its version, the hub's library fails through requests, httpx or OSError: to the user each is the same one line
    revision, reason = None, None
    try:
        revision = HfApi().model_info(name, timeout=HUB_TIMEOUT_S).sha
    except Exception as error:
        reason = error
    try:  # with no answer from the hub, a copy from an earlier run will do
        offline = revision is None
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, local_files_only=offline))
    except Exception as error:
        raise InputError(
            f"prior.model: there is no folder {name!r}, and the hub did not give a model of that name "
            f"({_one_line(reason or error)}); point prior.model to a local folder that holds it"
        ) from None


def _load_network(folder: Path, part: str) -> torch.nn.Module:
    config = _read_config(folder, part)
    kind, wanted = config.get("_class_name") or (config.get("architectures") or [None])[0], CLASSES[part].__name__
    if kind not in (wanted, None):
        raise InputError(f"{folder / part}/config.json: holds a {kind}, a {wanted} is needed")
    variant = _find_weights(folder / part, WEIGHTS[part])

    def load() -> tuple[torch.nn.Module, dict[str, Any]]:
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "variant": variant}
        return CLASSES[part].from_pretrained(folder / part, **options)

    model, info = _opened(folder / part, load)
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"{folder / part}: its weights lack {len(lacking)} of the tensors, {lacking[0]} first")
    return model


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


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    part = folder / "tokenizer"
    files = {path.name for path in part.iterdir()} if part.is_dir() else set()
    # transformers makes an empty vocabulary where files are missing, and says nothing
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise InputError(f"{part}: missing; needs tokenizer.json, or vocab.json with merges.txt")
    return _opened(part, lambda: CLIPTokenizer.from_pretrained(part, local_files_only=True))


def _load_schedule(folder: Path) -> DDIMScheduler:
    """The noise schedule as a DDIM scheduler, which reads every β-schedule that these models were trained with."""
    config = _read_config(folder, "scheduler")
    kind, prediction = config.get("_class_name", ""), config.get("prediction_type", "epsilon")
    if "Flow" in kind or "EDM" in kind or prediction not in ("epsilon", "v_prediction", "sample"):
        raise InputError(
            f"{folder}/scheduler/scheduler_config.json: {kind} with prediction_type {prediction!r} is not supported; "
            "epsilon, v_prediction and sample are"
        )
    return _opened(folder / "scheduler", lambda: DDIMScheduler.from_config(config))


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    path = folder / part / CONFIGS[part]
    if not path.is_file():
        raise InputError(f"prior.model: {folder} lacks {path.relative_to(folder)}; give a complete diffusers folder")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({_one_line(error)})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold a JSON object, holds a {type(config).__name__}")
    return config


def _check_fit(folder: Path, networks: dict[str, Any], tokenizer: CLIPTokenizer, require: str | None) -> None:
    """Raises InputError where the parts do not belong together, or the model is not of the kind that is needed."""
    unet, text, latent = (
        networks["unet"].config,
        networks["text_encoder"].config,
        networks["vae"].config.latent_channels,
    )
    kinds = {latent: "text", 2 * latent: "edit"}
    if unet.in_channels not in kinds or unet.out_channels != latent:
        raise InputError(
            f"{folder}/unet: {unet.in_channels} channels in and {unet.out_channels} out do not suit a VAE of {latent}: "
            f"{latent} (text to image) or {2 * latent} (editing) in and {latent} out would"
        )
    if require not in (None, kinds[unet.in_channels]):
        needed = {"edit": "an InstructPix2Pix model (8 channels)", "text": "a text-to-image model (4 channels)"}[
            require
        ]
        raise InputError(
            f"prior.model: the UNet of {folder} takes {unet.in_channels} channels; this job needs {needed}"
        )
    if unet.cross_attention_dim != text.hidden_size or len(tokenizer) > text.vocab_size:
        raise InputError(
            f"{folder}: text_encoder (width {text.hidden_size}, {text.vocab_size} tokens) does not suit the unet (text "
            f"width {unet.cross_attention_dim}) or the tokenizer ({len(tokenizer)} tokens)"
        )
    for key in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim"):
        if unet.get(key) is not None:
            raise InputError(
                f"{folder}/unet/config.json: {key} = {unet[key]!r} is not supported (SDXL and its like are not)"
            )


def _opened(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a broken file shows up as any of a dozen libraries' errors
        raise InputError(f"{path}: could not be opened ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def _quiet() -> Iterator[None]:
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
