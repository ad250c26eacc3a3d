"""A soft ball whose colour is a known function of the point: everything about its mesh is known in advance."""

import json
import math
import re
import struct
import time

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from csd3d.cameras import orbit
from csd3d.errors import InputError
from csd3d.export.mesh import MeshConfig, decimate, export_mesh, extract_mesh, keep_components, visible_threshold
from csd3d.export.placement import Placement
from csd3d.export.texture import bake_texture, grow, render_mesh, surface_colours, unwrap, write_textured
from custom_kernels.meshes import rasterise

AABB = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)
SMALL = MeshConfig(resolution=48, face_budget=1500, texture_size=128)


def soft_ball(peak=200.0, width=0.02, radius=0.6, centre=(0.0, 0.0, 0.0)):
    return lambda x: peak * torch.sigmoid((radius - (x - torch.tensor(centre)).norm(dim=-1)) / width)


def seen_radius(peak, width, radius=0.6):
    """Where a ray at the centre has lost half its light: peak·width·softplus((radius − r)/width) = ln 2."""
    return radius - width * math.log(math.expm1(math.log(2.0) / (peak * width)))


def colour(x):
    return 0.5 + 0.35 * torch.sin(3.0 * x + torch.tensor([0.0, 1.0, 2.0]))


def field(x, directions):
    return colour(x), soft_ball()(x)


def signed_volume(mesh):
    return float(
        np.einsum("fi,fi->f", mesh.triangles[:, 0], np.cross(mesh.triangles[:, 1], mesh.triangles[:, 2])).sum() / 6
    )


@pytest.fixture(scope="module")
def ball():
    return extract_mesh(soft_ball(), AABB, SMALL)


@pytest.fixture(scope="module")
def textured(ball):
    return bake_texture(ball, field, 128, ball.metadata["voxel"], 1 << 16)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "mesh"
    start = time.perf_counter()
    _, info = export_mesh(soft_ball(centre=(0.1, 0.2, 0.3)), field, AABB, folder, SMALL, name="soft_ball")
    return folder, info, time.perf_counter() - start


# ---- the surface ----


@pytest.mark.parametrize(("peak", "width"), [(50.0, 0.02), (200.0, 0.02), (2000.0, 0.005), (30.0, 0.05)])
def test_automatic_threshold_finds_the_seen_radius(peak, width):
    mesh = extract_mesh(soft_ball(peak, width), AABB, MeshConfig(resolution=64, face_budget=2000))
    radii = np.linalg.norm(mesh.vertices, axis=1)
    voxel = 2.0 / 63
    assert abs(radii.mean() - seen_radius(peak, width)) < 0.6 * voxel
    assert radii.std() < 0.05 * voxel
    assert mesh.is_watertight


def test_a_given_threshold_is_that_level_set():
    mesh = extract_mesh(soft_ball(200.0, 0.05), AABB, MeshConfig(resolution=64, threshold=100.0, face_budget=4000))
    assert np.linalg.norm(mesh.vertices, axis=1).mean() == pytest.approx(0.6, abs=0.005)
    assert signed_volume(mesh) == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.03)  # positive: normals point outward


def test_haze_does_not_count_as_surface():
    haze = extract_mesh(lambda x: soft_ball()(x) + 1.5, AABB, SMALL)
    assert haze.metadata["threshold"] == pytest.approx(
        extract_mesh(soft_ball(), AABB, SMALL).metadata["threshold"], rel=0.3
    )
    assert abs(haze.extents / 2 - seen_radius(200.0, 0.02)).max() < 0.05


def test_threshold_of_a_slab_in_closed_form():
    """Density rising as k s past a wall, counted from the haze h = 16 ln 2 on: (σ² − h²) / 2k = ln 2."""
    s = np.linspace(-0.5, 0.5, 201, dtype=np.float32).clip(0)
    slab = np.broadcast_to(100.0 * s[:, None, None], (201, 5, 5))
    expected = math.sqrt(2 * 100.0 * math.log(2.0) + (16 * math.log(2.0) / 1.005) ** 2)
    assert visible_threshold(slab, 0.005) == pytest.approx(expected, rel=0.02)
    assert visible_threshold(slab[::-1], 0.005) == pytest.approx(expected, rel=0.02)
    assert visible_threshold(np.zeros((9, 9, 9), np.float32), 0.1) == 0.0


