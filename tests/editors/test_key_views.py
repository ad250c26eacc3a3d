"""DGE and GaussCtrl: epipolar lines against projected points, key views, and edits of the tiny scene."""

from types import SimpleNamespace

import pytest
import torch
from balls import Ball

from csd3d.cameras import Cameras, look_at, orbit
from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation.ddim import ddim_edit, ddim_sample
from csd3d.editors.dge import DGE
from csd3d.editors.fatezero import FateZero
from csd3d.editors.gaussctrl import GaussCtrl
from csd3d.editors.inversion import invert, micro_batches
from csd3d.editors.key_views import (
    EpipolarLines,
    epipolar_distance,
    in_runs,
    layer_strides,
    one_of_each,
    view_rays,
)
from csd3d.editors.pix2video import Pix2Video
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.attention import attention_layers, layer_sizes, self_attention
from csd3d.threads import pinned

THROUGH = {"rtol": 1e-3, "atol": 1e-3}  # several steps of a UNet in float32
LENS = (0.1, -0.02, 0.0, 0.0, 0.004, -0.003)


@pytest.fixture(scope="module")
def source(tiny_capture, tiny_prior):
    prior = load_prior(PriorConfig(model=str(tiny_prior), device="cpu"))
    for layer in attention_layers(prior.unet).values():  # loud enough to be seen in the output
        for part in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]):
            part.weight.mul_(3)
    source = SceneSource(prior, load_capture(SceneConfig(path=str(tiny_capture))), "red blue")
    # a random VAE's latents are all but constant, which group norms amplify a thousandfold
    source.z, source.image = torch.randn(2, 5, 4, 4, 4, generator=torch.Generator().manual_seed(8))
    return source


def new_edit(source, seed=0):
    return SceneEdit(source, Ball(), source.capture.images.clone(), torch.Generator().manual_seed(seed))


def edited(source, editor, step=0, monkeypatch=None) -> torch.Tensor:
    """The latents of an editor's edit."""
    edit, found = new_edit(source), []
    edit.replace = lambda rows, z: found.append(z)
    editor.update(edit, step, lambda _: None)
    return found[0]


def two_cameras(lens=None, fisheye=False) -> Cameras:
    position = torch.tensor([[3.0, -1.0, 0.5], [2.0, 2.5, 1.4]], dtype=torch.float64)
    focal, centre = torch.tensor([70.0, 90.0]), torch.tensor([31.0, 36.0])
    distortion = None if lens is None else torch.tensor([lens, lens]).double()
    pose = look_at(position, torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64))
    parts = (x.double() for x in (focal, focal * 1.1, centre, centre - 3))
    return Cameras(pose, *parts, width=64, height=64, distortion=distortion, fisheye=fisheye)


def distance_to_line(points, start, end):
    """Of points [Q, 2] from the lines through `start` and `end` [P, 2]: [P, Q]."""
    along = torch.nn.functional.normalize(end - start, dim=-1)
    offset = points - start[:, None]
    return (along[:, None, 0] * offset[..., 1] - along[:, None, 1] * offset[..., 0]).abs()


@pytest.mark.parametrize(("lens", "fisheye"), [(None, False), (LENS, False), (LENS, True)])
def test_the_line_of_a_pixel_is_where_the_points_of_its_ray_are_seen(lens, fisheye):
    cameras = two_cameras(lens, fisheye)
    generator = torch.Generator().manual_seed(0)
    pixels = 64 * torch.rand(7, 2, generator=generator, dtype=torch.float64)
    rays_o, rays_d = cameras.rays(torch.zeros(7, dtype=torch.long), pixels)
    seen = []
    for depth in (2.5, 3.5):
        places, _ = cameras.project(rays_o + depth * rays_d, 1)
        seen.append(view_rays(cameras, 1, places)[1])  # without the lens
        away = epipolar_distance(cameras, 0, 1, view_rays(cameras, 0, pixels)[0], seen[-1])
        torch.testing.assert_close(away.diagonal(), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-6)
    others = 64 * torch.rand(9, 2, generator=generator, dtype=torch.float64)
    away = epipolar_distance(cameras, 0, 1, rays_d, others)
    torch.testing.assert_close(away, distance_to_line(others, *seen), rtol=1e-6, atol=1e-6)


