"""LoRA on top of a model: diffusers reads it in every common form, peft adds it, and it becomes part of the weights.

    prior:
      lora: [style.safetensors:0.8, owner/name]      # PLACE or PLACE:SCALE; pip install -c constraints.txt -e ".[lora]"

PLACE is a safetensors file, a folder with one, a hub name, or a hub name with a file: owner/name/file.safetensors.
Merged weights cost nothing as the model runs, and VSD's own LoRA can be added to them.
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from csd3d.errors import InputError
from csd3d.paths import split_number
from csd3d.priors.weights import tensor_shapes

NAME = "csd3d"  # of the adapter while it is added
MIXINS = {  # of diffusers' pipelines, by the class of the noise predictor: how they read a LoRA
    "UNet2DConditionModel": "StableDiffusionLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
}
SDXL_MIXIN = "StableDiffusionXLLoraLoaderMixin"
KOHYA = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and how strongly it is added."""

    file: Path
    scale: float = 1.0


def check_lora(texts: list[str]) -> None:
    """Raise InputError for an entry that says no place, a scale that is too large, or where peft is missing."""
    for text in texts:
        place, scale = split_number(text)
        if not place or not math.isfinite(number := float(scale[1:] or 1)) or abs(number) > 100:
            raise InputError(f"prior.lora: {text!r} is no PLACE or PLACE:SCALE with a scale from -100 to 100")
    if texts and importlib.util.find_spec("peft") is None:
        raise InputError('prior.lora: needs peft: pip install -c constraints.txt -e ".[lora]"')


def parts_in(file: Path) -> set[str]:
    """The parts of a model that a LoRA file has weights for; InputError where it is no LoRA."""
    names = list(tensor_shapes(file))
    if not any("lora" in name or "lokr" in name for name in names):
        raise InputError(f"prior.lora: {file}: holds no LoRA (its first tensor is {next(iter(names), 'missing')})")
    first = {name.split(".")[0] for name in names}
    kohya = {part for prefix, part in KOHYA.items() if any(name.startswith(f"{prefix}_") for name in first)}
    return kohya | {name for name in first if name in ("unet", "transformer") or name.startswith("text_encoder")}


def merge(network: nn.Module, part: str, lora: Lora, predictor: Any) -> None:
    """Add a LoRA's weights for `part`, if it has any, to those of the network.

    predictor: the config of the noise predictor, by which the LoRA is read.  Raises InputError where the LoRA is for
    another model.
    """
    if part not in parts_in(lora.file):
        return
    try:
        given, put = _added(network, part, lora, predictor)
        _merged(network, lora.scale)
    except Exception as error:  # of three libraries; shapes and names that do not fit
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"prior.lora: {lora.file}: does not fit this model's {part} ({reason})") from None
    if given != put:
        raise InputError(
            f"prior.lora: {lora.file}: is for another model: of its {given} tensors for the {part}, {put} fit"
        )


def _added(network: nn.Module, part: str, lora: Lora, predictor: Any) -> tuple[int, int]:
    """Add the LoRA as an adapter; how many tensors it has for the part, and how many have come into the network."""
    from diffusers import loaders

    kind = predictor.get("_class_name", "UNet2DConditionModel")
    name = SDXL_MIXIN if predictor.get("addition_embed_type") == "text_time" else MIXINS[kind]
    mixin = getattr(loaders, name)
    config = {"unet_config": predictor} if name == SDXL_MIXIN else {}
    state, *more = mixin.lora_state_dict(str(lora.file), return_lora_metadata=True, use_safetensors=True, **config)
    alphas, metadata = more if len(more) == 2 else (None, more[0])
    options = {"network_alphas": alphas, "adapter_name": NAME, "metadata": metadata}
    if part.startswith("text_encoder"):
        mixin.load_lora_into_text_encoder(state, text_encoder=network, prefix=part, **options)
    else:
        network.load_lora_adapter(state, prefix=part, **options)
    put = [name for name, _ in network.named_parameters() if f".{NAME}." in name or name.endswith(f".{NAME}")]
    return sum(name.startswith(f"{part}.") for name in state), len(put)


def _merged(network: nn.Module, scale: float) -> None:
    """Make the adapter part of the weights, and the network what it was without peft."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(scale)
            module.merge(safe_merge=True, adapter_names=[NAME])
    recurse_remove_peft_layers(network)
    network._hf_peft_config_loaded = False
    if hasattr(network, "peft_config"):
        del network.peft_config
