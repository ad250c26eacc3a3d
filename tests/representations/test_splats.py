"""Gaussian splats as a representation: fit, moves, checkpoints, files, surface."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from csd3d.cameras import Cameras, orbit
from csd3d.datasets import SceneConfig, load_capture
from csd3d.datasets.listing import Points
from csd3d.datasets.splat_files import moved, quaternion, read_splats, view_of, write_splats
from csd3d.errors import InputError
from csd3d.export.placement import Placement, capture_placement
from csd3d.rendering import Rendered
from csd3d.representations.base import open_scene
from csd3d.representations.batch import AssetConfig, Assets
from csd3d.representations.descent import Average, OptimConfig, asset_optimiser, averaged
from csd3d.representations.fit import FitConfig, Pictures
from csd3d.representations.splat_growth import move_dead, surface_points
from csd3d.representations.splats import GaussianSplats
from csd3d.schema import Chosen
from custom_kernels import native
from custom_kernels.splats import C0, Splats, render, rotation_matrices
from tests.datasets.test_spz import unpacked

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels are not compiled")
BOX = torch.tensor([-1.0, -1, -1, 1, 1, 1])
SMALL = GaussianSplats(count=200, relocate_every=5)
FIT = FitConfig(steps=40, warmup=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ball_pictures(side=32, views=6):
    """A red ball of radius 0.5 before white."""
    cameras = orbit(views, 3.0, 20.0, 45.0, side, side)
    images = []
    for i in range(views):
        rays_o, rays_d = cameras.image_rays(i)
        along = -(rays_o * rays_d).sum(1)
        hit = (rays_o + along[:, None] * rays_d).norm(dim=1) < 0.5
        images.append(torch.where(hit[:, None], torch.tensor([0.8, 0.1, 0.1]), 1.0).view(side, side, 3))
    return Pictures(torch.stack(images), cameras, None, torch.arange(views))


def fitted(config=SMALL, fit=FIT, pictures=None, steps=None, seed=0):
    pictures = pictures or ball_pictures()
    random = generator(seed)
    model = open_scene(config, BOX, random, background="white", hints={"cameras": pictures.cameras})
    optimiser = model.start_fit(fit)
    reports = [model.fit_step(optimiser, pictures, fit, step, random) for step in range(steps or fit.steps)]
    return model, optimiser, random, reports


# ---- fit


def test_a_fit_reproduces_the_pictures():
    pictures = ball_pictures()
    model, _, _, reports = fitted(pictures=pictures, fit=replace(FIT, steps=150))
    assert reports[-1]["psnr"] > 22 > reports[0]["psnr"] + 5
    view = model.render_views(pictures.cameras, torch.tensor([0]))
    assert view.opacity[0, 16, 16] > 0.8
    assert view.opacity[0, 0, 0] < 0.1
    assert view.depth[0, 16, 16].item() == pytest.approx(2.5, abs=0.5)  # of one colour: its shape is hardly seen


def test_any_number_of_threads_fits_to_the_same_bytes():
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(fitted(steps=12)[0].splats)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_resumed_fit_continues_exactly_though_splats_were_added():
    config = replace(SMALL, max_count=260)
    pictures = ball_pictures()
    whole, _, _, _ = fitted(config, pictures=pictures, steps=24)
    model, optimiser, random, _ = fitted(config, pictures=pictures, steps=13)
    states = copy.deepcopy((model.state_dict(), optimiser.state_dict(), random.get_state()))
    assert len(model.means) > 200
    other = open_scene(config, BOX, generator(5), background="white", hints={"cameras": pictures.cameras})
    adam = other.start_fit(FIT)
    other.load_state_dict(states[0])
    adam.load_state_dict(states[1])
    random = generator()
    random.set_state(states[2])
    for step in range(13, 24):
        other.fit_step(adam, pictures, FIT, step, random)
    assert len(other.means) == len(whole.means) > len(model.means)
    assert all(torch.equal(a, b) for a, b in zip(other.splats, whole.splats, strict=True))


def test_a_state_of_another_box_is_refused():
    """Of a box without a size, from a spoilt checkpoint, the surface could not be fused."""
    model = open_scene(SMALL, BOX, generator())
    state = model.state_dict()
    model.load_state_dict(state | {"aabb": BOX * (1 + 1e-6)})  # as another machine may round it
    for box in (0 * BOX - 1, 0 * BOX + 1e30, 2 * BOX):
        with pytest.raises(ValueError, match=r"^aabb: is .*, the scene's box is "):
            model.load_state_dict(state | {"aabb": box})


def test_an_edit_uses_few_harmonics():
    config = replace(SMALL, sh_degree=2, edit_degree=1)
    model, _, random, _ = fitted(config)
    assert model.degree == 2
    edit = copy.deepcopy(model)
    optimiser = edit.start_fit(FIT)
    edit.fit_step(optimiser, ball_pictures(), FIT, 0, random)
    assert (edit.degree, model.degree) == (1, 2)
    assert torch.equal(edit.rest[:, 3:], model.rest[:, 3:])  # what is not in use stays as it was


def test_a_step_that_is_not_finite_changes_nothing():
    model, optimiser, random, _ = fitted(steps=3)
    before = [x.clone() for x in model.splats]
    pictures = ball_pictures()
    pictures.images[:] = math.nan
    assert model.fit_step(optimiser, pictures, FIT, 3, random)["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.splats, strict=True))


def test_a_checkpoint_that_waits_for_a_view_that_is_not_there_is_refused():
    model, optimiser, random, _ = fitted(steps=3)
    model.set_extra_state(model.get_extra_state() | {"order": [999]})
    with pytest.raises(InputError, match="waits for view 999"):
        model.fit_step(optimiser, ball_pictures(), FIT, 3, random)


def test_masked_pixels_do_not_count():
    pictures = ball_pictures()
    pictures.masks = torch.ones(pictures.images.shape[:3], dtype=torch.bool)
    pictures.masks[:, :, 16:] = False
    spoiled = replace(pictures, images=pictures.images.clone())
    spoiled.images[:, :, 16:] = 0.3
    a, b = (fitted(pictures=p, steps=6)[0] for p in (pictures, spoiled))
    assert all(torch.equal(x, y) for x, y in zip(a.splats, b.splats, strict=True))


@pytest.mark.parametrize("start", ["points", "nerf"])
def test_a_fit_may_start_from_points_or_from_a_nerf(start):
    xyz = np.array([[0.0, 0, 0], [0.2, 0, 0.1], [0, 0.3, 0]])
    points = Points(xyz, np.full((3, 3), 0.25, np.float32))
    config = replace(SMALL, start=start, nerf_steps=12)
    pictures = ball_pictures(side=16)
    model = open_scene(config, BOX, generator(), hints={"cameras": pictures.cameras, "points": points})
    if start == "points":
        order = (model.means @ torch.tensor([1.0, 2.0, 0.0])).argsort()
        torch.testing.assert_close(model.means[order].double(), torch.from_numpy(xyz), atol=1e-6, rtol=0)
        torch.testing.assert_close(0.5 + C0 * model.dc, torch.full((3, 3), 0.25))
    else:
        before = model.means.detach().clone()
        model.fit_step(model.start_fit(FIT), pictures, FIT, 0, generator())
        assert model.means.shape != before.shape or not torch.allclose(model.means, before, atol=0.1)
    with pytest.raises(InputError, match="start is points"):
        replace(SMALL, start="points").open(BOX, generator())


class GlassBall:
    """A ball of radius 0.5, of which the left half of the world lets light through."""

    def render_rays(self, rays_o, rays_d):
        along = -(rays_o * rays_d).sum(1)
        inside = 0.25 - (rays_o + along[:, None] * rays_d).square().sum(1)
        depth = along - inside.clamp_min(0).sqrt()
        xyz = rays_o + depth[:, None] * rays_d
        solid = (inside > 0) & (xyz[:, 0] > 0)
        return Rendered(xyz + 0.5, depth, solid.float(), 0)


def test_points_of_surfaces_lie_on_what_is_solid():
    xyz, rgb = surface_points(GlassBall(), orbit(5, 2.0, 20.0, 40.0, 16, 16), 300, generator())
    assert 100 < len(xyz) <= 300
    assert (xyz[:, 0] > 0).all()
    torch.testing.assert_close(xyz.norm(dim=1), torch.full((len(xyz),), 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(rgb, (xyz + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


# ---- moves


def test_the_dead_move_beside_the_living_and_the_picture_stays():
    """Equation 9 of 3DGS-MCMC: n copies in the same place look as one did."""
    one = Splats(*(x[:1] for x in round_splats(2)))
    both = Splats(*(torch.cat((x, x)) for x in one))
    both.opacities[1] = -9.0
    found, changed = move_dead(both, 0.02, 0, generator())
    assert changed.tolist() == [0, 1]
    found.means[:] = one.means  # undo the spread
    view = view_of(orbit(1, 3.0, 0.0, 45.0, 33, 33), 0)
    was, now = (render(s, view, degree=0, antialiased=False) for s in (one, found))
    assert (was.light - now.light).abs().max() < 0.06
    assert was.light.sum().item() == pytest.approx(now.light.sum().item(), rel=2e-3)
    assert found.opacities[0] == found.opacities[1] < one.opacities[0]


def round_splats(count, seed=0):
    random = generator(seed)
    means = 0.3 * torch.randn(count, 3, generator=random)
    means[0] = 0
    sizes = torch.full((count, 3), -1.5)
    quats = torch.randn(count, 4, generator=random)
    return Splats(means, sizes, quats, torch.full((count,), 1.5), torch.rand(count, 3), torch.zeros(count, 15, 3))


def test_nothing_moves_where_none_is_dead_or_all_are():
    splats = round_splats(5)
    assert len(move_dead(splats, 0.02, 0, generator())[1]) == 0
    assert len(move_dead(splats._replace(opacities=torch.full((5,), -9.0)), 0.02, 3, generator())[1]) == 0


# ---- files


def textured(count=40, degree=3, seed=1):
    random = generator(seed)
    shapes = ((3,), (3,), (4,), (), (3,), ((degree + 1) ** 2 - 1, 3))
    parts = [torch.randn(count, *shape, generator=random) for shape in shapes]
    return Splats(0.4 * parts[0], 0.3 * parts[1] - 2, *parts[2:4], 0.4 * parts[4], 0.3 * parts[5])


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_ply_round_trip(degree, tmp_path):
    splats = textured(degree=degree)
    write_splats(tmp_path / "a.ply", splats, "a frame")
    found = read_splats(tmp_path / "a.ply", "here")
    unit = splats._replace(quats=torch.nn.functional.normalize(splats.quats, dim=1))
    assert all(torch.equal(a, b) for a, b in zip(found, unit, strict=True))
    head = (tmp_path / "a.ply").read_bytes().split(b"end_header")[0].decode().split("\n")
    assert head[3] == "element vertex 40"
    assert head[4:7] == ["property float x", "property float y", "property float z"]  # the order of 3DGS
    assert head[-2] == "property float rot_3"


def test_moved_splats_look_the_same_from_moved_cameras():
    """Quaternions, sizes and harmonics turn with the frame: a camera that moves along sees the same picture."""
    rotation = rotation_matrices(torch.tensor([[0.3, -0.5, 0.7, 0.4]], dtype=torch.float64))[0]
    assert torch.allclose(rotation_matrices(quaternion(rotation)[None])[0], rotation)
    scale, shift = 2.5, torch.tensor([3.0, -1.0, 7.0], dtype=torch.float64)
    cameras = orbit(3, 3.0, 20.0, 45.0, 40, 40)
    pose = cameras.camera_to_world.double()
    turned = torch.cat((rotation @ pose[:, :, :3], (scale * pose[:, :, 3] @ rotation.T + shift)[:, :, None]), 2)
    other = replace(cameras, camera_to_world=turned.float())
    splats = textured()
    for i in range(3):
        was = render(splats, view_of(cameras, i), degree=3, depth=True)
        now = render(moved(splats, rotation, scale, shift), view_of(other, i), degree=3, depth=True)
        torch.testing.assert_close(now.rgb, was.rgb, atol=2e-4, rtol=0)
        torch.testing.assert_close(now.depth, scale * was.depth, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("count", "distance", "told"), [(1, 3.0, 0), (40, 3.0, 0), (40, 1e6, 1), (1, 1e6, 1)])
def test_a_scene_far_from_its_origin_is_told_of_once_and_a_single_splat_is_none(
    tmp_path, caplog, count, distance, told
):
    model = SMALL.open(BOX, generator(), background="black")
    model.take(textured(count))
    model.write_files(tmp_path, Placement(shift=np.array([distance, 0, 0])))
    assert [record.levelname for record in caplog.records if "splats.ply" in record.message] == ["WARNING"] * told


def test_files_are_in_the_captures_own_frame(tmp_path):
    """splats.ply, looked at by a camera of the capture's own frame, is what the scene shows in the normalised one."""
    rotation = rotation_matrices(torch.tensor([[0.9, 0.1, 0.3, -0.2]], dtype=torch.float64))[0]
    transform = torch.eye(4, dtype=torch.float64)
    transform[:3, :3], transform[:3, 3], scale = rotation, torch.tensor([0.5, 1.0, -2.0]), 0.4
    model = SMALL.open(BOX, generator(), background="black")
    model.take(textured())
    placement = capture_placement(transform.numpy(), scale, BOX.numpy())
    model.write_files(tmp_path, placement)
    cameras = orbit(2, 3.0, 20.0, 45.0, 40, 40)
    pose = cameras.camera_to_world.double()
    own = torch.cat(
        (rotation.T @ pose[:, :, :3], ((pose[:, :, 3] / scale - transform[:3, 3]) @ rotation)[:, :, None]), 2
    )
    found = render(
        read_splats(tmp_path / "splats.ply", ""), view_of(replace(cameras, camera_to_world=own.float()), 1), degree=3
    )
    torch.testing.assert_close(found.rgb, model.render_views(cameras, torch.tensor([1])).rgb[0], atol=3e-4, rtol=0)
    upright = unpacked((tmp_path / "splats.spz").read_bytes())[0].means.double()  # as the GLB, y up
    torch.testing.assert_close(
        upright, torch.from_numpy(placement.gltf(model.means.detach().numpy())), atol=1e-5, rtol=0
    )


