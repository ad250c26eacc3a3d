"""Variational score distillation: the prior's score against that of a network trained on the renders."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Host, Network, Query, Step
from csd3d.optimisers import load_optimiser
from csd3d.registry import register
from csd3d.schema import Within


@register("method", "vsd", title="VSD (ProlificDreamer)")
@dataclass(frozen=True)
class VSD:
    """Variational score distillation (ProlificDreamer, arXiv 2305.16213), Eq. 9.

        Δ = ε^ω(z_t; y) − ε_φ(z_t; y, camera)

    ε_φ, LoRA in the prior's own UNet, is trained on the particles after every step with the denoising loss (Eq. 8). It
    is the score of the renders, so Δ vanishes where they are samples of the prior. The paper trains with lr 1e-4 over
    25 000 steps and gives its LoRA the prompt without the view; ours gets the particles' prompts.

        networks = VSD().open(prior)
        networks["lora"].reset(generator)
        G, report = distill_step(predict, VSD(), z, number, config, alphas_cumprod, generator, networks, prompts=texts,
                                 pose=camera_to_world)
    """

    rank: Annotated[int, Within(1, 1024)] = 4  # rank of the LoRA
    learning_rate: float = 1e-3  # learning rate of the LoRA (AdamW, one step after each step of the particles)

    perp_neg: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.learning_rate > 0:
            raise ValueError(f"rank is {self.rank}, learning_rate {self.learning_rate:g}: give 1 or more, and above 0")

    def open(self, prior: Host) -> dict[str, Network]:
        return {"lora": RenderNetwork(prior, self.rank, self.learning_rate)}

    def queries(self, step: Step) -> dict[str, Query]:
        return {**guided_queries(step), "lora": step.query(network="lora")}

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return guided(eps, step) - eps["lora"]

    def after(self, step: Step, networks: Mapping[str, Network]) -> dict[str, float]:
        return {"lora_loss": networks["lora"].train(step)}


class RenderNetwork:
    """ε_φ and its optimiser, as a `Network`. InputError where the prior does not support it, or peft is missing."""

    def __init__(self, prior: Host, rank: int, learning_rate: float) -> None:
        self.prior, self.learning_rate = prior, learning_rate
        self.score = prior.lora(rank, torch.Generator())
        self.optimiser = self._new_optimiser()

    def answer(self, query: Query) -> Tensor:
        return self.score.answer(query)

    def train(self, step: Step) -> float:
        """One training step on the particles, counted as evaluations of the prior; returns the loss before it."""
        with torch.enable_grad():
            loss = self.score.loss(step.z, step.prompts, step.pose, step.generator, view=step.view)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
        self.optimiser.step()
        self.prior.unet_evaluations += len(step.z)
        return loss.item()

    def reset(self, generator: torch.Generator) -> None:
        self.score.reset(generator)
        self.optimiser = self._new_optimiser()

    def parameters(self) -> list[torch.nn.Parameter]:
        return self.score.parameters()

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score.load_state_dict(state["score"])
        load_optimiser(self.optimiser, state["optimiser"])

    def _new_optimiser(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.score.parameters(), self.learning_rate, fused=True)
