"""Classifier guidance of a sampler, by a classifier of clean pictures such as CLIP.

Not to be confused with the method "classifier", which distils by the classifier-free difference ε(y) − ε(∅) alone.
Symbols: z_t, ε, ᾱ_t, σ_t = √(1 − ᾱ_t) as in `priors.prior`; ẑ_0 = (z_t − σ_t ε)/√ᾱ_t; p(y|z) the classifier.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from csd3d.distillation.ddim import PredictNoise, ddim_step
from csd3d.distillation.guidance import cfg
from csd3d.errors import InputError
from csd3d.metrics.clip import load_clip, text_image_score
from csd3d.priors import Prior
from csd3d.priors.parameterisation import to_epsilon

LogProb = Callable[[Tensor], Tensor]  # differentiable: clean latents z [N, ...] -> log p(y|z) [N], up to a constant
LOGIT_SCALE = 100.0  # what CLIP's cosines are multiplied by when it is trained (arXiv 2103.00020, section 2.5)


def classifier_guided(predict: PredictNoise, log_prob: LogProb, alphas_cumprod: Tensor, scale: float) -> PredictNoise:
    """ε̂ = ε − s σ_t ∇_{z_t} log p(y | ẑ_0(z_t)), Dhariwal & Nichol (arXiv 2105.05233) Algorithm 2.

    Their classifier sees z_t and is trained on noise. Ours sees the prediction ẑ_0, and the gradient goes through it,
    `predict` included, which must be differentiable (as in Universal Guidance, arXiv 2302.07121, section 3.2). It is
    exact where log p is linear in z and the prior a Gaussian: for log p = ⟨b, z⟩ it samples N(m + s τ² b, τ²) from
    N(m, τ²). Elsewhere E log p(y|z) stands for log E p(y|z). Scale s = 0 is `predict` itself.
    """
    if scale == 0:
        return predict

    def guided(z_t: Tensor, t: int) -> Tensor:
        alpha_bar = alphas_cumprod[t].item()
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            eps = predict(z_t, t)
            value = log_prob(ddim_step(z_t, eps, alpha_bar, 1.0)).sum()
            (gradient,) = torch.autograd.grad(value, z_t)
        return eps.detach() - scale * (1 - alpha_bar) ** 0.5 * gradient

    return guided


def clip_log_prob(source: str, text: str, decode: Callable[[Tensor], Tensor], device: torch.device) -> LogProb:
    """log p(y|z) = 100 cos(E_I(picture of z), E_T(text)) by the CLIP of `load_clip(source)`, as GLIDE guides.

    GLIDE (arXiv 2112.10741), section 2.4; the sum over other texts, which a softmax would divide by, is left out.
    """
    clip = load_clip(source or "world", device)
    wanted = clip.embed_texts([text])[0]
    return lambda z: LOGIT_SCALE * text_image_score(clip.image_tower(decode(z)), wanted)


def check_gradient(prior: Prior) -> None:
    """Raise InputError for a prior whose predictions have no gradient."""
    if not isinstance(getattr(prior, "outline", None), nn.Module) or prior.options.quantise != "none":
        raise InputError(
            "sampling.classifier_scale: it needs the gradient of the prior's network, and this prior has none "
            "(it is quantised, or has no network): set it to 0"
        )


def guided_with_graph(prior: Prior, prompt: str, null_prompt: str, guidance_scale: float) -> PredictNoise:
    """The classifier-free guided ε(z_t, t) of one prompt, differentiable in z_t, `micro_batch` rows at a time."""

    def predict(z_t: Tensor, t: int) -> Tensor:
        conditional = [branch(part, t, prompt) for part in z_t.split(prior.micro_batch)]
        if guidance_scale == 1:
            return torch.cat(conditional)
        null = [branch(part, t, null_prompt) for part in z_t.split(prior.micro_batch)]
        return cfg(torch.cat(null), torch.cat(conditional), guidance_scale)

    def branch(z_t: Tensor, t: int, text: str) -> Tensor:
        times = torch.full((len(z_t),), t, device=z_t.device)
        output = prior.output(z_t, times, prior.condition([text] * len(z_t)))
        prior.unet_evaluations += len(z_t)
        return to_epsilon(output, z_t, prior.alphas_cumprod[times], prior.prediction_type)

    return predict
