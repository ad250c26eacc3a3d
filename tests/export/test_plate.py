"""The plate that models put under an object made from words is taken away, and nothing of the object with it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from csd3d.evaluation.assets import STRAY, stray_faces
from csd3d.export import MeshConfig, export_mesh, extract_mesh
from csd3d.export.plate import hull, keep_object, plate_top, remove_plate
from csd3d.report.models import asset_mesh
from csd3d.report.text import has_albedo
from csd3d.representations.batch import ShadingConfig
from csd3d.schema import choose
from csd3d.tasks.text_to_3d import TextTo3DConfig
from csd3d.world.reference import scene_distance
from csd3d.world.scene import Scene, compile_scene
from csd3d.world.shapes import FLOOR, KINDS

AABB = [-1.2, -1.2, -1.2, 1.2, 1.2, 1.2]
SIDE = 40
AXIS = torch.linspace(-1.2, 1.2, SIDE)
POINTS = torch.cartesian_prod(AXIS, AXIS, AXIS)
ABOVE = AXIS.numpy() > FLOOR
PLATE = MeshConfig(resolution=SIDE, face_budget=3000, crop="plate")


def distance(scene):
    return lambda points: scene_distance(compile_scene(scene), points)[0]


def matter(distance_of):
    """The density [X, Y, Z] of what has this signed distance: 1 inside, 0 outside."""
    return (distance_of(POINTS) < 0).float().view(SIDE, SIDE, SIDE).numpy()


def soft(distance_of):
    return lambda x: 300 * torch.sigmoid(-distance_of(x) / 0.01)


def ball(x, radius=0.5, centre=(0.0, 0.0, -0.3)):
    return (x - torch.tensor(centre)).norm(dim=1) - radius


def disc(x, top=FLOOR, radius=1.0, thickness=0.1):
    return torch.maximum(x[:, :2].norm(dim=1) - radius, (x[:, 2] - top + thickness / 2).abs() - thickness / 2)


def foam(x):
    """A ring of bubbles of many sizes, most of it below the floor, with gaps."""
    generator = np.random.default_rng(3)
    found = []
    for angle in np.radians(np.arange(0, 360, 12)):
        reach, z = generator.uniform(0.7, 0.95), FLOOR - generator.uniform(0.03, 0.1)
        centre = (reach * np.cos(angle), reach * np.sin(angle), z)
        found.append(ball(x, generator.uniform(0.05, 0.09), tuple(np.float32(centre).tolist())))
    return torch.stack(found).amin(0)


@pytest.mark.parametrize("under", [disc, foam], ids=["disc", "foam"])
def test_a_ball_is_taken_off_what_is_under_it(under):
    whole = matter(ball)
    sigma = np.maximum(whole, matter(under))
    assert (sigma != whole).any()
    assert remove_plate(sigma, 0.5)
    keep_object(sigma, 0.5)
    assert (sigma <= whole).all()
    assert sigma.sum() > 0.97 * whole.sum()


@pytest.mark.parametrize("hat", [None, "red"], ids=["bare", "hat"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loses_its_plate_and_nothing_else(kind, hat):
    scene = Scene(kind, "blue", hat=hat, azimuth_deg=20.0, plate=False)
    whole = matter(distance(scene))
    alone = whole.copy()
    assert not remove_plate(alone, 0.5)
    keep_object(alone, 0.5)
    np.testing.assert_array_equal(alone, whole)
    sigma = np.maximum(whole, matter(lambda x: disc(x, radius=1.12)))
    assert remove_plate(sigma, 0.5)
    keep_object(sigma, 0.5)
    np.testing.assert_array_equal(sigma[:, :, ABOVE], whole[:, :, ABOVE])
    assert not sigma[:, :, ~ABOVE].any()


@pytest.mark.parametrize(
    ("base", "kept"),
    [((1.0, 0.3), True), ((0.75, 0.75), True), (None, False)],
    ids=["the hull of a ship", "a square plinth", "a thick ring of foam"],
)
def test_only_a_round_base_is_a_plate(base, kept):
    """Under a narrow tower, all as wide as it takes, and nearly a third of the height."""
    x, y, z = (POINTS.view(SIDE, SIDE, SIDE, 3)[..., k].numpy() for k in range(3))
    tower = (np.abs(x) < 0.2) & (np.abs(y) < 0.1) & (np.abs(z) < 1)
    low = (z > -1) & (z < -0.4)
    if base is None:
        below = low & (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.5)
    else:
        below = low & (np.abs(x) < base[0]) & (np.abs(y) < base[1])
    sigma = (tower | below).astype(np.float32)
    assert remove_plate(sigma, 0.5) != kept
    assert (sigma[below & ~tower].any()) == kept
    assert sigma[tower & (z > -0.3)].all()


def test_a_plate_alone_and_nothing_at_all_are_left_alone():
    for sigma in (matter(disc), np.zeros((8, 8, 8), np.float32)):
        before = sigma.copy()
        assert not remove_plate(sigma, 0.5)
        keep_object(sigma, 0.5)
        np.testing.assert_array_equal(sigma, before)


def test_a_floater_does_not_hide_the_plate():
    """It lies as far out as the plate, above it, where it would widen the hull of the object."""
    floaters = matter(lambda x: torch.minimum(ball(x, 0.1, (1.0, 0.2, -0.3)), ball(x, 0.1, (-1.0, -0.2, -0.3))))
    sigma = np.maximum(np.maximum(matter(ball), matter(disc)), floaters)
    assert plate_top(sigma >= 0.5) == np.argmax(ABOVE)
    remove_plate(sigma, 0.5)
    keep_object(sigma, 0.5)
    np.testing.assert_array_equal(sigma[:, :, ABOVE], matter(ball)[:, :, ABOVE])


def test_the_hull_of_a_ring_is_its_disc():
    x, y = np.mgrid[-20:21, -20:21]
    ring = np.abs(np.hypot(x, y) - 15) < 1
    assert hull(ring) == (pytest.approx(np.pi * 16.3**2, rel=0.03), pytest.approx(1, abs=0.05))
    ring[0, 0] = True  # a floater
    assert hull(ring)[0] == pytest.approx(np.pi * 16.3**2, rel=0.03)
    assert hull(np.zeros((4, 4), bool)) == (0, 0)
    assert hull(np.ones((9, 9), bool)) == (81, pytest.approx(2 / np.pi))
    assert hull(np.ones((27, 9), bool))[1] == pytest.approx(12 / (10 * np.pi))


@pytest.mark.parametrize(("gap", "kept"), [(3, True), (12, False)], ids=["near", "far"])
def test_a_part_near_the_object_is_kept_and_one_apart_is_not(gap, kept):
    """A robot's head that does not touch its body is a part of it; GAP is .04 of the height."""
    sigma = np.zeros((12, 12, 100), np.float32)
    sigma[3:9, 3:9, 2:60] = 1.0
    sigma[4:8, 4:8, 60 + gap : 92] = 1.0
    before = sigma.copy()
    keep_object(sigma, 0.5)
    np.testing.assert_array_equal(sigma[:, :, :60], before[:, :, :60])
    assert sigma[:, :, 60:].any() == kept


