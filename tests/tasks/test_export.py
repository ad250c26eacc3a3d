"""A finished run of every task, exported again: nothing that it held is lost, from whatever folder that is asked."""

import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_jobs import CASES, INPUTS, files_of, metrics_of, write_job
from tiny_models import save_tiny_pipeline

from csd3d import run as jobs
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest


@pytest.fixture(scope="module")
def priors(tiny_prior, tmp_path_factory):
    return {"edit": tiny_prior, "text": save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")}


@pytest.fixture
def started(request, priors, tiny_capture, tmp_path, monkeypatch):
    """The folder of a finished run whose input and prior were named relative to the folder it was started in."""
    config = write_job(tmp_path / "home", request.param, priors, tiny_capture)
    monkeypatch.chdir(tmp_path / "home")
    return jobs.start(config, [], tmp_path / "run", None, "cpu", stop=StopRequest())


def change(path):
    """Change the content of an input a little, so that it can still be read."""
    if path.name == "prior":
        path = path / "unet/diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        return
    path = path if path.is_file() else next(path.rglob("0*.png"))
    with Image.open(path) as picture:
        pixels = np.array(picture)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("started", CASES, indirect=True)
def test_an_exported_run_keeps_all_that_it_held_wherever_its_data_is(started, tmp_path, monkeypatch, request):
    before = metrics_of(started), files_of(started)
    assert before[0]["finished"]
    assert len(before[0]["results"]) >= 2
    monkeypatch.chdir(tmp_path)
    stop = StopRequest()
    jobs.export(started, [], "cpu", stop=stop)
    assert (metrics_of(started), files_of(started)) == before
    assert not stop.requested

    (tmp_path / "home").rename(tmp_path / "moved")
    keys = INPUTS[metrics_of(started)["task"]]
    first = next(iter(keys))
    with pytest.raises(InputError, match=rf"{first}: .* is not there any more; if it was moved, add {first}=PATH"):
        jobs.resume(started, [], "cpu", stop=stop)
    monkeypatch.chdir(tmp_path / "moved")
    jobs.export(started, [f"{key}={path}" for key, path in keys.items()], "cpu", stop=stop)
    assert (metrics_of(started), files_of(started)) == before

    # the new places are in its config.yaml now, so they need not be given again, from whatever folder
    monkeypatch.chdir(tmp_path)
    config = (started / "config.yaml").read_text()
    assert str(tmp_path / "moved" / keys[first]) in config
    assert str(tmp_path / "home") not in config
    change(tmp_path / "moved" / keys[first])
    for again in ([], [f"{first}={tmp_path}/moved/{keys[first]}"]):
        with pytest.raises(InputError, match=rf"{first}: this is not the input that the run was started with"):
            jobs.resume(started, again, "cpu", stop=stop)
    assert (metrics_of(started), files_of(started)) == before
    assert (started / "config.yaml").read_text() == config


@pytest.mark.parametrize("started", ["edit_video", "text_to_3d", "edit_scene"], indirect=True)
def test_what_has_no_checkpoint_is_left_out_and_not_computed(started):
    """A run killed before its comparison: it is exported as it stands, and says that it is not finished."""
    main, *others = metrics_of(started)["results"]
    for name in others:
        shutil.rmtree(started / "checkpoints" / name)
    jobs.export(started, [], "cpu", stop=StopRequest())
    assert list(metrics_of(started)["results"]) == [main]
    assert not metrics_of(started)["finished"]
    assert [p.name for p in (started / "checkpoints").iterdir() if p.name != "reconstruct"] == [main]
    jobs.resume(started, [], "cpu", stop=StopRequest())
    assert list(metrics_of(started)["results"]) == [main, *others]
    assert metrics_of(started)["finished"]


@pytest.mark.parametrize("started", ["edit_image"], indirect=True)
def test_a_run_without_a_checkpoint_is_not_exported(started):
    shutil.rmtree(started / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint yet"):
        jobs.export(started, [], "cpu", stop=StopRequest())
    place = started / "checkpoints" / "csd_edit"
    place.parent.mkdir()
    place.write_text("a file where the phase has its folder")
    for again in (jobs.export, jobs.resume):
        with pytest.raises(InputError, match=f"^{place}: must be a folder, as the run writes in it"):
            again(started, [], "cpu", stop=StopRequest())


@pytest.mark.parametrize("started", ["edit_image"], indirect=True)
def test_a_run_on_the_shipped_prior_may_be_exported_elsewhere(started, monkeypatch, tmp_path):
    """Named as it is in the package from the package's own folder, and found there from any other."""
    config = started.parent / "home/config.yaml"
    monkeypatch.chdir(jobs.PACKAGE_ROOT)
    keys = ["prior.model=csd3d/assets/ip2p", f"image={started.parent}/home/photo.png", "compare=[]"]
    keys.append("editors.csd_edit.edit.steps=1")
    folder = jobs.start(config, keys, tmp_path / "shipped", None, "cpu", stop=StopRequest())
    assert "model: csd3d/assets/ip2p" in (folder / "config.yaml").read_text()
    before = metrics_of(folder)
    monkeypatch.chdir(tmp_path)
    jobs.export(folder, [], "cpu", stop=StopRequest())
    assert metrics_of(folder) == before

    moved = tmp_path / "checkout"
    shutil.copytree(jobs.PACKAGE_ROOT / "csd3d/assets/ip2p", moved / "csd3d/assets/ip2p")
    monkeypatch.setattr(jobs, "PACKAGE_ROOT", moved)
    jobs.export(folder, [], "cpu", stop=StopRequest())
    assert metrics_of(folder) == before
