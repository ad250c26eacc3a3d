"""The network of variational score distillation: the score of the renders, as LoRA weights in the prior's own UNet.

Symbols as in `prior`, and: c [B, 12] a camera, the rows of its camera-to-world matrix [3, 4] one after the other (world
units in the last column); ε_φ the noise that this network predicts; e(c) [B, D] the camera's embedding.

The camera enters as text + e(c), the same vector on every token, and e is 0 at first: so ε_φ starts as exactly the
prior's ε, which one more token, zero though it be, would not allow (softmax would give it weight). A cross-attention
keeps its weights, q·(W_k e) being the same for all tokens, and its output moves by W_o W_v e(c) at every position: a
shift a channel and layer, as the paper's camera embedding, added to that of the time, is one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors.condition import Condition
from csd3d.priors.parameterisation import network_target
from csd3d.priors.prior import Prior
from csd3d.priors.queries import restricted, spread

Words = Tensor | Condition | Sequence[str]  # [B, L, D], or what a condition needs beside, or B prompts
ADAPTER = "renders"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class RenderScore:
    """ε_φ(z_t; y, c), ProlificDreamer (arXiv 2305.16213) section 3.3: the noise as predicted by a model of the renders.

    The weights of `prior` are shared, not copied, and frozen; trained are LoRA of `rank` in its attention layers and a
    small network of the camera, all float32. They act inside this object's own calls alone: `prior.predict_noise` stays
    that of the frozen network, bit for bit. Several particles (the paper's n > 1) share one RenderScore, which then
    models their mixture: pass their renders together.

    A UNet carries one RenderScore (ValueError for a second, and for a prior without a UNet); from then on its modules
    and tensors bear peft's names. Raises InputError where peft is not installed. `generator` draws the initial weights.
    """

    def __init__(self, prior: Prior, generator: torch.Generator, *, rank: int = 4, hidden: int = 256):
        if prior.prediction_type == "flow":
            raise ValueError("RenderScore needs a prior with a UNet, and this is a flow model's transformer")
        self.prior = prior
        width = prior.unet.config.get("encoder_hid_dim") or prior.unet.config.cross_attention_dim
        with torch.random.fork_rng(devices=[]):  # torch.nn draws from the global generator; what it draws is replaced
            _add_lora(prior.unet, rank)
            camera = nn.Sequential(nn.Linear(12, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self._camera = camera.to(prior.device)
        lora = {f"lora.{name}": p for name, p in prior.unet.named_parameters() if f".{ADAPTER}." in name}
        self._trained = lora | {f"camera.{name}": p for name, p in self._camera.named_parameters()}
        self.reset(generator)
        self._hide()

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors, always in the same order."""
        return list(self._trained.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors alone, by name, detached: what a checkpoint has to hold."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts a `state_dict` back, in place; ValueError naming the first tensor that is missing, odd or too many."""
        wanted = {name: tuple(p.shape) for name, p in self._trained.items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                raise ValueError(f"{name}: {found.get(name)} in the state, {wanted.get(name)} in this network")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state[name])

    @torch.no_grad()
    def predict(self, z_t: Tensor, t: int | Tensor, text: Words, cameras: Tensor | None = None) -> Tensor:
        """ε_φ(z_t; text, cameras) [B, C, h, w] without a graph, in the prior's own precision and micro batches.

        `text` [B, L, D] (or a condition, where the model takes more; or B prompts), `cameras` [B, 12] or None, the
        unconditional camera. Raises ValueError where shapes disagree.
        """
        condition = self._conditioned(text, cameras)
        with self._shown():
            return self.prior.predict_noise(z_t, t, condition)

    def answer(self, query: Query) -> Tensor:
        """ε_φ(z_t; prompts, pose) of a query, as a `distillation.method.Network` gives it."""
        asked = restricted(query)
        return spread(query, self.predict(asked.z_t, asked.t, self.prior.query_condition(asked), asked.pose))

    def loss(
        self,
        z: Tensor,
        text: Words,
        cameras: Tensor | None,
        generator: torch.Generator,
        drop: float = 0.1,
    ) -> Tensor:
        """The denoising loss of the renders z [B, C, h, w], arXiv 2305.16213 Eq. 8: a scalar.

            mean of |f(√ᾱ z + σ ε, t, text + e(c)) − target|²,  target ε, v or z as the network is parameterised

        One t, uniform over the schedule, and one ε an element, drawn here; a share `drop` of the cameras is left out
        (e = 0). Float32 whatever the prior's precision, since float16 gradients would underflow. Differentiable with
        respect to `parameters()` alone: z counts as data.
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
            output = self.prior.output(a * z + sigma * noise, t, self._conditioned(text, cameras, kept))
        return F.mse_loss(output, network_target(z, noise, alpha_bar, self.prior.prediction_type))

    def _conditioned(self, text: Words, cameras: Tensor | None, kept: Tensor | None = None) -> Condition:
        """The condition with text + e(c), e(c) left out where `kept` [B] is false."""
        if isinstance(text, Condition):
            condition = text
        else:
            condition = Condition(text) if isinstance(text, Tensor) else self.prior.condition(text)
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
        """Starts anew, as exactly the prior: weights U(±1/√inputs), as torch.nn and peft draw them, from `generator`;
        the last layers (`lora_B`, the camera's) 0.
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
        """The UNet with its LoRA inside the block, the frozen one again behind it."""
        self.prior.unet.enable_adapters()
        try:
            yield
        finally:
            self._hide()

    def _hide(self) -> None:
        self.prior.unet.disable_adapters()
        for parameter in self.parameters():  # peft froze them: a backward pass still to come would skip them silently
            parameter.requires_grad_(True)


def _add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f"VSD needs the package peft ({error}): pip install peft") from None
    if getattr(unet, "peft_config", None):
        raise ValueError("this prior carries LoRA weights already: load it again for another RenderScore")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION), adapter_name=ADAPTER)
