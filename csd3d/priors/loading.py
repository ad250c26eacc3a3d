"""Opening a prior: a diffusers folder on disk, or a hub name that is downloaded as one.

Components are opened one by one by their own classes (`components`), never through model_index.json, so that a folder
can run no code of its own; weights are safetensors only.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi, snapshot_download

from csd3d.errors import InputError
from csd3d.priors.components import one_line, quiet, weights_name
from csd3d.priors.diffusers_prior import DiffusersPrior
from csd3d.priors.embedding_cache import fingerprint
from csd3d.priors.kinds import NETWORKS, check_fit, find_kind, load_parts, make_codec, make_recipe, make_schedule
from csd3d.priors.memory import ATTENTION, set_attention
from csd3d.priors.text import TextEncoder
from csd3d.schema import path_key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_TIMEOUT_S = 5.0
HUB_FILES = ["model_index.json", "*/*.json", "tokenizer*/*"] + [
    f"{part}/{weights_name(part)}{suffix}" for part in NETWORKS for suffix in (".safetensors", "-0*-of-*.safetensors")
]


@dataclass
class PriorConfig:
    """Which diffusion model, and how it runs.

    model: a diffusers folder or a hub name such as timbrooks/instruct-pix2pix: Stable Diffusion 1.x/2.x, XL or 3.x,
        InstructPix2Pix (of SD or SDXL), DeepFloyd IF's first stage
    device: auto (CUDA if there is one) | cpu | cuda | cuda:N
    dtype: of the noise predictor's matrix products: auto (float32 on the CPU, float16 on CUDA) | float32 | bfloat16 |
        float16. Weights are held in float32 all the same: 4 bytes a parameter
    micro_batch: most elements sent through a network at once; less needs less memory
    attention: auto | sdpa | sliced (UNets only); see `memory.set_attention`
    vae_slicing: the VAE takes one image at a time, whatever micro_batch is
    drop_text_encoder: the text encoder is freed once the first noise is predicted; a job embeds its prompts before
    embedding_cache: a folder that keeps embeddings of prompts from run to run; "" for none
    """

    model: str = path_key()
    device: str = "auto"
    dtype: str = "auto"
    micro_batch: int = 16
    attention: str = "auto"
    vae_slicing: bool = False
    drop_text_encoder: bool = False
    embedding_cache: str = path_key(identity=False)

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(f"prior.dtype: {self.dtype!r} is none of auto, {', '.join(DTYPES)}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"prior.device: {self.device!r} is none of auto, cpu, cuda, cuda:N")
        if self.micro_batch < 1:
            raise InputError(f"prior.micro_batch: must be at least 1, got {self.micro_batch}")
        if self.attention not in ATTENTION:
            raise InputError(f"prior.attention: {self.attention!r} is none of {', '.join(ATTENTION)}")


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
    with quiet():
        kind = find_kind(folder)
        if kind == "sd3" and config.attention == "sliced":
            raise InputError(f"prior.attention: sliced is for UNets, {folder} holds a transformer; use auto or sdpa")
        parts = load_parts(folder, kind, device)
        alphas_cumprod, prediction_type = make_schedule(kind, folder, parts)
    check_fit(folder, kind, parts, require)
    unet = parts["transformer" if kind == "sd3" else "unet"]
    if kind != "sd3":  # whose attention is sdpa in any case
        set_attention(unet, config.attention)
    if config.vae_slicing and "vae" in parts:
        parts["vae"].enable_slicing()
    return DiffusersPrior(
        make_codec(kind, parts),
        unet,
        _text_encoder(config, folder, kind, parts, device),
        alphas_cumprod,
        prediction_type,
        unet_dtype=DTYPES[dtype],
        micro_batch=config.micro_batch,
        drop_text_encoder=config.drop_text_encoder,
    )


def _text_encoder(config: PriorConfig, folder: Path, kind: str, parts: dict, device: torch.device) -> TextEncoder:
    """The text encoders and tokenizers among `parts`, with their embeddings kept on disk where that is asked for."""
    name, recipe = make_recipe(kind, folder, parts)
    texts = {part: value for part, value in parts.items() if part.startswith(("text_encoder", "tokenizer"))}
    if not config.embedding_cache:
        return TextEncoder(texts, recipe, device)
    cache = Path(config.embedding_cache).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"prior.embedding_cache: {cache} can't be made a folder ({one_line(error)})") from None
    return TextEncoder(texts, recipe, device, cache, fingerprint(folder, name))


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
        raise InputError(f"prior.model: {model} is a file; give the diffusers folder that holds unet, vae and the rest")
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
            f"({one_line(reason or error)}); point prior.model to a local folder that holds it"
        ) from None