def disc(hole: float):
    """A flat disc whose density rises to 80 in its middle plane, but to `hole` times that within 0.1 of its axis."""

    def density(x):
        radius = x[:, :2].norm(dim=1)
        share = torch.where(radius < 0.1, hole, 1.0) * (radius < 0.7)
        return 80.0 * (1.0 - x[:, 2].abs() / 0.08).clamp_min(0.0) * share

    return density


@pytest.mark.parametrize(("hole", "euler"), [(1.0, 2), (0.3, 2), (0.0, 0)])
def test_a_thin_spot_of_a_sheet_is_no_hole_but_an_empty_one_is(hole, euler):
    """The spot stops 85 % of the light, nowhere as dense as the threshold. Euler number of a ball: 2, of a ring: 0."""
    mesh = extract_mesh(disc(hole), AABB, MeshConfig(resolution=96, face_budget=100_000))
    assert mesh.metadata["threshold"] > 0.3 * 80.0
    assert mesh.euler_number == euler


def test_surface_cut_by_the_box_is_closed():
    mesh = extract_mesh(soft_ball(centre=(0.0, 0.0, -1.0)), AABB, SMALL)
    assert mesh.is_watertight
    assert mesh.vertices[:, 2].min() > -1.05


def test_box_that_is_not_a_cube():
    mesh = extract_mesh(soft_ball(radius=0.3), (-0.5, -0.7, -1.0, 0.5, 0.7, 1.0), SMALL)
    assert mesh.extents == pytest.approx(np.full(3, 2 * seen_radius(200.0, 0.02, 0.3)), abs=0.04)


def test_floaters_and_cavities_are_dropped():
    def density(x):
        shell = soft_ball()(x) * torch.sigmoid((x.norm(dim=-1) - 0.3) / 0.02)  # hollow inside
        return shell + soft_ball(radius=0.08, centre=(0.85, 0.85, 0.85))(x)

    mesh = extract_mesh(density, AABB, SMALL)
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.55
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 0.7
    kept = extract_mesh(density, AABB, MeshConfig(resolution=48, face_budget=1500, keep_fraction=0.0))
    assert np.linalg.norm(kept.vertices, axis=1).max() > 1.2


def test_decimation_keeps_the_budget_and_the_shape(ball):
    assert len(ball.faces) <= 1500
    few = decimate(trimesh.creation.icosphere(5, 0.6), 400)
    assert len(few.faces) <= 400
    assert few.is_watertight
    assert few.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.04)


def test_inner_shell_is_recognised_by_its_winding():
    outer, inner = trimesh.creation.icosphere(2, 1.0), trimesh.creation.icosphere(2, 0.9)
    inner.invert()
    both = trimesh.util.concatenate([outer, inner])
    assert len(keep_components(both, 0.0).faces) == len(outer.faces)


def test_a_solid_box_is_not_told_to_lower_the_threshold(tmp_path):
    with pytest.raises(InputError, match=r"which is solid: .* is 100; set export\.mesh\.threshold above that"):
        export_mesh(lambda x: torch.full((len(x),), 100.0), None, (-1, -1, -1, 1, 1, 1), tmp_path, MeshConfig(16))


@pytest.mark.parametrize("density", [lambda x: torch.zeros(len(x)), lambda x: torch.full((len(x),), 1e-3)])
def test_empty_surface_says_what_to_change(density, tmp_path):
    with pytest.raises(InputError, match=r"no surface.*export\.mesh\.threshold.*train longer") as caught:
        export_mesh(density, field, AABB, tmp_path / "mesh", SMALL)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mesh").exists()


