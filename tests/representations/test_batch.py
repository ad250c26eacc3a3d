"""Assets and what a step does to them, in closed form."""

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from toy_parts import Blobs, BlobScene

from csd3d.cameras import orbit
from csd3d.distillation.step import DistillConfig
from csd3d.errors import InputError
from csd3d.fields import FieldConfig
from csd3d.guidance.asset_noise import CameraNoise
from csd3d.guidance.assets import asset_step, new_phase, noise_of, step_context
from csd3d.guidance.methods import method_runs
from csd3d.guidance.views import PromptConfig, Views, sample_views
from csd3d.rendering import RenderConfig, Rendered
from csd3d.rendering.bend import bend
from csd3d.representations.base import open_scene
from csd3d.representations.batch import (
    AssetConfig,
    Assets,
    AssetViews,
    LossConfig,
    ShadingConfig,
    check_memory,
    draw_shading,
    ignored,
    milestone,
    regularisers,
    scheduled,
)
from csd3d.representations.descent import Average, OptimConfig, averaged
from csd3d.schema import Chosen, choose
from csd3d.tasks.text_to_3d import TextTo3DConfig

FIELD = {"levels": 4, "log2_hashmap_size": 10, "max_resolution": 32, "hidden": 16, "sh_degree": 1, "blob_scale": 8.0}
RENDER = {"steps": 48, "resolution": 16, "warmup": 8, "update_every": 4}


