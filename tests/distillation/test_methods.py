"""Every method against its formula by hand on an exact prior, in its limits, and what its docstring claims."""

import math
from dataclasses import replace

import pytest
import torch
from asking import asking

from csd3d import registry
from csd3d.distillation.ddim import ddim_step
from csd3d.distillation.kernel import SVGDConfig
from csd3d.distillation.methods.bridge import Bridge
from csd3d.distillation.methods.cfd import CFD
from csd3d.distillation.methods.classifier import Classifier
from csd3d.distillation.methods.csd_edit import CSDEdit
from csd3d.distillation.methods.dds import DDS
from csd3d.distillation.methods.dreamcatalyst import DreamCatalyst
from csd3d.distillation.methods.dvrf import DVRF
from csd3d.distillation.methods.esd import ESD
from csd3d.distillation.methods.fsd import FSD
from csd3d.distillation.methods.ism import ISM
from csd3d.distillation.methods.lmc import LMC
from csd3d.distillation.methods.nfsd import NFSD
from csd3d.distillation.methods.particle_guidance import ParticleGuidance
from csd3d.distillation.methods.pds import PDS, posterior_coefficients
from csd3d.distillation.methods.rfds import RFDS
from csd3d.distillation.methods.rsd import RSD
from csd3d.distillation.methods.sdi import SDI
from csd3d.distillation.methods.sds import SDS
from csd3d.distillation.methods.vsd import VSD
from csd3d.distillation.step import DistillConfig, configured, distill_step, feature_gradient, new_step, step_gradient
from csd3d.priors import Condition, GaussianMixturePrior
from csd3d.priors.mixture import scaled_linear_alphas

ALPHAS = scaled_linear_alphas()
MEANS = torch.tensor([[0.0, 0.0], [1.5, -1.0], [-2.0, 0.5]], dtype=torch.float64)
STD = 0.2
FIRST, SECOND, THIRD = torch.eye(3)
WORDS = {
    "a duck": SECOND,
    "a cat": THIRD,
    "a duck, sharp": SECOND,
    "a duck, blurry": THIRD,
    "ugly": THIRD,
    "side": FIRST,
}


def mixture() -> GaussianMixturePrior:
    return GaussianMixturePrior(MEANS, torch.full((3,), STD, dtype=torch.float64), prompts=WORDS)


PRIOR = mixture()


def normal(seed: int, count: int = 6) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Z, SOURCE, EPS = normal(0), normal(1), normal(2)


class Says:
    """A network that answers by a function of the query."""

    def __init__(self, function) -> None:
        self.answer = function


def step_at(t: int, config: DistillConfig | None = None, z=Z, number=0, eps=EPS, **context):
    config = config or DistillConfig(steps=10)
    seeded = torch.Generator().manual_seed(5)
    step = new_step(z, t, number, config, ALPHAS, seeded, **{"prompts": "a duck", **context})
    return replace(step, eps=eps)


def direction(method, t: int, config: DistillConfig | None = None, networks=None, predict=None, **context):
    """Δ alone: one step with weight one and no SVGD, its noise given."""
    config = replace(config or DistillConfig(steps=10), weight="one", svgd=None)
    predict = predict or asking(PRIOR, networks)
    return step_gradient(predict, method, step_at(t, config, **context), config)[0]


def epsilon(z_t: torch.Tensor, t: int, prompt: str) -> torch.Tensor:
    """ε of one Gaussian of the mixture by hand, or of the whole for other words."""
    if prompt in WORDS:
        a, mean = ALPHAS[t].item(), MEANS[WORDS[prompt].argmax()]
        return math.sqrt(1 - a) * (z_t - math.sqrt(a) * mean) / (a * STD**2 + 1 - a)
    return PRIOR.predict_noise(z_t, t, Condition(PRIOR.embed([prompt] * len(z_t))))


def noised(z: torch.Tensor, t: int) -> torch.Tensor:
    a = ALPHAS[t].item()
    return math.sqrt(a) * z + math.sqrt(1 - a) * EPS


def guided(z: torch.Tensor, t: int, prompt: str, scale: float = 7.5) -> torch.Tensor:
    null = epsilon(noised(z, t), t, "")
    return null + scale * (epsilon(noised(z, t), t, prompt) - null)


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-9, atol=atol)