def spoil(path, change):
    head, body = path.read_bytes().split(b"end_header\n")
    path.write_bytes(change(head) + b"end_header\n" + body)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head: head.replace(b"vertex 4", b"vertex 10000000"), "number of splats is not between 0 and 5000000"),
        (lambda head: head.replace(b"vertex 4", b"vertex 5"), "ends before its 5 splats do"),
        (lambda head: head.replace(b" opacity", b" alpha"), "holds no Gaussian splats: its points have no opacity"),
        (lambda head: head.replace(b" f_rest_8\n", b" f_rust_8\n"), "8 columns f_rest"),
        (lambda head: head.replace(b"binary_little_endian", b"ascii"), "is an ASCII file"),
        (lambda head: b"PK" + head, "is no PLY file"),
    ],
)
def test_other_files_are_refused_in_one_line(change, said, tmp_path):
    path = tmp_path / "a.ply"
    write_splats(path, textured(4, degree=1), "a frame")
    spoil(path, change)
    with pytest.raises(InputError, match=said) as caught:
        read_splats(path, "scene.path")
    assert str(caught.value).startswith("scene.path: ")
    assert "\n" not in str(caught.value)


def test_splats_that_are_not_finite_are_counted(tmp_path):
    splats = textured(4)
    splats.means[1, 2], splats.rest[3, 0, 0] = math.nan, math.inf
    write_splats(tmp_path / "a.ply", splats, "a frame")
    with pytest.raises(InputError, match="2 of 4 splats hold numbers that are not finite"):
        read_splats(tmp_path / "a.ply", "scene.path")


