"""Captures as people have them: names of other systems, links, several sizes, scaled poses, far coordinates."""

import json
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captures import HEIGHT, WIDTH, picture, ring, transforms, write_capture

from csd3d.datasets import SceneConfig, load_capture
from csd3d.errors import InputError

NFC, NFD = unicodedata.normalize("NFC", "bilder für"), unicodedata.normalize("NFD", "bilder für")


def load(folder, **config):
    return load_capture(SceneConfig(str(folder), **config))


def relisted(folder, change, **meta):
    """Writes the capture's JSON again, each `file_path` changed."""
    meta = transforms(**meta)
    for frame in meta["frames"]:
        frame["file_path"] = change(frame["file_path"])
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


# --- names ---


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("/", "\\"),
        lambda name: ".\\" + name.replace("/", "\\"),
        lambda name: name.replace(".png", ".PNG"),
        lambda name: name.replace(".png", ".Png"),
        lambda name: name.replace("/", "\\").removesuffix(".png"),
    ],
)
def test_names_of_other_systems_are_found(tmp_path, change):
    folder = write_capture(tmp_path, transforms())
    expected = load(folder)
    torch.testing.assert_close(load(relisted(folder, change)).images, expected.images, atol=0, rtol=0)
    suffix = ".PNG" if change("01.png").lower().endswith(".png") else ""
    lists = {"train_filenames": ["images/01" + suffix, "images/02" + suffix.lower()]}
    lists["test_filenames"] = [".\\images\\03" + suffix]
    found = load(relisted(folder, change, **lists))
    assert [len(found.train), len(found.test)] == [2, 1]


@pytest.mark.parametrize(("stored", "listed"), [(NFD, NFC), (NFC, NFD)])
def test_folders_and_files_in_the_other_unicode_form_are_found(tmp_path, stored, listed):
    folder = write_capture(tmp_path, transforms())
    (folder / "images").rename(folder / stored)
    (folder / stored / "03.png").rename(folder / stored / f"{listed} 03.png")  # two forms in one path
    relisted(folder, lambda name: name.replace("images", listed).replace("03", f"{stored} 03"))
    assert len(load(folder).names) == 9


def test_a_file_that_has_a_backslash_in_its_name_is_that_file(tmp_path):
    folder = write_capture(tmp_path, transforms())
    (folder / "images/03.png").rename(folder / "images\\03.png")
    meta = transforms()
    meta["frames"][3]["file_path"] = "images\\03.png"
    (folder / "transforms.json").write_text(json.dumps(meta))
    assert len(load(folder).names) == 9


def test_masks_have_names_of_other_systems_too(tmp_path):
    meta = transforms()
    folder = write_capture(tmp_path, meta)
    (folder / "masks").mkdir()
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(folder / "masks/a.png")
    meta["frames"][3]["mask_path"] = "masks\\a.PNG"
    (folder / "transforms.json").write_text(json.dumps(meta))
    assert not load(folder).masks[3].any()


# --- pictures elsewhere ---


def test_pictures_beside_the_json_are_read_by_an_explicit_key(tmp_path):
    write_capture(tmp_path, transforms())
    folder = tmp_path / "ngp"
    folder.mkdir()
    for change in (lambda name: f"../{name}", lambda name: f"..\\{name}", lambda name: str(tmp_path / name)):
        relisted(folder, change)
        with pytest.raises(InputError, match=r"leaves the capture's folder .*scene.allow_outside=true") as caught:
            load(folder)
        assert "link" not in str(caught.value)
        assert len(load(folder, allow_outside=True).names) == 9


def test_the_message_says_which_link_leads_out(tmp_path):
    folder = write_capture(tmp_path / "set", transforms())
    (folder / "images").rename(tmp_path / "store")
    (folder / "images").symlink_to(tmp_path / "store")
    link = f"because {folder / 'images'} is a link to {tmp_path / 'store'}; .*scene.allow_outside=true"
    with pytest.raises(InputError, match=link):
        load(folder)
    assert len(load(folder, allow_outside=True).names) == 9


# --- sizes ---


