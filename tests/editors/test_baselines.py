"""The baselines on tiny random pipelines, and on mixtures where the answer is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from csd3d.canvas.pieces import (
    Pieces,
    frame_predictor,
    instruction_words,
    window_pieces,
    window_predictor,
    window_tracks,
)
from csd3d.canvas.windows import Windows
from csd3d.distillation.ddim import ddim_edit, ddim_invert, ddim_sample, ddim_step, ddim_timesteps
from csd3d.distillation.edit import guided_predictor
from csd3d.distillation.noise import draw_noise
from csd3d.editors.baselines import BASELINES, BaselineConfig, downscaled_size, edit_by
from csd3d.editors.baselines_video import FateZeroConfig, Pix2VideoConfig, Sampling, guide_latents
from csd3d.errors import InputError
from csd3d.priors import Condition, GaussianMixturePrior, PriorConfig, load_prior
from csd3d.priors.attention import CrossFrameAttention, attention_layers, cross_frame_attention

THROUGH = {"rtol": 1e-3, "atol": 1e-3}  # several steps of a UNet in float32


@pytest.fixture(scope="module")
def prior(tiny_prior):
    prior = load_prior(PriorConfig(model=str(tiny_prior), device="cpu"), require="edit")
    for layer in attention_layers(prior.unet).values():  # loud enough to be seen in the output
        for part in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]):
            part.weight.mul_(3)
    return prior


@pytest.fixture
def pieces(prior):
    """Of unit latents: those of a random VAE are all but constant, which group norms amplify a thousandfold."""
    return framed(prior, *torch.randn(2, 5, 4, 4, 4, generator=seeded(8)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(init="noise", noise="independent", pix2video=None, fatezero=None, **sampling) -> BaselineConfig:
    return BaselineConfig(
        init=init,
        noise=noise,
        sampling=Sampling(**{"steps": 4, "start": 0.6, "text_scale": 3.0, "image_scale": 1.5} | sampling),
        pix2video=Pix2VideoConfig(**(pix2video or {})),
        fatezero=FateZeroConfig(**{"mask_threshold": 0.7} | (fatezero or {})),  # which about half of the pixels reach
    )


def edit(name, prior, pieces, settings, seed=0) -> Tensor:
    return edit_by(name, prior, pieces, settings, seeded(seed))[0]


def framed(prior, z_source, condition, prompt="red blue") -> Pieces:
    """One window of 4 x 4 a frame."""
    first = torch.zeros(len(z_source), dtype=torch.long)
    windows = Windows(torch.arange(len(z_source)), first, first, (4, 4))
    return window_pieces(prior, z_source, condition, prompt, windows, torch.ones(1, 1, 4, 4))


def pick(prior, pieces: Pieces, rows: list[int]) -> Pieces:
    """A video of some of the frames of another."""
    return framed(prior, pieces.z_source[rows], pieces.condition[rows])


def strip(prior, width: int = 6, prompt="red") -> Pieces:
    """A canvas of 4 x `width` latents under windows of 4 x 4 at every second column."""
    lefts = range(0, width - 3, 2)

    def scatter(windows: Tensor) -> Tensor:
        canvas = torch.zeros(1, windows.shape[1], 4, width, dtype=windows.dtype)
        for left, window in zip(lefts, windows, strict=True):
            canvas[0, :, :, left : left + 4] += window
        return canvas

    z, condition = torch.randn(2, 1, 4, 4, width, generator=seeded(3))
    return Pieces(
        z_source=z,
        condition=condition,
        text=prior.condition([prompt]),
        null=prior.condition([""]),
        words=torch.zeros(12, dtype=torch.bool),
        gather=lambda canvas: torch.cat([canvas[:, :, :, left : left + 4] for left in lefts]),
        scatter=scatter,
        weights=torch.tensor([0.5, 1.0, 2.0, 0.5]).view(1, 1, 1, 4).expand(1, 1, 4, 4),
        tracks=[torch.tensor([i]) for i in range(len(lefts))],
    )


@pytest.mark.parametrize("name", ["ip2p", "ip2p_multidiffusion"])
def test_gaussian_windows_make_the_gaussian_canvas(name):
    """N(0.7, 0.2²) under the instruction, N(−0.3, 0.2²) under "": guided twice as far, DDIM of N(1.7, 0.2²)."""
    means = torch.tensor([0.7, -0.3]).view(2, 1, 1, 1).expand(2, 4, 4, 4)
    only = {"red": torch.tensor([1.0, 0.0]), "": torch.tensor([0.0, 1.0])}
    prior = GaussianMixturePrior(means, torch.tensor([0.2, 0.2]), prompts=only)
    pieces = strip(prior, width=10)
    settings = config(start=0.8, steps=20, text_scale=2.0, image_scale=1.0)
    found, evaluations = edit_by(name, prior, pieces, settings, seeded(1))

    def exact(z_t: Tensor, t: int) -> Tensor:
        a = prior.alphas_cumprod[t].item()
        return math.sqrt(1 - a) * (z_t - math.sqrt(a) * 1.7) / (a * 0.04 + 1 - a)

    z_t = draw_noise(pieces.z_source, "independent", seeded(1))
    expected = ddim_sample(exact, z_t, prior.alphas_cumprod, ddim_timesteps(800, 20))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert evaluations == 20 * 2 * 4  # at image scale 1 there are two branches


@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_frames_one_by_one_are_ddim_edit(prior, pieces, noise):
    found = edit("ip2p", prior, pieces, config(init="source", noise=noise))
    guided = guided_predictor(window_predictor(prior, pieces), torch.arange(5), 3.0, 1.5)
    alphas = prior.alphas_cumprod
    expected = ddim_edit(guided, pieces.z_source, alphas, start=600, steps=4, generator=seeded(), noise=noise)
    assert torch.equal(found, expected)
    alone = edit("ip2p", prior, pick(prior, pieces, [0]), config(init="source", noise=noise))
    torch.testing.assert_close(found[:1], alone, **THROUGH)  # of whose noise the first frame's is the first draw


def test_one_window_fused_is_one_window_bit_for_bit(prior, pieces):
    one = pick(prior, pieces, [2])
    one = replace(one, weights=torch.rand(1, 1, 4, 4, generator=seeded()) + 0.1)
    assert torch.equal(edit("ip2p_multidiffusion", prior, one, config()), edit("ip2p", prior, one, config()))


def test_windows_alone_are_averaged(prior):
    both = strip(prior)
    found = edit("ip2p", prior, both, config())
    z_t, windows = draw_noise(both.z_source, "independent", seeded()), []
    for left in (0, 2):
        part = replace(
            both,
            gather=lambda canvas, left=left: canvas[..., left : left + 4],
            tracks=[torch.tensor([0])],
        )
        guided = guided_predictor(window_predictor(prior, part), torch.arange(1), 3.0, 1.5)
        windows.append(ddim_sample(guided, z_t[..., left : left + 4], prior.alphas_cumprod, [600, 450, 300, 150]))
    weights = both.weights.expand(2, 4, 4, 4)
    expected = both.scatter(weights * torch.cat(windows)) / both.scatter(weights)
    torch.testing.assert_close(found, expected, **THROUGH)
    torch.testing.assert_close(found[..., :2], windows[0][..., :2], **THROUGH)
    assert (edit("ip2p_multidiffusion", prior, both, config()) - found).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "each", "settings"),
    [
        ("ip2p", 4 * 3 * 5, {}),
        ("ip2p", 4 * 2 * 5, {"image_scale": 1.0}),
        ("ip2p_multidiffusion", 4 * 3 * 5, {}),
        ("pix2video", 4 * (1 + 3) * 5, {}),
        ("fatezero", (4 + 3 + 4 * 3) * 5, {}),  # 3 of the 4 steps of the inversion record, and ask the instruction
    ],
)
def test_evaluations_are_counted_and_steps_reported(prior, pieces, name, each, settings):
    reports = []
    before = prior.unet_evaluations
    settings = config(**settings)
    z, evaluations = edit_by(name, prior, pieces, settings, seeded(), reports.append)
    assert evaluations == prior.unet_evaluations - before == each
    assert [r["t"] for r in reports][-4:] == [600.0, 450.0, 300.0, 150.0]
    assert z.shape == pieces.z_source.shape
    assert torch.equal(z, edit(name, prior, pieces, settings))  # a function of its seed


@pytest.mark.parametrize("name", ["pix2video", "fatezero"])
def test_the_size_of_a_call_changes_nothing(prior, pieces, name, monkeypatch):
    pieces = pick(prior, pieces, [0, 1, 2])
    expected = edit(name, prior, pieces, config())
    for size in (1, 4):
        monkeypatch.setattr(prior, "micro_batch", size)
        torch.testing.assert_close(edit(name, prior, pieces, config()), expected, **THROUGH)


@pytest.mark.parametrize("name", ["pix2video", "fatezero"])
def test_the_prior_is_left_as_it_was(prior, pieces, name):
    z, condition = pieces.z_source, Condition(prior.embed(["red"] * 5), pieces.condition)
    before = prior.predict_noise(z, 300, condition)
    edit(name, prior, pieces, config())
    assert torch.equal(prior.predict_noise(z, 300, condition), before)


def inverted(prior, pieces) -> Tensor:
    predict = window_predictor(prior, pieces)
    rows = torch.arange(len(pieces.z_source))
    image = lambda z_t, t: predict(z_t, t, ("image",), rows)  # noqa: E731
    return ddim_invert(image, pieces.z_source, prior.alphas_cumprod, [150, 300, 450, 600])


def test_pix2video_of_one_frame_is_the_edit_of_its_inversion(prior, pieces):
    one = pick(prior, pieces, [3])
    guided = guided_predictor(window_predictor(prior, one), torch.arange(1), 3.0, 1.5)
    expected = ddim_sample(guided, inverted(prior, one), prior.alphas_cumprod, [600, 450, 300, 150])
    torch.testing.assert_close(edit("pix2video", prior, one, config()), expected, **THROUGH)


def test_pix2video_knows_the_first_and_the_previous_frame_alone(prior, pieces):
    """Frames ahead play no part, so all frames at once is frame after frame."""
    settings = config(pix2video={"pull": 0.3})
    whole = edit("pix2video", prior, pieces, settings)
    torch.testing.assert_close(edit("pix2video", prior, pick(prior, pieces, [0, 1, 2]), settings), whole[:3], **THROUGH)
    for other in ([3, 1, 2], [0, 3, 2]):
        assert (edit("pix2video", prior, pick(prior, pieces, other), settings)[2] - whole[2]).abs().max() > 1e-2


def test_pix2video_injects_in_the_decoder_and_pulls_in_early_steps(prior, pieces):
    timesteps, rows = [600, 450, 300, 150], torch.arange(5)
    state = CrossFrameAttention(("anchor", "previous"))
    guided = guided_predictor(frame_predictor(prior, pieces, state.begin), rows, 3.0, 1.5)
    z_t, bars = inverted(prior, pieces), [prior.alphas_cumprod[t].item() for t in timesteps] + [1.0]
    with cross_frame_attention(prior.unet, state, "up_blocks."):
        for step, t in enumerate(timesteps):
            eps = guided(z_t, t)
            z0 = ddim_step(z_t, eps, bars[step], 1.0)
            if step < 2:
                z0 = torch.cat([z0[:1], 0.8 * z0[1:] + 0.2 * z0[:-1]])
            z_t = bars[step + 1] ** 0.5 * z0 + (1 - bars[step + 1]) ** 0.5 * eps
    found = edit("pix2video", prior, pieces, config(pix2video={"pull": 0.2, "pull_steps": 0.5}))
    torch.testing.assert_close(found, z_t, **THROUGH)


def test_latent_guidance_is_a_gradient_step(prior):
    z_t, eps = torch.randn(2, 3, 4, 4, 4, generator=seeded(1), dtype=torch.float64)
    a, a_next, pull = 0.3, 0.6, 0.25
    z_t.requires_grad_()
    z0 = (z_t - (1 - a) ** 0.5 * eps) / a**0.5
    z_next = ddim_step(z_t, eps, a, a_next).detach()
    loss = (z0[1:] - z0[:-1].detach()).square().sum()
    (gradient,) = torch.autograd.grad(loss, z_t)
    expected = z_next - 0.5 * pull * (a * a_next) ** 0.5 * gradient
    torch.testing.assert_close(guide_latents(z_next, z0.detach(), a_next, pull), expected, rtol=1e-12, atol=1e-12)


def test_fatezero_that_edits_nowhere_returns_the_source(prior, pieces):
    """With τ above 1 the instruction is not heard, and what is left is how well DDIM steps back up its own way."""
    errors, pieces = [], pick(prior, pieces, [0, 1])
    for steps in (6, 24):
        settings = config(steps=steps, start=0.3, image_scale=1.0, text_scale=7.5)
        errors.append(
            [
                (edit("fatezero", prior, pieces, replace(settings, fatezero=at)) - pieces.z_source).square().mean()
                for at in (FateZeroConfig(1.0, 2.0), FateZeroConfig(1.0, 0.0))
            ]
        )
    (coarse, _), (fine, edited) = errors
    assert fine < coarse / 4
    assert fine < edited / 100


def plain_fatezero(prior, pieces, rows: list[int]) -> Tensor:
    """Inversion and edit of frames `rows`, the first being the one that all see, without any maps."""
    video, index = pick(prior, pieces, rows), torch.arange(len(rows))
    state = CrossFrameAttention(("own", "anchor"))
    predict = frame_predictor(prior, video, state.begin)
    with cross_frame_attention(prior.unet, state):
        image = lambda z_t, t: predict(z_t, t, ("image",), index)  # noqa: E731
        z_t = ddim_invert(image, video.z_source, prior.alphas_cumprod, [150, 300, 450, 600])
        guided = guided_predictor(predict, index, 3.0, 1.5)
        return ddim_sample(guided, z_t, prior.alphas_cumprod, [600, 450, 300, 150])


@pytest.mark.parametrize("settings", [{"mask_threshold": 0.0}, {"fuse_steps": 0.0}])
def test_fatezero_without_the_source_is_the_plain_edit(prior, pieces, settings):
    found = edit("fatezero", prior, pieces, config(fatezero=settings))
    plain = plain_fatezero(prior, pieces, [2, 0, 1, 3, 4])
    torch.testing.assert_close(found[[2, 0, 1, 3, 4]], plain, **THROUGH)
    other = plain_fatezero(prior, pieces, [0, 1, 2, 3, 4])
    assert (found - other).abs().max() > 1e-2  # the middle frame is the one seen


def test_fatezero_in_chunks_that_fit_the_budget(prior, pieces):
    """One frame takes 3 steps of 2 bytes of 2 heads' maps: 3 blocks at 4 x 4, one at 2 x 2, 12 tokens."""
    one = 3 * 2 * 2 * (3 * (16 * 32 + 16 * 12) + (4 * 8 + 4 * 12))
    whole = edit("fatezero", prior, pieces, config())
    for frames, extra in ((2, 3), (3, 1), (5, 0)):
        settings = config(fatezero={"budget_gib": (frames + 0.5) * one / 2**30})
        found, evaluations = edit_by("fatezero", prior, pieces, settings, seeded())
        torch.testing.assert_close(found, whole, **THROUGH)
        assert evaluations == (5 + extra) * (4 + 3 + 12)  # the middle frame is edited again with each chunk
    before = prior.unet_evaluations
    with pytest.raises(InputError, match="raise budget_gib"):
        edit("fatezero", prior, pieces, config(fatezero={"budget_gib": 1.5 * one / 2**30}))
    assert prior.unet_evaluations == before


