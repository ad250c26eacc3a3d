"""FLUX.1 Kontext and FLUX.1 dev against diffusers' own pipelines on the same weights."""

import json
import math
import shutil

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from family_checks import PROMPT, SCALE, TOLERANCE, eight_bits, flow_step, images, noise, opened, quiet_pipeline
from tiny_models import save_tiny_flux

from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.flow import flow_time
from csd3d.priors.tokens import pack, unpack

SIZE = {"height": 32, "width": 48}
T = 499


@pytest.fixture
def kontext(kontext_folder):
    return opened(kontext_folder, "edit")


def unshifted(s, tokens):
    """The time that a pipeline shifts to s for so many tokens."""
    return 1 / (1 + math.exp(calculate_shift(tokens)) * (1 / s - 1))


def test_kontext_makes_the_pipelines_step(kontext, kontext_folder):
    picture, x = eight_bits(images(1)), noise(1, 16, 4, 6)
    s = flow_time(kontext.alphas_cumprod[T]).item()
    expected = quiet_pipeline(FluxKontextPipeline, kontext_folder)(
        picture[1],
        PROMPT,
        negative_prompt="",
        true_cfg_scale=SCALE,
        sigmas=[unshifted(s, 6)],
        latents=pack(x),
        max_area=32 * 48,
        _auto_resize=False,
        output_type="latent",
        **SIZE,
        guidance_scale=2.5,
    ).images
    image = kontext.encode_condition(picture[0])

    def guided(z_t):
        eps = kontext.predict({"image": Query(z_t, T, ("",), image), "full": Query(z_t, T, (PROMPT,), image)})
        return eps["image"] + SCALE * (eps["full"] - eps["image"])

    torch.testing.assert_close(flow_step(kontext, guided, x, T), unpack(expected, (4, 6)), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kontext", [True, False])
def test_without_a_picture_both_draw_as_their_pipelines(kontext, kontext_folder, tmp_path):
    folder = kontext_folder if kontext else save_tiny_flux(tmp_path / "flux", kontext=False)
    prior, x = load_prior(PriorConfig(str(folder), device="cpu", distilled_guidance=3.0)), noise(1, 16, 4, 6)
    assert prior.edits == kontext
    options = {"max_area": 32 * 48} if kontext else {}
    expected = quiet_pipeline(FluxKontextPipeline if kontext else FluxPipeline, folder)(
        prompt=PROMPT,
        sigmas=[unshifted(flow_time(prior.alphas_cumprod[T]).item(), 6)],
        latents=pack(x),
        output_type="latent",
        guidance_scale=3.0,
        **SIZE,
        **options,
    ).images
    step = flow_step(prior, lambda z_t: prior.predict({"x": Query(z_t, T, (PROMPT,))})["x"], x, T)
    torch.testing.assert_close(step, unpack(expected, (4, 6)), rtol=1e-4, atol=2e-5)


def test_tokens_are_in_diffusers_order_and_come_back():
    z = noise(2, 16, 4, 6)
    assert torch.equal(pack(z), FluxKontextPipeline._pack_latents(z, 2, 16, 4, 6))
    assert torch.equal(unpack(torch.cat([pack(z), pack(-z)], 1), (4, 6)), z)
    with pytest.raises(ValueError, match="even sides"):
        pack(z[..., :5])


def test_its_branches_are_three_and_differ(kontext):
    image = kontext.encode_condition(images(2))
    branches = kontext.edit_conditions([PROMPT, "blue"], image)
    assert list(branches) == ["null", "image", "full"]
    assert branches["null"].image is None
    z_t = noise(2, 16, 4, 6)
    eps = {name: kontext.predict_noise(z_t, T, condition) for name, condition in branches.items()}
    assert (eps["null"] - eps["image"]).abs().max() > 1e-3
    assert (eps["full"] - eps["image"]).abs().max() > 1e-4
    asked = kontext.predict({"null": Query(z_t, T, ("", "")), "full": Query(z_t, T, (PROMPT, "blue"), image)})
    torch.testing.assert_close(asked["null"], eps["null"], **TOLERANCE)
    torch.testing.assert_close(asked["full"], eps["full"], **TOLERANCE)


def test_the_source_is_z_itself_padded_to_16_pixels(kontext):
    x = images(1, 33, 50)
    assert kontext.latent_shape(33, 50) == (16, 6, 8)
    assert kontext.decode(kontext.encode(x), (33, 50)).shape == x.shape
    torch.testing.assert_close(kontext.encode_condition(x), kontext.encode(x), **TOLERANCE)
    assert torch.equal(kontext.condition_from_latent(kontext.encode(x)), kontext.encode(x))


def test_guidance_is_told_to_distilled_models_only(kontext, tmp_path):
    assert kontext.distilled_guidance == 2.5
    assert (kontext.defaults.text_scale, kontext.defaults.image_scale, kontext.defaults.working_size) == (1, 1, 1024)
    plain = save_tiny_flux(tmp_path / "plain", guided=False)
    prior = opened(plain, "edit")
    assert (prior.distilled_guidance, prior.defaults.sampling_text_scale) == (None, 2.5)
    assert prior.predict({"x": Query(noise(1, 16, 4, 4), T, ("red",))})["x"].isfinite().all()
    with pytest.raises(InputError, match=r"prior\.distilled_guidance.*leave it out"):
        load_prior(PriorConfig(str(plain), device="cpu", distilled_guidance=3.0))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("transformer/config.json", {"in_channels": 384}, "in_channels 384 does not suit.*masks, depth or edges"),
        ("vae/config.json", {"latent_channels": "x"}, "VAE of 'x' channels"),
        (
            "model_index.json",
            {"_class_name": "FluxFillPipeline"},
            "of a FluxFillPipeline is not supported.*flux_kontext",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ("transformer/config.json", {"joint_attention_dim": 32}, "text of width|could not be opened"),
    ],
)
def test_other_models_are_refused_in_one_line(kontext_folder, tmp_path, file, changes, said):
    folder = shutil.copytree(kontext_folder, tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    if changes.keys() & {"in_channels", "latent_channels"}:  # before any weights
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=said) as error:
        opened(folder, "edit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("attention", "sliced"), ("runtime", "openvino")])
def test_options_for_unets_are_refused(kontext_folder, monkeypatch, key, value):
    monkeypatch.setattr("csd3d.priors.loading.check_installed", lambda *_: None)
    with pytest.raises(InputError, match=f"prior.{key}"):
        load_prior(PriorConfig(str(kontext_folder), device="cpu", **{key: value}))
