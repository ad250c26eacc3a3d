"""The prior against diffusers' own pipelines on the same weights, and against algebra where no pipeline says."""

import logging

import pytest
import torch
import torch.nn.functional as F
from asking import edit_branches
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from tiny_models import MAX_TOKENS, save_tiny_pipeline
from transformers import CLIPTokenizer

from csd3d.priors import Condition, PriorConfig, load_prior, scaled_linear_alphas

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 networks whose convolutions may be summed in another order
PROMPTS = ["make it red", "turn it blue"]


@pytest.fixture
def prior(edit_folder):
    return load_prior(PriorConfig(str(edit_folder), device="cpu"), "edit")


@pytest.fixture(scope="module")
def pipeline(edit_folder):
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(edit_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(batch=2, height=32, width=24, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ddim_loop(scheduler, z, steps, predict):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        z = scheduler.step(predict(z, int(t)), t, z).prev_sample
    return z


def test_encode_is_the_pipelines_vae_scaled(prior, pipeline):
    posterior = pipeline.vae.encode(images() * 2 - 1).latent_dist
    torch.testing.assert_close(prior.encode(images()), posterior.mode() * 0.18215, **TOLERANCE)
    sample = posterior.sample(torch.Generator().manual_seed(3)) * 0.18215
    torch.testing.assert_close(prior.encode(images(), torch.Generator().manual_seed(3)), sample, **TOLERANCE)


def test_condition_is_what_the_pipeline_conditions_on(prior, pipeline):
    expected = pipeline.prepare_image_latents(images() * 2 - 1, 2, 1, torch.float32, "cpu", True)
    condition = prior.encode_condition(images())
    branches = Condition.cat(list(edit_branches(prior.embed(PROMPTS), prior.embed([""]), condition))[::-1])
    torch.testing.assert_close(branches.image, expected, **TOLERANCE)  # the pipeline's order: full, image, null


def test_decode_is_the_pipelines_vae(prior, pipeline):
    z = noise(2, 4, 4, 3)
    expected = (pipeline.vae.decode(z / 0.18215, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).detach()
    torch.testing.assert_close(prior.decode(z), expected, **TOLERANCE)


def test_embeddings_are_the_pipelines(prior, pipeline):
    expected = pipeline._encode_prompt(PROMPTS, "cpu", 1, True)
    ours = torch.cat([prior.embed(PROMPTS), prior.embed(["", ""]), prior.embed(["", ""])])
    torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert ours.shape[1] == MAX_TOKENS


def test_three_branches_retrace_the_pipelines_sampling(prior, pipeline):
    """InstructPix2Pix guidance from our predictions gives the pipeline's latents after each DDIM step."""
    start, after = noise(2, 4, 4, 3), []
    pipeline(
        PROMPTS,
        image=images(),
        latents=start,
        num_inference_steps=4,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, state: after.append(state["latents"]) or {},
    )
    branches = edit_branches(prior.embed(PROMPTS), prior.embed([""]), prior.encode_condition(images()))
    seen = []

    def predict(z, t):
        seen.append(z)
        null, image, full = (prior.predict_noise(z, t, branch) for branch in branches)
        return null + 1.5 * (image - null) + 7.5 * (full - image)

    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    end = ddim_loop(scheduler, start, 4, predict)
    torch.testing.assert_close(seen[1], after[0], **TOLERANCE)
    torch.testing.assert_close(end, after[-1], rtol=1e-3, atol=1e-4)
    assert (after[0] - start).abs().max() > 1e-2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_retraces_stable_diffusion(tmp_path, prediction_type):
    """Our ε in an ε-scheduler follows the pipeline whose scheduler does the conversion itself."""
    folder = save_tiny_pipeline(tmp_path / "text", "text", prediction_type)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    start = noise(1, 4, 4, 4)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    expected = pipe("make it red", latents=start, height=32, width=32, **options).images
    prior = load_prior(PriorConfig(str(folder), device="cpu"), "text")
    text, null = (Condition(prior.embed([prompt])) for prompt in ("make it red", ""))

    def predict(z, t):
        eps_null = prior.predict_noise(z, t, null)
        return eps_null + 5.0 * (prior.predict_noise(z, t, text) - eps_null)

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    torch.testing.assert_close(ddim_loop(scheduler, start, 3, predict), expected, rtol=1e-3, atol=1e-3)


def test_schedule_is_the_saved_one(prior):
    torch.testing.assert_close(prior.alphas_cumprod.double(), scaled_linear_alphas(), rtol=1e-5, atol=1e-7)
    assert prior.num_train_timesteps == 1000


def test_micro_batches_change_nothing_and_evaluations_are_counted(prior):
    z, t = noise(7, 4, 4, 3), torch.tensor([1, 999, 20, 500, 333, 700, 80])
    condition = Condition(noise(7, MAX_TOKENS, 16, seed=4), noise(7, 4, 4, 3, seed=5))
    alone = torch.cat([prior.predict_noise(z[i : i + 1], int(t[i]), condition[i : i + 1]) for i in range(7)])
    assert prior.unet_evaluations == 7
    for micro_batch in (1, 2, 3, 7, 16):
        prior.micro_batch = micro_batch
        torch.testing.assert_close(prior.predict_noise(z, t, condition), alone, **TOLERANCE)
    assert prior.unet_evaluations == 7 * 6
    prior.micro_batch = 2
    whole = prior.encode(images(5))
    prior.micro_batch = 16
    torch.testing.assert_close(prior.encode(images(5)), whole, **TOLERANCE)


def test_prediction_depends_on_each_of_its_inputs(prior):
    """Guards the comparisons above: a UNet that ignored an input would pass them."""
    z, text, image = noise(1, 4, 4, 3), prior.embed(PROMPTS), noise(1, 4, 4, 3, seed=9)
    base = prior.predict_noise(z, 500, Condition(text[:1], image))
    for other in (
        prior.predict_noise(z + 0.1, 500, Condition(text[:1], image)),
        prior.predict_noise(z, 20, Condition(text[:1], image)),
        prior.predict_noise(z, 500, Condition(text[1:], image)),
        prior.predict_noise(z, 500, Condition(text[:1], image + 0.1)),
    ):
        assert (other - base).abs().max() > 1e-3


def test_prompts_are_embedded_once(prior, monkeypatch):
    calls, forward = [], prior.text_encoder.forward
    monkeypatch.setattr(prior.text_encoder, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    first = prior.embed(["red", "blue", "red"])
    assert len(calls) == 2
    assert torch.equal(first[0], first[2])
    assert torch.equal(prior.embed(["blue"])[0], first[1])
    assert len(calls) == 2


def test_a_long_prompt_warns_with_what_is_cut(prior, caplog):
    with caplog.at_level(logging.WARNING, "csd3d"):
        long = prior.embed(["red " * 10 + "blue blue red"])
        prior.embed(["red " * 10 + "blue blue red"])
    assert len(caplog.records) == 1
    assert "cut off 'blue blue red'" in caplog.records[0].getMessage()
    torch.testing.assert_close(long, prior.embed(["red " * 10]))


def test_long_prompts_warn_once_in_short_and_say_that_the_view_is_lost(prior, caplog):
    with caplog.at_level(logging.WARNING, "csd3d"):
        prior.embed([f"{'red ' * 3000}{view}" for view in ("front", "side", "back")] + ["blue " * 3000])
    (record,) = caplog.records
    told = record.getMessage()
    assert told.startswith("4 prompts, as 'red red ")
    assert "without it they are only 2, so the words for the view" in told
    assert len(told) < 400


def test_characters_out_of_the_vocabulary_warn(prior, caplog):
    vocab = {token: i for token, i in prior.tokenizer.get_vocab().items() if token not in ("z", "z</w>")}
    prior.text.parts["tokenizer"] = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)
    with caplog.at_level(logging.WARNING, "csd3d"):
        prior.embed(["make it red"])
        assert not caplog.records
        prior.embed(["zebra"])
    assert "vocabulary" in caplog.records[0].getMessage()


def test_gradient_of_encode_is_the_numerical_one(prior):
    """⟨∇⟨c, encode(x)⟩, d⟩ against a central difference along d, for the latent, and the features alike."""
    x, direction = images(1, 16, 16).requires_grad_(), noise(1, 3, 16, 16)
    for function in (prior.encode, lambda v: prior.features(v)[-1]):
        cotangent = noise(*function(x).shape, seed=11)
        (gradient,) = torch.autograd.grad(function(x), x, cotangent)
        h = 3e-3
        with torch.no_grad():
            rise = (function(x + h * direction) - function(x - h * direction)) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), (rise * cotangent).sum(), rtol=2e-2, atol=1e-3)
        assert gradient.abs().max() > 0


def test_nothing_is_trainable(prior):
    x = images().requires_grad_()
    prior.encode(x).sum().backward()
    for network in (prior.vae, prior.unet, prior.text_encoder):
        assert not network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    condition = Condition(prior.embed(PROMPTS), prior.encode_condition(images()))
    assert not prior.predict_noise(prior.encode(x), 5, condition).requires_grad


def test_odd_sizes_are_padded_by_reflection_and_cropped(prior):
    x = images(1, 21, 30)
    z = prior.encode(x)
    assert prior.latent_shape(21, 30) == tuple(z.shape[1:]) == (4, 3, 4)
    torch.testing.assert_close(z, prior.encode(F.pad(x, (0, 2, 0, 3), mode="reflect")), **TOLERANCE)
    assert torch.equal(prior.decode(z, (21, 30)), prior.decode(z)[..., :21, :30])
    with pytest.raises(ValueError, match="25x32"):
        prior.decode(z, (25, 32))
    with pytest.raises(ValueError, match="7x32"):
        prior.encode(images(1, 7, 32))


def test_decode_clamps_only_where_no_gradient_flows(prior):
    z = noise(1, 4, 2, 2)
    prior.vae.decoder.conv_out.weight.mul_(30)
    clamped, free = prior.decode(z), prior.decode(z.clone().requires_grad_())
    assert free.min() < 0
    assert free.max() > 1
    torch.testing.assert_close(clamped, free.detach().clamp(0, 1), **TOLERANCE)
    assert free.requires_grad


def test_features_are_the_encoders_own(prior):
    seen = []
    blocks = [prior.vae.encoder.conv_in, *prior.vae.encoder.down_blocks]
    hooks = [block.register_forward_hook(lambda m, i, out: seen.append(out)) for block in blocks]
    prior.encode(images())
    for hook in hooks:
        hook.remove()
    for ours, hooked in zip(prior.features(images()), seen, strict=True):
        torch.testing.assert_close(ours, hooked, **TOLERANCE)


def test_bfloat16_is_for_unet_and_vae_and_answers_are_float32(prior, edit_folder):
    half = load_prior(PriorConfig(str(edit_folder), device="cpu", dtype="bfloat16"))
    exact, rounded = (p.encode(images()) for p in (prior, half))
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 4e-2
    assert rounded.dtype == torch.float32
    condition = Condition(prior.embed(PROMPTS), prior.encode_condition(images()))
    z = noise(2, 4, 4, 3)
    exact, rounded = (p.predict_noise(z, 300, condition) for p in (prior, half))
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 4e-2  # bfloat16 keeps 8 bits: about 1 % through a UNet
    assert rounded.dtype == torch.float32


def test_unsuitable_input_is_named(prior):
    text, z, image = prior.embed(PROMPTS), noise(2, 4, 4, 3), noise(2, 4, 4, 3)
    with pytest.raises(ValueError, match="needs an image"):
        prior.predict_noise(z, 5, Condition(text))
    with pytest.raises(ValueError, match=r"must be \[B, 4, h, w\]"):
        prior.predict_noise(z[:, :3], 5, Condition(text, image))
    with pytest.raises(ValueError, match="batch of 1"):
        prior.predict_noise(z[:1], 5, Condition(text, image))
    with pytest.raises(ValueError, match="999"):
        prior.predict_noise(z, 1000, Condition(text, image))
    with pytest.raises(ValueError, match="999"):
        prior.predict_noise(z, torch.tensor([5, -1]), Condition(text, image))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        prior.encode(torch.rand(1, 16, 16, 3))
    assert prior.unet_evaluations == 0