# Text methods.

TIMES = [1, 120, 199, 200, 500, 979]


@pytest.mark.parametrize("t", TIMES)
def test_sds_fsd_cfd_and_rsd_are_prediction_minus_noise(t):
    for method in (SDS(), FSD(), CFD(), RSD()):
        close(direction(method, t), guided(Z, t, "a duck") - EPS)
    config = configured(FSD(), DistillConfig())
    assert (config.noise, config.schedule) == ("camera", "annealed")
    config = configured(CFD(), DistillConfig())
    assert (config.noise, config.schedule) == ("surface", "annealed")


@pytest.mark.parametrize("t", TIMES)
def test_nfsd_is_a_domain_term_and_guidance(t):
    null, text, negative = (epsilon(noised(Z, t), t, prompt) for prompt in ("", "a duck", "ugly"))
    domain = null if t < 200 else null - negative
    close(direction(NFSD("ugly"), t), domain + 7.5 * (text - null))
    if t >= 200:
        close(direction(NFSD(""), t), direction(Classifier(), t))
        assert not torch.allclose(direction(NFSD("ugly"), t), direction(Classifier(), t))
    assert NFSD().negative_prompt.endswith(", gloomy")


@pytest.mark.parametrize("t", TIMES)
def test_classifier_is_guidance_alone(t):
    null, text = (epsilon(noised(Z, t), t, prompt) for prompt in ("", "a duck"))
    close(direction(Classifier(), t), 7.5 * (text - null))


@pytest.mark.parametrize("t", TIMES)
def test_bridge_is_sds_and_from_its_switch_on_omega_times_two_descriptions(t):
    method = Bridge(switch=0.5, good=", sharp", bad=", blurry")
    close(direction(method, t, number=4), direction(SDS(), t))
    good, bad = (epsilon(noised(Z, t), t, f"a duck, {words}") for words in ("sharp", "blurry"))
    close(direction(method, t, number=5), 7.5 * (good - bad))
    assert {q.prompts[0] for q in method.queries(step_at(t, number=5)).values()} == {"a duck, sharp", "a duck, blurry"}
    with pytest.raises(ValueError, match=r"switch is 1\.5"):
        Bridge(switch=1.5)


@pytest.mark.parametrize("t", TIMES)
def test_rfds_is_sds_on_velocities(t):
    """v^ω − (ε − z) with x_s = (1 − s) z + s ε and the velocity of the predicted noise."""
    a, sigma = math.sqrt(ALPHAS[t].item()), math.sqrt(1 - ALPHAS[t].item())
    s = sigma / (a + sigma)
    x_s = (1 - s) * Z + s * EPS
    close(x_s, noised(Z, t) / (a + sigma))
    velocity = (guided(Z, t, "a duck") - x_s) / (1 - s)
    close(direction(RFDS(), t), velocity - (EPS - Z))
    assert configured(RFDS(), DistillConfig()).weight == "one"


@pytest.mark.parametrize("t", TIMES)
def test_vsd_and_esd_are_against_their_network_with_and_without_the_camera(t):
    pose, other = torch.ones(6, 12), normal(7)
    view = torch.ones(6, 3)
    lora = Says(lambda query: (3.0 - (query.pose is None) / 2 - (query.view is None) / 2) * query.z_t + other)
    with_camera, without = (k * noised(Z, t) + other for k in (3, 2))
    context = {"networks": {"lora": lora}, "pose": pose, "view": view}
    found = [direction(method, t, **context) for method in (VSD(), ESD(entropy=0.3), ESD())]
    target = guided(Z, t, "a duck")
    close(found[0], target - with_camera)
    close(found[1], target - (0.7 * with_camera + 0.3 * without))
    close(found[2], target - 0.5 * (with_camera + without))
    close(direction(ESD(entropy=0.0), t, **context), found[0])


def test_vsd_vanishes_where_the_renders_are_the_priors_own_samples():
    exact = Says(lambda query: epsilon(query.z_t, query.t, query.prompts[0]))
    found = direction(VSD(), 300, DistillConfig(guidance_scale=1.0), networks={"lora": exact})
    close(found, torch.zeros_like(Z))