def mixed(folder, sizes):
    """Each picture is the part of size `sizes[i]` of one larger picture, about its centre; intrinsics a frame."""
    meta = transforms(ring(len(sizes)))
    for key in ("w", "h", "fl_x", "fl_y"):
        del meta[key]
    write_capture(folder, meta)
    for i, (frame, (width, height)) in enumerate(zip(meta["frames"], sizes, strict=True)):
        frame |= {"w": width, "h": height, "fl_x": 20.0, "fl_y": 20.0, "cx": width / 2 - 1, "cy": height / 2}
        Image.fromarray(picture(i, width=width, height=height)).save(folder / frame["file_path"])
    (folder / "transforms.json").write_text(json.dumps(meta))
    return load(folder)


def test_portrait_and_landscape_are_placed_on_one_raster(tmp_path):
    sizes = [(16, 12), (12, 16)] * 3
    capture = mixed(tmp_path, sizes)
    assert capture.images.shape == (6, 16, 16, 3)
    indices = torch.arange(6)
    for i, (image, (width, height)) in enumerate(zip(capture.cropped(capture.images, indices), sizes, strict=True)):
        expected = torch.from_numpy(picture(i, width=width, height=height)).float() / 255
        torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)
        left, top = (16 - width) // 2, (16 - height) // 2
        assert [capture.cameras.cx[i].item(), capture.cameras.cy[i].item()] == [left + width / 2 - 1, top + height / 2]
        assert capture.cameras.fx[i] == 20
    torch.testing.assert_close(capture.masks, ~capture.padding(indices))
    assert capture.masks[0].sum() == capture.masks[1].sum() == 16 * 12


def test_pictures_of_other_resolutions_are_brought_to_the_usual_one(tmp_path):
    """One of twice the size has the field of view that its intrinsics say, with half the focal length in pixels."""
    capture = mixed(tmp_path, [(16, 12)] * 4 + [(32, 24), (24, 32)])
    assert capture.images.shape[1:3] == (16, 16)
    assert capture.cameras.fx[4:].tolist() == [10, 10]
    whole = torch.from_numpy(picture(4, width=32, height=24)).float().unflatten(0, (12, 2)).unflatten(2, (16, 2))
    torch.testing.assert_close(capture.cropped(capture.images[4:5], torch.tensor([4]))[0] * 255, whole.mean((1, 3)))


def test_padding_is_completed_by_what_the_cameras_see_there(tmp_path):
    capture = mixed(tmp_path, [(16, 12), (12, 16)])
    full = capture.completed(lambda indices: torch.full((1, 16, 16, 3), 0.25))
    padding = capture.padding(torch.arange(2))
    assert (full.images[padding] == 0.25).all()
    assert torch.equal(full.images[~padding], capture.images[~padding])
    assert torch.equal(full.masks, capture.masks)  # still not learned from


def test_captures_of_one_size_have_no_padding(tmp_path):
    capture = load(write_capture(tmp_path, transforms()))
    assert capture.places is None
    assert capture.masks is None
    assert not capture.padding(torch.arange(2)).any()
    assert capture.completed(None) is capture


def test_photos_shrunk_since_scale_the_intrinsics(tmp_path, caplog):
    meta = transforms(w=2 * WIDTH, h=2 * HEIGHT, fl_x=20.0, fl_y=22.0, cx=11.0, cy=9.0)
    capture = load(write_capture(tmp_path, meta))
    cameras = capture.cameras
    assert [x[0].item() for x in (cameras.fx, cameras.fy, cameras.cx, cameras.cy)] == [10, 11, 5.5, 4.5]
    assert caplog.text.count("intrinsics are scaled") == 1
    angle = transforms(w=3 * WIDTH, h=3 * HEIGHT, camera_angle_x=1.0)
    for key in ("fl_x", "fl_y"):
        del angle[key]
    assert load(write_capture(tmp_path, angle)).cameras.fx[0].item() == pytest.approx(WIDTH / 2 / np.tan(0.5))


def test_an_angle_of_view_that_no_camera_has_is_warned_of(tmp_path, caplog):
    load(write_capture(tmp_path, transforms(w=1000 * WIDTH, h=1000 * HEIGHT)))
    assert caplog.text.count("is an angle of view of 179.9") + caplog.text.count("is an angle of view of 180") == 1


