"""What the config and the model's family say of a prior: its settings, and how it runs."""

from dataclasses import dataclass, field

import torch

from csd3d.priors.adapters import Lora


@dataclass(frozen=True)
class Defaults:
    """Settings for a model, used wherever a config says null. A model's csd3d.json can change them."""

    text_scale: float = 7.5  # guidance scale of the instruction in a collaborative edit
    image_scale: float = 1.5  # guidance scale of the source picture in a collaborative edit
    sampling_text_scale: float = 7.5  # guidance scale of the instruction where edited pictures are sampled
    sampling_image_scale: float = 1.5  # guidance scale of the source picture where edited pictures are sampled
    guidance_scale: float = 7.5  # classifier-free guidance scale of a text-to-image model
    guidance_final: float = 0.0  # that scale at the last step of a distillation; 0: it does not change
    t_min: float = 0.02  # lowest noise level of distillation, a fraction of the schedule
    t_max: float = 0.98  # highest noise level of distillation, a fraction of the schedule
    bandwidth: float = 3.0  # γ of the kernel "model", for latents of unit variance; an estimate (docs/gpu.md)
    working_size: int = 512  # side in pixels of the square pictures that the model was trained on


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