@pytest.mark.parametrize("t", TIMES)
def test_lmc_is_against_the_expected_reconstruction_of_the_clean_latent(t):
    a = ALPHAS[t].item()
    model = Says(lambda query: 0.9 * query.z_t + query.t / 1000)
    expected, sigma = 0.9 * Z + t / 1000, math.sqrt(1 - a)
    found = direction(LMC(), t, networks={"expected": model})
    denoised = (noised(Z, t) - sigma * guided(Z, t, "a duck")) / math.sqrt(a)
    close(sigma / math.sqrt(a) * found, expected - denoised)  # in units of the latent, what the paper says
    close(direction(LMC(), t, networks={"expected": Says(lambda query: query.z_t)}), direction(SDS(), t))


def test_the_shipped_network_of_lmc_opens_and_a_missing_one_says_how_to_train_it():
    networks = LMC().open(PRIOR)
    z = torch.randn(2, 4, 16, 16)
    query = step_at(300, z=z, eps=z).query(network="expected", z_t=z)
    assert networks["expected"].answer(query).shape == z.shape
    assert networks["expected"].state_dict() == {}
    with pytest.raises(ValueError, match=r"method lmc: folder: .*nowhere.*train_shipped lmc"):
        LMC("nowhere").open(PRIOR)


# Methods that find their noise themselves.


def run(method, config, z=Z, number=0, seed=0, predict=None, **context):
    arguments = z, number, config, ALPHAS, torch.Generator().manual_seed(seed)
    return distill_step(predict or asking(PRIOR), method, *arguments, **{"prompts": "a duck", **context})


@pytest.mark.parametrize("t", [700])
def test_sdi_finds_the_noise_that_the_flow_of_a_gaussian_has(t):
    """On N(μ, s²) the flow keeps the quantile: z_t = √ᾱ μ + (z − μ)/s √(ᾱ s² + 1 − ᾱ)."""
    method = SDI(inversion_scale=1.0, inversion_noise=0.0, grid=1000)
    step = method.noise(step_at(t, eps=None), asking(PRIOR))
    a = ALPHAS[t].item()
    expected = math.sqrt(a) * MEANS[1] + (Z - MEANS[1]) / STD * math.sqrt(a * STD**2 + 1 - a)
    torch.testing.assert_close(step.z_t, expected, rtol=0.02, atol=0.01)


def test_sdi_leaves_a_sample_of_the_prior_where_it_is_at_low_noise():
    """z − ẑ_0 at the inverted z_t is the rest of DDIM's way, whatever the config says of weight and schedule."""
    z = MEANS[1] + STD * normal(3)
    method = SDI(scale=1.0, inversion_scale=1.0, inversion_noise=0.0, grid=1000)
    for number in (0, 4, 9):
        gradient, report = run(method, DistillConfig(steps=10, weight="sigma2", schedule="uniform"), z, number)
        assert report["t"] == round(1000 * (0.98 + (0.25 - 0.98) * number / 9))
        a = ALPHAS[int(report["t"])].item()
        shrunk = math.sqrt(a) * STD / math.sqrt(a * STD**2 + 1 - a)
        torch.testing.assert_close(gradient, (1 - shrunk) * (z - MEANS[1]), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("t", "steps"), [(980, 11), (600, 7), (250, 4)])
def test_sdi_inverts_by_the_grid_below_t_to_a_level_drawn_above_it(t, steps):
    """The authors' levels 1, 101, ... below t and one in [t, t + 100); noise at every step but the first."""
    levels = [SDI().levels(step_at(t)) for _ in range(3)]
    assert all(found[:-1] == list(range(1, t, 100)) and t <= found[-1] < t + 100 for found in levels)
    calls = []
    SDI().noise(step_at(t, eps=None), asking(PRIOR, calls=calls))
    assert len(calls) == steps
    assert [query.t for query, _ in calls] == [1, *range(1, t, 100)][:steps]


@pytest.mark.parametrize(("t", "share"), [(980, 0.56), (600, 0.35), (250, 0.21)])
def test_the_fresh_noise_of_sdi_has_the_authors_share(t, share):
    """Of ε, on an exact Gaussian as wide as the noise is: where nothing pulls it back."""
    wide = GaussianMixturePrior(torch.zeros(1, 2, dtype=torch.float64), torch.ones(1))
    found = []
    for eta in (0.3, 0.0):
        method, z = SDI(inversion_noise=eta), normal(8, 4000)
        step = method.noise(step_at(t, z=z, eps=None), asking(wide))
        found.append(step.eps)
    assert (found[0] - found[1]).std().item() == pytest.approx(share, rel=0.15)