def test_a_finished_scene_is_read_rendered_and_left_as_it_is(tiny_capture, tmp_path):
    """A .ply with cameras but without photos: they are rendered, and the reconstruction changes nothing."""
    (tmp_path / "transforms.json").write_text((tiny_capture / "transforms.json").read_text())
    splats = textured(seed=3)
    write_splats(tmp_path / "scene.ply", splats, "own")
    capture = load_capture(SceneConfig(path=str(tmp_path / "scene.ply")))
    assert capture.reader == "Gaussian splats"
    hints = {"splats": capture.splats, "cameras": capture.cameras}
    model = open_scene(GaussianSplats(), capture.aabb, generator(), capture.unbounded, hints=hints)
    optimiser = model.start_fit(FIT)
    pictures = Pictures(capture.images, capture.cameras, None, capture.train)
    assert model.fit_step(optimiser, pictures, FIT, 0, generator())["psnr"] > 45  # pictures of 8 bits
    assert torch.equal(model.means, capture.splats.means)
    edit = copy.deepcopy(model)
    adam = edit.start_fit(FIT)
    pictures.images[:] = 0.5
    edit.fit_step(adam, pictures, FIT, 0, generator())
    assert not torch.equal(edit.means, model.means)
    (tmp_path / "transforms.json").unlink()
    with pytest.raises(InputError, match=r"scene.ply has no transforms.json beside it"):
        load_capture(SceneConfig(path=str(tmp_path / "scene.ply")))


