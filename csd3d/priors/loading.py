"""Opening a prior: find the model's folder, then its family, which loads it."""

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch

from csd3d import registry
from csd3d.devices import FORMS, choose_device, is_device
from csd3d.errors import InputError, at_key
from csd3d.priors.adapters import check_lora
from csd3d.priors.compiled import check_compiler
from csd3d.priors.hub import fetch_weights, find_lora, find_model, model_files, with_loras
from csd3d.priors.libraries import quiet
from csd3d.priors.memory import ATTENTION
from csd3d.priors.model_settings import check_working_size, read_defaults
from csd3d.priors.opening import PREDICTORS, ModelFolder
from csd3d.priors.options import Options
from csd3d.priors.prior import Prior
from csd3d.priors.quantised import QUANTISE, check_quantise
from csd3d.priors.runtimes import check_installed, check_runtime, counted
from csd3d.priors.trying import try_out
from csd3d.schema import Within, counted_as, incidental, path_key, path_keys

logger = logging.getLogger("csd3d")
EXACT = ":exact"  # what the names of registered priors end with; "world:exact" is csd3d.world.exact_prior
OF_NETWORKS = (  # keys of a PriorConfig that say nothing of a prior without a network
    *("config", "lora", "family", "quantise", "compile", "runtime", "distilled_guidance"),
    *("offload", "attention", "drop_text_encoder", "embedding_cache"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def unless(default: Any) -> Callable[[Any], Any]:
    """What a checkpoint's identity says of a key: nothing where it has its default."""
    return lambda value: None if value == default else value


@dataclass
class PriorConfig:
    """Which diffusion model, and how it runs."""

    model: str = path_key()  # a diffusers folder, one .safetensors, or a hub name such as timbrooks/instruct-pix2pix
    config: str = path_key(identity=False)  # folder or hub name with the configs of a single file; "": as inferred
    lora: list[str] = path_keys()  # LoRA to add, each a file, folder or hub name, with :SCALE if not 1 (extra lora)
    family: str = "auto"  # the kind of model: auto (recognised by its configs), or a registered family's name
    device: str = incidental("auto")  # of the whole job: auto (CUDA if there is one), cpu, cuda, cuda:N; --device wins
    dtype: str = "auto"  # auto (float16 on CUDA, else float32), float32, float16, or bfloat16 (for the VAE too)
    weights: str = counted_as(unless("auto"), "auto")  # as kept: auto (dtype's on CUDA, else float32) or as dtype
    quantise: str = counted_as(unless("none"), "none")  # none, or the predictor: bnb-int8, bnb-nf4, torchao-int8
    compile: bool = counted_as(unless(False), False)  # torch.compile the noise predictor: slow start, faster steps
    offload: str = incidental("none")  # none, or model: on a card, predictor and text encoder wait on the host
    runtime: str = counted_as(counted, "torch")  # noise predictor's: torch, or on a CPU openvino, onnxruntime (extras)
    micro_batch: int = incidental(16)  # most elements sent through a network at once; fewer need less memory
    attention: str = incidental("auto")  # auto (as diffusers chooses), sdpa, or sliced (less memory, UNets only)
    vae_slicing: bool = incidental(False)  # the VAE takes one image at a time, whatever micro_batch is
    # guidance scale that a distilled model (FLUX) is told; null: the model's default
    distilled_guidance: Annotated[float, Within(0, 100)] | None = counted_as(lambda scale: scale, None)
    drop_text_encoder: bool = incidental(False)  # free the text encoder before the noise predictor is opened
    embedding_cache: str = path_key(identity=False, made=True)  # folder that keeps embeddings of prompts; "": none

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(f"prior.dtype: {self.dtype!r} is none of auto, {', '.join(DTYPES)}")
        if not is_device(self.device):
            raise InputError(f"prior.device: {self.device!r} is none of {FORMS}")
        if self.micro_batch < 1:
            raise InputError(f"prior.micro_batch: must be at least 1, got {self.micro_batch}")
        if self.attention not in ATTENTION:
            raise InputError(f"prior.attention: {self.attention!r} is none of {', '.join(ATTENTION)}")
        check_runtime(self.runtime, self.dtype, self.attention)
        for key, known in {"weights": ("auto", *DTYPES), "offload": ("none", "model"), "quantise": QUANTISE}.items():
            if getattr(self, key) not in known:
                raise InputError(f"prior.{key}: {getattr(self, key)!r} is none of {', '.join(known)}")
        clashes = {"quantise": ("lora", "offload", "compile"), "runtime": ("quantise", "compile", "offload")}
        usual = {"runtime": "torch", "quantise": "none", "offload": "none", "compile": False, "lora": []}
        for key, others in clashes.items():
            for other in others:
                if getattr(self, key) != usual[key] and getattr(self, other) != usual[other]:
                    raise InputError(f"prior.{other}: does not go with prior.{key}={getattr(self, key)}; leave one out")


def load_prior(config: PriorConfig, require: Literal["edit", "text"] | None = None) -> Prior:
    """Open a prior on its device, frozen; `require` an editing model or a text-to-image model, or accept either.

    Raises InputError naming the folder and the part that is missing, broken or of the wrong kind. A hub model's weights
    are downloaded only after its configs show that it is supported.
    """
    if config.model.endswith(EXACT):
        return _open_exact(config, require)
    options = _options(config)
    folder = find_model(config.model, config.config)
    family = find_family(folder, config.family)
    parts = getattr(family, "parts", {})
    defaults = read_defaults(folder, parts)
    if check := getattr(family, "check", None):
        check(folder)
    if check_options := getattr(family, "check_options", None):
        check_options(folder, options)
    entry = registry.entry_of("family", family)
    title = entry.title if entry else family.__name__
    if edits := getattr(family, "edits", None):
        _check_require(folder, title, edits(folder), require)
    if config.lora:
        loras = tuple(find_lora(text, folder, parts) for text in config.lora)
        folder, options = with_loras(folder, loras), replace(options, lora=loras)
    fetch_weights(folder, parts, options.kept)
    with quiet():
        prior = registry.returned("family", family, "load", family.load(folder, options), Prior)
    prior.family = title
    prior.knows = folder.settings().get("knows", "")
    _check_require(folder, title, prior.edits, require)
    if config.distilled_guidance is not None and prior.distilled_guidance is None:
        told = f"{folder}, of the family {prior.family!r}, is not told a guidance scale"
        raise InputError(f"prior.distilled_guidance: {told}; leave it out")
    prior.defaults = replace(prior.defaults, **defaults)
    check_working_size(folder, prior.defaults.working_size)
    prior.files = model_files(folder, parts, options.kept)
    if family.__module__.startswith("csd3d."):  # a plugin's may have no text encoder, or another kind of picture
        try_out(prior, folder)
    return prior


def _open_exact(config: PriorConfig, require: Literal["edit", "text"] | None) -> Prior:
    """Open a registered prior, which has no network."""
    for key in OF_NETWORKS:
        if getattr(config, key) != getattr(PriorConfig(), key):
            raise InputError(f"prior.{key}: {config.model} has no network that this could be said of; leave it out")
    with at_key(f"prior.model: {config.model}"):
        opener = registry.get("prior", config.model.removesuffix(EXACT)).thing
    return registry.returned("prior", opener, "the opener", opener(_options(config), require), Prior)


def find_family(folder: ModelFolder, name: str = "auto") -> Any:
    """The family called `name`, or for "auto" the one whose `matches` accepts the folder.

    Raises InputError naming the model's class and the families where none does, or those where several do.
    """
    if name != "auto":
        return registry.get("family", name, key="prior.family").thing
    found = [entry for entry in registry.entries("family") if entry.thing.matches(folder)]
    if len(found) == 1:
        return found[0].thing
    if found:
        names = " and ".join(f"{entry.name} ({entry.title})" for entry in found)
        raise InputError(f"prior.model: {folder}: several families know it, {names}; choose one with prior.family=NAME")
    known = "; ".join(f"{entry.name} ({entry.title})" for entry in registry.entries("family"))
    configs = {part: config for part in PREDICTORS if (config := folder.config(part))}
    if not configs:
        raise InputError(
            f"prior.model: {folder} lacks {' and '.join(f'{part}/config.json' for part in PREDICTORS)}, one of which "
            f"would say what it is; give a complete diffusers folder, of one of the families {known}"
        )
    part, config = next(iter(configs.items()))
    # models of one class differ in the other inputs of their predictor
    inputs = [f"{key} = {value!r}" for key, value in config.items() if value and key.endswith("_embed_type")]
    kind = " with ".join([str(config.get("_class_name")), *([", ".join(inputs)] if inputs else [])])
    if pipeline := folder.index().get("_class_name"):  # models of one transformer may differ in the pipeline alone
        kind += f" of a {pipeline}"
    raise InputError(
        f"prior.model: {folder}/{part}/config.json: a {kind} is not supported; supported are {known}. "
        "prior.family can name one"
    )


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16: on x86 by AVX512-BF16 or AMX; others are taken to."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: True)() for name in checks)


def _options(config: PriorConfig) -> Options:
    device, dtype = choose_device(config.device), config.dtype
    if dtype == "auto":
        dtype = "float16" if device.type == "cuda" else "float32"
    if dtype == "float16" and device.type == "cpu":
        raise InputError("prior.dtype: float16 needs CUDA; on the CPU use float32 or bfloat16")
    check_installed(config.runtime, device)
    check_quantise(config.quantise)
    check_lora(config.lora)
    if config.compile:
        check_compiler(device)
    weights = {"auto": dtype if device.type == "cuda" else "float32"}.get(config.weights, config.weights)
    if weights not in ("float32", dtype):
        raise InputError(
            f"prior.weights: {weights} needs prior.dtype={weights}, which computes in it; here that is {dtype}"
        )
    offload = config.offload if device.type == "cuda" else "none"  # elsewhere all is on the host
    if dtype == "bfloat16" and device.type == "cpu" and not has_bfloat16():
        logger.warning("prior.dtype: bfloat16: this processor has no instructions for it, float32 is faster")
    same = {option.name for option in fields(Options)} - {"device", "dtype", "weights", "offload", "lora"}
    same = {name: getattr(config, name) for name in same}
    return Options(device, DTYPES[dtype], DTYPES[weights], offload, **same)


def _check_require(folder: ModelFolder, family: str, edits: bool, require: str | None) -> None:
    if require in (None, "edit" if edits else "text"):
        return
    edit, text = "an editing model", "a text-to-image model"
    found = f"{edit} (it has a `source`)" if edits else f"{text} (it has no `source`)"
    needed = {"edit": f"{edit}, such as InstructPix2Pix", "text": text}[require]
    raise InputError(f"prior.model: {folder}, of the family {family!r}, is {found}; this job needs {needed}")
