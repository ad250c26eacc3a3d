"""Loading the noise predictor in fewer bits, by diffusers' own quantisers.

    prior:
      quantise: bnb-nf4      # or bnb-int8, torchao-int8; pip install -c constraints.txt -e ".[quantise]"

Linear layers are quantised as they are loaded; other layers, the VAE and the text encoders keep their precision.
"""

import importlib.util
from typing import Any

import torch
from torch.utils._pytree import tree_map

from csd3d.errors import InputError

PACKAGES = {"bnb-int8": "bitsandbytes", "bnb-nf4": "bitsandbytes", "torchao-int8": "torchao"}
QUANTISE = ("none", *PACKAGES)


def check_quantise(name: str) -> None:
    """Raise InputError for an unknown way, or one whose package is missing."""
    if name not in QUANTISE:
        raise InputError(f"prior.quantise: {name!r} is none of {', '.join(QUANTISE)}")
    if name != "none" and importlib.util.find_spec(PACKAGES[name]) is None:
        raise InputError(
            f'prior.quantise: {name} needs {PACKAGES[name]}: pip install -c constraints.txt -e ".[quantise]"'
        )


def lowered(inputs: Any, dtype: torch.dtype) -> Any:
    """Nested inputs of a network with their tensors of floats in `dtype`; times [B] keep their precision."""
    floats = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1  # noqa: E731
    return tree_map(lambda x: x.to(dtype) if floats(x) else x, inputs)


def quantisation(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of `from_pretrained` that quantise a network; dtype: in which 4-bit layers compute."""
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if name == "bnb-int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif name == "bnb-nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": config, "device_map": {"": device}}