# ---- surface


def test_the_surface_of_a_ball_is_where_it_is():
    """Splats on a sphere: σ is ln 2 / voxel, the surface's, at its radius; the inside is solid, the outside empty."""
    random = generator()
    count, radius = 2500, 0.5
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=random), dim=1)
    sizes = torch.tensor([-3.3, -3.3, -6.0]).repeat(count, 1)  # discs that face outward
    axis = torch.nn.functional.normalize(direction + torch.tensor([0.0, 0, 1]), dim=1)
    quats = torch.cat((torch.zeros(count, 1), axis), 1)  # half a turn about the middle of z and the direction
    red = (torch.tensor([0.8, 0.1, 0.1]) - 0.5).repeat(count, 1) / C0
    splats = Splats(radius * direction, sizes, quats, torch.full((count,), 6.0), red, torch.zeros(count, 0, 3))
    model = replace(SMALL, sh_degree=0).open(BOX, random, background="white")
    model.take(splats)
    places = torch.linspace(0.0, 0.9, 300)[:, None] * torch.tensor([[0.6, 0.0, 0.8]])
    rgb, sigma = model.radiance(places, -places)
    level = math.log(2) / model.surface().voxel
    assert (places.norm(dim=1)[(sigma > level).sum()]).item() == pytest.approx(radius, abs=0.015)
    assert sigma[0] > 10 * level
    assert sigma[-1] == 0
    at = (sigma - level).abs().argmin()
    torch.testing.assert_close(rgb[at], torch.tensor([0.8, 0.1, 0.1]), atol=0.05, rtol=0)
    assert model.density(torch.tensor([[5.0, 0, 0]])) == 0


