"""A diffusers folder, and opening one part of it: a network, a tokenizer, a config, a scheduler.

The family says which class opens a part, never the folder, so a folder cannot run code of its own; weights are
safetensors only. All functions raise InputError in one line that names the file.

diffusers and transformers take seconds to import, so they are imported where a model is opened.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from csd3d.errors import InputError
from csd3d.files import read_json
from csd3d.priors import adapters
from csd3d.priors.later import Later, check_tensors, without_weights
from csd3d.priors.libraries import opened
from csd3d.priors.options import Options
from csd3d.priors.quantised import quantisation
from csd3d.priors.weights import find_weights, shapes_in, weight_sets, weights_name

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

Class = type | str  # a class, or its full name: "diffusers.AutoencoderKL"
CONFIG = "a part of a diffusers model"  # how error messages describe a JSON file of it
SETTINGS = "csd3d.json"  # csd3d's own file in a model's folder: {"defaults": ..., "knows": ..., "parts": ...}
SHIPPED = Path(__file__).resolve().parents[1] / "assets"
ZERO_ALPHA = 1e-10  # ᾱ below is taken for 0; a cosine schedule ends at 2e-9
LEAST_ALPHA = 2.0**-24  # what it becomes
PREDICTORS = ("unet", "transformer")  # what diffusers calls the noise predictor


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder: its parts, and their configs, by which families recognise it.

    A shipped model may share a part with another: {"parts": {"vae": "../ip2p/vae"}} in its csd3d.json. In any other
    model this is an InputError, because it could point anywhere on the disk.
    """

    path: Path
    added: Mapping[str, Path] = field(default_factory=dict, kw_only=True)  # files elsewhere that belong to the model

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

    def open(self, part: str, cls: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.nn.Module:
        """The network of a part, of class `cls`; its weights in `dtype`, or as they are in the file."""
        return open_network(self.part(part), cls, weights_name(part), dtype, **options)

    def check(self, part: str, network: torch.nn.Module, kept: str) -> bool:
        """Raise InputError unless the headers of a part's weights make the whole `network`; False: they do not tell."""
        place, stem = self.part(part), weights_name(part)
        variant = find_weights(place, stem, kept)
        sets = weight_sets(stem, (file.name for file in place.iterdir()))
        check_tensors(network, shapes_in(place, sets[variant].files), str(place))
        return True

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


def load_parts(folder: ModelFolder, classes: Mapping[str, Class], options: Options) -> dict[str, Any]:
    """Open every part of a model with its class: networks with their LoRA on the device, and tokenizers.

    Networks are kept in float32 if they are VAEs, else in `options.weights`. If `options.drop_text_encoder`, the noise
    predictor is a `Later` where its files can be checked without opening it.
    """
    parts: dict[str, Any] = {}
    # the predictor first: until it is open its weights are there twice, as in the file and as they are kept
    for part, cls in sorted(classes.items(), key=lambda item: item[0] not in PREDICTORS):
        if part.startswith("tokenizer"):
            parts[part] = open_tokenizer(folder.part(part), class_of(cls))
        else:
            parts[part] = _load_network(folder, part, class_of(cls), options)
    for part in (part for part in parts if part.startswith("tokenizer")):
        encoder = part.replace("tokenizer", "text_encoder")
        known = parts[encoder].config.get_text_config().vocab_size
        if len(parts[part]) > known:
            raise InputError(f"{folder}: {encoder} ({known} tokens) does not suit {part} ({len(parts[part])} tokens)")
    return parts


def _load_network(folder: ModelFolder, part: str, cls: Any, options: Options) -> "torch.nn.Module | Later":
    """The network of a part, in its precision and where it is to be."""
    config = read_config(folder, part)
    _check_class(folder, part, config, cls)
    predicts = part in PREDICTORS
    dtype = options.weights if predicts or part.startswith("text_encoder") else torch.float32
    # with offload, what is not at work is on the host; the VAE is small, and its gradients need it to stay
    device = torch.device("cpu") if options.offload == "model" and dtype is options.weights else options.device
    if predicts and options.quantise != "none":
        quantised = quantisation(options.quantise, options.dtype, options.device)
        load = partial(folder.open, part, cls, dtype, kept=options.kept, **quantised)
    else:
        load = lambda: folder.open(part, cls, dtype, kept=options.kept).to(device)  # noqa: E731
    if predicts and options.drop_text_encoder and options.runtime == "torch" and not options.lora:
        outline = opened(folder.part(part), lambda: without_weights(cls, config))
        if folder.check(part, outline, options.kept):
            return Later(outline.to(dtype), load)
    network = load()
    for lora in options.lora:
        adapters.merge(network, part, lora, folder.config("unet") or folder.config("transformer"))
    return network


def _check_class(folder: ModelFolder, part: str, config: Mapping[str, Any], cls: type) -> None:
    """Raise InputError where the config of a part names another class."""
    listed = config.get("architectures")
    kind = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    if kind not in (cls.__name__, None):
        raise InputError(f"{folder.part(part)}/config.json: holds a {kind}, a {cls.__name__} is needed")


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


def check_channels(folder: ModelFolder, part: str, *editing: int, more: int = 0) -> None:
    """Raise InputError, by the configs alone, unless the predictor takes and gives as many channels as the VAE's z has.

    An editing model takes one of `editing` times as many; another may take `more` besides. Channels that a config does
    not say are diffusers' own.
    """
    usual = 4 if part == "unet" else 16
    latent = read_config(folder, "vae").get("latent_channels", 4)
    config = read_config(folder, part)
    takes, gives = (config.get(key, usual) for key in ("in_channels", "out_channels"))
    known = isinstance(latent, int) and (latent, latent + more, *(times * latent for times in editing))
    if not known or takes not in known or gives != latent:
        also = "".join(f" or {times}x" for times in editing) + (" (editing)" if editing else "")
        raise InputError(
            f"{folder}/{part}/config.json: {takes!r} channels in and {gives!r} out do not suit a VAE of {latent!r}: as "
            f"many (text to image){also} in and as many out would"
        )


def takes_source(folder: ModelFolder, part: str) -> bool:
    """Whether a predictor takes a source picture beside z, by the channels in the configs alone."""
    latent, takes = folder.config("vae").get("latent_channels", 4), folder.config(part).get("in_channels", 0)
    return takes >= 2 * latent


def open_network(
    path: Path, cls: Any, stem: str, dtype: torch.dtype | None = None, kept: str = "float32", **options: Any
) -> torch.nn.Module:
    """The network of class `cls` in a folder, from weights called `stem` that hold every one of its tensors.

    kept: the precision whose variant is preferred.
    """
    options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    options |= {} if dtype is None else {"torch_dtype": dtype}
    variant = find_weights(path, stem, kept)
    model, info = opened(path, lambda: cls.from_pretrained(path, variant=variant, **options))
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"{path}: its weights lack {len(lacking)} of the tensors, {lacking[0]} first")
    return model


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
    schedule = opened(folder.part("scheduler"), lambda: DDIMScheduler.from_config(config))
    return _away_from_zero(folder, schedule, prediction)


