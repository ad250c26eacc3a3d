"""Qwen-Image-Edit against diffusers' own pipelines on the same weights."""

import inspect
import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from family_checks import PROMPT, SCALE, TOLERANCE, eight_bits, flow_step, images, noise, opened
from tiny_models import save_tiny_qwen_edit
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.families import qwen_edit
from csd3d.priors.flow import flow_time
from csd3d.priors.tokens import pack, unpack

T = 499
PARTS = {
    "vae": AutoencoderKLQwenImage,
    "transformer": QwenImageTransformer2DModel,
    "text_encoder": Qwen2_5_VLForConditionalGeneration,
    "tokenizer": Qwen2Tokenizer,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}


@pytest.fixture
def qwen(qwen_folder):
    return opened(qwen_folder, "edit")


class Processor:
    """transformers' processor without its videos, which need torchvision."""

    def __init__(self, tokenizer, **options):
        self.tokenizer, self.images = tokenizer, Qwen2VLImageProcessorPil(**options)

    def __call__(self, text, images, padding, return_tensors):
        seen = self.images(images, return_tensors="pt")
        tokens = int(seen["image_grid_thw"].prod()) // self.images.merge_size**2
        text = [line.replace(qwen_edit.PAD, qwen_edit.PAD * tokens) for line in text]
        return self.tokenizer(text, padding=padding, return_tensors=return_tensors) | seen


class Inputs(dict):
    def to(self, device):
        return self


def pipeline_of(kind, folder):
    parts = {part: cls.from_pretrained(folder / part) for part, cls in PARTS.items()}
    encoder = parts["text_encoder"].eval()
    image_token = encoder.config.image_token_id

    def tell_where_the_picture_is(module, args, options):
        # diffusers 0.42 does not pass this on, and transformers 5 then has no rows and columns (diffusers issue 14194)
        return args, options | {"mm_token_type_ids": (options["input_ids"] == image_token).int()}

    encoder.register_forward_pre_hook(tell_where_the_picture_is, with_kwargs=True)
    processor = Processor(parts["tokenizer"], patch_size=8, min_pixels=256, max_pixels=65536)
    pipeline = kind(**parts, processor=lambda **asked: Inputs(processor(**asked)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("plus", [False, True])
def test_it_makes_the_pipelines_step(qwen_folder, tmp_path, monkeypatch, plus):
    kind = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    monkeypatch.setitem(
        vars(sys.modules[kind.__module__]), "calculate_dimensions", lambda area, ratio: (64, 32, None)[: 3 - plus]
    )
    monkeypatch.setattr(qwen_edit, "SHOWN_AREA", 64 * 32)
    folder = save_tiny_qwen_edit(tmp_path / "plus", plus=True) if plus else qwen_folder
    prior, (picture, shown), x = opened(folder, "edit"), eight_bits(images(1, 32, 64)), noise(1, 16, 4, 8)
    s = flow_time(prior.alphas_cumprod[T]).item()
    sigma = 1 / (1 + math.exp(calculate_shift(8)) * (1 / s - 1))
    options = {"sigmas": [sigma], "latents": pack(x), "output_type": "latent", "height": 32, "width": 64}
    expected = pipeline_of(kind, folder)(shown, PROMPT, negative_prompt=" ", true_cfg_scale=SCALE, **options).images
    image = prior.encode_condition(picture)

    def guided(z_t):
        eps = prior.predict({"image": Query(z_t, T, (" ",), image), "full": Query(z_t, T, (PROMPT,), image)})
        v = {name: pack((e - x) / (1 - s)) for name, e in eps.items()}  # ε = x_s + (1 − s) v
        both = v["image"] + SCALE * (v["full"] - v["image"])
        assert (both - v["full"]).abs().max() > 1e-3
        both = both * v["full"].norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)  # the pipeline's own
        return x + (1 - s) * unpack(both, (4, 8))

    torch.testing.assert_close(flow_step(prior, guided, x, T), unpack(expected, (4, 8)), rtol=1e-4, atol=5e-5)


def test_pictures_are_prepared_as_transformers_does(qwen):
    vision = qwen.text_encoder.config.vision_config
    for size, least, most in (((40, 72), 256, 65536), ((50, 81), 256, 2048), ((24, 24), 4096, 65536)):
        # smooth, because PIL clips between its two passes where sharp pictures overshoot
        picture, shown = eight_bits(F.interpolate(images(1, 5, 7), size, mode="bilinear"))
        theirs = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=least, max_pixels=most)(shown, return_tensors="pt")
        seen = (picture[0] * 255).round().to(torch.uint8)
        ours, grid = qwen_edit.patches(qwen_edit.resized(seen, *qwen_edit.seen_size(seen, 16, least, most)), vision)
        assert list(grid) == theirs["image_grid_thw"][0].tolist()
        # it rounds between them too: one level of 255, over a standard deviation of 0.26
        torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=1.1 / 255 / 0.26)


def test_the_condition_holds_the_picture_that_the_text_encoder_sees(qwen):
    x = images(1, 33, 50)
    image = qwen.encode_condition(x)
    assert image.shape == (1, 16 + 192, 8, 8)  # padded to 64 x 64 pixels
    seen = qwen.text.sees(image[0])
    assert torch.equal(seen[:, :33, :50], (x[0] * 255).round().to(torch.uint8))
    torch.testing.assert_close(image[:, :16], qwen.encode(x), **TOLERANCE)
    again = qwen.condition_from_latent(qwen.encode(x))
    torch.testing.assert_close(again[:, :16], image[:, :16], **TOLERANCE)
    decoded = (qwen.decode(qwen.encode(x))[0] * 255).round().to(torch.uint8)
    assert torch.equal(qwen.text.sees(again[0]), decoded)


