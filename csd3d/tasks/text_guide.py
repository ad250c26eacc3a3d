"""What a text job asks of its prior: the prompts of every branch, the methods' own networks, one distillation step.

Shared by text_to_image and text_to_3d. N particles; each has its own text (views say what they are).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from csd3d.distillation import DistillConfig, distill_step, feature_gradient
from csd3d.distillation.distill import Extras, PredictBranches, possible_branches
from csd3d.distillation.methods import find_method, method_config, method_names
from csd3d.errors import InputError
from csd3d.priors import Condition, Prior, perceptual_vectors
from csd3d.priors.expected import ExpectedReconstruction, load_expected
from csd3d.priors.lora import RenderScore
from csd3d.schema import path_key

NONE = Extras()


@dataclass
class WordsConfig:
    """The words that methods add: `negative` is what the unconditional branch is told; SDS-Bridge bridges from the
    prompt + `bad` to the prompt + `good` (its paper's words); NFSD's domain is told from `unwanted`."""

    negative: str = ""
    good: str = ", detailed high resolution, high quality, sharp"
    bad: str = ", oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed"
    unwanted: str = "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution"


@dataclass
class LoraConfig:
    """VSD's network of the renders: LoRA of `rank` in the prior's UNet, a step of AdamW after every step."""

    rank: int = 4
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.learning_rate > 0:
            raise ValueError(f"rank is {self.rank}, learning_rate {self.learning_rate:g}: give 1 or more, and above 0")


@dataclass
class GuideConfig:
    """What only some methods use: their words, VSD's network, and the folder of LMC-SDS's trained b_ψ."""

    words: WordsConfig = field(default_factory=WordsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    expected: str = path_key("csd3d/assets/lmc")


@dataclass
class Networks:
    """A prior and what the methods of a job add to it: VSD's network, of which a UNet carries one, and LMC's."""

    prior: Prior
    score: RenderScore | None = None
    expected: ExpectedReconstruction | None = None


def check_features(prior: Prior, config: DistillConfig) -> None:
    """InputError where svgd.space is "features" and the prior has none."""
    if config.svgd is not None and config.svgd.space == "features":
        try:
            prior.features(torch.zeros(1, 3, 64, 64, device=prior.device))
        except ValueError as error:
            raise InputError(f'distill.svgd.space is "features": {error}; or choose noisy, clean or coarse') from None


def open_networks(prior: Prior, names: Sequence[str], config: GuideConfig) -> Networks:
    """What the methods need; InputError where it is missing, or where the prior cannot carry it."""
    needs = {need: name for name in names for need in find_method(name)[0].needs}
    expected = score = None
    if "expected" in needs:
        try:
            expected = load_expected(config.expected, prior.device)
        except InputError as error:
            how = "train one with `python -m tools.train_shipped lmc`"
            raise InputError(f"method {needs['expected']}: guide.expected: {error}; {how}") from None
    if "lora" in needs:
        try:
            score = RenderScore(prior, torch.Generator(), rank=config.lora.rank)
        except ValueError as error:
            raise InputError(f"method {needs['lora']}: {error}") from None
    return Networks(prior, score, expected)


class Guide:
    """A method at work on a prior: predicts its branches, trains VSD's network, which it starts anew."""

    def __init__(
        self, name: str, networks: Networks, distill: DistillConfig, config: GuideConfig, generator: torch.Generator
    ) -> None:
        self.networks, self.prior, self.distill = networks, networks.prior, distill
        self.score = networks.score if "lora" in find_method(name)[0].needs else None
        self.optimiser = None
        if self.score is not None:
            self.score.reset(generator)
            self.optimiser = torch.optim.AdamW(self.score.parameters(), config.lora.learning_rate, fused=True)

    def step(
        self,
        z: Tensor,
        texts: dict[str, list[str]],
        step: int,
        generator: torch.Generator,
        extras: Extras = NONE,
        cameras: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """G [N, ...] of latents z, and what to log. `texts` are `branch_texts`; `cameras` [N, 12] are told to VSD."""
        extras = replace(extras, expected=self.networks.expected)
        predict = self.predictor(texts, cameras)
        gradient, report = distill_step(
            predict, z.detach(), step, self.distill, self.prior.alphas_cumprod, generator, extras
        )
        if self.score is not None:
            report["lora_loss"] = self._train_score(z, texts["text"], cameras, generator)
        return gradient, report

    def loss(
        self,
        z: Tensor,
        images: Callable[[], Tensor],
        texts: dict[str, list[str]],
        step: int,
        generator: torch.Generator,
        extras: Extras = NONE,
        cameras: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Σ_i ⟨z_i, G_i⟩, whose gradient at z is `step`'s G, and what to log.

        Where the kernel compares features, also Σ_i ⟨φ_i, their force⟩, φ those of the `images()` [N, 3, S, S] that the
        z are of, from the prior's encoder.
        """
        if self.distill.svgd is None or self.distill.svgd.space != "features":
            gradient, report = self.step(z, texts, step, generator, extras, cameras)
            return (z * gradient.to(z)).sum(), report
        features = perceptual_vectors(self.prior.features(images()))
        extras = replace(extras, features=features.detach())
        gradient, report = self.step(z, texts, step, generator, extras, cameras)
        schedule = self.prior.alphas_cumprod
        force = feature_gradient(features.detach(), int(report["t"]), self.distill, schedule, extras.groups)
        return (z * gradient.to(z)).sum() + (features * force).sum(), report

    def predictor(self, texts: dict[str, list[str]], cameras: Tensor | None = None) -> PredictBranches:
        """predict(z_stack, t, names): every branch under its texts, branches that are told the same computed once."""
        told = {name: (name.startswith("source_"), *branch) for name, branch in texts.items()} | {"lora": ("lora",)}

        def predict(z_stack: Tensor, t: int, names: tuple[str, ...]) -> Tensor:
            parts = dict(zip(names, z_stack.chunk(len(names)), strict=True))
            plain = {told[name]: name for name in names if name != "lora"}
            condition = Condition.cat([self.prior.condition(texts[name]) for name in plain.values()])
            stack = self.prior.predict_noise(torch.cat([parts[name] for name in plain.values()]), t, condition)
            found = dict(zip(plain, stack.chunk(len(plain)), strict=True))
            if "lora" in names:
                found[told["lora"]] = self.score.predict(parts["lora"], t, self.prior.condition(texts["text"]), cameras)
            return torch.cat([found[told[name]] for name in names])

        return predict

    def _train_score(self, z: Tensor, texts: list[str], cameras: Tensor | None, generator: torch.Generator) -> float:
        """One step of VSD's network on the renders; their prediction counts as an evaluation each."""
        loss = self.score.loss(z, self.prior.condition(texts), cameras, generator)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.prior.unet_evaluations += len(z)
        return loss.item()


def branch_texts(
    texts: Sequence[str], words: WordsConfig, away: Sequence[Sequence[str]] = (), source: str = ""
) -> dict[str, list[str]]:
    """The prompts [N] of every branch of `distill_step`, for particles whose own are `texts`.

    `source` says what the source shows; where it says nothing, the source's prediction is the unconditional one.
    """
    return {
        "null": [words.negative] * len(texts),
        "text": list(texts),
        "negative": [words.unwanted] * len(texts),
        "good": [text + words.good for text in texts],
        "bad": [text + words.bad for text in texts],
        "source_null": [words.negative] * len(texts),
        "source_text": [source or words.negative] * len(texts),
        **dict(zip(("away", "away2"), map(list, away), strict=False)),
    }


def embed_all(prior: Prior, texts: dict[str, list[str]], names: Sequence[str], config: DistillConfig) -> None:
    """Have the prior embed the prompts of every branch the methods use, so that its text encoder can be dropped."""
    used = set().union(*(possible_branches(method_config(name, config)) for name in names))
    prior.condition(list(dict.fromkeys(text for name, branch in texts.items() if name in used for text in branch)))


def expand_methods(names: Sequence[str], source: bool = False) -> list[str]:
    """The methods named, each once; "all" is every one of a text, and with a `source` those that edit it."""
    known = method_names(source)
    return list(dict.fromkeys(name for given in names for name in (known if given == "all" else (given,))))