def test_sdi_guides_by_its_own_scales():
    """8.5 and −6.5 here are ±7.5 in the convention ε_y + s (ε_y − ε_∅), whatever the config's scale."""
    at = SDI(grid=1).levels(step_at(1))[-1]  # the only one
    null, text, end = epsilon(Z, at, ""), epsilon(Z, at, "a duck"), ALPHAS[at].item()
    method, asked = SDI(grid=1, inversion_noise=0.0), []

    def predict(queries):
        asked.append(queries)
        return asking(PRIOR)(queries)

    step = method.noise(step_at(1, DistillConfig(guidance_scale=2.0), eps=None), predict)
    inverted = text + -7.5 * (text - null)
    x = ddim_step(Z, inverted, 1.0, end)
    close(step.eps, (x - math.sqrt(end) * Z) / math.sqrt(1 - end), atol=1e-7)
    found = method.direction({"null": null, "text": text}, step)
    close(found, text + 7.5 * (text - null) - step.eps)


def test_ism_is_the_difference_along_its_trajectory():
    """By hand: x_0 → x_200 → x_s → x_t under ∅, ε^ω(x_t; y) − ε(x_s; ∅)."""
    step = step_at(400, eps=None)
    done = ISM().noise(step, asking(PRIOR))
    fresh = torch.randn(6, 2, generator=torch.Generator().manual_seed(5))
    x = math.sqrt(ALPHAS[0]) * Z + math.sqrt(1 - ALPHAS[0]) * fresh.double()
    for at, then in ((0, 200), (200, 320), (320, 400)):
        eps = epsilon(x, at, "")
        a, b = ALPHAS[at].item(), ALPHAS[then].item()
        x = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps
    close(done.z_t, x)
    null, text = epsilon(x, 400, ""), epsilon(x, 400, "a duck")
    close(direction(ISM(), 400, eps=done.eps, kept=done.kept), null + 7.5 * (text - null) - eps)


def test_ism_of_a_prompt_that_says_nothing_vanishes_with_its_interval():
    sizes = [
        run(ISM(interval=d), DistillConfig(schedule="annealed", t_max=0.5), prompts="", z=Z)[1]["gradient_rms"]
        for d in (0.2, 0.02, 0.001)
    ]
    assert sizes[0] > 5 * sizes[1] > 25 * sizes[2] > 0


# Methods that edit.

ABOUT = {"source": SOURCE, "source_prompts": "a cat"}


@pytest.mark.parametrize("t", TIMES)
def test_dds_is_the_difference_of_two_guided_predictions(t):
    close(direction(DDS(), t, **ABOUT), guided(Z, t, "a duck") - guided(SOURCE, t, "a cat"))
    assert configured(DDS(), DistillConfig()).weight == "one"


@pytest.mark.parametrize("t", [0, 2, 101, 401, 901])
def test_pds_is_the_difference_of_stochastic_latents(t):
    """s = (x_t' − μ(x_t, x̂_0))/σ step by step, the same ε_t and ε_t' for both: t' = t − 2, and α, β of the step t."""
    alphas, at = ALPHAS.tolist(), max(t, 2)  # the first that has a t − 2
    a, before, alpha = alphas[at], alphas[at - 2], alphas[at] / alphas[at - 1]
    other = normal(9)

    def stochastic(z, predicted):
        x_t = math.sqrt(a) * z + math.sqrt(1 - a) * EPS
        x_before = math.sqrt(before) * z + math.sqrt(1 - before) * other
        x0 = (x_t - math.sqrt(1 - a) * predicted) / math.sqrt(a)
        mean = (math.sqrt(before) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - before) * x_t) / (1 - a)
        return (x_before - mean) / math.sqrt((1 - before) / (1 - a) * (1 - alpha))

    answers = guided(Z, t, "a duck"), guided(SOURCE, t, "a cat")
    expected = stochastic(Z, answers[0]) - stochastic(SOURCE, answers[1])
    close(direction(PDS(), t, **ABOUT), expected, atol=1e-6)
    assert configured(PDS(), DistillConfig()).weight == "one"