def test_a_surface_that_smoothing_removes_is_told_so(tmp_path):
    def dot(x):  # one sample of 16³ is dense, in a voxel of 0.1
        return torch.where((x - 0.05).norm(dim=-1) < 0.06, 100.0, 1e-3)

    box, config = (-0.75, -0.75, -0.75, 0.75, 0.75, 0.75), MeshConfig(16, threshold=90.0)
    with pytest.raises(InputError, match=r"\(100 % opaque a voxel\), above the threshold 90 but"):
        export_mesh(dot, field, box, tmp_path / "mesh", config)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"the box is"):
        extract_mesh(soft_ball(), (-1, -1, 1, 1, 1, -1), SMALL)
    with pytest.raises(InputError, match=r"threshold is -1"):
        MeshConfig(threshold=-1.0)
    with pytest.raises(InputError, match=r"face_budget is 3"):
        MeshConfig(face_budget=3)


def test_nan_densities_are_empty_space():
    mesh = extract_mesh(lambda x: torch.where(x[:, 0] > 0.95, torch.nan, soft_ball()(x)), AABB, SMALL)
    assert np.isfinite(mesh.vertices).all()
    assert mesh.is_watertight


def test_a_room_seen_from_inside_is_its_walls_and_what_stands_in_it():
    """A hollow box with a ball in it: from inside its inner walls, from outside its outer ones, as of any object."""

    def density(x):
        far = x.abs().amax(1)
        wall = torch.sigmoid((far - 0.6) / 0.02) * torch.sigmoid((0.8 - far) / 0.02)
        return 200 * torch.maximum(wall, torch.sigmoid((0.25 - (x + 0.1).norm(dim=1)) / 0.02))

    eyes = torch.tensor([[0.3, 0.3, 0.0], [0.2, -0.3, 0.3], [0.0, 0.4, 0.1], [0.9, 0.9, 0.9]])
    room = extract_mesh(density, AABB, SMALL, eyes=eyes)
    assert room.is_watertight
    parts = sorted(room.split(only_watertight=False), key=lambda part: part.volume)
    assert [len(parts), np.sign(parts[0].volume), np.sign(parts[1].volume)] == [2, -1, 1]
    np.testing.assert_allclose(np.abs(parts[0].bounds), 0.6, atol=0.08)
    np.testing.assert_allclose(parts[1].bounds.mean(0), -0.1, atol=0.02)
    outside = extract_mesh(density, AABB, SMALL, eyes=torch.full((4, 3), 0.95))
    np.testing.assert_allclose(np.abs(outside.bounds), 0.8, atol=0.08)
    np.testing.assert_array_equal(outside.faces, extract_mesh(density, AABB, SMALL).faces)


# ---- the texture ----


def test_unwrapping_covers_each_face_without_overlap(ball):
    _, faces, uv = unwrap(ball, 128)
    assert len(faces) == len(ball.faces)
    assert uv.min() >= 0
    assert uv.max() <= 1
    pixels = np.concatenate([p for p, _, _ in rasterise(uv[faces] * 128, 128, 128)])
    assert len(np.unique(pixels)) > 0.98 * len(pixels)  # a centre on a shared edge counts twice


def test_surface_colour_forgives_points_off_the_surface():
    """Colour known on the seen surface and nonsense in empty space: a point half a voxel outside still gets the
    surface's.
    """
    normals = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=-1)

    def empty_is_magenta(x, d):
        sigma = soft_ball(2000.0, 0.004)(x)
        return torch.where((sigma > 0.5)[:, None], 0.25, torch.tensor([1.0, 0.0, 1.0])), sigma

    for offset in (-0.02, 0.0, 0.02):
        got = surface_colours(empty_is_magenta, ((0.61 + offset) * normals).numpy(), normals.numpy(), 0.04, 64)
        np.testing.assert_allclose(got, 0.25, atol=0.03)


def test_surface_colour_is_seen_from_outside():
    normals = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    got = surface_colours(lambda x, d: (0.5 + 0.5 * d, torch.full((len(x),), 50.0)), normals, normals, 0.1, 1 << 10)
    np.testing.assert_allclose(got, 0.5 - 0.5 * normals, atol=1e-5)