def test_the_mesh_is_one_piece_on_the_ground(tmp_path):
    """A ball on a disc with a big floater above it: the files hold the ball alone, standing on y = 0."""

    def seen(x):
        return torch.stack((ball(x), disc(x), ball(x, 0.3, (0.0, 0.0, 0.8)))).amin(0)

    config = replace(PLATE, texture_size=64, face_budget=600)
    _, figures = export_mesh(soft(seen), lambda x, d: (0 * x + 0.5, soft(seen)(x)), AABB, tmp_path, config, lit=False)
    assert figures["pieces"] == 1
    assert figures["watertight"]
    assert figures["base_colour"] == "albedo"
    assert figures["left_out"] == "plate"
    np.testing.assert_allclose(
        trimesh.load_mesh(tmp_path / "mesh.glb").bounds, [[-0.5, 0, -0.5], [0.5, 1, 0.5]], atol=0.04
    )


def test_the_mesh_of_a_chair_has_no_face_of_its_plate():
    """With "box" the plate stays, and more than a third of the faces are it."""
    chair = replace(Scene("chair", "red"), plate=False)
    on_plate = soft(distance(replace(chair, plate=True)))
    figures = {
        crop: stray_faces(extract_mesh(on_plate, AABB, replace(PLATE, crop=crop)).triangles_center, distance(chair))
        for crop in ("plate", "box")
    }
    assert figures["plate"] == 0
    assert figures["box"] > 1 / 3


def test_stray_faces_are_those_far_from_the_true_surface():
    """Two spheres of equal faces, one of them moved away from the true surface by more than what is allowed."""
    true = trimesh.creation.icosphere(3, 0.5)
    for radius, expected in ((0.5 + 0.9 * STRAY, 0.0), (0.5 - 0.9 * STRAY, 0.0), (0.5 + 1.2 * STRAY, 0.5)):
        other = trimesh.creation.icosphere(3, radius)
        centres = np.concatenate([true.triangles_center, other.triangles_center])
        assert stray_faces(centres, lambda x: x.norm(dim=1) - 0.5) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("representation", "lambertian", "front", "albedo"),
    [
        ("hashgrid", 0.5, None, True),
        ("hashgrid", 0.0, None, False),
        ("splats", 0.5, None, False),
        ("hashgrid", 0.5, "a picture, which holds its light", False),
    ],
)
def test_colours_are_the_albedo_if_training_lit_them(representation, lambertian, front, albedo):
    config = TextTo3DConfig(prompt="a mug", shading=ShadingConfig(lambertian=lambertian))
    config.asset.representation = choose("representation", representation)
    assert has_albedo(SimpleNamespace(config=config, front=front)) == albedo


@pytest.mark.parametrize(
    ("prompt", "crop"),
    [
        ("a red chair with yellow stripes", "plate"),
        ("a blue duck, on a plate", "box"),
        ("a cake on a silver Platter", "box"),
        ("two dishes", "box"),
        ("a plated knight", "plate"),
        ("", "plate"),
    ],
)
def test_a_plate_stays_if_the_prompt_names_it(prompt, crop):
    assert asset_mesh(MeshConfig(), prompt).crop == crop
    assert asset_mesh(MeshConfig(crop="plate"), prompt).crop == "plate"
    assert asset_mesh(MeshConfig(crop="box"), prompt).crop == "box"
