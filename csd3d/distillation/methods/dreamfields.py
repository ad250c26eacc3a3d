"""DreamFields: pictures pulled to a text by CLIP alone, without a diffusion model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.distillation.method import Host, Network, Predict, Query, Step
from csd3d.errors import InputError
from csd3d.registry import register
from csd3d.schema import Within, path_key

if TYPE_CHECKING:
    from csd3d.metrics.clip import ClipModel


@register("method", "dreamfields", title="DreamFields")
@dataclass(frozen=True)
class DreamFields:
    """DreamFields' CLIP loss (Jain et al. 2022, arXiv 2112.01455), Eq. 2: the prior predicts nothing.

        Δ = ∇_x L,   L = −(1/K) Σ_k ⟨E_I(crop_k(x)), E_T(y)⟩

    x [N, 3, S, S] are the pictures themselves, in [0, 1], not latents. Each of the K crops is a random square of the
    picture, resized to S. The paper's random backgrounds are `asset.textured_background`, its loss on transmittance is
    `losses.transmittance`. t is drawn and not used. The paper's CLIP is ViT-B/16 on crops of 154 of 168 pixels.

        networks = DreamFields().open(prior)
        predict = partial(prior.predict, networks=networks)
        G, report = distill_step(predict, DreamFields(), x, number, config, alphas_cumprod, generator, prompts="a duck")
        x = x - learning_rate * G
    """

    clip: str = path_key("world")  # a CLIP: world (the shipped one), a folder, a hub name or open_clip:NAME/WEIGHTS
    crops: Annotated[int, Within(1, 64)] = 2  # K, random crops of each picture in a step
    smallest: float = 0.9  # least side of a crop, as a share of the picture's

    pictures: ClassVar[bool] = True
    fixed: ClassVar[dict[str, object]] = {"weight": "one", "noise": "shared"}

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest is {self.smallest}: give a share of the picture's side in (0, 1]")

    def open(self, prior: Host) -> dict[str, Network]:
        from csd3d.metrics.clip import load_clip  # metrics build on priors, which build on this package

        try:
            return {"clip": ClipNetwork(load_clip(self.clip, prior.device))}
        except InputError as error:
            raise InputError(f"method dreamfields: clip: {error}") from None

    def noise(self, step: Step, predict: Predict) -> Step:
        """No noise, but the step's crops [K, 3]: size, top and left, as shares of what they can be."""
        drawn = torch.rand(self.crops, 3, generator=step.generator, device=step.generator.device)
        return replace(step, eps=torch.zeros_like(step.z), kept={"crops": drawn.cpu()})

    def queries(self, step: Step) -> dict[str, Query]:
        crops = crop_pictures(step.z, step.kept["crops"], self.smallest)
        return {f"crop{k}": step.query(network="clip", z_t=crop) for k, crop in enumerate(crops)}

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        """The gradients at the crops, taken back to the pictures."""
        with torch.enable_grad():
            x = step.z.detach().requires_grad_()
            crops = crop_pictures(x, step.kept["crops"], self.smallest)
            total = sum((crop * eps[f"crop{k}"]).sum() for k, crop in enumerate(crops)) / len(crops)
            (gradient,) = torch.autograd.grad(total, x)
        return gradient


def crop_pictures(x: Tensor, places: Tensor, smallest: float) -> list[Tensor]:
    """K crops of pictures [N, C, S, S], each resized to S; `places` [K, 3] in [0, 1) as `DreamFields.noise` draws."""
    side, found = x.shape[-1], []
    for size, top, left in places.tolist():
        edge = max(round(side * (smallest + (1 - smallest) * size)), 1)
        row, column = (int(place * (side - edge + 1)) for place in (top, left))
        part = x[..., row : row + edge, column : column + edge]
        found.append(F.interpolate(part, (side, side), mode="bilinear", align_corners=False))
    return found


class ClipNetwork:
    """∂/∂x of −⟨E_I(x), E_T(y)⟩ as a `Network`; its queries have pictures [N, 3, S, S] as z_t. Nothing is trained."""

    def __init__(self, clip: "ClipModel") -> None:
        self.clip = clip
        self.texts: dict[str, Tensor] = {}  # embeddings by prompt

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings [N, D]; each prompt is embedded once in a run."""
        if new := [text for text in dict.fromkeys(prompts) if text not in self.texts]:
            self.texts |= dict(zip(new, self.clip.embed_texts(new), strict=True))
        return torch.stack([self.texts[text] for text in prompts])

    def answer(self, query: Query) -> Tensor:
        with torch.enable_grad():
            x = query.z_t.detach().requires_grad_()
            loss = -(self.clip.image_tower(x) * self.embed(query.prompts)).sum()
            (gradient,) = torch.autograd.grad(loss, x)
        return gradient

    def reset(self, generator: torch.Generator) -> None: ...

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
