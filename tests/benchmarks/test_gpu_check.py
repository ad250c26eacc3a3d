import json

import pytest

from benchmarks import gpu_check, stand_ins
from benchmarks.gpu_check import JOBS, ROOT, SECTIONS, Check
from csd3d.run import read


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("name", JOBS)
def test_keys_of_every_job_exist(name, rehearse):
    config, keys, small = JOBS[name]
    read(ROOT / "configs" / f"{config}.yaml", [*keys, *(small if rehearse else ())])


def test_keys_that_sections_add_exist(monkeypatch, tmp_path):
    """Every section that is a job of a task, as far as its config."""
    asked = []
    monkeypatch.setattr(gpu_check.jobs, "start", lambda config, keys, *_, **__: asked.append(read(config, keys)))
    monkeypatch.setattr(gpu_check, "write_model", lambda *_: 0)
    check = Check(tmp_path, tmp_path, "cuda", False, float("inf"))
    names = [name for name in SECTIONS if name.split()[0].removeprefix("large_") in JOBS]
    for name in names:
        with pytest.raises(FileNotFoundError):  # no run, so no metrics.json
            SECTIONS[name][0](check)
    assert len(asked) == len(names) == 8


def test_a_rehearsal_writes_what_it_found(monkeypatch, tmp_path):
    command = ["gpu_check", "--out", str(tmp_path), "--device", "cpu", "--rehearse", "--only", "machine", "precision"]
    monkeypatch.setattr("sys.argv", command)
    gpu_check.main()
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {"torch", "python"} <= found["machine"].keys()
    assert 0 < found["precision"]["t2i_bfloat16_relative_rms"] < 0.1


def test_a_missing_encoder_leaves_empty_videos(monkeypatch, tmp_path):
    from csd3d.export import video
    from csd3d.report import canvas

    monkeypatch.setattr(video, "encode", video.encode)
    monkeypatch.setattr(canvas, "frame_writer", canvas.frame_writer)
    stand_ins.leave_out_videos()
    with canvas.frame_writer(tmp_path / "a.mp4", 24) as add:
        add(None)
    assert (tmp_path / "a.mp4").read_bytes() == b""
