"""What holds for every family alike."""

import logging

import pytest
import torch
from family_checks import PROMPT, TOLERANCE, images, noise, opened
from tiny_models import MAX_TOKENS

from csd3d.errors import InputError
from csd3d.priors import Condition
from csd3d.priors.loading import find_family
from csd3d.priors.opening import ModelFolder


@pytest.fixture
def sdxl(sdxl_folder):
    return opened(sdxl_folder)


@pytest.fixture
def deepfloyd(if_folder):
    return opened(if_folder)


@pytest.fixture
def sd3(sd3_folder):
    return opened(sd3_folder)


@pytest.mark.parametrize("name", ["sdxl", "deepfloyd", "sd3"])
def test_micro_batches_change_nothing(request, name):
    prior = request.getfixturevalue(name)
    z = noise(5, *prior.latent_shape(32, 32))
    t, condition = torch.tensor([999, 3, 20, 500, 333]), prior.condition(["red", "blue", "", "a", PROMPT])
    whole = prior.predict_noise(z, t, condition)
    prior.micro_batch = 2
    torch.testing.assert_close(prior.predict_noise(z, t, condition), whole, **TOLERANCE)
    alone = [prior.predict_noise(z[i : i + 1], int(t[i]), condition[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), whole, **TOLERANCE)
    assert prior.unet_evaluations == 15
    assert whole.isfinite().all()


@pytest.mark.parametrize("name", ["sdxl", "deepfloyd", "sd3"])
def test_a_long_prompt_warns_once_an_encoder_with_what_is_cut(request, name, caplog):
    prior = request.getfixturevalue(name)
    limits = {"sdxl": [MAX_TOKENS], "deepfloyd": [77], "sd3": [MAX_TOKENS, 256]}[name]
    prompt = "red " * 300 + "blue blue"
    with caplog.at_level(logging.WARNING, "csd3d"):
        prior.embed([prompt, prompt])
        prior.embed([prompt])
    messages = [record.getMessage() for record in caplog.records]
    assert [f"({limit} tokens)" in message for limit, message in zip(limits, messages, strict=True)] == [True] * len(
        limits
    )
    assert all("red blue blue'" in message for message in messages)
    if name == "deepfloyd":
        kept = " ".join(["red"] * 76)
        assert messages[0].endswith(f"cut off '{'red ' * 10} … red red blue blue'; shorten the prompt")
        torch.testing.assert_close(prior.embed([prompt]), prior.embed([kept]))


def test_a_condition_without_pooled_text_is_refused_in_words(sdxl, sd3):
    for prior, channels in ((sdxl, 4), (sd3, 16)):
        with pytest.raises(ValueError, match=r"prior\.condition"):
            prior.predict_noise(noise(1, channels, 4, 4), 5, Condition(prior.embed([PROMPT])))


def test_models_of_texts_take_no_picture(deepfloyd, sd3, sdxl):
    for prior in (deepfloyd, sd3, sdxl):
        assert not prior.edits
        with pytest.raises(ValueError, match="InstructPix2Pix"):
            prior.encode_condition(images())
        with pytest.raises(ValueError, match="InstructPix2Pix"):
            prior.edit_conditions([PROMPT], noise(1, 4, 2, 2))


@pytest.mark.parametrize("name", ["edit", "text", "sdxl", "if", "sd3", "kontext", "qwen"])
def test_the_configs_say_whether_a_model_edits(request, name):
    folder = request.getfixturevalue(f"{name}_folder")
    assert find_family(ModelFolder(folder)).edits(ModelFolder(folder)) == opened(folder, None).edits


def test_a_family_that_there_is_not_is_told_with_its_key(edit_folder):
    with pytest.raises(InputError, match=r"^prior\.family: unknown family 'foo'; did you mean"):
        find_family(ModelFolder(edit_folder), "foo")
