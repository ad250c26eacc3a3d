"""CSD-Edit of canvases, on exact priors with known answers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from csd3d.canvas.latents import Latents
from csd3d.canvas.windows import Cover, draw_sweep
from csd3d.distillation.edit_loop import CollaborativeEditConfig, edit_step
from csd3d.distillation.step import new_step, step_gradient
from csd3d.distillation.svgd import SVGDConfig
from csd3d.editors.canvas import Canvas, CanvasPhase
from csd3d.editors.csd_edit_canvas import CSDEditCanvas
from csd3d.priors import Condition, Defaults, PriorConfig, load_prior, scaled_linear_alphas
from csd3d.priors.prior import predict_queries

EDIT = CollaborativeEditConfig(
    steps=24, lr=1.0, lr_decay=1.0, weight="x0", schedule="annealed", t_max=0.8, noise="shared", svgd=None
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class ExactPrior:
    """Knows N(source, s²) without an instruction, and N(c, s²) under the instruction "c", a number; counts its rows."""

    device, num_train_timesteps, defaults = torch.device("cpu"), 1000, Defaults()

    def __init__(self, std=0.1):
        self.alphas_cumprod, self.std, self.unet_evaluations = scaled_linear_alphas().float(), std, 0

    def condition_from_latent(self, z):
        return z

    def query_condition(self, query):
        said = [float(prompt or "nan") for prompt in query.prompts]
        image = torch.zeros_like(query.z_t) if query.image is None else query.image
        return Condition(torch.tensor(said)[:, None, None], image)

    def predict(self, queries):
        return predict_queries(self, queries)

    def predict_noise(self, z_t, t, condition):
        self.unet_evaluations += len(z_t)
        said = condition.text[:, :, :, None]
        mean = torch.where(said.isnan(), condition.image, said)
        alpha_bar = self.alphas_cumprod[t][:, None, None, None]
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (z_t - alpha_bar.sqrt() * mean) / variance


def canvas_of(prior, z, instructions, cover, shares=None):
    latents = Latents(clip=None, size=None, codec=SimpleNamespace(wrap=cover.wrap), z=z)
    return Canvas(prior, latents, instructions, cover, shares=shares)


def editor_of(edit=EDIT, batch=None, **keys):
    return CSDEditCanvas(**{"text_scale": 1.0, "image_scale": 1.0} | keys, edit=replace(edit, batch=batch))


def edited(canvas, edit=EDIT, batch=None, roll=0):
    """All sweeps of an edit, without the job about it; `roll`: windows drawn alike on a canvas rolled so far."""
    editor, z = editor_of(edit, batch), canvas.latents.z.clone()
    cover, phase = editor.cover(canvas), CanvasPhase(seeded(), z=z, moved=torch.zeros_like(z))
    canvas.generator = lambda purpose: seeded(1000 + int(purpose.split("/")[1]))
    for number in range(edit.steps):
        sweep = draw_sweep(cover, seeded(number))
        sweep = replace(sweep, windows=replace(sweep.windows, left=(sweep.windows.left + roll) % z.shape[3]))
        for part in range(cover.steps):
            report = editor.move(canvas, phase, sweep, (number, part, cover.steps), edit)
            assert not report["skipped"]
        phase.z += phase.moved
        phase.moved.zero_()
    return phase.z


@pytest.mark.parametrize("svgd", [None, SVGDConfig(bandwidth=10.24, normalize="row", repulsion=0.0)])
def test_regions_end_at_their_own_means(svgd):
    """Inside a region its instruction's mean; outside the source; where they overlap or end, the mix by area."""
    z = torch.randn(1, 4, 16, 40, generator=seeded(7))
    shares = torch.zeros(1, 2, 16, 40)
    shares[0, 0, :, 3:17], shares[0, 1, 4:, 20:38] = 1, 1
    shares[0, :, 4:, 15:17] = 0.5
    shares[0, 0, :, 2] = 0.25
    prior, cover, edit = ExactPrior(std=1e-3), Cover((1, 16, 40), (16, 16)), replace(EDIT, svgd=svgd)
    found = edited(canvas_of(prior, z, ["0.8", "-0.5"], cover, shares), edit, batch=8)
    means = 0.8 * shares[:, :1] - 0.5 * shares[:, 1:]
    expected = means + (1 - shares.sum(1, keepdim=True)) * z
    if svgd is None:
        torch.testing.assert_close(found, expected.expand_as(z), rtol=0, atol=2e-3)
    untouched = (shares.sum(1, keepdim=True) == 0).expand_as(z)
    torch.testing.assert_close(found[untouched], z[untouched], rtol=0, atol=1e-6)
    alone = (shares[:, 1:] == 1).expand_as(z)  # the other instruction, whatever is shared, never comes in here
    drift = edited(canvas_of(prior, z, ["-9", "-0.5"], cover, shares), edit, batch=8)
    assert (drift - found)[alone].abs().max() < 2e-3