def test_pds_holds_to_its_source_as_strongly_as_its_authors():
    """E[ψ]/E[χ] over t 20 ... 979, the strength of the identity term under w = 1."""
    found = [posterior_coefficients(*ALPHAS[[t, t - 2]].tolist(), (ALPHAS[t] / ALPHAS[t - 1]).item())
             for t in range(20, 980)]  # fmt: skip
    psi, chi = torch.tensor(found, dtype=torch.float64).mean(0)
    assert (psi / chi).item() == pytest.approx(1.115, abs=0.02)
    z = SOURCE + 1.0
    pull = direction(PDS(), 401, z=z, **ABOUT) - direction(PDS(psi=0.0), 401, z=z, **ABOUT)
    psi, chi = found[401 - 20]
    close(pull, torch.full((6, 2), psi).double(), atol=1e-7)
    assert psi / chi == pytest.approx(0.607, abs=0.002)


@pytest.mark.parametrize("t", TIMES)
def test_dreamcatalyst_is_dds_and_a_pull_by_its_authors_weights(t):
    """grad = (δ + γ τ^(1/e)) (ε_tgt − ε_src) + ψ e^τ (x_tgt − x_src), δ 0.2, γ 0.8 and their ψ, our χ, 0.075."""
    tau, change = t / 1000, guided(Z, t, "a duck") - guided(SOURCE, t, "a cat")
    expected = (0.2 + 0.8 * tau ** (1 / math.e)) * change + 0.075 * math.exp(tau) * (Z - SOURCE)
    close(direction(DreamCatalyst(), t, **ABOUT), expected)
    close(direction(DreamCatalyst(chi=0.0, delta=1.0, gamma=0.0), t, **ABOUT), direction(DDS(), t, **ABOUT))
    for key in ("chi", "delta", "gamma"):
        with pytest.raises(ValueError, match=f"{key} is -1"):
            DreamCatalyst(**{key: -1.0})


def test_dreamcatalyst_pulls_harder_at_high_noise_and_pds_at_low():
    nothing = lambda asked: {name: torch.zeros_like(query.z_t) for name, query in asked.items()}  # noqa: E731
    pull = lambda method, t: direction(method, t, z=SOURCE + 1.0, predict=nothing, **ABOUT).mean()  # noqa: E731
    assert pull(DreamCatalyst(), 900) > 1.5 * pull(DreamCatalyst(), 200)
    assert pull(PDS(), 200) > 10 * pull(PDS(), 900)
    config = configured(DreamCatalyst(), DistillConfig(steps=3, t_min=0.2, t_max=0.9))
    found = [run(DreamCatalyst(), config, number=k, **ABOUT)[1]["t"] for k in range(3)]
    assert (config.weight, found) == ("one", [900, 550, 200])


def test_pds_without_a_pull_is_chi_times_dds():
    _, chi = posterior_coefficients(*ALPHAS[[500, 498]].tolist(), (ALPHAS[500] / ALPHAS[499]).item())
    close(direction(PDS(psi=0.0), 500, **ABOUT), chi * direction(DDS(), 500, **ABOUT))
    for wrong in (-1.0, math.inf):
        with pytest.raises(ValueError, match=f"psi is {wrong}"):
            PDS(psi=wrong)


@pytest.mark.parametrize("t", [2, 101, 401, 701, 999])
def test_a_consistent_posterior_has_no_identity_term(t):
    for previous in (t - 1, t - 2, 0):
        psi, chi = posterior_coefficients(ALPHAS[t].item(), ALPHAS[previous].item())
        assert abs(psi) < 1e-6 * chi


@pytest.mark.parametrize(("t", "ratio"), [(101, 2.7), (401, 0.61), (701, 0.16), (901, 0.06)])
def test_the_authors_mixed_steps_make_one(t, ratio):
    psi, chi = posterior_coefficients(*ALPHAS[[t, t - 2]].tolist(), (ALPHAS[t] / ALPHAS[t - 1]).item())
    assert psi / chi == pytest.approx(ratio, rel=0.06)


