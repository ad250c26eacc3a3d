"""Queries to a prior: computed once, in one call, in their order, under the right conditions."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_models import save_tiny_pipeline

from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors import Condition, GaussianMixturePrior, PriorConfig, load_prior
from csd3d.priors.camera_embedding import CAMERA_WIDTH, MAP_CHANNELS, camera_embedding, camera_map, no_camera

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
RED, BLUE, NOTHING = ("make it red",) * 2, ("turn it blue",) * 2, ("",) * 2


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def opened(folder):
    return load_prior(PriorConfig(str(folder), device="cpu"))


@pytest.fixture
def prior(text_folder):
    return opened(text_folder)


@pytest.fixture
def editor(edit_folder):
    return opened(edit_folder)


def watch(prior, monkeypatch):
    """The rows and timesteps of every call of the UNet."""
    calls, forward = [], prior.unet.forward
    monkeypatch.setattr(
        prior.unet, "forward", lambda x, t, **told: calls.append((x.clone(), t.tolist())) or forward(x, t, **told)
    )
    return calls


def test_all_queries_go_through_in_one_call_in_their_order(prior, monkeypatch):
    a, b, calls = noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=2), watch(prior, monkeypatch)
    asked = {"late": Query(b, 700, RED), "null": Query(a, 300, NOTHING), "text": Query(a, 300, RED)}
    found = prior.predict(asked)
    (rows, steps), *others = calls
    assert not others
    assert torch.equal(rows, torch.cat([b, a, a]))
    assert steps == [700] * 2 + [300] * 4
    assert list(found) == list(asked)
    for name, query in asked.items():
        alone = prior.predict_noise(query.z_t, query.t, prior.condition(query.prompts))
        torch.testing.assert_close(found[name], alone, **TOLERANCE)
    again = prior.predict(asked)
    assert all(torch.equal(found[name], again[name]) for name in asked)
    assert not any(answer.requires_grad for answer in found.values())


def test_the_same_batch_is_the_same_to_the_bit(prior):
    a = noise(2, 4, 4, 4)
    found = prior.predict({"null": Query(a, 300, NOTHING), "text": Query(a, 300, RED)})
    condition = Condition.cat([prior.condition(NOTHING), prior.condition(RED)])
    assert torch.equal(torch.cat(list(found.values())), prior.predict_noise(torch.cat([a, a]), 300, condition))


def test_equal_queries_are_computed_once(prior):
    a = noise(2, 4, 4, 4)
    asked = {"x": Query(a, 300, RED), "y": Query(a, 300, BLUE), "z": Query(a, 300, ("make it red",) * 2)}
    found = prior.predict(asked)
    assert prior.unet_evaluations == 4
    assert torch.equal(found["x"], found["z"])
    assert (found["x"] - found["y"]).abs().max() > 1e-4
    prior.predict({"x": Query(a, 300, RED), "other tensor": Query(a.clone(), 300, RED), "t": Query(a, 301, RED)})
    assert prior.unet_evaluations == 10
    assert prior.predict({}) == {}


def test_micro_batches_change_nothing(prior):
    asked = {str(t): Query(noise(2, 4, 4, 4, seed=t), t, BLUE) for t in (10, 500, 990)}
    whole = prior.predict(asked)
    prior.micro_batch = 4
    parts = prior.predict(asked)
    for name in asked:
        torch.testing.assert_close(parts[name], whole[name], **TOLERANCE)


def test_only_the_rows_that_are_needed_are_computed(prior):
    z, prompts, rows = noise(4, 4, 4, 4), ("red", "blue", "", "red"), torch.tensor([2, 0])
    found = prior.predict({"all": Query(z, 300, prompts), "some": Query(z, 300, prompts, rows=rows)})
    assert prior.unet_evaluations == 6
    torch.testing.assert_close(found["some"][rows], found["all"][rows], **TOLERANCE)
    assert not found["some"][[1, 3]].any()


def test_other_networks_answer_for_themselves(prior):
    z = noise(2, 4, 4, 4)
    networks = {"mine": SimpleNamespace(answer=lambda query: query.z_t + query.t)}
    found = prior.predict({"own": Query(z, 5, RED), "mine": Query(z, 5, RED, network="mine")}, networks)
    assert torch.equal(found["mine"], z + 5)
    assert prior.unet_evaluations == 2
    with pytest.raises(ValueError, match="'mine'"):
        prior.predict({"mine": Query(z, 5, RED, network="mine")})


def test_without_an_image_an_editing_model_is_asked_its_null_branch(editor, monkeypatch):
    z, image, calls = noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=3), watch(editor, monkeypatch)
    asked = {"null": Query(z, 400, NOTHING), "image": Query(z, 400, NOTHING, image), "full": Query(z, 400, RED, image)}
    found = editor.predict(asked)
    assert len(calls) == 1
    conditions = editor.edit_conditions(RED, image)
    assert list(conditions) == ["null", "image", "full"]
    assert not conditions["null"].image.any()
    for name, condition in conditions.items():
        torch.testing.assert_close(found[name], editor.predict_noise(z, 400, condition), **TOLERANCE)
    assert (found["null"] - found["image"]).abs().max() > 1e-4


def test_the_condition_of_a_latent_is_that_of_its_picture(editor):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    condition = editor.encode_condition(images)
    torch.testing.assert_close(editor.condition_from_latent(editor.encode(images)), condition, **TOLERANCE)


def test_queries_whose_conditions_differ_in_shape_go_apart(prior, monkeypatch):
    """As a family whose null branch has no image at all would have it: both answers are right."""
    z, calls = noise(2, 4, 4, 4), watch(prior, monkeypatch)
    longer = noise(2, 20, 16, seed=5)
    usual = prior.query_condition
    monkeypatch.setattr(
        type(prior), "query_condition", lambda self, q: Condition(longer) if q.prompts == BLUE else usual(q)
    )
    found = prior.predict({"a": Query(z, 9, RED), "b": Query(z, 9, BLUE), "c": Query(z, 9, NOTHING)})
    assert [len(rows) for rows, _ in calls] == [4, 2]
    torch.testing.assert_close(found["b"], prior.predict_noise(z, 9, Condition(longer)), **TOLERANCE)
    torch.testing.assert_close(found["c"], prior.predict_noise(z, 9, prior.condition(NOTHING)), **TOLERANCE)


def test_a_mixture_answers_queries_too():
    mixture = GaussianMixturePrior(noise(3, 5), torch.ones(3), prompts={"first": torch.tensor([1.0, 0, 0])})
    z = noise(2, 5, seed=2)
    found = mixture.predict(
        {"a": Query(z, 400, ("first", "")), "b": Query(z, 400, ("first", "")), "c": Query(z, 9, RED)}
    )
    assert mixture.unet_evaluations == 4
    assert torch.equal(found["a"], mixture.predict_noise(z, 400, mixture.condition(["first", ""])))
    assert torch.equal(found["b"], found["a"])


def test_a_network_of_the_renders_starts_as_the_prior_and_answers_queries(prior):
    z, poses = noise(3, 4, 4, 4), noise(3, 12, seed=4)
    network = prior.lora(2, torch.Generator().manual_seed(0))
    own = Query(z, 300, ("red", "blue", ""), pose=poses)
    asked = {"own": own, "lora": Query(z, 300, own.prompts, network="lora", pose=poses)}
    found = prior.predict(asked, {"lora": network})
    assert torch.equal(found["lora"], found["own"])
    assert prior.unet_evaluations == 6
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        network.loss(z, own.prompts, poses, torch.Generator().manual_seed(1)).backward()
        optimiser.step()
    rows = torch.tensor([1])
    asked["some"] = Query(z, 300, own.prompts, network="lora", pose=poses, rows=rows)
    learned = prior.predict(asked, {"lora": network})
    assert torch.equal(learned["own"], found["own"])
    assert (learned["lora"] - found["own"]).abs().max() > 1e-4
    torch.testing.assert_close(learned["some"][1], learned["lora"][1], **TOLERANCE)
    assert not learned["some"][[0, 2]].any()
    with pytest.raises(InputError, match="carries LoRA"):
        prior.lora(2, torch.Generator())


# --- cameras ---


def save_with_cameras(folder, width=CAMERA_WIDTH, channels=4):
    """A tiny Stable Diffusion whose UNet is told a vector of `width`, and a map where it takes 7 channels."""
    save_tiny_pipeline(folder, "text")
    config = UNet2DConditionModel.load_config(folder / "unet")
    cameras = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config | cameras | {"in_channels": channels})
    unet.save_pretrained(folder / "unet")
    return folder


def test_a_unet_with_cameras_is_told_the_view(tmp_path):
    prior, z = opened(save_with_cameras(tmp_path / "camera")), noise(2, 4, 4, 4)
    assert prior.takes_camera
    view = torch.tensor([[90.0, 30.0, 4.0], [180.0, 0.0, 3.6]])
    asked = {"told": Query(z, 300, RED, view=view), "not": Query(z, 300, RED)}
    found = prior.predict(asked)
    text = prior.embed(RED)
    for name, labels in {"told": camera_embedding(*view.unbind(1)), "not": no_camera(2)}.items():
        raw = prior.unet(z, 300, encoder_hidden_states=text, class_labels=labels).sample
        torch.testing.assert_close(found[name], raw, **TOLERANCE)
    assert (found["told"] - found["not"]).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"view must be \[2, 3\]"):
        prior.condition(RED, view=view[:, :2])


def test_a_unet_with_three_more_channels_is_shown_the_map_and_zeros_without_a_view(tmp_path):
    prior, z = opened(save_with_cameras(tmp_path / "map", channels=4 + MAP_CHANNELS)), noise(2, 4, 4, 4)
    assert (prior.takes_camera, prior.edits) == (True, False)
    view = torch.tensor([[90.0, 30.0, 4.0], [180.0, 0.0, 3.6]])
    found = prior.predict({"told": Query(z, 300, RED, view=view), "not": Query(z, 300, RED)})
    for name, labels in {"told": camera_embedding(*view.unbind(1)), "not": no_camera(2)}.items():
        shown = torch.cat([z, camera_map(labels, 4, 4)], 1)
        raw = prior.unet(shown, 300, encoder_hidden_states=prior.embed(RED), class_labels=labels).sample
        torch.testing.assert_close(found[name], raw, **TOLERANCE)


def test_more_channels_are_for_models_with_cameras(tmp_path):
    save_tiny_pipeline(tmp_path, "text")
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 7}))
    with pytest.raises(InputError, match="7 channels in and 4 out do not suit a VAE of 4"):
        opened(tmp_path)


def test_what_is_projected_must_be_a_camera(tmp_path):
    with pytest.raises(InputError, match=f"projection_class_embeddings_input_dim = 2048.*would be {CAMERA_WIDTH}"):
        opened(save_with_cameras(tmp_path / "unclip", 2048))


def test_a_unet_without_cameras_passes_over_the_view(prior):
    z, view = noise(2, 4, 4, 4), torch.zeros(2, 3)
    assert not prior.takes_camera
    found = prior.predict({"told": Query(z, 300, RED, view=view), "not": Query(z, 300, RED)})
    torch.testing.assert_close(found["told"], found["not"], **TOLERANCE)


def test_the_network_of_the_renders_is_trained_at_the_views_it_is_asked_at(tmp_path):
    """At first it is the prior, so its loss is the prior's own error at each view, or at none where that is dropped."""
    prior, z = opened(save_with_cameras(tmp_path / "camera")), noise(2, 4, 4, 4)
    view = torch.tensor([[90.0, 30.0, 4.0], [180.0, 0.0, 3.6]])
    network = prior.lora(2, torch.Generator().manual_seed(0))
    text, cameras = prior.embed(RED), torch.zeros(2, 12)
    for drop, labels in ((0.0, camera_embedding(*view.unbind(1))), (1.0, no_camera(2))):
        generator = torch.Generator().manual_seed(5)
        found = network.loss(z, RED, cameras, generator, drop=drop, view=view)
        generator.manual_seed(5)
        t = torch.randint(1000, (2,), generator=generator)
        eps = torch.randn(z.shape, generator=generator)
        a, sigma = (part.sqrt()[:, None, None, None] for part in (prior.alphas_cumprod[t], 1 - prior.alphas_cumprod[t]))
        raw = prior.unet(a * z + sigma * eps, t, encoder_hidden_states=text, class_labels=labels).sample
        torch.testing.assert_close(found, (raw - eps).square().mean(), **TOLERANCE)