def test_colours_that_are_no_numbers_are_black_and_told_once(tmp_path, caplog, recwarn):
    def half(x, directions):
        return torch.where(x[:, :1] > 0, torch.nan, colour(x)), torch.where(x[:, 1] > 0, torch.inf, soft_ball()(x))

    _, info = export_mesh(soft_ball(), half, AABB, tmp_path, SMALL)
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, RuntimeWarning)] == []
    (told,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert re.fullmatch(rf"mesh: \d+ of {info['vertices']} vertices are black: .*; lower the learning rate", told)
    vertices = trimesh.load(tmp_path / "mesh.ply")
    black = (vertices.visual.vertex_colors[:, :3] == 0).all(1)
    assert black[vertices.vertices[:, 0] > 0.1].all()
    assert not black[vertices.vertices[:, 0] < -0.1].any()


def test_texture_read_back_is_the_colour_of_the_field(textured):
    samples, face = trimesh.sample.sample_surface(textured, 2000, seed=0)
    bary = trimesh.triangles.points_to_barycentric(textured.triangles[face], samples)
    uv = np.einsum("sk,ski->si", bary, textured.visual.uv[textured.faces[face]])
    texture = np.asarray(textured.visual.material.baseColorTexture, float) / 255
    rows = ((1 - uv[:, 1]) * texture.shape[0]).astype(int).clip(0, texture.shape[0] - 1)
    columns = (uv[:, 0] * texture.shape[1]).astype(int).clip(0, texture.shape[1] - 1)
    error = np.abs(texture[rows, columns] - colour(torch.tensor(samples, dtype=torch.float32)).numpy())
    assert error.mean() < 0.01
    assert np.quantile(error, 0.999) < 0.06


def test_seams_are_padded():
    texture, filled = np.zeros((40, 40, 3)), np.zeros((40, 40), bool)
    texture[10:20, 10:20], filled[10:20, 10:20] = [1.0, 0.5, 0.0], True
    texture[19, 19] = [0.0, 0.0, 1.0]
    grown = grow(texture, filled, 8)
    np.testing.assert_array_equal(grown[14, 2], [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(grown[22, 22], [0.0, 0.0, 1.0])  # the nearest corner
    np.testing.assert_allclose(grown[39, 0], texture[filled].mean(0))


def test_picture_of_the_mesh_is_the_picture_of_the_field(textured):
    cameras = orbit(3, radius=3.0, elevation_deg=25.0, fov_deg=40.0, width=48, height=48)
    radius = np.linalg.norm(textured.vertices, axis=1).mean()
    for index in range(3):
        rays_o, rays_d = cameras.image_rays(index)
        half_b = (rays_o * rays_d).sum(-1)
        discriminant = half_b**2 - rays_o.square().sum(-1) + radius**2
        hit = colour(rays_o + rays_d * (-half_b - discriminant.clamp_min(0).sqrt())[:, None])
        picture = render_mesh(textured, cameras, index).reshape(-1, 3) / 255
        inner, outer = (discriminant > 0.05).numpy(), (discriminant < -0.05).numpy()
        assert np.abs(picture - hit.numpy())[inner].mean() < 0.015
        assert (picture[outer] == 1.0).all()


# ---- the files ----


def test_files_reload_in_their_frames(written):
    """The ball's centre is (0.1, 0.2, 0.3) in the scene; in the GLB it stands on y = 0, and +x of the scene is +z."""
    folder, info, seconds = written
    assert (info["pieces"], info["base_colour"]) == (1, "lit")
    loaded = {ext: trimesh.load_mesh(folder / f"mesh.{ext}") for ext in ("glb", "obj", "ply")}
    for mesh in loaded.values():
        assert len(mesh.faces) == info["faces"]
        assert signed_volume(mesh) > 0  # a rotation, no mirror
    centre = {ext: mesh.bounds.mean(0) for ext, mesh in loaded.items()}
    np.testing.assert_allclose(centre["obj"], [0.1, 0.2, 0.3], atol=0.02)
    np.testing.assert_allclose(centre["ply"], [0.1, 0.2, 0.3], atol=0.02)
    radius = np.ptp(loaded["ply"].vertices[:, 2]) / 2
    np.testing.assert_allclose(centre["glb"], [0.2, radius, 0.1], atol=0.02)
    assert loaded["glb"].bounds[0, 1] == pytest.approx(0, abs=1e-6)
    assert seconds < 20


def test_ply_has_the_field_colour_a_vertex(written):
    mesh = trimesh.load_mesh(written[0] / "mesh.ply")
    assert mesh.is_watertight
    expected = colour(torch.tensor(mesh.vertices, dtype=torch.float32)).numpy()
    assert np.abs(mesh.visual.vertex_colors[:, :3] / 255 - expected).mean() < 0.02
    assert b"comment csd3d: right-handed, z up" in (written[0] / "mesh.ply").read_bytes()[:300]


def test_obj_names_its_material_and_the_material_its_picture(written):
    folder = written[0]
    assert "mtllib mesh.mtl" in (folder / "mesh.obj").read_text()
    assert "map_Kd mesh.png" in (folder / "mesh.mtl").read_text()
    assert sorted(p.name for p in folder.iterdir()) == ["mesh.glb", "mesh.mtl", "mesh.obj", "mesh.ply", "mesh.png"]
    mesh = trimesh.load_mesh(folder / "mesh.obj")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight


def gltf_of(path):
    """The JSON chunk of a GLB, and its binary chunk."""
    data = path.read_bytes()
    assert data[:4] == b"glTF"
    length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def test_glb_has_unit_normals_and_names(written):
    """Read from the bytes, as a viewer does; of a ball about c the normal at p is (p − c) / |p − c|, seams included."""
    tree, binary = gltf_of(written[0] / "mesh.glb")
    primitive = tree["meshes"][0]["primitives"][0]
    assert primitive["attributes"].keys() == {"POSITION", "NORMAL", "TEXCOORD_0"}
    found = []
    for key in ("POSITION", "NORMAL"):
        accessor = tree["accessors"][primitive["attributes"][key]]
        start = tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0) + accessor.get("byteOffset", 0)
        assert (accessor["componentType"], accessor["type"]) == (5126, "VEC3")
        found.append(np.frombuffer(binary, "<f4", 3 * accessor["count"], start).reshape(-1, 3))
    expected = found[0] - np.array([0.2, found[0][:, 1].max() / 2, 0.1])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(found[1], axis=1), 1.0, atol=1e-4)
    assert (found[1] * expected).sum(1).min() > 0.97
    assert [tree["meshes"][0]["name"], tree["materials"][0]["name"]] == ["soft_ball", "soft_ball"]
    assert [node["name"] for node in tree["nodes"] if "mesh" in node] == ["soft_ball"]
    assert tree["asset"]["generator"] == "csd3d"


def test_glb_keeps_the_rules_of_gltf(written):
    """What gltf-validator checks of such a file: lengths, alignment, limits, targets, indices, and values."""
    data = (written[0] / "mesh.glb").read_bytes()
    assert struct.unpack_from("<4sII", data) == (b"glTF", 2, len(data))
    tree, binary = gltf_of(written[0] / "mesh.glb")
    assert len(binary) % 4 == 0
    assert len(tree["buffers"]) == 1
    assert tree["buffers"][0]["byteLength"] <= len(binary)
    assert tree["scenes"][tree["scene"]]["nodes"]
    primitive = tree["meshes"][0]["primitives"][0]
    kinds = {5126: ("<f4", 4), 5125: ("<u4", 4), 5123: ("<u2", 2)}
    values = {}
    for name, index in {**primitive["attributes"], "indices": primitive["indices"]}.items():
        accessor = tree["accessors"][index]
        view = tree["bufferViews"][accessor["bufferView"]]
        assert view["target"] == (34963 if name == "indices" else 34962)
        kind, size = kinds[accessor["componentType"]]
        columns = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}[accessor["type"]]
        start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
        assert start % size == 0
        assert columns * accessor["count"] * size <= view["byteLength"]
        found = np.frombuffer(binary, kind, columns * accessor["count"], start).reshape(-1, columns)
        values[name] = found
        assert np.isfinite(found).all()
        for key, limit in (("min", found.min(0)), ("max", found.max(0))):
            if key in accessor:
                np.testing.assert_allclose(accessor[key], limit, rtol=1e-6)
    assert "min" in tree["accessors"][primitive["attributes"]["POSITION"]]
    assert len({len(found) for name, found in values.items() if name != "indices"}) == 1
    assert values["indices"].max() < len(values["POSITION"])
    corners = values["indices"].reshape(-1, 3)
    assert (np.diff(np.sort(corners, axis=1), axis=1) > 0).all()
    assert ((values["TEXCOORD_0"] >= 0) & (values["TEXCOORD_0"] <= 1)).all()
    image = tree["images"][tree["textures"][0]["source"]]
    assert image["mimeType"] in ("image/png", "image/jpeg")


