"""A whole model in one safetensors file, as model-sharing sites have them, opened by diffusers' `from_single_file`.

    prior:
      model: dreamshaper_8.safetensors
      config: stable-diffusion-v1-5/stable-diffusion-v1-5    # or a local folder; needed only without the hub

Such a file has weights alone. Its configs and tokenizers are those of a diffusers folder of the same kind: the one that
`prior.config` names, else the hub's that diffusers infers from the tensors' names and shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from csd3d.errors import InputError
from csd3d.priors.libraries import opened
from csd3d.priors.opening import ModelFolder
from csd3d.priors.weights import check_types, tensor_shapes

PREFIXES = {  # of the tensors of each part, in the files of SD 1.x and 2.x, SDXL and SD3
    "unet": ("model.diffusion_model.",),
    "transformer": ("model.diffusion_model.", "joint_blocks.", "double_blocks."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # of a UNet: its shape says what it takes


@dataclass(frozen=True)
class SingleFile(ModelFolder):
    """A checkpoint file; `path` is the folder with its configs and tokenizers, `configs` the model that this is of."""

    file: Path = field(kw_only=True)
    shapes: Mapping[str, tuple[int, ...]] = field(kw_only=True, repr=False)
    configs: ModelFolder = field(kw_only=True, repr=False)

    def __str__(self) -> str:
        return str(self.file)

    def has(self, name: str) -> bool:
        """Whether the part can be opened; an optional part needs weights, in the file or beside the configs."""
        return not self.lacks(name) or (self.configs.has(name) and any(self.part(name).glob("*.safetensors")))

    def lacks(self, name: str) -> bool:
        """Whether the file has no weights of that part; tokenizers are never in it."""
        prefixes = PREFIXES.get(name, ())
        return not any(tensor.startswith(prefixes) for tensor in self.shapes) if prefixes else True

    def config(self, name: str) -> dict[str, Any]:
        """The config of a part; a UNet's input channels are the file's own, so that editing models are known."""
        config = super().config(name)
        if name == "unet" and config and len(shape := self.shapes.get(FIRST, ())) == 4:
            config = config | {"in_channels": shape[1]}
        return config

    def open(self, part: str, cls: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.nn.Module:
        """The network of a part from the file, or where the file lacks it from beside the configs."""
        if self.lacks(part):
            if not self.has(part):
                raise InputError(
                    f"{self.file}: holds no {part}; give prior.config=FOLDER, a diffusers folder that has its weights"
                )
            return super().open(part, cls, dtype, **options)
        from diffusers.loaders.single_file import load_single_file_sub_model
        from safetensors.torch import load_file

        prefixes = PREFIXES[part]
        check_types(self.file, lambda name: name.startswith(prefixes) and not name.endswith("position_ids"))
        options.pop("kept", None)
        if part == "unet":
            options |= {"in_channels": self.config(part).get("in_channels", 4)}
        load = lambda: load_single_file_sub_model(  # noqa: E731
            library_name=cls.__module__.split(".")[0],
            class_name=cls.__name__,
            name=part,
            checkpoint=load_file(self.file),
            pipelines=None,
            is_pipeline_module=False,
            cached_model_config_path=str(self.path),
            local_files_only=True,
            torch_dtype=dtype,
            **options,
        )
        network = opened(self.file, load)
        lacking = sorted(name for name, tensor in network.state_dict().items() if tensor.is_meta)
        if lacking:
            raise InputError(f"{self.file}: lacks {len(lacking)} tensors of the {part}, {lacking[0]} first")
        return network

    def tensor_count(self, part: str, kept: str) -> int:
        """The number of tensors of the whole file, or of the part beside the configs."""
        return super().tensor_count(part, kept) if self.lacks(part) and self.has(part) else len(self.shapes)

    def check(self, part: str, network: torch.nn.Module, kept: str) -> bool:
        """False for a part in the file: its tensors have other names until they are converted."""
        return self.lacks(part) and self.has(part) and super().check(part, network, kept)


def model_type(file: Path) -> tuple[str, str, Mapping[str, tuple[int, ...]]]:
    """Of a checkpoint file: what diffusers infers it to be, the hub's model with such configs, and its header.

    Raises InputError for what is no safetensors file, or no whole model.
    """
    if file.suffix != ".safetensors":
        raise InputError(
            f"prior.model: {file} is a file, but no .safetensors; other formats are pickles, which can run code and "
            "are not opened: convert it, or give a diffusers folder"
        )
    shapes = tensor_shapes(file)
    from diffusers.loaders import single_file_utils as utils

    outline = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    known = opened(file, lambda: utils.infer_diffusers_model_type(outline))
    if known == "v1" and FIRST not in shapes:  # which diffusers says of whatever it does not know
        also = " (a LoRA goes under prior.lora)" if any("lora" in name for name in shapes) else ""
        raise InputError(f"prior.model: {file}: its tensors, {next(iter(shapes), 'none')} first, make no model{also}")
    return known, utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[known]["pretrained_model_name_or_path"], shapes
