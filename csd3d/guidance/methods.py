"""The methods of a text job: reading them from its config, opening their networks, and one step of distillation.

Shared by text_to_3d and text_to_image. There are N particles, each with its own prompt, such as one for its view.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from csd3d.distillation.method import Method, Network
from csd3d.distillation.named import create_method, method_title, named_config, names_for, parse_name
from csd3d.distillation.step import DistillConfig, distill_step, feature_gradient, possible_prompts
from csd3d.distillation.suits import suited
from csd3d.distillation.svgd import SVGDConfig
from csd3d.errors import InputError
from csd3d.priors import Prior, PriorConfig, load_prior, perceptual_vectors
from csd3d.schema import Chosen

UNSAID = SVGDConfig()  # distill.svgd without the key: the defaults if a method collaborates, else null
ALIASES = ("csd",)  # names in configs that stand for a registered method under another name

MOVED = {  # keys of earlier releases, for both tasks
    "distill.method": "name the method in the key method",
    "distill.inversion_steps": "methods.sdi.grid is the number of levels of an inversion over the whole schedule",
    "distill.inversion_noise": "methods.sdi.inversion_noise",
    "distill.inversion_guidance": "methods.sdi.inversion_scale",
    "distill.inversion_scale": "methods.sdi.inversion_scale",
    "distill.psi": "methods.pds.psi",
    "guide.words.negative": "distill.null_prompt",
    "guide.words.good": "methods.bridge.good",
    "guide.words.bad": "methods.bridge.bad",
    "guide.words.unwanted": "methods.nfsd.negative_prompt",
    "guide.lora.rank": "methods.vsd.rank",
    "guide.lora.learning_rate": "methods.vsd.learning_rate",
    "guide.expected": "methods.lmc.folder",
}


# ------------------------------------------------------------------------------------------------- what a config names


def distill_by_model(steps: int) -> DistillConfig:
    """The `distill` of a text job without keys: guidance and noise levels are the model's."""
    return DistillConfig(steps=steps, guidance_scale=None, t_min=None, t_max=None, svgd=UNSAID)


@dataclass(frozen=True)
class MethodRun:
    """A method in a job: its name in configs ("vsd+csd"), and `distill` with the keys that it fixes."""

    name: str
    method: Method
    distill: DistillConfig

    @property
    def title(self) -> str:
        """The name in tables and pictures."""
        return method_title(self.name)

    @property
    def collaborates(self) -> bool:
        """Whether it acts between particles."""
        return self.distill.svgd is not None or getattr(self.method, "together", False)


def method_runs(
    chosen: Iterable[Chosen], settings: Mapping[str, Any], distill: DistillConfig, have: Sequence[str] = ()
) -> dict[str, MethodRun]:
    """The methods named by a config, by name, each once and in order; "all" means every method that the job can run.

    settings: of the methods, by registered name.  have: which of "source" and "image" the job has.
    Raises ValueError for a method that needs something the job does not have, or that does not go with `distill`.
    """
    chosen = list(chosen)
    given = {one.name: one.thing for one in chosen if one.thing is not None}
    for one in chosen:
        if one.thing is not None and one.thing != given[one.name]:
            raise ValueError(f"method names {one.name} twice, with other settings, which one run has once")
    names = [name for one in chosen for name in (names_for(have) if one.name == "all" else (one.name,))]
    runs = {}
    for name in dict.fromkeys(names):
        base, _ = parse_name(name)
        method = given.get(name) or settings.get(base) or create_method(name)
        _check_needs(name, method, have)
        runs[name] = MethodRun(name, method, named_config(name, method, distill))
    return runs


def settle_distill(distill: DistillConfig, names: Sequence[str]) -> DistillConfig:
    """Return `distill` with svgd null if none of the methods collaborates.

    Raises ValueError where its svgd contradicts the methods, or its switch is set but unused.
    """
    if distill.switch != DistillConfig().switch and distill.schedule != "staged":
        raise ValueError(  # in earlier releases the key was SDS-Bridge's too
            f"distill.switch is for schedule staged; SDS-Bridge's is methods.bridge.switch={distill.switch}"
        )
    collaborates = [name for name in names if name == "all" or parse_name(name)[1]]
    if collaborates and distill.svgd is None:
        name = collaborates[0]
        other = "name other methods" if name == "all" else f"name {parse_name(name)[0]} instead"
        raise ValueError(
            f"distill.svgd is null, but {name} collaborates by it: leave the key out, write distill.svgd={{}} for its "
            f"defaults, or {other}"
        )
    if collaborates or distill.svgd is None:
        return distill
    if distill.svgd is not UNSAID:
        with_csd = "csd" if names[0] == "sds" else f"{names[0]}+csd"
        raise ValueError(
            f"distill.svgd is set, but {names[0]} does not collaborate: write distill.svgd=null, or name {with_csd}"
        )
    return dataclasses.replace(distill, svgd=None)


def _check_needs(name: str, method: Method, have: Sequence[str]) -> None:
    lacking = [need for need in getattr(method, "needs", ()) if need not in have]
    if "image" in lacking:
        raise ValueError(f"method {name!r} needs an editing model: use task edit_scene or edit_image")
    if lacking:
        raise ValueError(f"method {name!r} edits a source: give source.image in task text_to_image")


# ------------------------------------------------------------------------------------------- what it needs of the prior