def test_every_place_is_a_video_of_its_own(prior, pieces):
    """Two frames of 4 x 8 latents under two windows each are two videos side by side."""
    left, right = pick(prior, pieces, [0, 1]), pick(prior, pieces, [2, 3])
    wide = [torch.cat([getattr(left, key), getattr(right, key)], dim=3) for key in ("z_source", "condition")]
    rows = {"frame": torch.tensor([1, 0, 0, 1]), "top": torch.zeros(4).long(), "left": torch.tensor([0, 0, 4, 4])}
    both = window_pieces(prior, *wide, "red blue", Windows(**rows, size=(4, 4)), torch.ones(1, 1, 4, 4))
    for name in ("pix2video", "fatezero"):
        expected = torch.cat([edit(name, prior, video, config()) for video in (left, right)], dim=3)
        torch.testing.assert_close(edit(name, prior, both, config()), expected, **THROUGH)


def test_tracks_are_places_in_the_order_of_frames():
    frame, top = torch.tensor([1, 0, 0, 1, 0]), torch.tensor([0, 0, 2, 2, 0])
    left = torch.tensor([4, 4, 4, 4, 0])
    assert [track.tolist() for track in window_tracks(frame, top, left)] == [[4], [1, 0], [2, 3]]


def test_words_are_the_tokens_between_start_and_end(prior):
    """The tiny tokenizer knows "red" and "blue" whole, and spells the rest; it takes 12 tokens."""
    assert instruction_words(prior, "red blue").int().tolist() == [0, 1, 1] + [0] * 9
    assert instruction_words(prior, "").sum() == 0
    assert instruction_words(prior, "red " * 30).int().tolist() == [0] + [1] * 10 + [0]