def _away_from_zero(folder: ModelFolder, schedule: "DDIMScheduler", prediction: str) -> "DDIMScheduler":
    """The schedule with 2⁻²⁴ in place of ᾱ_T = 0, as diffusers' Euler schedulers have it.

    Models with zero terminal SNR (arXiv 2305.08891) have ᾱ_T = 0, where ẑ_0 = (z_t − σ ε)/√ᾱ is 0/0. At 2⁻²⁴ the
    rounding of float32 still leaves ẑ_0 three digits, and to the network z_t is the same. InputError for epsilon, which
    says nothing of ẑ_0 there.
    """
    alphas = schedule.alphas_cumprod
    if not alphas.isfinite().all() or alphas.max() > 1 or alphas.min() < 0:
        raise InputError(f"{folder}/scheduler/scheduler_config.json: its betas do not make a noise schedule")
    if prediction == "epsilon" and alphas.min() < ZERO_ALPHA:
        raise InputError(
            f"{folder}/scheduler/scheduler_config.json: prediction_type epsilon with zero terminal SNR "
            "(rescale_betas_zero_snr) cannot be: the noise says nothing of the picture there; v_prediction could be"
        )
    schedule.alphas_cumprod = torch.where(alphas < ZERO_ALPHA, LEAST_ALPHA, alphas)
    return schedule


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
