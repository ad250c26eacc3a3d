"""The run folder: made whole, held by one process, and what is told when it cannot be written."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from csd3d import run as jobs
from csd3d.engine.checkpoint import save_checkpoint
from csd3d.engine.environment import read_environment
from csd3d.engine.phase import Job
from csd3d.engine.run_folder import check_output, create_run_folder, held
from csd3d.errors import InputError
from csd3d.files import make_folder, write_text
from csd3d.media.encoding import Encoder


def test_run_folder_has_everything_and_no_two_are_one(tmp_path):
    folders = [create_run_folder("job", "seed: 1\n", argv=["launch.py", "a b=c"], root=tmp_path) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(
        re.fullmatch(r"\d{8}-\d{6}(-[23])?", folder.name) and folder.parent == tmp_path / "job" for folder in folders
    )
    assert {path.name for path in folders[0].iterdir()} == {"config.yaml", "cmd.txt", "environment.json", "log.txt"}
    assert (folders[0] / "cmd.txt").read_text() == "launch.py 'a b=c'\n"
    assert (folders[0] / "config.yaml").read_text() == "seed: 1\n"
    environment = json.loads((folders[0] / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["threads"] >= 1
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == sorted(folder.name for folder in folders)


def test_output_may_be_new_or_empty_but_nothing_is_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/er"):
        folder = create_run_folder("job", "x", output=tmp_path / name)
        assert folder == tmp_path / name
        assert (folder / "config.yaml").exists()
    with pytest.raises(InputError, match="it is not empty; choose another with --output, or continue"):
        create_run_folder("job", "y", output=tmp_path / "empty")
    assert (tmp_path / "empty/config.yaml").read_text() == "x"


def test_a_folder_that_cannot_be_made_is_bad_input_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("keep")
    long = tmp_path / ("a" * 300)
    for output in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nothing/here"), long, long / "b"):
        with pytest.raises(InputError, match="cannot be made the run folder") as caught:
            create_run_folder("job", "x", output=output)
        assert str(output) in str(caught.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="it is the current one"):
        create_run_folder("job", "x", output=Path("."))

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(InputError, match="No space left"):
        create_run_folder("job", "x", output=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here"]


def test_an_output_that_cannot_be_made_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "read", lambda *_: pytest.fail("a config was read first"))
    (tmp_path / "file").write_text("keep")
    for place, why in (("file", "it is no folder"), ("file/below", "file is no folder"), ("", "it is not empty")):
        with pytest.raises(InputError, match=why):
            jobs.start(tmp_path / "config.yaml", [], tmp_path / place, None, "cpu", stop=None)
    (tmp_path / "empty").mkdir()
    for place in ("empty", "new", "a/b", "x" * 300):  # the last is told when it is made
        check_output(tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_bad_input(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        create_run_folder("job", "x", output=tmp_path / "new")


@pytest.mark.parametrize("name", ["/tmp", "../elsewhere", "a/../../b"])
def test_a_name_does_not_lead_out_of_the_outputs(name, tmp_path):
    with pytest.raises(InputError, match="name: "):
        create_run_folder(name, "", root=tmp_path / "outputs")
    assert not list(tmp_path.iterdir())


def test_an_output_in_a_circle_of_links_is_bad_input(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"loop/x: cannot be made the run folder"):
        create_run_folder("job", "x", output=tmp_path / "loop" / "x")


def test_a_run_folder_left_unfinished_long_ago_is_deleted(tmp_path):
    for name in (".new-run-old", ".new-run-young"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".new-run-old", (0, 0))
    create_run_folder("job", "x", output=tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-run-young", "run"]


# ------------------------------------------------------------------------------------------------------------- holding


@pytest.fixture
def run(tmp_path):
    return create_run_folder("job", "task: x\n", output=tmp_path / "run")


HOLDER = """
import sys, time
from pathlib import Path
from csd3d.engine.run_folder import held
with held(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_has_died(run):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    with pytest.raises(InputError, match="another process works in this run folder"), held(run):
        pass
    process.kill()
    process.communicate()
    with held(run):
        pass


def test_what_killed_writers_left_is_deleted_and_nothing_else(run):
    kept = ["images/a.png", "notes.tmp", ".hidden", "videos/part.mp4", "mesh/mesh.partial"]
    left = ["images/.a.partial.png", ".metrics.partial.json", "videos/.b.whole.mp4", "result.partial.mp4"]
    for name in kept + left:
        write_text(run / name, "x")
    save_checkpoint(run / "checkpoints", "edit", {}, {})
    (run / "checkpoints/edit/tensors-7.safetensors").write_bytes(b"half")
    with held(run):
        found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    checkpoint = {"checkpoints/edit/checkpoint.json", "checkpoints/edit/tensors-1.safetensors"}
    assert found == {"config.yaml", "cmd.txt", "environment.json", "log.txt", *kept, *checkpoint}


@pytest.mark.parametrize("name", ["checkpoints", "curves", "images", "videos", "mesh", "metrics.json", "report.html"])
def test_what_is_in_the_way_is_told_before_any_work(run, name):
    is_file = "." in name
    (run / name).mkdir() if is_file else (run / name).write_text("x")
    said = f"{name}: must be a {'file' if is_file else 'folder'}, .* move"
    with pytest.raises(InputError, match=said), held(run):
        pytest.fail("it began")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_log_that_is_no_regular_file_is_refused(run, tmp_path, kind):
    log = run / "log.txt"
    log.unlink()
    {"link": lambda: log.symlink_to(tmp_path / "out"), "pipe": lambda: os.mkfifo(log), "folder": log.mkdir}[kind]()
    with pytest.raises(InputError, match=r"log.txt: must be a (regular )?file"), held(run):
        pytest.fail("it began")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_cannot_be_read_is_told_as_that(run):
    (run / "checkpoints").mkdir(mode=0)
    with pytest.raises(InputError, match=r"checkpoints: cannot be read \(no permission\)"), held(run):
        pass


def test_a_folder_in_place_of_a_file_is_told_by_the_name_of_the_file(run):
    (run / "images/grid.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"images/grid.json: cannot be written .* move away") as caught, held(run):
        write_text(run / "images/grid.json", "x")
    assert "partial" not in str(caught.value)


def test_a_damaged_checkpoint_keeps_its_tensors(run):
    place = save_checkpoint(run / "checkpoints", "edit", {}, {})
    (place / "tensors-1.safetensors").rename(place / "tensors-2.safetensors")  # not the one in the record
    with held(run):
        pass
    (place / "checkpoint.json").unlink()
    (place / "checkpoint.json").symlink_to("checkpoint.json")
    with held(run):
        pass
    assert (place / "tensors-2.safetensors").exists()


def test_a_phase_whose_checkpoint_or_curve_is_no_folder_is_told(run):
    job = Job(config=None, device=torch.device("cpu"), folder=run)
    for place in ("checkpoints/edit", "curves/edit"):
        write_text(run / place, "x")
        with pytest.raises(InputError, match=f"{place}: must be a folder"):
            job.check_checkpoints(["edit"])
        (run / place).unlink()


@pytest.mark.parametrize("fails", [FileNotFoundError, RuntimeError, InputError])
def test_a_deleted_run_folder_is_told_in_one_line_and_not_made_again(run, fails):
    def work():
        shutil.rmtree(run)
        for place in (run, run / "images"):
            with pytest.raises(FileNotFoundError):
                make_folder(place)
        write_text(run.with_name("run2") / "a.txt", "elsewhere")
        raise fails("whatever the code made of it")

    with pytest.raises(InputError, match="the run folder was deleted") as caught, held(run):
        work()
    assert "\n" not in str(caught.value)
    assert not run.exists()


def test_checkpoints_and_videos_make_no_part_of_a_deleted_run_folder(run):
    def save():
        shutil.rmtree(run)
        save_checkpoint(run / "checkpoints", "fit", {"x": torch.zeros(2)}, {})

    def film():
        shutil.rmtree(run)
        with Encoder(run / "videos" / "a.mp4", 24) as writer:
            writer.add(np.zeros((16, 16, 3), np.uint8))

    for work in (save, film):
        (run / "config.yaml").write_text("seed: 1\n")
        with pytest.raises(InputError, match="the run folder was deleted") as caught, held(run):
            work()
        assert "\n" not in str(caught.value)
        assert not run.exists()
        run.mkdir()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_errors_of_the_disk_are_one_line_with_what_to_do(run, code):
    said = "free some space, then --resume" if code == errno.ENOSPC else "make it writable"
    with pytest.raises(InputError, match=rf"a.png: cannot be written \(.*{said}") as caught, held(run):
        raise OSError(code, os.strerror(code), str(run / "a.png"))
    assert "\n" not in str(caught.value)
    with held(run):  # it is free again
        pass


def test_a_thread_that_cannot_write_prints_no_traceback(run, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))

    def write(error):
        raise error

    with held(run):
        for error in (OSError(errno.ENOSPC, "full"), ZeroDivisionError()):
            thread = threading.Thread(target=write, args=(error,))
            thread.start()
            thread.join()
    assert seen == [ZeroDivisionError]


def test_a_run_folder_deleted_at_the_very_end_is_told(run):
    with pytest.raises(InputError, match="the run folder was deleted"), held(run):
        (run / "config.yaml").unlink()


def test_other_errors_keep_their_traceback(run):
    with pytest.raises(ZeroDivisionError), held(run):
        raise ZeroDivisionError
    with pytest.raises(ConnectionError), held(run):
        raise ConnectionError(errno.ECONNREFUSED, "refused")


@pytest.mark.parametrize("text", [None, "", "[1]", '{"a": '])
def test_a_damaged_environment_is_no_reason_to_lose_the_report(run, text):
    (run / "environment.json").unlink()
    if text is not None:
        (run / "environment.json").write_text(text)
    assert read_environment(run) == {}


def test_a_held_folder_stays_held_when_its_config_is_replaced(tmp_path):
    (tmp_path / "config.yaml").write_text("old")
    with held(tmp_path) as replace_config:
        replace_config("new: é")
        replace_config("newer: é")
        with pytest.raises(InputError, match="another process works in this run folder"), held(tmp_path):
            pass
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "newer: é"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    with held(tmp_path):
        pass
