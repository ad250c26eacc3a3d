"""The log, progress without a terminal, and curves that a resumed run does not repeat."""

import io
import logging
import math
import re
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from csd3d.engine import logs
from csd3d.engine.logs import Curves, logging_to, progress, read_curves


def test_log_file_takes_our_loggers_and_warnings_while_open(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "true")
    with logging_to(tmp_path):
        logging.getLogger("csd3d.datasets").info("one [bracketed]")
        logging.getLogger("custom_kernels").warning("two")
        logging.getLogger("other").warning("not ours")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("three", stacklevel=1)
    logging.getLogger("csd3d").warning("too late")
    lines = (tmp_path / "log.txt").read_text()
    assert all(
        text in lines for text in ("INFO csd3d.datasets: one [bracketed]", "WARNING custom_kernels: two", "three")
    )
    assert "not ours" not in lines
    assert "too late" not in lines
    assert not logging.getLogger("csd3d").handlers


# ------------------------------------------------------------------------------------------------------------ progress


@pytest.fixture
def screen(monkeypatch):
    """What progress() writes, with a clock that goes one second a look."""
    stream = io.StringIO()
    clock = iter(range(10**6))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(logs, "console", lambda: Console(file=stream, width=200))
    monkeypatch.setattr(logs.time, "monotonic", lambda: float(next(clock)))
    return stream


def test_progress_without_a_terminal_is_a_line_now_and_then(screen):
    seen = []
    for step in progress(range(25, 100), "Edit [x]", done=25, describe=lambda: f"loss {seen[-1]}"):
        seen.append(step)
    lines = screen.getvalue().splitlines()
    assert 6 <= len(lines) <= 10  # of 75 steps
    assert lines[0] == "Edit [x]: 35/100, 0:10 elapsed, ETA 1:05, loss 34"  # a second a step, 65 to go
    assert lines[-1].startswith("Edit [x]: 100/100, ")
    assert lines[-1].endswith("elapsed, loss 99")


def test_progress_is_quiet_in_ci_and_takes_any_iterable(screen, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert list(progress((i for i in range(30)), "Bake")) == list(range(30))
    assert len(screen.getvalue().splitlines()) == 1
    assert screen.getvalue().startswith("Bake: 30, ")
    assert list(progress([], "None")) == []


def test_first_step_says_nothing_about_the_others(monkeypatch):
    """It takes 18 s, which a first line once made three hours of; there is no ETA before the third step."""
    stream = io.StringIO()
    clock = iter([0.0, 18.0, 29.0, 30.0, 40.0])  # the start, then the end of each step
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(logs, "console", lambda: Console(file=stream, width=200))
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    steps = progress(range(600), "edit")
    for _ in range(5):
        next(steps)
    assert stream.getvalue().splitlines() == [
        "edit: 1/600, 0:18 elapsed",
        "edit: 2/600, 0:29 elapsed",
        "edit: 4/600, 0:40 elapsed, ETA 1:12:51",  # 22 s for 3 steps
    ]


def test_last_line_is_not_said_twice(screen):
    assert list(progress(range(10), "video")) == list(range(10))  # ten seconds: its line is due at the last step
    assert screen.getvalue() == "video: 10/10, 0:10 elapsed\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_log_file_has_the_progress_and_what_ended_the_run(tmp_path, monkeypatch, terminal):
    stream = io.StringIO()
    monkeypatch.delenv("CI", raising=False)
    console = Console(file=stream, width=100, force_terminal=terminal)
    monkeypatch.setattr(logs, "console", lambda: console)

    def steps():
        yield from range(4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), logging_to(tmp_path):
        list(progress(steps(), "mesh", total=4, interval=0))
    text = (tmp_path / "log.txt").read_text()
    assert "mesh: 3/4, 0:00 elapsed" in text
    assert "the run ended by ZeroDivisionError" in text
    assert "Traceback" in text
    assert "Traceback" not in stream.getvalue()


def test_progress_bar_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.delenv("CI", raising=False)
    console = Console(file=stream, width=100, force_terminal=True)
    monkeypatch.setattr(logs, "console", lambda: console)
    for _ in progress(range(4), "Outer", total=4, describe=lambda: "psnr 30.0"):
        for _ in progress(range(2), "Inner"):  # one within another
            pass
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "4/4" in text
    assert "psnr 30.0" in text
    assert "Inner" in text


# -------------------------------------------------------------------------------------------------------------- curves


def events(folder: Path) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("loss")]


def test_curves_of_a_resumed_run_are_those_of_an_unbroken_one(tmp_path):
    with Curves(tmp_path, "edit") as curves:
        for step in range(8):  # the checkpoint was at 5
            curves.add(step, {"loss": 8.0 - step, "spread": math.nan if step == 2 else 0.5})
    with (tmp_path / "curves/edit/curves.jsonl").open("a") as handle:
        handle.write('{"step": 8, "lo')  # killed
    with Curves(tmp_path, "edit", first=5) as curves:
        for step in range(5, 10):
            curves.add(step, {"loss": 80.0 - step})
    with Curves(tmp_path, "reconstruct") as curves:
        curves.add(3, {"loss": 1.0})

    expected = [(step, (8.0 if step < 5 else 80.0) - step) for step in range(10)]
    found = read_curves(tmp_path)
    assert found.keys() == {"edit", "reconstruct"}
    assert found["edit"]["loss"] == expected
    assert found["edit"]["spread"] == [(0, 0.5), (1, 0.5), (2, None), (3, 0.5), (4, 0.5)]
    assert events(tmp_path / "curves/edit") == expected
    assert len(list((tmp_path / "curves/edit").glob("events.*"))) == 1
    assert events(tmp_path / "curves/reconstruct") == [(3, 1.0)]


def test_curves_are_on_disk_at_once(tmp_path):
    with Curves(tmp_path, "edit") as curves:
        curves.add(0, {"loss": 1.0})
        assert read_curves(tmp_path) == {"edit": {"loss": [(0, 1.0)]}}
    assert read_curves(tmp_path / "nowhere") == {}


def test_lines_of_curves_that_are_no_rows_are_left_out(tmp_path):
    """A hand, or a bad disk, may have damaged any of them."""
    path = tmp_path / "curves/edit/curves.jsonl"
    path.parent.mkdir(parents=True)
    lines = [b'{"step": 0, "loss": 1.0}', b'{"loss": 1.0}', b"7", b'{"step": "a"}', b"\xff\xfe", b"[" * 100_000]
    lines += [b'{"step": 3, "loss": "x"}', b'{"step": 4, "loss": 1' + b"0" * 5000 + b"}", b'{"step": 5, "loss": null}']
    path.write_bytes(b"\n".join(lines))
    assert read_curves(tmp_path) == {"edit": {"loss": [(0, 1.0), (5, None)]}}
    with Curves(tmp_path, "edit", 5):
        assert path.read_text() == '{"step": 0, "loss": 1.0}\n'


def test_a_full_disk_does_not_stop_the_log(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with logging_to(tmp_path):
        logging.getLogger("csd3d").info("a line")
    assert "Traceback" not in capsys.readouterr().err