@pytest.mark.parametrize("t", [120, 500, 979])
@pytest.mark.parametrize("number", [0, 5, 9])
def test_dvrf_is_the_authors_velocities_with_their_shift(t, number):
    """Eq. 6 and 8 as their code has it, with velocities from flow-matching's x_s; η = number/steps."""
    a, sigma = math.sqrt(ALPHAS[t].item()), math.sqrt(1 - ALPHAS[t].item())
    s, eta = sigma / (a + sigma), number / 10

    def velocity(x_s, prompt, scale):
        z_t = (a + sigma) * x_s
        null = epsilon(z_t, t, "")
        eps = null + scale * (epsilon(z_t, t, prompt) - null)
        return (eps - x_s) / (1 - s)

    x_target = (1 - s) * Z + s * EPS + eta * s * (Z - SOURCE)
    x_source = (1 - s) * SOURCE + s * EPS
    delta = velocity(x_target, "a duck", 7.5) - velocity(x_source, "a cat", 3.0)
    found = direction(DVRF(source_scale=3.0), t, number=number, **ABOUT)
    close(found, delta + (1 - eta) * (Z - SOURCE), atol=1e-7)
    if number == 0:
        close(direction(DVRF(), t, **ABOUT), (1 + sigma / a) * direction(DDS(), t, **ABOUT))


def test_dvrf_contains_flow_edit():
    """η = 1, s falling, steps of Δs: z_FE follows dz = [v(z + x̃_s − z̃; y) − v(x̃_s; ỹ)] ds, arXiv 2412.08629."""
    method, config, z, by_hand = DVRF(eta_start=1.0), DistillConfig(guidance_scale=1.0), SOURCE, SOURCE
    ratio = ((1 - ALPHAS) / ALPHAS).sqrt()
    times = (ratio / (1 + ratio)).tolist()
    for t in range(900, 0, -100):
        s, a = times[t], math.sqrt(ALPHAS[t].item())
        length = s - times[t - 100]
        z = z - length * direction(method, t, config, z=z, **ABOUT)
        x = (1 - s) * SOURCE + s * EPS
        moved, scale = x + by_hand - SOURCE, a + math.sqrt(1 - a * a)
        change = epsilon(scale * moved, t, "a duck") - moved - (epsilon(scale * x, t, "a cat") - x)
        by_hand = by_hand - length * change / (1 - s)
    close(z, by_hand, atol=1e-7)
    assert (z - SOURCE).norm() > 1


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("baseline", ["image", "guided", "noise"])
@pytest.mark.parametrize("image_scale", [1.0, 1.5])
def test_csd_edit_is_target_minus_source(t, baseline, image_scale):
    class Editor(GaussianMixturePrior):
        def predict_noise(self, z_t, t, condition):
            eps = super().predict_noise(z_t, t, condition)
            return eps if condition.image is None else eps + 0.3 * (z_t - condition.image)

    prior, image = Editor(MEANS, torch.full((3,), STD, dtype=torch.float64), prompts=WORDS), normal(4)[..., None, None]
    z, source, eps = (x[..., None, None] for x in (Z, SOURCE, EPS))
    prior.means = prior.means[..., None, None]

    def of(z_t, prompt, shown=True):
        return epsilon(z_t[..., 0, 0], t, prompt)[..., None, None] + (0.3 * (z_t - image) if shown else 0)

    a = ALPHAS[t].item()
    z_t, source_t = (math.sqrt(a) * x + math.sqrt(1 - a) * eps for x in (z, source))
    null = of(z_t, "", False)
    target = null + image_scale * (of(z_t, "") - null) + 7.5 * (of(z_t, "a duck") - of(z_t, ""))
    null = of(source_t, "", False)
    plain = of(source_t, "")
    known = {"image": plain, "guided": null + image_scale * (plain - null), "noise": eps}[baseline]
    method = CSDEdit(image_scale=image_scale, baseline=baseline)
    found = direction(method, t, z=z, source=source, image=image, eps=eps, predict=asking(prior))
    close(found, target - known)


def test_csd_edit_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="baseline is 'null'"):
        CSDEdit(baseline="null")
    with pytest.raises(ValueError, match="text_scale is inf"):
        CSDEdit(text_scale=math.inf)
    with pytest.raises(ValueError, match="csd_edit needs image"):
        direction(CSDEdit(), 500, **ABOUT)


