"""CSD-Edit: an instruction edits several views together, with the noise predictions of an editing model."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.guidance import ip2p_guidance
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "csd_edit", title="CSD-Edit")
@dataclass(frozen=True)
class CSDEdit:
    """CSD-Edit, collaborative score distillation for editing (arXiv 2307.04787), Eq. 10.

        Δ = ε^{ω_y,ω_s}(z_t; x̃, y) − ε(z̃_t; x̃, ∅)

    The first term is predicted at the noised *target*, the second at the *source* noised with the same ε and t. At
    z = z̃, if the instruction has no effect, Δ is 0 with ω_s = 1 and (ω_s − 1)(ε(x̃, ∅) − ε(∅, ∅)) with another ω_s,
    unless the baseline is guided by ω_s too.

        method = CSDEdit(text_scale=7.5, image_scale=1.5)
        config, image = CollaborativeEditConfig(), prior.encode_condition(images)    # the paper's settings for images
        z = collaborative_edit(predict, method, z, image, config, alphas_cumprod, generator, prompts="make it snow")
    """

    text_scale: float = 7.5  # ω_y, guidance scale of the instruction
    image_scale: float = 1.5  # ω_s, guidance scale of the source picture; 1 saves the null branch
    baseline: str = "image"  # image (the paper's), guided (by ω_s too, as in the authors' code) or noise (ε, as in SDS)

    needs: ClassVar[tuple[str, ...]] = ("source", "image")

    def __post_init__(self) -> None:
        if self.baseline not in ("image", "guided", "noise"):
            raise ValueError(f"baseline is {self.baseline!r}: choose one of image, guided, noise")
        for key in ("text_scale", "image_scale"):
            if not math.isfinite(getattr(self, key)):
                raise ValueError(f"{key} is {getattr(self, key)}: give a finite number")

    def queries(self, step: Step) -> dict[str, Query]:
        nothing = step.null_prompt
        queries = {"image": step.query(nothing, image=True), "full": step.query(image=True)}
        if self.image_scale != 1:
            queries["null"] = step.query(nothing)
        if self.baseline != "noise":
            queries["source_image"] = step.query(nothing, of="source", image=True)
        if self.baseline == "guided" and self.image_scale != 1:
            queries["source_null"] = step.query(nothing, of="source")
        return queries

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        image = eps["image"]
        target = ip2p_guidance(eps.get("null", image), image, eps["full"], self.text_scale, self.image_scale)
        if self.baseline == "noise":
            return target - step.eps
        source = eps["source_image"]
        if "source_null" in eps:  # guided: ε(∅,∅) + ω_s (ε(x̃,∅) − ε(∅,∅)), without an instruction
            source = ip2p_guidance(eps["source_null"], source, source, 0.0, self.image_scale)
        return target - source