def settings(**changes):
    grid = choose("representation", "hashgrid", field=FieldConfig(**FIELD), render=RenderConfig(**RENDER))
    asset = AssetConfig(representation=grid, resolution=[(0, 12)], levels=[(0, 4)])
    return TextTo3DConfig(**{"prompt": "a red chair", "asset": asset, "guidance_size": 16} | changes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Job:
    """What `new_phase` asks of a job."""

    device = torch.device("cpu")

    def __init__(self, config):
        self.config = config

    def generator(self, purpose):
        return generator(sum(map(ord, purpose)))


class Pull:
    """A guide whose direction is z minus a colour: descending it makes everything that colour. Latents are pixels."""

    def __init__(self, colour):
        self.colour = torch.tensor(colour).view(1, 3, 1, 1)
        self.prior = SimpleNamespace(unet_evaluations=0)

    def encode(self, images):
        return images

    def loss(self, z, images, step, generator, prompts, pose, view, guides_view, groups, away):
        assert z.shape[0] == len(prompts) == len(pose) == len(view) == len(groups) == len(images())
        return (z * (z - self.colour).detach()).sum(), {"t": 0.0}


@pytest.mark.parametrize("particles", [1, 2])
def test_a_direction_is_descended_through_the_renderer(particles):
    """Sign and path of the gradient: renders go towards the colour that the direction points to, background and all."""
    config = settings(particles=particles, optim=OptimConfig(background=1.0))
    guide, wanted = Pull([0.9, 0.1, 0.2]), torch.tensor([0.9, 0.1, 0.2]).view(3, 1, 1)
    phase = new_phase(Job(config), "sds")
    errors = []
    for step in range(40):
        views = sample_views(config.views, 3, 12, generator(7))
        with torch.no_grad():
            shown = phase.model.render(views.cameras, torch.full((particles, 432), 0.5), draw(), None).images
        errors.append((shown - wanted).abs().mean().item())
        asset_step(config, phase, guide, step, None)
    assert errors[-1] < 0.3 * errors[0]
    fields = [model.field.table for model in phase.model.models]
    assert particles == 1 or not torch.equal(*fields)  # starts of their own


BACKDROPS = {"white": (1.0, 1.0, 1.0), "red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)}


def test_a_step_stands_before_a_backdrop_and_its_prompts_say_which():
    seen = set()

    class Look(Pull):
        def loss(self, z, *others, prompts, away, **context):
            told = [*prompts, *(text for texts, _ in away for text in texts)]
            (word,) = {text.split(" on ")[1].split(",")[0] for text in told}
            torch.testing.assert_close(z[:, :, 8, 8], torch.tensor(BACKDROPS[word]).expand(len(z), 3))
            seen.add(word)
            return super().loss(z, *others, prompts=prompts, away=away, **context)

    config = settings(prompts=PromptConfig(template="{prompt} on {backdrop}, {view}", backdrops=BACKDROPS))
    config.asset.representation.thing.field.blob_radius = 1e-4  # all is empty
    phase = new_phase(Job(config), "sds")
    for step in range(12):
        asset_step(config, phase, Look([0.5, 0.5, 0.5]), step, None)
    assert seen == BACKDROPS.keys()
    assert phase.model.models[0].background(torch.ones(2, 3)).eq(1).all()  # the finished asset's is the first
    assert not list(phase.model.models[0].background.parameters())
    with pytest.raises(ValueError, match="random_background"):
        settings(prompts=config.prompts, asset=AssetConfig(random_background=0.5))


def draw(step=0, losses=None, **config):
    return draw_shading(ShadingConfig(**config), losses or LossConfig(), step, generator())


def test_a_step_that_is_not_finite_changes_nothing():
    config, guide = settings(), Pull([math.nan, 0, 0])
    phase = new_phase(Job(config), "sds")
    before = {name: value.clone() for name, value in phase.model.named_parameters()}
    assert asset_step(config, phase, guide, 0, None)["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in phase.model.named_parameters())


def test_particles_are_asset_major_and_share_as_asked():
    cameras = sample_views(settings().views, 3, 8, generator()).cameras
    views = Views(cameras, torch.tensor([0.0, 90.0, 180.0]), torch.tensor([20.0, 20.0, 80.0]))
    groups = {
        share: step_context(settings(particles=2, share=share), views)["groups"].tolist()
        for share in ("auto", "views", "assets", "all")
    }
    assert groups["views"] == [0, 0, 0, 1, 1, 1]
    assert groups["assets"] == groups["auto"] == [0, 1, 2, 0, 1, 2]
    assert groups["all"] == [0] * 6
    context = step_context(settings(particles=2), views)
    front, side, top = (f"a red chair, {word} view" for word in ("front", "side", "overhead"))
    assert context["prompts"] == [front, side, top] * 2
    (first, weights), (second, others) = context["away"]  # Perp-Neg's: from the front away from side and back
    back = "a red chair, back view"
    assert (first[:3], second[:3]) == ([side, side, front], [back, front, back])
    assert (weights.tolist(), others.tolist()) == ([1, 0, 0] * 2, [1, 1, 0] * 2)
    assert torch.equal(context["pose"], cameras.camera_to_world.flatten(1).repeat(2, 1))
    place = torch.tensor([[0.0, 20.0], [90.0, 20.0], [180.0, 80.0]]).repeat(2, 1)
    torch.testing.assert_close(context["view"][:, :2], place)
    torch.testing.assert_close(context["view"][:, 2], cameras.positions.norm(dim=1).repeat(2))
    config = settings(particles=2)
    for camera, told in (("auto", True), (True, True), (False, False)):
        config.prompts.camera = camera
        assert (step_context(config, views)["view"] is not None) == told


def test_camera_noise_is_that_of_the_assets_map_at_the_camera():
    noises = []

    class Look(Pull):
        def loss(self, *others, camera_noise, **context):
            noises.append(camera_noise)
            return super().loss(*others, **context)

    config = settings(particles=2, views_per_step=2)
    phase = new_phase(Job(config), "fsd")
    first, second = torch.randn(2, 3, 60, 80, generator=generator())
    for maps in ([first, first], [first, second]):
        phase.generator.manual_seed(0)
        asset_step(config, phase, Look([0.5, 0.5, 0.5]), 0, CameraNoise(maps))
    same, own = noises
    assert same.shape == (4, 3, 16, 16)
    assert torch.equal(same[:2], same[2:])
    assert not torch.equal(same[0], same[1])
    assert torch.equal(own[:2], same[:2])
    assert not torch.isclose(own[2:], same[2:]).any()


def test_assets_have_camera_noise_of_their_own_unless_they_collaborate():
    def maps(name, particles=3):
        job = Job(settings(particles=particles))
        job.prior = SimpleNamespace(latent_shape=lambda height, width: (4, height // 8, width // 8))
        return noise_of(job, method_runs([Chosen(name)], {}, DistillConfig())[name]).maps

    own, shared, alone = maps("fsd"), maps("fsd+csd"), maps("fsd", 1)
    assert len({float(one[0, 0, 0]) for one in own}) == len(own) == 3
    assert len(shared) == 3
    assert all(torch.equal(one, alone[0]) for one in (own[0], *shared))


def test_schedules_ramp_and_milestones_step():
    assert [scheduled((10, 1.0, 20, 3.0), step) for step in (0, 10, 15, 20, 99)] == [1, 1, 2, 3, 3]
    assert scheduled(0.5, 7) == 0.5
    assert [milestone([(0, 32), (5, 64)], step) for step in (0, 4, 5, 9)] == [32, 32, 64, 64]


def test_losses_are_their_formulas():
    opacity = torch.tensor([0.0, 0.5, 1.0, 0.8])
    penalty, distortion = torch.tensor([0.0, 0.2, 0.4, 0.6]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    views = AssetViews(None, [Rendered(None, None, opacity, 0, distortion, penalty)], None)
    total, found = regularisers(views, LossConfig(1.0, 2.0, (0, 0.0, 10, 3.0), 4.0), 5)
    p = opacity.clamp(1e-3, 1 - 1e-3)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean().item()
    sparsity = (opacity**2 + 0.01).sqrt().mean().item()
    assert found == pytest.approx({"orientation": 0.3, "sparsity": sparsity, "opacity": entropy, "distortion": 2.5})
    assert total.item() == pytest.approx(0.3 + 2 * sparsity + 1.5 * entropy + 10.0)
    assert regularisers(views, LossConfig(), 5) == (0, {})


def test_smoothness_is_the_bend_of_all_assets_and_left_out_where_depths_have_no_gradient():
    cameras, opacity = orbit(2, 4.0, 20.0, 31.0, 8, 8), torch.ones(2, 8, 8)
    depths = [(4 + 0.05 * torch.rand(2, 8, 8, generator=generator())).requires_grad_() for _ in range(3)]
    views = AssetViews(None, [Rendered(None, depth, opacity, 0) for depth in depths], cameras)
    total, found = regularisers(views, LossConfig(smoothness=2.0), 0)
    expected = sum(bend(depth, opacity, cameras).mean().item() for depth in depths) / 3
    assert found == {"smoothness": pytest.approx(expected)}
    assert total.item() == pytest.approx(2 * expected)
    total.backward()
    assert all(depth.grad.abs().max() > 0 for depth in depths)
    flat = AssetViews(None, [Rendered(None, depth.detach(), opacity, 0) for depth in depths], cameras)
    assert regularisers(flat, LossConfig(smoothness=2.0), 0) == (0, {})


def test_shading_comes_as_often_as_asked_and_not_before_its_start():
    config = ShadingConfig(start=3, lambertian=0.5, textureless=0.25)
    modes = [draw_shading(config, LossConfig(), 3, generator(seed)).mode for seed in range(400)]
    shares = {mode: modes.count(mode) / 400 for mode in set(modes)}
    assert shares == pytest.approx({"albedo": 0.25, "lambertian": 0.5, "textureless": 0.25}, abs=0.08)
    assert all(draw_shading(config, LossConfig(), 2, generator(s)).mode == "albedo" for s in range(20))
    assert draw_shading(ShadingConfig(), LossConfig(orientation=1.0), 0, generator()).orientation


def test_renders_of_several_assets_are_each_their_own():
    config = settings().asset
    assets = Assets(config, 2, generator())
    views = sample_views(settings().views, 2, 8, generator(1))
    jitter = torch.full((2, 128), 0.5)
    both = assets.render(views.cameras, jitter, draw(), None).images
    assert both.shape == (4, 3, 8, 8)
    alone = assets.models[1].render_rays(*views.cameras.image_rays(0), jitter[1, :64]).rgb
    torch.testing.assert_close(both[2], alone.T.view(3, 8, 8))
    plain = assets.render(views.cameras, jitter, draw(), torch.tensor([1.0, 0.0, 0.0])).images
    corner, opacity = plain[0, :, 0, 0], both[0, :, 0, 0]
    assert not torch.allclose(corner, opacity)


def test_too_much_for_memory_is_refused_before_it_is_allocated():
    with pytest.raises(InputError, match=r"lower views.*resolution"):
        check_memory(AssetConfig(resolution=[(0, 64), (9, 1024)]), 8, 64)
    check_memory(AssetConfig(), 1, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"share": "none"}, "share"),
        ({"method": Chosen("dds")}, "edits a source"),
        ({"prompt": " "}, "prompt is empty"),
        ({"particles": 0}, "particles"),
        ({"compare": [Chosen("sds"), Chosen("foo")]}, "unknown method 'foo'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        TextTo3DConfig(**{"prompt": "a chair"} | change)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("asset.resolution", {"asset": AssetConfig(resolution=[(0, 32), (600, 64)])}),
        ("losses.opacity", {"losses": LossConfig(opacity=(0, 0.0, 601, 1.0))}),
        ("shading.start", {"shading": ShadingConfig(start=600, lambertian=0.1)}),
    ],
)
def test_schedules_past_the_last_step_are_refused(key, changes):
    with pytest.raises(ValueError, match=f"is 600, but {key} needs 601; change"):
        TextTo3DConfig(prompt="a chair", **changes)
    TextTo3DConfig(prompt="a chair", losses=LossConfig(opacity=(0, 0.0, 600, 1.0)), shading=ShadingConfig(start=600))
    with pytest.raises(ValueError, match="rising"):
        AssetConfig(resolution=[(5, 32)])


# ------------------------------------------------------------------------------- a representation from outside csd3d


@dataclass(frozen=True)
class Growing(Blobs):
    """Blobs that are doubled before step 2; they have no levels of detail and report no losses of their own."""

    def open(self, aabb, generator, unbounded=False, background="learned"):
        return GrowingScene(self, aabb, generator)


class GrowingScene(BlobScene):
    def keep_up(self, step, generator):
        if step == 2:
            self.double()


def growing_phase():
    asset = AssetConfig(representation=Chosen("growing", Growing()), resolution=[(0, 12)], levels=[(0, 3), (900, 99)])
    losses = LossConfig(orientation=0.1, distortion=0.1)
    config = settings(asset=asset, losses=losses, particles=2, optim=OptimConfig(ema=0.5, learning_rate=0.1))
    return config, new_phase(Job(config), "sds")


def grow(config, phase, steps):
    for step in steps:
        assert asset_step(config, phase, Pull([0.9, 0.1, 0.2]), step, None)["skipped"] == 0
        phase.step = step + 1
    return phase


def test_the_average_of_a_parameter_that_grew_starts_anew():
    config, phase = growing_phase()
    grow(config, phase, range(2))
    behind = [mean.clone() for mean in phase.average.means]
    grow(config, phase, [2])
    for before, mean, p in zip(behind, phase.average.means, phase.model.parameters(), strict=True):
        torch.testing.assert_close(mean, p.detach() if p.shape != before.shape else (before + p.detach()) / 2)
    grown = phase.model.models[0].centres
    assert len(grown) == 32
    assert phase.optimiser.state[grown]["step"] == 1
    assert phase.optimiser.state[phase.model.models[0].behind]["step"] == 3
    grow(config, phase, [3])
    shown = averaged(phase.model, phase.average)
    for own, mean in zip(shown.parameters(), phase.average.means, strict=True):
        assert torch.equal(own, mean)
    assert not torch.equal(shown.models[0].centres, phase.model.models[0].centres)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_representation_that_grows_resumes_exactly(stop, tmp_path):
    unbroken = grow(*growing_phase(), range(5))
    config, broken = growing_phase()
    grow(config, broken, range(stop)).save(tmp_path, "sds", {})
    config, resumed = growing_phase()
    resumed.load(tmp_path, "sds", {})
    grow(config, resumed, range(stop, 5))
    for parts in (
        (list(phase.model.parameters()) + phase.average.means for phase in (unbroken, resumed)),
        ([state["exp_avg"] for state in phase.optimiser.state.values()] for phase in (unbroken, resumed)),
    ):
        assert all(torch.equal(*pair) for pair in zip(*parts, strict=True))


def test_averages_are_exponential():
    model = torch.nn.Linear(2, 1, bias=False)
    average, values = Average(model, 0.75), torch.tensor([[1.0, 2.0]])
    for value in (values, 3 * values, 5 * values):
        model.weight.data = value.clone()
        average.update()
    torch.testing.assert_close(average.means[0], 0.75 * (0.75 * values + 0.25 * 3 * values) + 0.25 * 5 * values)


def test_levels_are_those_of_the_representation():
    with pytest.raises(ValueError, match="more than the 4 of the hashgrid"):
        dataclasses.replace(settings().asset, levels=[(0, 5)])


def test_the_learning_rate_warms_up_and_decays():
    optim = OptimConfig(warmup=4, final=0.01)
    assert optim.share(1, 101) == pytest.approx(0.5 * 0.01**0.01)
    assert optim.share(50, 101) == pytest.approx(0.1)
    assert optim.share(100, 101) == pytest.approx(0.01)
    assert OptimConfig(warmup=0).share(0, 1) == 1.0
    with pytest.raises(ValueError, match="final is 0"):
        OptimConfig(final=0.0)


# ----------------------------------------------------------------------------------------- what a representation lacks


class NoFit(BlobScene):
    fit_step = None


@dataclass(frozen=True)
class Lacking:
    model: type

    def open(self, aabb, generator, unbounded=False, background="learned"):
        return self.model(Blobs(), aabb, generator)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (NoFit, "Lacking: the NoFit that open returned lacks fit_step"),
        (lambda *parts: parts[0], "Lacking: open returned a Blobs, which is no nn.Module"),
    ],
)
def test_a_scene_that_lacks_a_method_is_refused_when_it_is_opened(model, said):
    box = torch.tensor([-1.0, -1, -1, 1, 1, 1])
    with pytest.raises(InputError, match=said):
        open_scene(Lacking(model), box, generator())
    with pytest.raises(InputError, match=said):
        Assets(AssetConfig(representation=Chosen("lacking", Lacking(model))), 1, generator())
    assert isinstance(open_scene(Lacking(BlobScene), box, generator()), BlobScene)


def test_keys_that_a_representation_does_not_support_are_named_once():
    losses = LossConfig(orientation=0.1, distortion=(0, 0.0, 10, 0.1), smoothness=1.0, sparsity=1.0)
    shading = ShadingConfig(textureless=0.5)
    told = ignored(AssetConfig(representation=Chosen("blobs", Blobs()), levels=[(0, 3)]), losses, shading)
    assert told == [
        f"{key} is set, but has no effect: Blobs that multiply has no {feature}"
        for key, feature in {
            "losses.orientation": "orientation",
            "losses.distortion": "distortion",
            "losses.smoothness": "smoothness",
            "shading.textureless": "shading",
            "asset.levels": "levels of detail",
        }.items()
    ]
    assert (
        ignored(AssetConfig(representation=Chosen("blobs", Blobs())), LossConfig(sparsity=1.0), ShadingConfig()) == []
    )
    assert ignored(AssetConfig(levels=[(0, 3)]), losses, shading) == []  # the hash grid supports all


def test_reduced_pictures_give_every_pixel_a_gradient_and_keep_the_mean():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    small = AssetViews(images, [], None).at_side(8)
    small.sum().backward()
    assert (images.grad > 0).all()
    torch.testing.assert_close(small.mean(), images.mean(), rtol=0.01, atol=0)
