"""InstructPix2Pix, MultiDiffusion, Pix2Video and FateZero on tiny random pipelines, and on exact mixtures."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from csd3d.canvas.latents import Latents
from csd3d.canvas.windows import Cover, Windows, window_tracks
from csd3d.distillation.ddim import ddim_edit, ddim_invert, ddim_sample, ddim_step, ddim_timesteps
from csd3d.distillation.guidance import edit_predictor
from csd3d.distillation.noise import draw_noise
from csd3d.distillation.samplers import sample
from csd3d.editors.canvas import Canvas, CanvasPhase, Sampling
from csd3d.editors.fatezero import FateZero, instruction_words
from csd3d.editors.inversion import by_micro_batches, image_query, invert, noised_source
from csd3d.editors.ip2p import IP2P, downscaled_size
from csd3d.editors.multidiffusion import MultiDiffusion
from csd3d.editors.pix2video import Pix2Video, guide_latents
from csd3d.editors.rave import RAVE, cut, deal, lay
from csd3d.editors.tokenflow import TokenFlow
from csd3d.errors import InputError
from csd3d.priors import Condition, Defaults, GaussianMixturePrior, PriorConfig, load_prior
from csd3d.priors.attention import CrossFrameAttention, attention_layers, cross_frame_attention, self_attention
from csd3d.priors.token_flow import SOURCE, TokenFlowAttention

THROUGH = {"rtol": 1e-3, "atol": 1e-3}  # several steps of a UNet in float32
STEPS = [600, 450, 300, 150]  # of `editor`
EDITORS = {"ip2p": IP2P, "ip2p_multidiffusion": MultiDiffusion, "pix2video": Pix2Video, "fatezero": FateZero}
EDITORS |= {"rave": RAVE, "tokenflow": TokenFlow}


@pytest.fixture(scope="module")
def prior(tiny_prior):
    prior = load_prior(PriorConfig(model=str(tiny_prior), device="cpu"), require="edit")
    for layer in attention_layers(prior.unet).values():  # loud enough to be seen in the output
        for part in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]):
            part.weight.mul_(3)
    return prior


@pytest.fixture
def video(prior):
    """Of unit latents: those of a random VAE are all but constant, which group norms amplify a thousandfold."""
    return framed(prior, *torch.randn(2, 5, 4, 4, 4, generator=seeded(8)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def editor(name="ip2p", **keys):
    common = {"steps": 4, "start": 0.6, "text_scale": 3.0, "image_scale": 1.5}
    masked = {"mask_threshold": 0.7} if name == "fatezero" else {}  # which about half of the pixels reach
    return EDITORS[name](**common | masked | keys)


@dataclass(eq=False)
class Planted(Canvas):
    """A canvas whose source pictures are given, [F, C, H, W], whatever its latents."""

    given: Tensor | None = None

    def condition(self) -> Tensor:
        return self.gather(self.given)


def edit(canvas, name="ip2p", seed=0, **keys) -> Tensor:
    with torch.no_grad():
        return editor(name, **keys).sample(canvas, seeded(seed))


def canvas_of(prior, z, condition, cover, prompt="red blue") -> Planted:
    latents = Latents(clip=None, size=None, codec=SimpleNamespace(wrap=False), z=z)
    return Planted(prior, latents, [prompt], cover, given=condition)


def framed(prior, z, condition, prompt="red blue") -> Planted:
    """One window of 4 x 4 a frame."""
    return canvas_of(prior, z, condition, Cover((len(z), 4, 4), (4, 4)), prompt)


def pick(canvas, rows: list[int]) -> Planted:
    """A video of some of the frames of another."""
    return framed(canvas.prior, canvas.latents.z[rows], canvas.given[rows])


def strip(prior, width: int = 6, prompt="red") -> Planted:
    """A canvas of 4 x `width` latents under windows of 4 x 4 at every second column."""
    z, condition = torch.randn(2, 1, 4, 4, width, generator=seeded(3))
    return canvas_of(prior, z, condition, Cover((1, 4, width), (4, 4), overlap=0.5), prompt)


def guided(canvas, predict=None):
    """The guided prediction of all windows, as `editor` has it."""
    images = canvas.condition()
    return edit_predictor(predict or canvas.predict, canvas.prompts(len(images)), images, 3.0, 1.5)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++"])
@pytest.mark.parametrize("name", ["ip2p", "ip2p_multidiffusion"])
def test_gaussian_windows_make_the_gaussian_canvas(name, sampler):
    """N(0.7, 0.2²) under the instruction, N(−0.3, 0.2²) under "": guided twice as far, that is N(1.7, 0.2²)."""
    means = torch.tensor([0.7, -0.3]).view(2, 1, 1, 1).expand(2, 4, 4, 4)
    only = {"red": torch.tensor([1.0, 0.0]), "": torch.tensor([0.0, 1.0])}
    prior = GaussianMixturePrior(means, torch.tensor([0.2, 0.2]), prompts=only)
    canvas = strip(prior, width=10)
    assert len(canvas.windows) == 4
    found = edit(canvas, name, seed=1, start=0.8, steps=20, text_scale=2.0, image_scale=1.0, sampler=sampler)

    def exact(z_t: Tensor, t: int) -> Tensor:
        a = prior.alphas_cumprod[t].item()
        return math.sqrt(1 - a) * (z_t - math.sqrt(a) * 1.7) / (a * 0.04 + 1 - a)

    z_t = draw_noise(canvas.z, "independent", seeded(1))
    expected = sample(exact, z_t, prior.alphas_cumprod, ddim_timesteps(800, 20), sampler)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert prior.unet_evaluations == 20 * 2 * 4  # at image scale 1 there are two branches


@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_frames_one_by_one_are_ddim_edit(prior, video, noise):
    found = edit(video, init="source", noise=noise)
    alphas = prior.alphas_cumprod
    expected = ddim_edit(guided(video), video.z, alphas, start=600, steps=4, generator=seeded(), noise=noise)
    assert torch.equal(found, expected)
    alone = edit(pick(video, [0]), init="source", noise=noise)
    torch.testing.assert_close(found[:1], alone, **THROUGH)  # of whose noise the first frame's is the first draw


def test_one_window_fused_is_one_window_bit_for_bit(prior, video):
    one = pick(video, [2])
    one.__dict__["weights"] = torch.rand(1, 1, 4, 4, generator=seeded()) + 0.1
    assert torch.equal(edit(one, "ip2p_multidiffusion"), edit(one))


def test_windows_alone_are_averaged(prior):
    both = strip(prior)
    both.__dict__["weights"] = torch.tensor([0.5, 1.0, 2.0, 0.5]).view(1, 1, 1, 4).expand(2, 1, 4, 4)
    found = edit(both)
    z_t, windows = draw_noise(both.z, "independent", seeded()), []
    for left in (0, 2):
        part = framed(prior, both.z[..., left : left + 4], both.given[..., left : left + 4], "red")
        windows.append(ddim_sample(guided(part), z_t[..., left : left + 4], prior.alphas_cumprod, STEPS))
    weights = both.weights.expand(2, 4, 4, 4)
    expected = both.scatter(weights * torch.cat(windows)) / both.scatter(weights)
    torch.testing.assert_close(found, expected, **THROUGH)
    torch.testing.assert_close(found[..., :2], windows[0][..., :2], **THROUGH)
    assert (edit(both, "ip2p_multidiffusion") - found).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "each", "keys"),
    [
        ("ip2p", 4 * 3 * 5, {}),
        ("ip2p", 4 * 2 * 5, {"image_scale": 1.0}),
        ("ip2p_multidiffusion", 4 * 3 * 5, {}),
        ("pix2video", 4 * (1 + 3) * 5, {}),
        ("rave", 4 * (1 * 5 + 3 * 9), {}),  # one grid of 9, in which 4 frames appear twice
        ("tokenflow", 4 * (1 + 1 + 3) * 5, {}),
        ("fatezero", (4 + 3 + 4 * 3) * 5, {}),  # 3 of the 4 steps of the inversion record, and ask the instruction
    ],
)
def test_one_step_edits_the_canvas_as_a_function_of_its_seed(prior, video, name, each, keys):
    before, z = prior.unet_evaluations, video.latents.z
    phase = CanvasPhase(seeded(), z=z.clone(), moved=torch.zeros_like(z))
    assert editor(name).count_steps(video) == 1
    assert editor(name, **keys).take_step(video, phase, 0) == {"t": 150.0, "skipped": 0.0}
    assert prior.unet_evaluations - before == each
    assert phase.z.shape == z.shape
    assert torch.equal(phase.z, edit(video, name, **keys))


def test_keys_that_are_null_are_the_jobs_and_then_what_suits_the_model(video):
    video.sampling = Sampling(steps=7, start=0.5, text_scale=2.0)
    video.prior.defaults, suits = Defaults(sampling_text_scale=9.0, sampling_image_scale=1.25), video.prior.defaults
    try:
        assert IP2P().sampling(video) == Sampling(7, 0.5, 2.0, 1.25)
        assert IP2P(steps=3, image_scale=1.0).sampling(video) == Sampling(3, 0.5, 2.0, 1.0)
        video.sampling = Sampling()
        assert Pix2Video(start=0.2).sampling(video) == Sampling(50, 0.2, 9.0, 1.25)
    finally:
        video.prior.defaults = suits


@pytest.mark.parametrize("name", ["pix2video", "fatezero", "tokenflow"])
def test_the_size_of_a_call_changes_nothing(prior, video, name, monkeypatch):
    video = pick(video, [0, 1, 2])
    expected = edit(video, name)
    for size in (1, 4):
        monkeypatch.setattr(prior, "micro_batch", size)
        torch.testing.assert_close(edit(video, name), expected, **THROUGH)


@pytest.mark.parametrize("name", ["pix2video", "fatezero", "tokenflow"])
def test_the_prior_is_left_as_it_was(prior, video, name):
    z, condition = video.z, Condition(prior.embed(["red"] * 5), video.given)
    before = prior.predict_noise(z, 300, condition)
    edit(video, name)
    assert torch.equal(prior.predict_noise(z, 300, condition), before)


def inverted(canvas) -> Tensor:
    images = canvas.condition()
    image = lambda z_t, t: canvas.predict({"image": image_query(z_t, t, images)})["image"]  # noqa: E731
    return ddim_invert(image, canvas.gather(canvas.z), canvas.prior.alphas_cumprod, STEPS[::-1])


def test_windows_are_inverted_each_alone(video):
    found = invert(video, video.z, video.condition(), STEPS)
    torch.testing.assert_close(found, inverted(video), **THROUGH)
    torch.testing.assert_close(found[1:2], inverted(pick(video, [1])), **THROUGH)


def test_pix2video_of_one_frame_is_the_edit_of_its_inversion(prior, video):
    one = pick(video, [3])
    expected = ddim_sample(guided(one), inverted(one), prior.alphas_cumprod, STEPS)
    torch.testing.assert_close(edit(one, "pix2video"), expected, **THROUGH)


def test_pix2video_knows_the_first_and_the_previous_frame_alone(video, monkeypatch):
    """Frames ahead play no part, so all frames at once is frame after frame."""
    monkeypatch.setattr("csd3d.editors.pix2video.GUIDANCE", 10.0)  # few numbers are a frame's here
    whole = edit(video, "pix2video")
    torch.testing.assert_close(edit(pick(video, [0, 1, 2]), "pix2video"), whole[:3], **THROUGH)
    for other in ([3, 1, 2], [0, 3, 2]):
        assert (edit(pick(video, other), "pix2video")[2] - whole[2]).abs().max() > 1e-2


def test_pix2video_injects_in_the_decoder_and_guides_in_early_steps(prior, video, monkeypatch):
    monkeypatch.setattr("csd3d.editors.pix2video.GUIDANCE", 6.4)  # 0.2 of the difference
    state = CrossFrameAttention(("anchor", "previous"))
    predict = guided(video, by_micro_batches(video, state.begin))
    z_t, bars = inverted(video), [prior.alphas_cumprod[t].item() for t in STEPS] + [1.0]
    with cross_frame_attention(prior.unet, state, "up_blocks."):
        for step, t in enumerate(STEPS):
            eps = predict(z_t, t)
            z0 = ddim_step(z_t, eps, bars[step], 1.0)
            z_t = ddim_step(z_t, eps, bars[step], bars[step + 1])
            if step < 2:
                z_t = torch.cat([z_t[:1], z_t[1:] - 0.2 * (z0[1:] - z0[:-1])])
    torch.testing.assert_close(edit(video, "pix2video", guided_steps=0.5), z_t, **THROUGH)


def test_latent_guidance_is_a_gradient_step_of_the_authors_loss():
    """100 times the mean squared difference, each frame to the one before, by ẑ_0 itself; 0.0122 for 4 x 64 x 64."""
    z_next, z0 = torch.randn(2, 3, 4, 4, 4, generator=seeded(1), dtype=torch.float64)
    z0.requires_grad_()
    loss = sum(100 * (z0[i] - z0[i - 1].detach()).square().mean() for i in (1, 2))
    (gradient,) = torch.autograd.grad(loss, z0)
    expected = z_next - gradient
    torch.testing.assert_close(guide_latents(z_next, z0.detach()), expected, rtol=1e-12, atol=1e-12)
    pair = torch.stack([torch.zeros(4, 64, 64), torch.ones(4, 64, 64)])
    assert guide_latents(torch.zeros_like(pair), pair)[1].unique().tolist() == pytest.approx([-0.0122], abs=1e-4)


def test_fatezero_that_edits_nowhere_returns_the_source(video):
    """With τ above 1 the instruction is not heard, and what is left is how well DDIM steps back up its own way."""
    errors, video = [], pick(video, [0, 1])
    for steps in (6, 24):
        keys = {"steps": steps, "start": 0.3, "image_scale": 1.0, "text_scale": 7.5, "fuse_steps": 1.0}
        found = (edit(video, "fatezero", mask_threshold=threshold, **keys) for threshold in (2.0, 0.0))
        errors.append([(z - video.z).square().mean() for z in found])
    (coarse, _), (fine, away) = errors
    assert fine < coarse / 4
    assert fine < away / 100


def plain_fatezero(video, rows: list[int]) -> Tensor:
    """Inversion and edit of frames `rows`, the first being the one that all see, without any maps."""
    video, state = pick(video, rows), CrossFrameAttention(("own", "anchor"))
    predict, images = by_micro_batches(video, state.begin), video.condition()
    with cross_frame_attention(video.prior.unet, state):
        image = lambda z_t, t: predict({"image": image_query(z_t, t, images)})["image"]  # noqa: E731
        z_t = ddim_invert(image, video.z, video.prior.alphas_cumprod, STEPS[::-1])
        return ddim_sample(guided(video, predict), z_t, video.prior.alphas_cumprod, STEPS)


@pytest.mark.parametrize("keys", [{"mask_threshold": 0.0}, {"fuse_steps": 0.0}])
def test_fatezero_without_the_source_is_the_plain_edit(video, keys):
    found = edit(video, "fatezero", **keys)
    torch.testing.assert_close(found[[2, 0, 1, 3, 4]], plain_fatezero(video, [2, 0, 1, 3, 4]), **THROUGH)
    other = plain_fatezero(video, [0, 1, 2, 3, 4])
    assert (found - other).abs().max() > 1e-2  # the middle frame is the one seen


def test_fatezero_in_chunks_that_fit_the_budget(prior, video):
    """One frame takes 3 steps of 2 bytes of 2 heads' maps: 3 blocks at 4 x 4, one at 2 x 2, 12 tokens."""
    one = 3 * 2 * 2 * (3 * (16 * 32 + 16 * 12) + (4 * 8 + 4 * 12))
    whole = edit(video, "fatezero")
    for frames, extra in ((2, 3), (3, 1), (5, 0)):
        before = prior.unet_evaluations
        found = edit(video, "fatezero", budget_gib=(frames + 0.5) * one / 2**30)
        torch.testing.assert_close(found, whole, **THROUGH)
        # the middle frame is edited again with each chunk
        assert prior.unet_evaluations - before == (5 + extra) * (4 + 3 + 12)
    before = prior.unet_evaluations
    with pytest.raises(InputError, match="raise budget_gib"):
        edit(video, "fatezero", budget_gib=1.5 * one / 2**30)
    assert prior.unet_evaluations == before


