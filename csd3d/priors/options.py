"""What the config and the model's family say of a prior: its settings, and how it runs."""

from dataclasses import dataclass, field
from typing import Annotated

import torch

from csd3d.priors.adapters import Lora
from csd3d.schema import Amount, Share, Within

LEAST_SIDE, MOST_SIDE = 8, 8192  # pixels of a picture


@dataclass(frozen=True)
class Defaults:
    """Settings for a model, used wherever a config says null. A model's csd3d.json can change them."""

    text_scale: Amount = 7.5  # guidance scale of the instruction in a collaborative edit
    image_scale: Amount = 1.5  # guidance scale of the source picture in a collaborative edit
    sampling_text_scale: Amount = 7.5  # guidance scale of the instruction where edited pictures are sampled
    sampling_image_scale: Amount = 1.5  # guidance scale of the source picture where edited pictures are sampled
    guidance_scale: Amount = 7.5  # classifier-free guidance scale of a text-to-image model
    guidance_final: Amount = 0.0  # that scale at the last step of a distillation; 0: it does not change
    t_min: Share = 0.02  # lowest noise level of distillation, a fraction of the schedule
    t_max: Share = 0.98  # highest noise level of distillation, a fraction of the schedule
    bandwidth: Amount = 3.0  # γ of the kernel "model", for latents of unit variance; an estimate (docs/gpu.md)
    working_size: Annotated[int, Within(LEAST_SIDE, MOST_SIDE)] = (
        512  # side in pixels of the pictures it was trained on
    )


@dataclass(frozen=True)
class Options:
    """How a prior runs: the keys of `PriorConfig`, with device and precision resolved."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32  # of the predictor and the text encoders; the VAE's are float32
    offload: str = "none"
    quantise: str = "none"
    compile: bool = False
    lora: tuple[Lora, ...] = ()
    micro_batch: int = 16
    attention: str = "auto"
    vae_slicing: bool = False
    distilled_guidance: float | None = None
    drop_text_encoder: bool = False
    embedding_cache: str = ""
    runtime: str = "torch"

    @property
    def kept(self) -> str:
        """The precision of the weights by name: "float32", "float16" or "bfloat16"."""
        return str(self.weights).removeprefix("torch.")