def test_without_a_lens_pixels_are_where_they_are():
    pixels = 64 * torch.rand(5, 2, dtype=torch.float64)
    torch.testing.assert_close(view_rays(two_cameras(), 1, pixels)[1], pixels)


def test_a_pixel_of_a_layer_sees_those_within_reach_of_its_line():
    cameras = two_cameras()
    lines = EpipolarLines(cameras, {"fine": 8, "coarse": 32}, {"fine": (8, 8), "coarse": (2, 2)}, 1.0)
    for layer, side, stride in (("fine", 8, 8), ("coarse", 2, 32)):
        near = lines.near(layer, 0, 1)
        centres = torch.tensor([[x + 0.5, y + 0.5] for y in range(side) for x in range(side)]).double() * stride
        directions = cameras.rays(torch.zeros(side**2, dtype=torch.long), centres)[1]
        assert torch.equal(near, epipolar_distance(cameras, 0, 1, directions, centres) <= stride)
        assert 0 < near.float().mean() < (0.6 if layer == "fine" else 1.1)
    same = cameras[torch.tensor([0, 0])]
    assert EpipolarLines(same, {"a": 8}, {"a": (8, 8)}, 1.0).near("a", 0, 1) is None


def test_layers_are_as_wide_as_they_are_halved(source):
    sizes = layer_sizes(source.prior.unet, 5, 7)
    for name, stride in layer_strides(sizes, (5, 7), 8).items():
        assert stride == (8 if sizes[name] == (5, 7) else 16)
    assert layer_strides({"a": (2, 4)}, (5, 13), 8) == {"a": 32}


def test_runs_go_round_the_scene_and_each_gives_one_view():
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    cameras = orbit(12, 3.0, 20.0, 40.0, 8, 8, azimuth_start_deg=5)[shuffled]
    runs = in_runs(cameras, 5)
    assert sorted(len(run) for run in runs) == [2, 2, 2, 3, 3]
    assert sorted(torch.cat(runs).tolist()) == list(range(12))
    for run in runs:  # neighbours on the circle
        assert {(b - a) % 12 for a, b in zip(shuffled[run][:-1].tolist(), shuffled[run][1:].tolist(), strict=True)} == {
            1
        }
    drawn = one_of_each(runs, torch.Generator().manual_seed(1))
    assert drawn.tolist() == sorted(drawn.tolist())
    assert all(sum(int(view) in run.tolist() for view in drawn) == 1 for run in runs)


def test_whole_calls_hold_all_frames():
    names = ("image", "full", "null")
    assert [(group, len(part)) for group, part in micro_batches(names, 4, 9, whole=True)] == [
        (("image", "full"), 4),
        (("null",), 4),
    ]
    with pytest.raises(ValueError, match="4 frames in one call"):
        micro_batches(names, 4, 3, whole=True)


def plain(source, editor, z_t, t):
    """The guided prediction of views that see one another in extended attention, or, without it, alone."""
    return editor.guided(new_edit(source), source.prior.predict)(z_t, t)