@pytest.mark.parametrize("lit", [True, False], ids=["lit", "albedo"])
def test_only_colours_that_hold_light_ask_for_no_more(textured, tmp_path, lit):
    """GLB by KHR_materials_unlit, as its specification says, with a matte fallback; MTL by illum 0."""
    write_textured(textured, tmp_path, "ball", Placement(), lit)
    tree, _ = gltf_of(tmp_path / "mesh.glb")
    (material,) = tree["materials"]
    assert material["pbrMetallicRoughness"]["baseColorTexture"]["index"] == 0
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert material.get("extensions", {}) == ({"KHR_materials_unlit": {}} if lit else {})
    assert tree.get("extensionsUsed", []) == (["KHR_materials_unlit"] if lit else [])
    assert "extensionsRequired" not in tree
    assert f"illum {0 if lit else 1}\n" in (tmp_path / "mesh.mtl").read_text()


@pytest.mark.parametrize("extension", ["obj", "ply"])
def test_obj_and_ply_have_normals_in_the_frame_of_the_scene(written, extension):
    mesh = trimesh.load(written[0] / f"mesh.{extension}", process=False)
    assert "vertex_normals" in mesh._cache  # those of the file, not of the faces
    expected = mesh.vertices - np.array([0.1, 0.2, 0.3])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert (mesh.vertex_normals * expected).sum(1).min() > 0.97