def open_prior(
    config: PriorConfig,
    device: torch.device,
    runs: Mapping[str, MethodRun],
    prompts: Sequence[str],
    source_prompts: Sequence[str] | None = None,
) -> tuple[Prior, dict[str, "Networks"]]:
    """Load the prior, embed all prompts, and open the networks of the methods.

    Raises InputError where the prior cannot do what a method needs.
    """
    prior = load_prior(dataclasses.replace(config, device=str(device)), require="text")
    check_suits(prior, runs)
    check_features(prior, runs)
    embed_prompts(prior, runs, prompts, source_prompts)
    return prior, open_networks(prior, runs)


class Networks(dict[str, Network]):
    """The networks of a method by name; one part of a phase's checkpoint."""

    def reset(self, generator: torch.Generator) -> None:
        """Draw new initial weights for all."""
        for network in self.values():
            network.reset(generator)

    def state_dict(self) -> dict[str, Any]:
        """The state of every network that is trained."""
        return {name: network.state_dict() for name, network in self.items() if network.parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`."""
        for name, network in self.items():
            if network.parameters():
                network.load_state_dict(state[name])


def open_networks(prior: Prior, runs: Mapping[str, MethodRun]) -> dict[str, Networks]:
    """The networks of every method that has any, by the method's name.

    A UNet can have one LoRA, so methods with the same networks and settings (vsd, vsd+csd, esd) share them, and each
    phase resets them. InputError where the prior does not support them, or their files are missing.
    """
    opened: dict[tuple, Networks] = {}
    networks = {}
    for name, run in runs.items():
        if not hasattr(run.method, "open"):
            continue
        owner = next(kind for kind in type(run.method).__mro__ if "open" in vars(kind))
        key = (owner, *(getattr(run.method, field.name) for field in dataclasses.fields(owner)))
        try:
            if key not in opened:
                opened[key] = Networks(run.method.open(prior))
        except ValueError as error:
            text = str(error)
            raise InputError(text if text.startswith("method ") else f"method {name}: {text}") from None
        networks[name] = opened[key]
    return networks


def check_suits(prior: Prior, runs: Mapping[str, MethodRun]) -> None:
    """Raise InputError where keys of `distill` contradict what suits the model."""
    for run in runs.values():
        try:
            suited(run.distill, prior.defaults)
        except ValueError as error:
            raise InputError(f"distill: {error}; what the config leaves out is this model's own") from None


def check_features(prior: Prior, runs: Mapping[str, MethodRun]) -> None:
    """Raise InputError where a method's kernel compares features and the prior has none."""
    for name, run in runs.items():
        if run.distill.svgd is None or run.distill.svgd.space != "features":
            continue
        try:
            prior.features(torch.zeros(1, 3, 64, 64, device=prior.device))
        except ValueError as error:
            raise InputError(
                f'method {name}: distill.svgd.space is "features": {error}; or choose noisy, clean or coarse'
            ) from None


def embed_prompts(
    prior: Prior, runs: Mapping[str, MethodRun], prompts: Sequence[str], source_prompts: Sequence[str] | None = None
) -> None:
    """Embed every prompt that the methods may use, before the text encoder may be dropped."""
    away = prompts  # Perp-Neg's prompts are those of other views
    texts = [
        text
        for run in runs.values()
        for text in possible_prompts(run.method, suited(run.distill, prior.defaults), prompts, source_prompts, away)
    ]
    if texts:  # a job may only sample
        prior.condition(list(dict.fromkeys(texts)))


# ------------------------------------------------------------------------------------------------------------- a step


class Guide:
    """A method with a prior and the method's networks, which are reset."""

    def __init__(self, prior: Prior, run: MethodRun, networks: Networks | None, generator: torch.Generator) -> None:
        self.prior, self.method, self.distill = prior, run.method, suited(run.distill, prior.defaults)
        self.networks = networks
        if networks is not None:
            networks.reset(generator)

    @property
    def pictures(self) -> bool:
        """Whether the method works on pictures [N, 3, S, S] in place of latents."""
        return getattr(self.method, "pictures", False)

    def encode(self, pictures: Tensor) -> Tensor:
        """z of pictures [N, 3, S, S], differentiable: their latents, or what the method judges, they themselves."""
        return pictures if self.pictures else self.prior.encode(pictures)

    def step(self, z: Tensor, number: int, generator: torch.Generator, **context: Any) -> tuple[Tensor, dict]:
        """G [N, ...] of latents z, and what to log. `context`: fields of `distillation.method.Step`."""
        networks = self.networks or {}
        predict, schedule = partial(self.prior.predict, networks=networks), self.prior.alphas_cumprod
        return distill_step(
            predict, self.method, z.detach(), number, self.distill, schedule, generator, networks, **context
        )

    def loss(
        self, z: Tensor, images: Callable[[], Tensor], number: int, generator: torch.Generator, **context: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """Σ_i ⟨z_i, G_i⟩, whose gradient at z is `step`'s G, and what to log.

        If the kernel compares features, the loss also has Σ_i ⟨φ_i, force on φ_i⟩, where φ are the prior's features of
        `images()` [N, 3, S, S], the pictures of z.
        """
        if self.distill.svgd is None or self.distill.svgd.space != "features":
            gradient, report = self.step(z, number, generator, **context)
            return (z * gradient.to(z)).sum(), report
        features = perceptual_vectors(self.prior.features(images()))
        fixed, schedule = features.detach(), self.prior.alphas_cumprod
        gradient, report = self.step(z, number, generator, features=fixed, **context)
        force = feature_gradient(fixed, int(report["t"]), self.distill, schedule, context.get("groups"))
        return (z * gradient.to(z)).sum() + (features * force).sum(), report