def test_latents_have_the_vaes_mean_and_deviation(qwen):
    x = images(2, 32, 32)
    config = qwen.vae.config
    raw = qwen.vae.encode(2 * x[:, :, None] - 1).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(qwen.encode(x), (raw - mean) / std, **TOLERANCE)
    torch.testing.assert_close(qwen.codec.unscaled(qwen.encode(x)), raw, **TOLERANCE)
    x.requires_grad_()
    qwen.decode(qwen.encode(x)).sum().backward()
    assert x.grad.abs().max() > 0


def test_features_are_the_encoders_own(qwen):
    seen, encoder = [], qwen.vae.encoder
    hooks = [
        m.register_forward_hook(lambda m, i, out: seen.append(out)) for m in (encoder.conv_in, *encoder.down_blocks)
    ]
    qwen.encode(images(1, 32, 32))
    for hook in hooks:
        hook.remove()
    for ours, hooked in zip(qwen.features(images(1, 32, 32)), seen, strict=True):
        torch.testing.assert_close(ours, hooked[:, :, 0], **TOLERANCE)


def test_prompts_of_other_lengths_in_one_batch_change_nothing(qwen):
    image, z_t = qwen.encode_condition(images(2, 32, 32)), noise(2, 16, 4, 4)
    together = qwen.condition(["red", PROMPT], image)
    assert together.mask.sum(1).tolist() == [together.text.shape[1] - len(PROMPT) + 3, together.text.shape[1]]
    alone = [qwen.condition([prompt], image[i : i + 1]) for i, prompt in enumerate(("red", PROMPT))]
    expected = torch.cat([qwen.predict_noise(z_t[i : i + 1], T, part) for i, part in enumerate(alone)])
    torch.testing.assert_close(qwen.predict_noise(z_t, T, together), expected, **TOLERANCE)
    assert (expected - qwen.predict_noise(z_t, T, qwen.condition([PROMPT, PROMPT], image))).abs().max() > 1e-4


def test_a_picture_is_embedded_once_and_kept_on_disk(qwen_folder, tmp_path, monkeypatch):
    config = PriorConfig(str(qwen_folder), device="cpu", embedding_cache=str(tmp_path))
    qwen, (first, second) = load_prior(config), images(2, 32, 32).split(1)
    calls = []
    monkeypatch.setattr(qwen.text_encoder, "forward", counting(qwen.text_encoder.forward, calls))
    a, b = (qwen.condition(["red"], qwen.encode_condition(x)).text for x in (first, second))
    qwen.condition(["red", "red"], qwen.encode_condition(torch.cat([first, second])))
    assert len(calls) == 2
    assert (a - b).abs().max() > 1e-3
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again = load_prior(config)
    again.release_text_encoder()
    assert torch.equal(again.condition(["red"], again.encode_condition(first)).text, a)


def test_embeddings_of_pictures_that_were_not_used_lately_go(qwen, monkeypatch):
    monkeypatch.setattr("csd3d.priors.text.SEEN_BYTES", 2 * qwen.condition(["a"], first_of(qwen, 0)).text.nbytes)
    for seed in (1, 2, 1, 3, 1):
        qwen.condition(["a"], first_of(qwen, seed))
    calls = []
    monkeypatch.setattr(qwen.text_encoder, "forward", counting(qwen.text_encoder.forward, calls))
    qwen.condition(["a"], first_of(qwen, 1))
    assert not calls
    qwen.condition(["a"], first_of(qwen, 2))
    assert calls


def first_of(prior, seed):
    return prior.encode_condition(images(1, 32, 32, seed))


def counting(forward, calls):
    def counted(*args, **options):
        calls.append(1)
        return forward(*args, **options)

    counted.__signature__ = inspect.signature(forward)
    return counted


def test_it_has_no_prediction_without_a_picture(qwen):
    image = qwen.encode_condition(images(1, 32, 32))
    assert list(qwen.edit_conditions([PROMPT], image)) == ["image", "full"]
    with pytest.raises(InputError, match="image_scale must be 1"):
        qwen.predict({"null": Query(noise(1, 16, 4, 4), T, ("",))})
    with pytest.raises(ValueError, match="build conditions with an image"):
        qwen.condition([PROMPT])
    qwen.embed_ahead([PROMPT])  # nothing to embed before there is a picture


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("transformer/config.json", {"in_channels": 32}, "in_channels 32 does not suit"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds = True is not supported"),
        (
            "model_index.json",
            {"_class_name": "QwenImagePipeline"},
            "of a QwenImagePipeline is not supported.*qwen_edit",
        ),
        ("processor/preprocessor_config.json", {"max_pixels": 2}, "least and the most pixels"),
        ("transformer/config.json", {"joint_attention_dim": 16}, "text of width|could not be opened"),
    ],
)
def test_other_models_are_refused_in_one_line(qwen_folder, tmp_path, file, changes, said):
    folder = shutil.copytree(qwen_folder, tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    if "joint_attention_dim" not in changes:  # before any weights
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=said) as error:
        opened(folder, "edit")
    assert "\n" not in str(error.value)


def test_its_text_encoder_cannot_be_dropped(qwen_folder):
    with pytest.raises(InputError, match=r"prior\.drop_text_encoder"):
        load_prior(PriorConfig(str(qwen_folder), device="cpu", drop_text_encoder=True))