def test_words_need_the_tokenizer(tiny_prior):
    prior = load_prior(PriorConfig(model=str(tiny_prior), device="cpu"))
    prior.embed(["red"])
    prior.release_text_encoder()
    with pytest.raises(InputError, match="drop_text_encoder"):
        instruction_words(prior, "red")


def test_a_whole_is_made_as_small_as_the_prior_was_trained_at(prior):
    """4 latents of 8 pixels for the longer side, both sides in units of 16 pixels: the VAE's 8, halved once."""
    sizes = {(40, 150): (16, 32), (1080, 1920): (16, 32), (32, 32): (32, 32), (4000, 30): (32, 16)}
    assert {size: downscaled_size(prior, *size) for size in sizes} == sizes


def test_odd_requests_are_refused(prior, pieces):
    with pytest.raises(InputError, match=f"'best' is unknown: choose one of {', '.join(BASELINES)}"):
        edit("best", prior, pieces, config())
    with pytest.raises(InputError, match="max_pixels is 3"):
        edit("fatezero", prior, pieces, config(fatezero={"max_pixels": 3}))
    for settings, message in (
        ({"init": "photo"}, "init"),
        ({"noise": "none"}, "noise"),
        ({"steps": 0}, "steps"),
        ({"start": 1.5}, "start"),
        ({"pix2video": {"pull": -0.1}}, "pull"),
        ({"fatezero": {"mask_threshold": -2.0}}, "mask_threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**settings)