def test_textures_are_a_power_of_two():
    with pytest.raises(InputError, match=r"texture_size is 1000: it must be a power of two, such as 1024"):
        MeshConfig(texture_size=1000)
    with pytest.raises(InputError, match=r"crop is 'ball': it must be one of auto, plate, box, none"):
        MeshConfig(crop="ball")


def test_texture_has_the_size_asked_for(written):
    assert Image.open(written[0] / "mesh.png").size == (128, 128)
    assert trimesh.load_mesh(written[0] / "mesh.glb").visual.material.baseColorTexture.size == (128, 128)
    text = (written[0] / "mesh.obj").read_text()
    assert "\no soft_ball\nusemtl soft_ball\n" in text
    assert "newmtl soft_ball\n" in (written[0] / "mesh.mtl").read_text()


@pytest.mark.parametrize("extension", ["glb", "obj"])
def test_textures_reload_the_right_way_up(written, extension):
    mesh = trimesh.load_mesh(written[0] / f"mesh.{extension}")
    seen = mesh.visual.to_color().vertex_colors[:, :3] / 255
    position = np.array(mesh.vertices)
    if extension == "glb":  # (y, z, x), standing on y = 0
        lowest = trimesh.load_mesh(written[0] / "mesh.ply").bounds[0, 2]
        position = position[:, [2, 0, 1]] + [0, 0, lowest]
    expected = colour(torch.tensor(position, dtype=torch.float32)).numpy()
    assert np.abs(seen - expected).mean() < 0.03