def test_all_views_as_key_views_are_extended_attention(source):
    editor, z_t, prior = DGE(key_views=5), torch.randn(5, 4, 4, 4), source.prior

    def extended(name, base, attn, hidden):
        context = hidden.unflatten(0, (-1, 5)).flatten(1, 2).repeat_interleave(5, 0)
        return base(attn, hidden, encoder_hidden_states=context)

    with self_attention(prior.unet, extended):
        expected = plain(source, editor, z_t, 400)
    edit = new_edit(source)
    torch.testing.assert_close(editor.guided(edit, editor.predictor(edit))(z_t, 400), expected, **THROUGH)
    assert (plain(source, editor, z_t, 400) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("make", [DGE, GaussCtrl])
def test_micro_batches_and_threads_change_nothing(make, source, monkeypatch):
    editor, found = make(key_views=2, ddim_steps=3), {}
    for size in (16, 4, 2):
        monkeypatch.setattr(source.prior, "micro_batch", size)
        for threads in (1, 4):
            torch.set_num_threads(threads)
            with pinned():
                found[size, threads] = edited(source, editor)
        assert torch.equal(found[size, 1], found[size, 4])
        torch.testing.assert_close(found[size, 1], found[16, 1], **THROUGH)


def test_views_without_key_views_are_edited_alone(source):
    alphas, keys = source.prior.alphas_cumprod, {"start": 0.6, "ddim_steps": 3}
    predict = DGE().guided(new_edit(source), source.prior.predict)
    expected = ddim_edit(predict, source.z, alphas, start=600, steps=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(edited(source, DGE(alone_below=1.0, **keys)), expected)
    assert (edited(source, DGE(**keys)) - expected).abs().max() > 1e-2
    z_t = invert(new_edit(source), source.z, source.image, [600, 400, 200])
    expected = ddim_sample(predict, z_t, alphas, [600, 400, 200])
    torch.testing.assert_close(edited(source, GaussCtrl(own_weight=1.0, **keys)), expected, **THROUGH)
    assert (edited(source, GaussCtrl(**keys)) - expected).abs().max() > 1e-2


def test_every_view_costs_the_same_as_alone(source):
    source.prior.unet_evaluations = 0
    edited(source, DGE(ddim_steps=3))
    assert source.prior.unet_evaluations == 3 * 3 * 5
    edited(source, GaussCtrl(ddim_steps=3))
    assert source.prior.unet_evaluations == 3 * 3 * 5 + (3 + 1) * 3 * 5  # and the inversion, of one branch


def test_later_rounds_start_at_renders(source):
    edit, rounds = new_edit(source), []
    edit.replace = lambda rows, z: rounds.append(edit.model.rendered)
    editor = DGE(ddim_steps=1, rounds=2, edit_every=3)
    for step in range(8):
        editor.update(edit, step, lambda _: None)
    assert rounds == [0, 1]
    GaussCtrl(ddim_steps=1).update(edit, 3, lambda _: None)
    assert rounds == [0, 1]


@pytest.mark.parametrize("make", [DGE, GaussCtrl])
def test_what_cannot_be_edited_is_told_before_any_work(make, source, monkeypatch):
    make().check(source, "editors.it")
    monkeypatch.setattr(source.prior, "micro_batch", 2)
    with pytest.raises(InputError, match=r"^editors\.it\.key_views: 3 key views .* prior\.micro_batch is 2: give at"):
        make(key_views=3).check(source, "editors.it")
    bare = SimpleNamespace(prior=SimpleNamespace(micro_batch=16), capture=source.capture)
    with pytest.raises(InputError, match=r"^editors\.it: prior\.model: .* UNet .* and this model has none"):
        make().check(bare, "editors.it")


@pytest.mark.parametrize("make", [Pix2Video, FateZero])
def test_canvas_editors_refuse_a_prior_without_attention_too(make):
    with pytest.raises(InputError, match=r"^prior\.model: .* and this model has none"):
        make().check(SimpleNamespace())


@pytest.mark.parametrize(
    ("make", "keys", "said"),
    [
        (DGE, {"noise": "camera"}, "noise is 'camera'"),
        (DGE, {"init": "photo"}, "init is 'photo'"),
        (DGE, {"start": 1.5}, "start is 1.5"),
        (GaussCtrl, {"key_views": 0}, "key_views is 0"),
        (GaussCtrl, {"own_weight": -0.1}, "own_weight is -0.1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, keys, said):
    with pytest.raises(ValueError, match=said):
        make(**keys)