def test_instructions_are_shared_among_their_own_particles_only():
    """Two windows each: as if the others were not there, scaled by the share; a constant kernel would mix them all."""
    z = torch.randn(4, 4, 8, 8, generator=seeded(3))
    source, eps = torch.randn(2, 4, 4, 8, 8, generator=seeded(4))
    shares = torch.zeros(2, 4, 1, 8, 8)
    shares[0, :2], shares[1, 2:] = 0.75, 1.0
    edit = replace(EDIT, svgd=SVGDConfig(bandwidth=0.0))

    def gradient(rows, texts, shares=None):
        prior, count = ExactPrior(), len(z[rows])
        alphas, told = torch.full((1000,), 0.6), tuple((text,) * count for text in texts)
        prior.alphas_cumprod, parts = alphas, {"source": source[rows], "image": source[rows], "shares": shares}
        step = new_step(z[rows], 300, 0, edit, alphas, seeded(), prompts=told[0], instructions=told, **parts)
        return step_gradient(prior.predict, editor_of().method(0, 0), replace(step, eps=eps[rows]), edit)[0]

    found = gradient(slice(None), ["0.8", "-0.5"], shares)
    first, second = gradient(slice(2), ["0.8"]), gradient(slice(2, 4), ["-0.5"])
    back = math.sqrt(0.4 / 0.6) * math.sqrt(0.6 / 0.4) * (z - source)[:2]  # w(t) times the way to the source
    torch.testing.assert_close(found[:2], 0.75 * first + 0.25 * back)
    torch.testing.assert_close(found[2:], second)


def test_rows_without_a_share_are_not_computed():
    """Three windows side by side, a region in one and one in two of them: 2 · 3 shared rows, 1 + 2 of instructions."""
    shares = torch.zeros(1, 2, 8, 24)
    shares[0, 0, :, :4], shares[0, 1, :, 12:20] = 1, 1
    prior = ExactPrior()
    cover = Cover((1, 8, 24), (8, 8), overlap=0.0)
    edited(canvas_of(prior, torch.zeros(1, 4, 8, 24), ["1", "2"], cover, shares), replace(EDIT, steps=1))
    assert prior.unet_evaluations == 2 * 3 + 3


def test_mini_batches_change_nothing_but_who_shares_with_whom():
    """Without collaboration a sweep in seven steps moves every latent as a sweep in one."""
    z = torch.randn(3, 4, 20, 20, generator=seeded(3))
    cover, prior = Cover((3, 20, 20), (16, 16)), ExactPrior(std=0.5)
    assert replace(cover, batch=2).steps == 6
    whole, parts = (edited(canvas_of(prior, z, ["0.3"], cover), replace(EDIT, steps=3), batch) for batch in (None, 2))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert prior.unet_evaluations == 2 * 3 * 12 * 3


