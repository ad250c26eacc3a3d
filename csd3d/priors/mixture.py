"""A prior with an exact noise prediction, for tests of methods: a mixture of isotropic Gaussians in pixel space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.distillation.method import Network, Query
from csd3d.priors.condition import Condition
from csd3d.priors.expected import load_expected
from csd3d.priors.prior import Defaults
from csd3d.priors.queries import NO_NETWORKS, predict_queries


def scaled_linear_alphas(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Stable Diffusion's ᾱ_t = Π (1 − β_s), √β linear in s (arXiv 2112.10752) -> [steps] float64."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)


def mixture_noise(z_t: Tensor, alpha_bar: Tensor, means: Tensor, stds: Tensor, log_weights: Tensor) -> Tensor:
    """ε(z_t) = −σ_t ∇ log p_t(z_t) of p = Σ_k w_k N(μ_k, s_k² I), noised to t.

        p_t = Σ_k w_k N(√ᾱ μ_k, v_k I),  v_k = ᾱ s_k² + σ_t²
        ε = σ_t Σ_k r_k (z_t − √ᾱ μ_k) / v_k,  r_k the posterior of component k given z_t

    z_t [B, D], alpha_bar [B], means [K, D], stds [K], log_weights [B, K] (−inf switches a component off) -> [B, D].
    """
    offsets = z_t[:, None] - alpha_bar.sqrt()[:, None, None] * means
    variances = alpha_bar[:, None] * stds.square() + (1 - alpha_bar)[:, None]
    log_density = log_weights - offsets.square().sum(-1) / (2 * variances) - z_t.shape[1] / 2 * variances.log()
    pulls = log_density.softmax(1) / variances
    return (1 - alpha_bar).sqrt()[:, None] * (pulls[..., None] * offsets).sum(1)


@dataclass(frozen=True, eq=False)
class Bank:
    """Points [K, D] with their log weights [K]; None: all are equally likely."""

    points: Tensor
    log_weights: Tensor | None = None


def posterior_mean(z_t: Tensor, alpha_bar: Tensor, banks: Sequence[Bank]) -> Tensor:
    """ẑ_0(z_t) = E[z | z_t] [B, D], where row i's z is one of the points of `banks[i]`.

        ẑ_0 = Σ_k softmax_k(log w_k − ‖z_t − √ᾱ z_k‖² / 2σ_t²) z_k

    z_t [B, D], alpha_bar [B]; the limit of `mixture_noise` for s_k → 0.
    """
    clean = torch.empty_like(z_t)
    same: dict[tuple[int, int], list[int]] = {}  # rows with one bank go together
    for row, bank in enumerate(banks):
        same.setdefault((id(bank.points), id(bank.log_weights)), []).append(row)
    for rows in same.values():
        bank, own, alpha = banks[rows[0]], z_t[rows], alpha_bar[rows, None]
        # ‖z_t‖² is the same for all k
        squared = alpha * bank.points.square().sum(1) - 2 * alpha.sqrt() * (own @ bank.points.T)
        logits = -squared / (2 * (1 - alpha))
        logits = logits if bank.log_weights is None else logits + bank.log_weights
        clean[rows] = logits.softmax(1) @ bank.points
    return clean


class GaussianMixturePrior:
    """A mixture with `means` [K, ...], `stds` [K] > 0 and `weights` [K]; z is the image itself and ε is exact.

    `prompts` maps prompts to weights [K]; other prompts have `weights`. The embedding of a prompt is [1, K] log
    weights. An image condition is accepted and ignored.
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor,
        weights: Tensor | None = None,
        prompts: dict[str, Tensor] | None = None,
        alphas_cumprod: Tensor | None = None,
    ):
        if len(stds) != len(means) or not bool((stds > 0).all()):
            raise ValueError(f"{len(means)} means need as many positive stds, got {stds.tolist()}")
        self.means, self.stds = means, stds.to(means)
        self.weights = torch.ones(len(means)).to(means) if weights is None else weights.to(means)
        self.prompts = prompts or {}
        self.alphas_cumprod = (scaled_linear_alphas() if alphas_cumprod is None else alphas_cumprod).to(means)
        self.unet_evaluations = 0
        self.defaults = Defaults()
        self.edits, self.takes_camera = True, False

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images

    def encode_condition(self, images: Tensor) -> Tensor:
        return images

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return z

    def features(self, images: Tensor) -> list[Tensor]:
        return [images]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """[B, 1, K] normalised log weights of the prompts."""
        weights = torch.stack([self.prompts.get(prompt, self.weights).to(self.means) for prompt in prompts])
        return (weights / weights.sum(1, keepdim=True)).log()[:, None]

    def condition(self, prompts: Sequence[str], image: Tensor | None = None, view: Tensor | None = None) -> Condition:
        return Condition(self.embed(prompts), image)

    def query_condition(self, query: Query) -> Condition:
        return self.condition(query.prompts)

    def edit_conditions(self, prompts: Sequence[str], image: Tensor, null_prompt: str = "") -> dict[str, Condition]:
        """As `Prior.edit_conditions`; "image" equals "null", because the image is ignored."""
        null = self.condition([null_prompt] * len(image))
        return {"null": null, "image": null, "full": self.condition(prompts)}

    def predict(self, queries: Mapping[str, Query], networks: Mapping[str, Network] = NO_NETWORKS) -> dict[str, Tensor]:
        """See `queries.predict_queries`."""
        return predict_queries(self, queries, networks)

    def expected(self, folder: str) -> torch.nn.Module:
        """See `Prior.expected`."""
        return load_expected(folder, self.device)

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
        """The exact ε(z_t; condition) [B, ...]; `z_t` [B, ...] has the shape of the means."""
        if z_t.shape[1:] != self.means.shape[1:] or len(condition) != len(z_t):
            raise ValueError(
                f"z_t {tuple(z_t.shape)} must match means {tuple(self.means.shape)} and a condition of {len(condition)}"
            )
        self.unet_evaluations += len(z_t)
        alpha_bar = self.alphas_cumprod[torch.as_tensor(t, device=self.device).expand(len(z_t))]
        flat = z_t.to(self.means).flatten(1)
        return mixture_noise(flat, alpha_bar, self.means.flatten(1), self.stds, condition.text[:, 0]).reshape(z_t.shape)