def test_every_place_is_a_video_of_its_own(prior, video):
    """Two frames of 4 x 8 latents under two windows each are two videos side by side."""
    left, right = pick(video, [0, 1]), pick(video, [2, 3])
    z, condition = (torch.cat(parts, 3) for parts in ((left.z, right.z), (left.given, right.given)))
    both = canvas_of(prior, z, condition, Cover((2, 4, 8), (4, 4)))
    rows = {"frame": torch.tensor([1, 0, 0, 1]), "top": torch.zeros(4).long(), "left": torch.tensor([0, 0, 4, 4])}
    both.__dict__ |= {"windows": Windows(**rows, size=(4, 4)), "weights": torch.ones(1, 1, 4, 4)}
    for name in ("pix2video", "fatezero"):
        expected = torch.cat([edit(one, name) for one in (left, right)], dim=3)
        torch.testing.assert_close(edit(both, name), expected, **THROUGH)


def test_tracks_are_places_in_the_order_of_frames():
    frame, top = torch.tensor([1, 0, 0, 1, 0]), torch.tensor([0, 0, 2, 2, 0])
    left = torch.tensor([4, 4, 4, 4, 0])
    assert [track.tolist() for track in window_tracks(Windows(frame, top, left, (4, 4)))] == [[4], [1, 0], [2, 3]]


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