def test_one_window_is_the_edit_of_one_latent():
    """A canvas that fits is a particle like any other: `collaborative_edit`'s answer, to the bit."""
    z = torch.randn(1, 4, 8, 8, generator=seeded(3))
    prior, edit, expected = ExactPrior(), replace(EDIT, steps=3), z.clone()
    parts = prior.predict, editor_of().method(0, 0)
    for number in range(3):
        settings = (z, z, number, edit, prior.alphas_cumprod, seeded(1000 + number))
        expected, _, _ = edit_step(*parts, expected, *settings, prompts="0.3")
    found = edited(canvas_of(prior, z, ["0.3"], Cover((1, 8, 8), (8, 8))), edit)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def random_prior(tiny_prior):
    return load_prior(PriorConfig(model=str(tiny_prior)))


@pytest.mark.parametrize("svgd", [None, SVGDConfig()])
def test_rolling_a_panorama_that_closes_rolls_its_edit(random_prior, svgd):
    """To the bit, when the windows are drawn alike: nothing knows where the picture's border was."""
    z = torch.randn(1, 4, 4, 16, generator=seeded(3))
    cover, edit = Cover((1, 4, 16), (4, 4), wrap=True), replace(EDIT, steps=2, svgd=svgd)
    found = edited(canvas_of(random_prior, z, ["paint it red"], cover), edit)
    rolled = edited(canvas_of(random_prior, z.roll(5, 3), ["paint it red"], cover), edit, roll=5)
    assert (found - z).abs().max() > 0.1
    assert torch.equal(rolled, found.roll(5, 3))


@pytest.mark.parametrize(("share_above", "like"), [(1.0, None), (0.0, SVGDConfig(bandwidth=0))])
def test_windows_share_above_a_noise_level_only(share_above, like):
    z = torch.randn(3, 4, 8, 8, generator=seeded(3))
    edit = replace(EDIT, steps=2, svgd=SVGDConfig(bandwidth=0))
    cover = Cover((3, 8, 8), (8, 8))
    found = edited(canvas_of(ExactPrior(), z, ["0.3"], cover), replace(edit, share_above=share_above))
    expected = edited(canvas_of(ExactPrior(), z, ["0.3"], cover), replace(edit, svgd=like))
    assert torch.equal(found, expected)


def test_steps_cost_the_same_and_every_latent_gets_its_passes():
    editor = editor_of(passes=10)
    one = Cover((24, 16, 16), (16, 16), batch=24)
    assert editor.count_sweeps(one) == 24
    assert editor.count_sweeps(replace(one, shape=(48, 16, 16))) == 12  # the same 24 steps, of 24 windows each
    assert editor.count_sweeps(replace(one, shape=(240, 16, 16))) == 10
    assert replace(editor, passes=0).count_sweeps(replace(one, shape=(240, 16, 16))) == 2


def test_scales_that_are_null_are_those_that_suit_the_model():
    """At another image scale than 1 the null branch is asked for too."""
    found = []
    for keys, suits in (
        ({"text_scale": None, "image_scale": None}, Defaults(text_scale=4.0, image_scale=1.25)),
        ({"text_scale": 4.0, "image_scale": 1.25}, Defaults()),
    ):
        canvas = canvas_of(ExactPrior(), torch.ones(1, 4, 8, 8), ["0.3"], Cover((1, 8, 8), (8, 8)))
        canvas.prior.defaults, canvas.generator = suits, lambda purpose: seeded()
        phase = CanvasPhase(seeded(), z=canvas.latents.z.clone(), moved=torch.zeros(1, 4, 8, 8))
        editor_of(**keys).take_step(canvas, phase, 0)
        assert canvas.prior.unet_evaluations == 4
        found.append(phase.z)
    assert torch.equal(*found)
    assert (found[0] - 1).abs().max() > 0.1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"baseline": "none"}, "choose one of image, guided, noise"),
        ({"passes": -1}, "passes is -1"),
        ({"text_scale": math.inf}, "text_scale is inf"),
    ],
)
def test_odd_settings_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        CSDEditCanvas(**keys)