@pytest.mark.parametrize("method", [DDS(), PDS(), DVRF()])
@pytest.mark.parametrize("noise", ["independent", "shared", "camera"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_source_that_is_what_is_wanted_stays(method, scale, noise):
    """Exactly: both are noised alike."""
    config = DistillConfig(guidance_scale=scale, noise=noise, steps=10)
    for prompt, still in (("a duck", True), ("a cat", False)):
        about = {"source": Z.clone(), "source_prompts": prompt, "camera_noise": EPS}
        assert torch.equal(run(method, config, **about)[0], torch.zeros_like(Z)) == still


@pytest.mark.parametrize("method", [DDS(), PDS(), DVRF()])
def test_a_source_is_asked_for(method):
    for source, got in ((None, "nothing"), (Z[:1], r"\(1, 2\)")):  # one row would be broadcast
        with pytest.raises(ValueError, match=rf"ds|rf needs source, latents \(6, 2\) to edit, got {got}"):
            run(method, DistillConfig(), source=source)


# All of them.

NETWORKS = {"lora": Says(lambda query: query.z_t), "expected": Says(lambda query: query.z_t)}
METHODS = [e.thing for e in registry.entries("method") if e.name not in ("csd_edit", "dreamfields")]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_one_particle_with_svgd_is_the_method_alone(method):
    for number in (0, 9):  # both stages of the bridge
        found = []
        for svgd in (None, SVGDConfig(), SVGDConfig(normalize="row", space="clean")):
            config, predict = DistillConfig(steps=10, svgd=svgd), asking(PRIOR, NETWORKS)
            about = {**ABOUT, "source": SOURCE[:1], "camera_noise": EPS[:1], "features": Z[:1]}
            found.append(run(method(), config, Z[:1], number, predict=predict, **about)[0])
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_two_identical_particles_are_finite_and_move_alike(method):
    config, predict = DistillConfig(steps=10, noise="shared", svgd=SVGDConfig()), asking(PRIOR, NETWORKS)
    z = Z[:1].expand(2, -1)
    about = {**ABOUT, "source": SOURCE[:1].expand(2, -1), "camera_noise": EPS[:1].expand(2, -1), "features": z}
    found, report = run(method(), config, z, 0, predict=predict, **about)
    assert torch.isfinite(found).all()
    if method not in (SDI, ISM):  # these draw a noise for each
        close(found[0], found[1])
    assert not report["skipped"]


@pytest.mark.parametrize("method", [DDS(), PDS(psi=0.0), DVRF(eta=0.0)])
@pytest.mark.parametrize("svgd", [None, SVGDConfig(repulsion=0.0, normalize="row")])
def test_edits_take_every_particle_from_the_sources_mode_as_far_as_to_the_targets(method, svgd):
    """Of N(μ, s²), z̃ goes to z̃ + μ_target − μ_source, at every t: how it differs from its mode is kept."""
    source = MEANS[2] + STD * Z
    config = DistillConfig(400, guidance_scale=1.0, noise="shared", svgd=svgd)
    z, generator = source, torch.Generator().manual_seed(0)
    for number in range(config.steps):
        about = {"prompts": "a duck", "source": source, "source_prompts": "a cat"}
        gradient, report = distill_step(asking(PRIOR), method, z, number, config, ALPHAS, generator, **about)
        a = ALPHAS[int(report["t"])].item()
        exact = math.sqrt(a * (1 - a)) / (a * STD**2 + 1 - a)  # the slope of DDS's Δ in z
        z = z - gradient * {DDS: 0.9 / exact, PDS: 5.0, DVRF: 0.5 / (exact * (1 + ((1 - a) / a) ** 0.5))}[type(method)]
    torch.testing.assert_close(z, source + MEANS[1] - MEANS[2], rtol=0, atol=1e-3)


def test_pds_stops_where_the_pull_is_as_strong():
    """DDS of equal Gaussians is c (z − z̃ − shift), c = √(ᾱ(1−ᾱ))/(ᾱs² + 1 − ᾱ): so z − z̃ ends as shift χc/(χc + ψ)."""
    config = DistillConfig(200, schedule="annealed", t_min=0.4, t_max=0.4, guidance_scale=1.0)
    z, generator, psi = SOURCE, torch.Generator().manual_seed(0), 0.1
    for number in range(config.steps):
        gradient, _ = distill_step(
            asking(PRIOR), PDS(psi=psi), z, number, config, ALPHAS, generator, prompts="a duck", **ABOUT
        )
        z = z - 3 * gradient
    a = ALPHAS[400].item()
    _, chi = posterior_coefficients(a, ALPHAS[398].item(), (ALPHAS[400] / ALPHAS[399]).item())
    c = chi * math.sqrt(a * (1 - a)) / (a * STD**2 + 1 - a)
    torch.testing.assert_close(z, SOURCE + (MEANS[1] - MEANS[2]) * c / (c + psi), rtol=0, atol=1e-6)


def test_a_bridge_moves_in_a_straight_line_that_nothing_stops():
    """Its Δ is the constant −ω σ √ᾱ (μ_good − μ_bad)/v."""
    method, t = Bridge(switch=0.0, good=", sharp", bad=", blurry"), 500
    a = ALPHAS[t].item()
    v = a * STD**2 + 1 - a
    close(direction(method, t), -7.5 * math.sqrt(a * (1 - a)) / v * (MEANS[1] - MEANS[2]))


def test_rsd_keeps_scores_and_repels_by_features():
    """Its particles' own SDS, and on their features what autograd says of λ σ_t/N Σ_j k(φ_i, φ_j)."""
    method, phi = RSD(repulsion=3.0), normal(11)
    config = configured(method, DistillConfig(schedule="annealed", t_max=0.4))
    gradient, report = run(method, config, features=phi)
    alone, _ = run(SDS(), DistillConfig(schedule="annealed", t_max=0.4))
    close(gradient, alone)
    assert report["repulsion_ratio"] > 0
    a, leaf = ALPHAS[400].item(), phi.clone().requires_grad_()
    squared = (leaf[:, None] - phi[None]).square().mean(-1)
    between = squared.detach()[~torch.eye(6, dtype=torch.bool)]
    total = torch.exp(-math.log(7) / between.median() * squared).sum() / 6
    (grad,) = torch.autograd.grad(total, leaf)
    close(feature_gradient(phi, 400, config, ALPHAS), (1 - a) * 3.0 * math.sqrt(1 - a) * grad)
    z = RSD(space="clean")
    by_latents, _ = run(z, DistillConfig(schedule="annealed", t_max=0.4))
    assert not torch.allclose(by_latents, alone)


@pytest.mark.parametrize("t", [300, 600])
def test_particle_guidance_adds_the_gradient_of_its_potential_within_groups(t):
    """By autograd of log Φ, whose h is the median squared distance over ln N; none where noise is less than picture."""
    method, groups = ParticleGuidance(strength=3.0), torch.tensor([0, 1, 0, 1, 0, 1])
    a = ALPHAS[t].item()
    expected = guided(Z, t, "a duck") - EPS
    z_t = math.sqrt(a) * Z + math.sqrt(1 - a) * EPS
    for rows in (groups == 0, groups == 1) if 1 - a > a else ():
        x = z_t[rows].clone().requires_grad_()
        squared = (x[:, None] - x[None]).square().sum(-1)
        off = ~torch.eye(3, dtype=torch.bool)
        h = squared.detach()[off].median() / math.log(3)
        log_phi = -3.0 / 2 * torch.exp(-squared / h)[off].sum()
        expected[rows] -= math.sqrt(1 - a) * torch.autograd.grad(log_phi, x)[0]
    close(direction(method, t, groups=groups), expected)
    close(direction(method, t, groups=torch.arange(6)), guided(Z, t, "a duck") - EPS)  # one each: nothing to push
    apart, _ = run(method, DistillConfig(schedule="annealed", t_max=0.9, noise="shared"), z=Z * 1e-3)
    alone, _ = run(SDS(), DistillConfig(schedule="annealed", t_max=0.9, noise="shared"), z=Z * 1e-3)
    moved = -(apart - alone)  # the gradient is descended
    assert (moved * (Z - Z.mean(0))).sum() > 0


def test_every_method_lists_its_queries_once_and_documents_itself():
    for entry in registry.entries("method"):
        assert entry.title
        assert entry.thing.__doc__.count("arXiv") >= 1, entry.name
        assert "        G, report = distill_step(" in entry.thing.__doc__ or entry.name == "csd_edit", entry.name