def test_odd_requests_are_refused(video):
    with pytest.raises(InputError, match="max_pixels is 3"):
        edit(video, "fatezero", max_pixels=3)
    for name, keys in (
        ("ip2p", {"init": "photo"}),
        ("ip2p_multidiffusion", {"noise": "none"}),
        ("ip2p", {"steps": 0}),
        ("pix2video", {"start": 1.5}),
        ("pix2video", {"guided_steps": -0.1}),
        ("fatezero", {"mask_threshold": -2.0}),
    ):
        with pytest.raises(ValueError, match=next(iter(keys))):
            editor(name, **keys)


def test_grids_hold_every_frame_and_are_cut_as_they_were_laid():
    for frames, places in ((9, 9), (10, 4), (2, 9)):
        dealt = deal(frames, places, seeded(frames))
        assert dealt.shape == (-(-frames // places), places)
        assert dealt.flatten()[:frames].sort().values.tolist() == list(range(frames))
    assert not torch.equal(deal(9, 9, seeded(1)), deal(9, 9, seeded(2)))
    grids = torch.randn(3, 4, 2, 4, 5, generator=seeded())
    assert torch.equal(cut(lay(grids, 2), 2), grids.flatten(0, 1))
    assert torch.equal(lay(grids, 2)[1, :, 4:, :5], grids[1, 2])  # third frame: second row, first column


def test_rave_of_a_prediction_that_sees_one_pixel_is_frame_by_frame(video, monkeypatch):
    """Then it matters neither where a frame lies nor beside which; 5 frames fill grids of 4 and of 9."""
    monkeypatch.setattr(
        Planted, "predict", lambda _, asked: {name: (0.1 * query.z_t).sin() for name, query in asked.items()}
    )
    expected = edit(video, init="source", noise="shared", image_scale=1.0)
    for side in (1, 2, 3):
        found = edit(video, "rave", grid=side, noise="shared", image_scale=1.0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rave_shows_frames_to_one_another_with_their_own_source(prior, video):
    two = edit(video, "rave", grid=2)
    other = edit(pick(video, [0, 1, 2, 3, 3]), "rave", grid=2)
    assert (two[:3] - other[:3]).abs().max() > 1e-3  # the last frame was another
    alone, keys = edit(video, "rave", grid=1, noise="shared"), {"init": "source", "noise": "shared"}
    torch.testing.assert_close(alone, edit(video, **keys), **THROUGH)


def test_source_at_every_level_is_its_inversion_or_has_one_noise(prior, video):
    path = noised_source(video, video.condition(), STEPS, "inversion", seeded())
    assert sorted(path) == STEPS[::-1]
    torch.testing.assert_close(path[600], inverted(video), **THROUGH)
    shorter = invert(video, video.z, video.condition(), STEPS[2:])
    torch.testing.assert_close(path[300], shorter, **THROUGH)
    noised = noised_source(video, video.condition(), STEPS, "shared", seeded())
    eps = draw_noise(video.z, "shared", seeded())
    bar = prior.alphas_cumprod[300].item()
    torch.testing.assert_close(noised[300], bar**0.5 * video.z + (1 - bar) ** 0.5 * eps, **THROUGH)


def test_tokenflow_of_key_frames_alone_is_extended_attention(prior, video):
    """Self-attention sees all frames as its context, by a processor of its own; the source plays no part."""
    found, z_t = edit(video, "tokenflow", key_every=1), inverted(video)

    def attend(name, base, attn, hidden):
        frames = hidden.unflatten(0, (-1, 5)).flatten(1, 2)  # [branches, frames n, D]
        return base(attn, hidden, encoder_hidden_states=frames.repeat_interleave(5, 0))

    prior.micro_batch, before = 15, prior.micro_batch
    try:
        with self_attention(prior.unet, attend):
            expected = ddim_sample(guided(video), z_t, prior.alphas_cumprod, STEPS)
    finally:
        prior.micro_batch = before
    torch.testing.assert_close(found, expected, **THROUGH)


def test_tokenflow_of_identical_frames_is_one_frame_identical_everywhere(video):
    same = pick(video, [1] * 5)
    found = edit(same, "tokenflow", key_every=3)
    torch.testing.assert_close(found, edit(pick(video, [1]), "tokenflow").expand_as(found), **THROUGH)


def test_tokenflow_takes_features_from_the_frames_before_and_after():
    state = TokenFlowAttention()
    state.hold(torch.tensor([2, 6]))
    assert [state.nearest(i) for i in (0, 2, 3, 6, 9)] == [
        ([0], [1.0]),
        ([0], [1.0]),
        ([0, 1], [0.75, 0.25]),
        ([0, 1], [0.0, 1.0]),
        ([1], [1.0]),
    ]


def test_tokenflow_matches_the_source_and_not_the_edit():
    """A frame whose source is that of a key frame with pixels in another order has its output in that order."""
    state, order = TokenFlowAttention(), torch.tensor([2, 0, 3, 1])
    key, edited_key, edited_frame = torch.randn(3, 1, 4, 6, generator=seeded())
    attend = lambda attn, hidden: 2 * hidden  # noqa: E731
    state.hold(torch.tensor([0]))
    state.begin((SOURCE, "full"), 0)
    state.attend("layer", attend, None, torch.cat([key, edited_key]))
    state.hold(torch.tensor([0]), torch.tensor([1]))
    state.begin((SOURCE, "full"), 0)
    source, edit_ = state.attend("layer", attend, None, torch.cat([3 * key[:, order], edited_frame])).chunk(2)
    assert torch.equal(source, 6 * key[:, order])
    assert torch.equal(edit_, 2 * edited_key[:, order])


def test_too_many_key_frames_for_a_call_are_refused(prior, video, monkeypatch):
    monkeypatch.setattr(prior, "micro_batch", 2)
    with pytest.raises(InputError, match=r"key_every: 2 makes 3 key frames of 5 frames.*prior\.micro_batch is 2"):
        edit(video, "tokenflow", key_every=2)


@pytest.mark.parametrize(("name", "says"), [("tokenflow", "works inside the attention"), ("rave", "has no network")])
def test_a_prior_without_a_network_is_refused(name, says):
    mixture = GaussianMixturePrior(torch.zeros(1, 4, 4, 4), torch.ones(1))
    with pytest.raises(InputError, match=says):
        editor(name).check(mixture)