# ---- settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"start": "mesh"}, "start is 'mesh'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"sh_degree": 4}, "sh_degree is 4"),
        ({"count": 0}, "count is 0"),
        ({"count": 10_000_000}, "give 1 to 5,000,000"),
        ({"least_opacity": 0.0}, "least_opacity"),
        ({"relocate_every": 0}, "relocate_every"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        GaussianSplats(**change)


def test_assets_of_splats_have_learning_rates_of_their_own():
    assets = Assets(AssetConfig(representation=Chosen("splats", SMALL)), 2, generator())
    optimiser = asset_optimiser(assets, OptimConfig(learning_rate=0.01))
    rates = {id(p): group["rate"] for group in optimiser.param_groups for p in group["params"]}
    model = assets.models[1]
    assert rates[id(model.opacities)] == pytest.approx(0.1)
    assert rates[id(model.means)] == pytest.approx(0.01 * 2.4 * 1.1)
    assert len(rates) == len(list(assets.parameters()))


def test_an_average_does_not_lie_between_the_places_of_a_splat_that_moved():
    assets = Assets(AssetConfig(representation=Chosen("splats", SMALL)), 1, generator())
    average, model = Average(assets, 0.9), assets.models[0]
    average.update()
    with torch.no_grad():
        model.opacities[:3], model.means[:3] = -9.0, 0.9
    model.keep_up(5, generator())
    average.update()
    means = averaged(assets, average).models[0]
    assert torch.equal(means.means[:3], model.means[:3])
    assert torch.equal(means.opacities[:3], model.opacities[:3])


def test_lenses_bend_splats_as_they_bend_points():
    """A small splat appears where its camera projects its middle to, through a strong lens."""
    lens = torch.tensor([[0.2, -0.1, 0.0, 0.0, 0.01, -0.01]])
    for fisheye in (False, True):
        cameras = replace(orbit(1, 3.0, 20.0, 60.0, 64, 64), distortion=lens, fisheye=fisheye)
        point = torch.tensor([[0.6, 0.5, 0.4]])
        parts = torch.full((1, 3), -5.0), torch.ones(1, 4), torch.full((1,), 5.0), torch.ones(1, 3)
        image = render(Splats(point, *parts, torch.zeros(1, 0, 3)), view_of(cameras, 0), degree=0, antialiased=False)
        opacity = 1 - image.light
        rows, columns = (torch.arange(64) + 0.5 for _ in range(2))
        found = torch.stack(((opacity * columns).sum(), (opacity * rows[:, None]).sum())) / opacity.sum()
        torch.testing.assert_close(found, cameras.project(point, 0)[0][0], atol=0.1, rtol=0)


def test_a_gpu_without_gsplat_is_told_the_command(monkeypatch):
    problem = """gsplat is not installed: pip install -c constraints.txt -e ".[gsplat]\""""
    monkeypatch.setattr("custom_kernels.splats.gsplat_obstacle", lambda: problem)
    with pytest.raises(InputError, match=r'needs gsplat on a GPU, but .*pip install .*"\.\[gsplat\]"'):
        SMALL.check_backend(torch.device("cuda"))
    SMALL.check_backend(torch.device("cpu"))


def test_given_cameras_need_not_be_on_one_device_with_nothing():
    """No camera, no picture: the shapes are those of the protocol."""
    model = SMALL.open(BOX, generator(), background="white")
    cameras = orbit(2, 3.0, 20.0, 45.0, 9, 7)
    seen = model.render(cameras[torch.tensor([1])])
    assert isinstance(cameras, Cameras)
    assert (seen.rgb.shape, seen.depth.shape, seen.opacity.shape) == ((1, 7, 9, 3), (1, 7, 9), (1, 7, 9))
