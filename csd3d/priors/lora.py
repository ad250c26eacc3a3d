"""The network of variational score distillation: the score of the renders, as LoRA weights in the prior's own UNet.

Symbols as in `prior`, and: c [B, 12] a camera, its camera-to-world matrix [3, 4] row by row; ε_φ the noise that this
network predicts; e(c) [B, D] the camera's embedding.

We add e(c) to every text token instead of appending a token. e is 0 at first, so ε_φ starts equal to the prior's ε; an
appended zero token would still receive softmax weight. Adding e(c) leaves the weights of a cross-attention unchanged,
because q·(W_k e) is the same for all tokens, and shifts its output by W_o W_v e(c) at every position: one shift per
channel and layer, as with the paper's camera embedding, which is added to the time embedding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors.condition import Condition
from csd3d.priors.parameterisation import network_target
from csd3d.priors.prior import Prior
from csd3d.priors.queries import restricted, spread

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Words = Tensor | Condition | Sequence[str]  # embeddings [B, L, D], a whole condition, or B prompts
ADAPTER = "renders"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class RenderScore:
    """ε_φ(z_t; y, c), ProlificDreamer (arXiv 2305.16213) section 3.3: the noise predicted by a model of the renders.

    The frozen weights of `prior` are shared, not copied. LoRA of `rank` in its attention layers and a small network of
    the camera are trained in float32. They act only in calls of this object; `prior.predict_noise` does not change by a
    bit. Several particles (the paper's n > 1) share one RenderScore, which models their mixture: pass their renders
    together.

    `generator` draws the initial weights. The UNet's modules and tensors get peft's names. Raises ValueError for a
    second RenderScore on one UNet and for a prior without a UNet, InputError where peft is not installed.
    """

    def __init__(self, prior: Prior, generator: torch.Generator, *, rank: int = 4, hidden: int = 256):
        if prior.prediction_type == "flow":
            raise ValueError("RenderScore needs a prior with a UNet, and this is a flow model's transformer")
        self.prior = prior
        width = prior.unet.config.get("encoder_hid_dim") or prior.unet.config.cross_attention_dim
        with torch.random.fork_rng(devices=[]):  # torch.nn draws from the global generator; `reset` draws again
            _add_lora(prior.unet, rank)
            camera = nn.Sequential(nn.Linear(12, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self._camera = camera.to(prior.device)
        lora = {f"lora.{name}": p for name, p in prior.unet.named_parameters() if f".{ADAPTER}." in name}
        self._trained = lora | {f"camera.{name}": p for name, p in self._camera.named_parameters()}
        self.reset(generator)
        self._hide()

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors, in a fixed order."""
        return list(self._trained.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors by name, detached."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a `state_dict` in place; ValueError naming the first tensor that is missing, unknown or misshapen."""
        expected = {name: tuple(p.shape) for name, p in self._trained.items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        for name in sorted({*expected, *given}):
            if expected.get(name) != given.get(name):
                raise ValueError(f"{name}: {given.get(name)} in the state, {expected.get(name)} in this network")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state[name])

    @torch.no_grad()
    def predict(self, z_t: Tensor, t: int | Tensor, text: Words, cameras: Tensor | None = None) -> Tensor:
        """ε_φ(z_t; text, cameras) [B, C, h, w] without a graph, in the prior's own precision and micro batches.

        `cameras` is [B, 12], or None for the unconditional prediction. Raises ValueError where shapes disagree.
        """
        condition = self._conditioned(text, cameras)
        with self._shown():
            return self.prior.predict_noise(z_t, t, condition)

    def answer(self, query: Query) -> Tensor:
        """ε_φ(z_t; prompts, pose) of a query; see `distillation.method.Network`."""
        reduced = restricted(query)
        return spread(query, self.predict(reduced.z_t, reduced.t, self.prior.query_condition(reduced), reduced.pose))

    def loss(
        self,
        z: Tensor,
        text: Words,
        cameras: Tensor | None,
        generator: torch.Generator,
        drop: float = 0.1,
        view: Tensor | None = None,
    ) -> Tensor:
        """The denoising loss of the renders z [B, C, h, w], arXiv 2305.16213 Eq. 8: a scalar.

            mean of |f(√ᾱ z + σ ε, t, text + e(c)) − target|²,  target ε, v or z by the network's parameterisation

        Draws one uniform t and one ε for each element; a share `drop` of the cameras is left out (e = 0).  view [B, 3]:
        the cameras as a prior that takes them is told them (`Query.view`), left out where e is.  Computed in float32,
        because float16 gradients would underflow. Gradients reach `parameters()` only, not z.
        """
        z, draws = z.detach().to(self.prior.device, torch.float32), {"generator": generator, "device": generator.device}
        if len(text) != len(z):
            raise ValueError(f"z has a batch of {len(z)}, its text of {len(text)}")
        t = torch.randint(self.prior.num_train_timesteps, (len(z),), **draws).to(z.device)
        noise = torch.randn(z.shape, **draws).to(z.device)
        kept = (torch.rand(len(z), **draws) >= drop).to(z.device)
        alpha_bar = self.prior.alphas_cumprod[t]
        a, sigma = (value.sqrt()[:, None, None, None] for value in (alpha_bar, 1 - alpha_bar))
        with self._shown():
            output = self.prior.output(a * z + sigma * noise, t, self._conditioned(text, cameras, kept, view))
        return F.mse_loss(output, network_target(z, noise, alpha_bar, self.prior.prediction_type))

    def _conditioned(
        self, text: Words, cameras: Tensor | None, kept: Tensor | None = None, view: Tensor | None = None
    ) -> Condition:
        """The condition with text + e(c); no e(c), and none of the prior's own cameras, where `kept` [B] is false."""
        if isinstance(text, Condition):
            condition = text
        else:
            condition = Condition(text) if isinstance(text, Tensor) else self.prior.condition(text, view=view)
        if kept is not None and condition.camera is not None:
            condition = replace(condition, camera=condition.camera * kept[:, None])
        if cameras is None:
            return condition
        if cameras.shape != (len(condition), 12):
            raise ValueError(f"cameras must be [{len(condition)}, 12], got {tuple(cameras.shape)}")
        embedding = self._camera(cameras.to(self.prior.device, torch.float32))
        if kept is not None:
            embedding = embedding * kept[:, None]
        return replace(condition, text=condition.text + embedding[:, None])

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw new initial weights U(±1/√inputs), as torch.nn and peft do; last layers (`lora_B`, the camera's) are 0.

        The network is then equal to the prior.
        """
        for name, parameter in self._trained.items():
            parameter.data = parameter.data.float()
            if ".lora_B." in name or name.startswith("camera.2."):
                parameter.zero_()
            else:
                fan_in = parameter.shape[1] if parameter.ndim > 1 else self._camera[0].in_features
                uniform = torch.rand(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_((2 * uniform - 1) / math.sqrt(fan_in))

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Enable the UNet's LoRA inside the block."""
        self.prior.unet.enable_adapters()
        try:
            yield
        finally:
            self._hide()

    def _hide(self) -> None:
        self.prior.unet.disable_adapters()
        for parameter in self.parameters():  # peft froze them, and a later backward pass would silently skip them
            parameter.requires_grad_(True)


def _add_lora(unet: "UNet2DConditionModel", rank: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f'VSD needs the package peft ({error}): pip install -c constraints.txt -e ".[lora]"') from None
    if getattr(unet, "peft_config", None):
        raise ValueError("this prior carries LoRA weights already: load it again for another RenderScore")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION), adapter_name=ADAPTER)
