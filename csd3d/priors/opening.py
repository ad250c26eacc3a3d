"""A diffusers folder, and opening one part of it: a network, a tokenizer, a config.

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
from typing import Any

import torch

from csd3d.errors import InputError
from csd3d.files import read_json
from csd3d.priors import adapters
from csd3d.priors.later import Later, check_tensors, without_weights
from csd3d.priors.libraries import opened
from csd3d.priors.options import Options
from csd3d.priors.quantised import quantisation
from csd3d.priors.weights import check_types, find_weights, shapes_in, weight_files, weights_name

Class = type | str  # a class, or its full name: "diffusers.AutoencoderKL"
CONFIG = "a part of a diffusers model"  # how error messages describe a JSON file of it
SETTINGS = "csd3d.json"  # csd3d's own file in a model's folder: {"defaults": ..., "knows": ..., "parts": ...}
SHIPPED = Path(__file__).resolve().parents[1] / "assets"
LAYERS = ("layers_per_block", "num_layers", "num_single_layers", "num_hidden_layers", "num_res_blocks", "depth")
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
        # text that no path can have would raise ValueError
        place = Path() if "\0" in shared[name] else (self.path / shared[name]).resolve()
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
        place = self.part(part)
        check_tensors(network, shapes_in(weight_files(place, weights_name(part), kept)), str(place))
        return True

    def tensor_count(self, part: str, kept: str) -> int:
        """The number of tensors that the files of a part hold."""
        return len(shapes_in(weight_files(self.part(part), weights_name(part), kept)))

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
    _check_layers(folder.part(part) / config_name(part), config, folder.tensor_count(part, options.kept))
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


def _check_layers(file: Path, config: Mapping[str, Any], most: int) -> None:
    """Raise InputError where a config says fewer than 0 layers or more than its weights have tensors: `most`.

    Building a network of ten million layers would take hours.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_layers(file, value, most)
        for number in flat(value) if key.endswith(LAYERS) else ():
            if type(number) is int and not 0 <= number <= most:
                right = f"0 to {most}, as many as the weights have tensors"
                raise InputError(f"{file}: {key}: expected {right}, got {number}")


def flat(value: Any) -> list[Any]:
    """The items of lists in each other; another value alone."""
    return [item for each in value for item in flat(each)] if isinstance(value, list) else [value]


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
    try:
        model, info = opened(path, lambda: cls.from_pretrained(path, variant=variant, **options))
    except InputError as error:
        if "ignore_mismatched_sizes" not in str(error):  # transformers' advice, which names no tensor
            raise
        options["ignore_mismatched_sizes"] = True
        model, info = opened(path, lambda: cls.from_pretrained(path, variant=variant, **options))
        name, shape, right = sorted(info["mismatched_keys"])[0]
        raise InputError(f"{path}: {name} has the shape {tuple(shape)}, its config says {tuple(right)}") from None
    state = model.state_dict()
    for file in weight_files(path, stem, kept):
        check_types(file, lambda name: name in state and state[name].is_floating_point())
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
    try:
        tokenizer = opened(path, lambda: cls.from_pretrained(path, local_files_only=True))
    except InputError:
        for file in sorted(path.glob("*.json")):
            read_json(file, "a part of a tokenizer")  # which says the file, if it is that
        raise
    longest = tokenizer.model_max_length
    if not isinstance(longest, (int, float)) or longest < 2:
        raise InputError(
            f"{path}/tokenizer_config.json: model_max_length: expected a number of tokens, got {longest!r}"
        )
    return tokenizer


def read_config(folder: ModelFolder, part: str) -> dict[str, Any]:
    """The JSON config of a part; InputError without one."""
    if config := folder.config(part):
        return config
    raise InputError(f"prior.model: {folder} lacks {part}/{config_name(part)}; give a complete diffusers folder")
