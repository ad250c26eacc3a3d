"""A frozen diffusion model: an image codec, a text encoder and a noise predictor.

Symbols and shapes, here and in the other modules of this package:
  z    [B, C, h, w] clean latent in the predictor's scale (a VAE's times `scaling_factor`; a pixel-space model's pixels)
  z_t  [B, C, h, w] noised latent √ᾱ_t z + σ_t ε, σ_t = √(1 − ᾱ_t)
  t    int, or [B] long, in 0..num_train_timesteps − 1;  ᾱ_t = `alphas_cumprod[t]`
  images [B, 3, H, W] in [0, 1]
A prior applies no guidance: methods ask for each branch and combine them. `families` holds the kinds of models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from csd3d.distillation.method import Network, Query
from csd3d.errors import InputError
from csd3d.priors.alterations import parts_of
from csd3d.priors.autoencoder import PixelCodec, SourcePicture, VaeCodec
from csd3d.priors.calling import call_forward
from csd3d.priors.camera_embedding import view_embedding
from csd3d.priors.compiled import Compiled, faster
from csd3d.priors.condition import Condition
from csd3d.priors.later import Later
from csd3d.priors.options import Defaults, Options
from csd3d.priors.parameterisation import to_epsilon
from csd3d.priors.quantised import lowered
from csd3d.priors.queries import NO_NETWORKS, predict_queries
from csd3d.priors.rows import predict_rows
from csd3d.priors.runtimes import Exported
from csd3d.priors.text import TextEncoder

if TYPE_CHECKING:
    from csd3d.priors.lora import RenderScore
    from csd3d.priors.team import Team

Forward = Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor, Condition], Tensor]


@dataclass(eq=False)
class Prior:
    """A frozen diffusion model; every family returns one.

    All networks are in eval mode. The VAE's weights are float32, those of the noise predictor and the text encoders of
    `options.weights`. If `options.dtype` is lower than float32, the predictor runs under autocast, and for bfloat16 the
    VAE too; float16 would overflow in it. The predictor may be opened when it is first needed, see `later`, and be
    computed by another library, see `runtimes`. Latents and images are returned as contiguous float32.
    """

    codec: VaeCodec | PixelCodec  # images to latents and back
    unet: nn.Module | Later  # the noise predictor, a UNet or a transformer; if it is a `Later`, reading it opens it
    text: TextEncoder
    family: str = field(default="", kw_only=True)  # title of its family, set by `load_prior`
    knows: str = field(default="", kw_only=True)  # name of the ground truth that it was trained on, by its csd3d.json
    alphas_cumprod: Tensor  # ᾱ [T]
    forward: Forward  # (network, z_t, t [B], ᾱ_t [B], condition) -> the network's output, of prediction_type
    prediction_type: str = "epsilon"  # epsilon | v_prediction | sample | flow; see `parameterisation`
    defaults: Defaults = field(default_factory=Defaults)
    options: Options = field(default_factory=Options)
    source: SourcePicture | None = None  # for an editing model
    distilled_guidance: float | None = field(default=None, kw_only=True)  # what the predictor is told; None: nothing
    camera_width: int = 0  # K of the camera embedding that the predictor takes; 0: none
    scenes_only: bool = field(default=False, kw_only=True)  # an editing model of captures, not of pictures and videos
    files: Mapping[str, Path] = field(default_factory=dict)  # what it was opened from, by name; empty: not known

    def __post_init__(self) -> None:
        self.device = self.options.device
        self.exported: Exported | Compiled | None = None
        network = self.__dict__.pop("unet")
        self._later = network if isinstance(network, Later) else None
        if self._later is None:
            if self.options.offload == "none":
                self.device = next(network.parameters()).device
            self._take(network)
        self.alphas_cumprod = self.alphas_cumprod.to(self.device, torch.float32)
        self.micro_batch = self.options.micro_batch
        self.team: Team | None = None  # other processes that predict too
        self.unet_evaluations = 0  # batch elements predicted so far; the caller may reset it

    def __getattr__(self, name: str) -> Any:
        later = self.__dict__.get("_later")
        if name not in ("unet", "parts") or later is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._later = None
        self._take(later.open())
        return self.__dict__[name]

    def _take(self, network: nn.Module) -> None:
        self.unet = network.eval().requires_grad_(False)
        if self.options.quantise == "none":
            self.unet = self.unet.to(memory_format=torch.channels_last)
        self.parts = parts_of(self.unet)  # to see what a method changes in it
        self.exported = faster(self.unet, self.options, self.device)

    @property
    def outline(self) -> nn.Module:
        """The noise predictor for its config and sizes: while it is not open yet, without weights."""
        return self.unet if self._later is None else self._later.outline

    @property
    def opens_later(self) -> bool:
        """Whether the noise predictor is not open yet."""
        return self._later is not None

    vae = property(lambda self: self.codec.vae)
    text_encoder = property(lambda self: self.text.parts["text_encoder"])
    tokenizer = property(lambda self: self.text.parts["tokenizer"])

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def edits(self) -> bool:
        """Whether the model takes a source picture beside z_t."""
        return self.source is not None

    @property
    def takes_camera(self) -> bool:
        """Whether the model takes the camera of a picture (`Query.view`)."""
        return self.camera_width > 0

    # ------------------------------------------------------------------------------------------------------- pictures

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of z for an image of `height` x `width` pixels, padding included."""
        return self.codec.latent_shape(height, width)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z of images, differentiable: the mode of a VAE's posterior, or a sample of it with a generator.

        Raises ValueError for other shapes than [B, 3, H, W], or images smaller than a latent pixel.
        """
        with self._vae_at_work():
            return self.codec.encode(self._normalised(images), generator, self.micro_batch).contiguous()

    def encode_condition(self, images: Tensor) -> Tensor:
        """The image condition of source pictures. ValueError for a model that does not edit."""
        with self._vae_at_work():
            return self._source().encode(self.codec, self._normalised(images), self.micro_batch).contiguous()

    def introduce(self, source: Any, image: Tensor) -> None:
        """Learn, before a scene is edited, its `SceneSource` and its photos' image condition. Networks need not."""

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError where it takes no pictures of this size, in pixels. Networks take all."""

    def condition_from_latent(self, z: Tensor) -> Tensor:
        """`encode_condition` of pictures with a known z. ValueError for a model that does not edit."""
        with self._vae_at_work():
            return self._source().from_latent(self.codec, z)

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images of z, of `size` = (H, W) if given; clamped to [0, 1] unless z requires a gradient."""
        with self._vae_at_work():
            images = self.codec.decode(z.float(), size, self.micro_batch) / 2 + 0.5
        return (images if images.requires_grad else images.clamp(0, 1)).contiguous()

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the VAE's encoder for a perceptual loss, differentiable: `conv_in`, then each down block.

        Raises ValueError for a pixel-space model, which has no VAE.
        """
        with self._vae_at_work():
            return [maps.float() for maps in self.codec.features(self._normalised(images))]

    # --------------------------------------------------------------------------------------------------------- prompts

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [B, L, D], padded to the encoder's length as in diffusers' pipelines, cached by prompt."""
        return self.text(prompts)["text"]

    def condition(self, prompts: Sequence[str], image: Tensor | None = None, view: Tensor | None = None) -> Condition:
        """The condition of a batch of prompts for `predict_noise`, with pooled embeddings if the model takes them.

        image: see `encode_condition`; some text encoders see it too.  view [B, 3]: azimuth and elevation in degrees,
        distance; ignored by models that take no camera.
        """
        return Condition(**self.text(prompts, image), image=image, camera=self._camera(len(prompts), view))

    def embed_ahead(self, prompts: Sequence[str]) -> None:
        """Embed prompts while there is a text encoder; nothing where it sees the picture that goes with a prompt."""
        if self.text.sees is None:
            self.text(prompts)

    def edit_conditions(self, prompts: Sequence[str], image: Tensor, null_prompt: str = "") -> dict[str, Condition]:
        """The branches of an editing model's guidance: "null" (∅, ∅), "image" (x̃, ∅), "full" (x̃, y).

        Without "null" for a model that always takes a picture.

        `prompts` has one prompt per image. InstructPix2Pix, arXiv 2211.09800, Eq. 3:

            ε = ε(∅, ∅) + s_I (ε(x̃, ∅) − ε(∅, ∅)) + s_T (ε(x̃, y) − ε(x̃, ∅))
        """
        source, nothing = self._source(), [null_prompt] * len(image)
        images = {branch: source.null(image) if branch == "null" else image for branch in source.branches}
        return {name: self.condition(prompts if name == "full" else nothing, x) for name, x in images.items()}

    def release_text_encoder(self) -> None:
        """Free the text encoders. Prompts that were embedded before, or are in the embedding cache, still work."""
        self.text.release()

    # ------------------------------------------------------------------------------------------------------ prediction

    def predict(self, queries: Mapping[str, Query], networks: Mapping[str, Network] = NO_NETWORKS) -> dict[str, Tensor]:
        """The answer [N, ...] to every query, without a graph; see `queries.predict_queries`."""
        return predict_queries(self, queries, networks)

    def query_condition(self, query: Query) -> Condition:
        """The condition of a query; for an editing model, a query without an image is the null branch."""
        image = query.image
        if image is None and self.source is not None:
            image = self.source.null(query.z_t)
        return self.condition(query.prompts, image, query.view)

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
        """ε(z_t; condition) [B, C, h, w], without guidance and without a graph, `micro_batch` elements at a time.

        Raises ValueError for a batch, channels, t or a condition that do not fit the model.
        """
        if self.takes_camera and condition.camera is None:
            condition = replace(condition, camera=self._camera(len(condition), None))
        self._check(z_t, t, condition)
        if self.options.drop_text_encoder:
            self.release_text_encoder()
        t = torch.full((len(z_t),), t, device=self.device) if isinstance(t, int) else t  # a copy to a card would wait
        self.unet_evaluations += len(z_t)
        return torch.cat(predict_rows(self, z_t, t.to(self.device).expand(len(z_t)), condition)).contiguous()

    def output(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The predictor's own output, of its `prediction_type`, for z_t at t [B], with a graph: for training.

        It is computed in one batch and in float32, or in bfloat16 where weights are kept in half.
        """
        network = partial(self._network, autocast=False)
        return call_forward(self.forward, self.family, network, z_t, t, self.alphas_cumprod[t], condition)

    def lora(self, rank: int, generator: torch.Generator) -> "RenderScore":
        """VSD's network on this prior's weights, see `lora.RenderScore`; InputError where it cannot be had."""
        from csd3d.priors.lora import RenderScore  # which imports this module

        try:
            return RenderScore(self, generator, rank=rank)
        except ValueError as error:
            raise InputError(str(error)) from None

    def expected(self, folder: str) -> nn.Module:
        """LMC-SDS's trained b_ψ(z, t) from `folder`, on this prior's device; InputError where there is none."""
        from csd3d.priors.expected import load_expected

        return load_expected(folder, self.device)

    def predict_part(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """ε of rows that go through the network together, with t [B]."""
        z_t, alpha_bar = z_t.float(), self.alphas_cumprod[t]
        output = call_forward(self.forward, self.family, self._network, z_t, t, alpha_bar, condition)
        return to_epsilon(output, z_t, alpha_bar, self.prediction_type)

    def _vae_at_work(self) -> torch.autocast:
        if self.options.offload == "model" and self._later is None:
            self.unet.to("cpu")  # its room on the card is the VAE's now
        lower = self.options.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=lower)

    def _network(self, *args: Any, autocast: bool = True, **options: Any) -> Tensor:
        if self.options.offload == "model":
            self.unet.to(self.device)
        if autocast and self.exported is not None and self.exported.holds():
            return self.exported(*args, **options)
        lower, dtype = self.options.dtype != torch.float32, self.options.dtype
        if not autocast:  # in float16 gradients would underflow
            lower, dtype = self.options.weights != torch.float32, torch.bfloat16
        if self.options.quantise != "none":  # autocast does not reach into quantised layers
            (args, options), lower = lowered((args, options), self.options.weights), False
        with torch.autocast(self.device.type, dtype, enabled=lower):
            return self.unet(*args, **options, return_dict=False)[0].float()

    def _camera(self, count: int, view: Tensor | None) -> Tensor | None:
        return view_embedding(view, count, self.camera_width, self.device) if self.takes_camera else None

    def _source(self) -> SourcePicture:
        if self.source is None:
            raise ValueError("this model takes no image condition: an editing model (InstructPix2Pix) does")
        return self.source

    def _normalised(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W] in [0, 1], got {tuple(images.shape)}")
        return (images.to(self.device, torch.float32) * 2 - 1).to(memory_format=torch.channels_last)

    def _check(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> None:
        if z_t.ndim != 4 or z_t.shape[1] != self.codec.channels:
            raise ValueError(f"z_t must be [B, {self.codec.channels}, h, w], got {tuple(z_t.shape)}")
        if condition.image is not None:
            self._source()
        elif self.source is not None and self.source.null(z_t) is not None:
            raise ValueError("this model edits: its condition needs an image, see encode_condition and edit_conditions")
        if len(condition) != len(z_t):
            raise ValueError(f"z_t has a batch of {len(z_t)}, its condition of {len(condition)}")
        # t on the GPU is not checked, because reading it would wait for all queued work
        if not (isinstance(t, Tensor) and t.is_cuda) and not _within(t, self.num_train_timesteps):
            raise ValueError(f"t must be in 0..{self.num_train_timesteps - 1}, got {t}")


def _within(t: int | Tensor, steps: int) -> bool:
    t = torch.as_tensor(t)
    return bool(((t >= 0) & (t < steps)).all())
