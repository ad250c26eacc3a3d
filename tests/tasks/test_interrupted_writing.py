"""Ctrl+C in a real run while result.mp4 is written: no half file, and --resume ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_jobs import files_of, metrics_of, write_job

ROOT = Path(__file__).parents[2]
SLOW_WRITER = """
import contextlib, sys, time
import csd3d.report.canvas as canvas, launch
whole = canvas.frame_writer
@contextlib.contextmanager
def slow(path, *args, **kwargs):
    with whole(path, *args, **kwargs) as add:
        def later(frame):
            add(frame)
            print("writing", path.name, flush=True)
            time.sleep(0.8)
        yield later
canvas.frame_writer = slow
sys.exit(launch.main())
"""


def interrupted(*argv: str, home: Path, group: bool, presses: int) -> tuple[int, str]:
    """Run launch.py in a process group of its own; press Ctrl+C after the first frame. Returns exit code and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SLOW_WRITER, *argv, "--device", "cpu"]
    said = home / "stderr.txt"
    with said.open("w") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(command, cwd=home, env=environment, start_new_session=True, **pipes)
        assert "writing result.mp4\n" in iter(process.stdout.readline, ""), said.read_text()
        for _ in range(presses):
            (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
            while process.poll() is None and "finishing with what there is" not in said.read_text():
                time.sleep(0.02)  # the second press comes once the first has been answered
        process.communicate(timeout=300)
    return process.returncode, said.read_text()


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_ctrl_c_while_the_result_is_written(tiny_prior, tiny_capture, tmp_path, group):
    """Once: it is finished all the same. Twice: 130, nothing half-written is left by --resume, which ends alike."""
    home, run = tmp_path / "home", tmp_path / "run"
    config = write_job(home, "edit_video", {"edit": tiny_prior}, tiny_capture)
    start = ("--config", str(config), "compare=[]", "editors.csd_edit.edit.steps=1", "--output", str(run))
    code, said = interrupted(*start, home=home, group=group, presses=2)
    assert code == 130, said
    assert "Traceback" not in said
    assert not (run / "result.mp4").exists()
    assert "Aborted. `--resume RUN_DIR` continues" in said

    code, said = interrupted("--resume", str(run), home=home, group=group, presses=1)
    assert code == 0, said
    assert metrics_of(run)["finished"]
    assert (run / "result.mp4").stat().st_size > 500
    assert not [name for name in files_of(run) if Path(name).name.startswith(".")]