@pytest.mark.parametrize("factor", [2, 0.5])
def test_masks_of_another_size_are_resized(tmp_path, factor):
    meta = transforms()
    for frame in meta["frames"]:
        frame["mask_path"] = "m.png"
    folder = write_capture(tmp_path, meta)
    mask = np.full((int(HEIGHT * factor), int(WIDTH * factor)), 255, np.uint8)
    mask[: len(mask) // 4] = 0
    Image.fromarray(mask).save(folder / "m.png")
    masks = load(folder).masks
    assert not masks[:, : HEIGHT // 4].any()
    assert masks[:, HEIGHT // 4 :].all()


# --- poses ---


def test_scaled_camera_matrices_are_divided_with_one_warning(tmp_path, caplog):
    meta = transforms()
    expected = load(write_capture(tmp_path / "a", meta)).cameras.camera_to_world
    for frame in meta["frames"]:
        frame["transform_matrix"] = [[0.1 * x for x in row[:3]] + row[3:] for row in frame["transform_matrix"]]
    found = load(write_capture(tmp_path / "b", meta)).cameras.camera_to_world
    torch.testing.assert_close(found, expected)
    assert caplog.text.count("scaled by 0.1") == 1
    assert "those of 9 frames" in caplog.text


def moved(meta, offset, scale=1.0):
    for frame in meta["frames"]:
        for row, x in zip(frame["transform_matrix"], offset, strict=False):
            row[3] = row[3] * scale + x
    return meta


def test_a_box_that_no_camera_can_have_seen_is_refused(tmp_path):
    meta = moved(transforms(aabb=[[-1.0] * 3, [1.0] * 3]), (1e7, 0.0, 0.0))
    with pytest.raises(InputError, match=r"aabb: the box is 5e\+06 times its size away from the nearest camera"):
        load(write_capture(tmp_path, meta))


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("offset", [(5e5, 4.1e6, 120.0), (1e7, -1e7, 1e7)])
def test_far_coordinates_come_back_to_the_millimetre(tmp_path, offset, box):
    extra = {"aabb": (np.array([[-1.0] * 3, [1.0] * 3]) + offset).tolist()} if box else {}
    capture = load(write_capture(tmp_path, moved(transforms(**extra), offset)))
    assert capture.cameras.positions.abs().max() == pytest.approx(1.0)
    expected = ring().positions.double() + torch.tensor(offset, dtype=torch.float64)
    torch.testing.assert_close(capture.map_back(capture.cameras.positions), expected, atol=1e-5, rtol=0)
    middle = torch.tensor(offset, dtype=torch.float64) + torch.tensor([0.001, 0, 0])
    there = capture.scale * (capture.transform[:3, :3] @ middle + capture.transform[:3, 3])
    torch.testing.assert_close(capture.map_back(there.float()), middle, atol=1e-6, rtol=0)
    if box:  # it still holds the same part of the scene
        torch.testing.assert_close(capture.map_back(capture.aabb.reshape(2, 3)), torch.tensor(extra["aabb"]).double())


@pytest.mark.parametrize("offset", [(0.0, 0.0, 0.0), (1e7, -1e7, 1e7)])
@pytest.mark.parametrize("count", [1, 4])
def test_one_point_of_view_is_warned_of(tmp_path, caplog, count, offset):
    load(write_capture(tmp_path / "walked", moved(transforms(), offset)))
    assert "depth can't be known" not in caplog.text
    meta = transforms(ring(count))
    for frame in meta["frames"]:
        for row in frame["transform_matrix"][:3]:
            row[3] = 1.0
    load(write_capture(tmp_path / "tripod", moved(meta, offset)), holdout_every=0)
    assert "depth can't be known" in caplog.text


def test_blenders_test_views_that_were_never_rendered_leave_others_to_hold_out(tmp_path, caplog):
    write_capture(tmp_path, transforms(), "transforms_train.json")
    listed = json.dumps(transforms()).replace("images/", "test/")
    (tmp_path / "transforms_test.json").write_text(listed)
    capture = load(tmp_path)
    assert [len(capture.train), len(capture.test)] == [7, 2]
    assert "every 8-th frame is held out" in caplog.text
