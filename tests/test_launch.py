"""The command line, with a stand-in for csd3d.run: what it is called with, what is printed, and every way out."""

import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import csd3d
import launch
from csd3d.errors import InputError
from csd3d.run import unused

ROOT = Path(__file__).parents[1]


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """csd3d.run replaced by functions that record their arguments and return a run folder."""
    calls = []
    module = types.ModuleType("csd3d.run")
    for name in ("start", "resume", "export"):
        setattr(module, name, lambda *args, _name=name, stop: calls.append((_name, *args)) or tmp_path)
    monkeypatch.setitem(sys.modules, "csd3d.run", module)
    monkeypatch.setattr(csd3d, "run", module, raising=False)
    module.calls = calls
    (tmp_path / "c.yaml").write_text("task: x")
    return module


def test_arguments_reach_the_job(jobs, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    assert launch.main(["--config", str(config)]) == 0
    assert (
        launch.main(["--config", str(config), "a.b=1", "--seed", "3", "c=d e", "--device", "cpu", "--output", "o"]) == 0
    )
    assert launch.main(["--resume", "runs/a", "steps=5"]) == 0
    assert launch.main(["--export", "runs/a", "--device", "cuda"]) == 0
    assert jobs.calls == [
        ("start", config, [], None, None, "auto"),
        ("start", config, ["a.b=1", "c=d e"], Path("o"), 3, "cpu"),
        ("resume", Path("runs/a"), ["steps=5"], "auto"),
        ("export", Path("runs/a"), [], "cuda"),
    ]
    assert f"Results in {tmp_path}:" in capsys.readouterr().out


def test_paths_of_the_command_line_may_be_in_the_home(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch.main(["--config", "~/c.yaml", "--output", "~/x"]) == 0  # as a shell leaves it in quotes
    assert launch.main(["--resume", "~/x"]) == 0
    assert [call[1] for call in jobs.calls] == [tmp_path / "c.yaml", tmp_path / "x"]
    assert jobs.calls[0][3] == tmp_path / "x"


@pytest.mark.parametrize(
    "argv",
    ["", "a=1", "--config a --resume b", "--resume a --seed 1", "--resume a --output b",
     "--config a --seed x", "--config a --nonsense"],
)  # fmt: skip
def test_mistakes_in_the_command_line(jobs, argv, capsys):
    with pytest.raises(SystemExit) as caught:
        launch.main(argv.split())
    assert caught.value.code == 2
    assert re.fullmatch(r"error: .+; see csd3d --help\n", capsys.readouterr().err)
    assert not jobs.calls


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--confg a", "unrecognized argument --confg; did you mean --config?"),
        ("process x --outpt y", "unrecognized argument --outpt; did you mean --output?"),
        ("process x --output y --frames z", "argument --frames: invalid int value: 'z'"),
        ("process x y --output z", "unrecognized arguments: y"),
        ("process", "the following arguments are required: "),
        ("proces x --output y", "csd3d proces: there is no such command; did you mean csd3d process?"),
        ("nosuch", "csd3d nosuch: there is no such command; did you mean csd3d "),
        ("editor", "did you mean csd3d editors?"),
        ("configs/sds.yaml", "a job begins with an option, such as --config configs/sds.yaml"),
        ("methods nosuch", "csd3d methods: nosuch is not expected"),
        ("keys", "csd3d keys: give one name"),
        ("keys hashgird", "did you mean hashgrid?"),
    ],
)
def test_every_mistake_in_a_command_is_one_line_with_what_would_be_right(argv, said, capsys):
    try:
        code = launch.main(argv.split())
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_bad_input_is_one_line_and_2(jobs, tmp_path, capsys):
    def start(*_, stop):
        raise InputError("c.yaml: key:\n what was wrong")

    jobs.start = start
    assert launch.main(["--config", str(tmp_path / "c.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: c.yaml: key: what was wrong\n"
    assert "Results" not in captured.out


@pytest.mark.parametrize("given", ["configs/csd-txt-to-3d.yaml", "csd-text-to-3d", "elsewhere/csd-text-to-3d.yml"])
def test_a_missing_config_names_the_nearest_and_all(jobs, given, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert launch.main(["--config", given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {given}: no such config file; did you mean configs/csd-text-to-3d.yaml? ")
    assert "configs/ has " in error
    assert "csd-diverse, csd-edit-capture, " in error
    assert not jobs.calls


def test_an_unknown_option_is_told_how_a_key_is_written(jobs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        launch.main(["--config", str(tmp_path / "c.yaml"), "--prompt", "a duck"])
    assert 'key=value, such as prompt="a blue duck"' in capsys.readouterr().err


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as caught:
        launch.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("text", "scenes", "pictures", "panoramas", "videos", "examples:"))
    for file in (ROOT / "configs").glob("*.yaml"):
        assert file.name in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_value_of_any_length_leaves_a_line_that_can_be_read(jobs, tmp_path, monkeypatch, capsys):
    """Its start, with file and key, and its end, with what would be right, are whole; argparse's mistakes too."""
    for value in ("x" * 5000, "a red chair, " * 400, "x\ny" * 2000):
        told = f"c.yaml: prior.model: {value!r} is neither a folder nor a hub name"

        def refuse(*_, told=told, **__):
            raise InputError(told)

        monkeypatch.setattr(jobs, "start", refuse)
        assert launch.main(["--config", str(tmp_path / "c.yaml")]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {told[:40]}")
        assert line.endswith(" is neither a folder nor a hub name\n")
        assert len(line) < 1100
        assert line.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        launch.main(["--config", "c.yaml", f"--{'x' * 5000}"])
    line = capsys.readouterr().err
    assert line.startswith("error: unrecognized argument --xxx")
    assert line.endswith("; see csd3d --help\n")
    assert len(line) < 1100


def test_other_errors_keep_their_traceback(jobs, tmp_path):
    def start(*_, stop):
        raise ZeroDivisionError

    jobs.start = start
    with pytest.raises(ZeroDivisionError):
        launch.main(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("config", "override", "warned"),
    [
        ({"methods": ["csd_edit", "ip2p+own"]}, "editors.ip2p.steps=3", None),
        ({"methods": ["csd_edit"]}, "editors.ip2p.steps=3", "editors.ip2p"),
        ({"runs": {"csd": None, "vsd+csd": None}, "methods": {"nfsd": None}}, "methods.vsd.rank=3", None),
        ({"runs": {"csd": None}, "methods": {}}, "methods.sds={}", None),
        ({"runs": {"csd": None}, "methods": {"nfsd": None}}, "methods.nfsd.scale=3", "methods.nfsd"),
        ({"methods": ["csd_edit"]}, "seed=3", None),
    ],
)
def test_settings_that_a_run_does_not_use_are_warned_of(config, override, warned):
    lines = unused(types.SimpleNamespace(**config), [override, override])
    assert lines == ([f"{warned} is set, but this run does not use {warned.partition('.')[2]}"] if warned else [])


def test_results_that_exist_are_named(tmp_path):
    named = ["report.html", "videos/orbit.mp4", "mesh/mesh.glb", "mesh/splats.ply", "mesh/splats.spz", "metrics.json"]
    for name in (*named, "videos/other.txt", "mesh/mesh.ply"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    lines = launch.summary(tmp_path, stopped=False).splitlines()
    assert [line.strip() for line in lines[1:]] == named
    assert f"--resume {tmp_path}" in launch.summary(tmp_path, stopped=True).splitlines()[-1]


# -------------------------------------------------------------------------------------------------------- as a process


def csd3d_process(*argv: str, code: str = "") -> subprocess.Popen:
    """launch.main in a process of its own, after `code`."""
    script = f"import sys, types\n{code}\nimport launch\ncode = launch.main()\nassert 'torch' not in sys.modules\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", f"{script}sys.exit(code)", *argv], cwd=ROOT, env=environment, **pipes
    )


def test_help_and_config_mistakes_do_not_wait_for_torch(tmp_path):
    (tmp_path / "bad.yaml").write_text("task: x\nseed: [1,")
    processes = [csd3d_process("--config", str(tmp_path / name)) for name in ("none.yaml", "bad.yaml")]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert errors[0].startswith(f"error: {tmp_path}/none.yaml: no such config file; ")
    assert errors[0].count("\n") == 1
    assert re.fullmatch(rf"error: {tmp_path}/bad.yaml: line \d, column \d+: .*\n", errors[1])
    code = "import atexit; atexit.register(lambda: print('torch' in sys.modules))"
    assert csd3d_process("--help", code=code).communicate(timeout=60)[0].endswith("False\n")


@pytest.mark.parametrize("word", ["methods", "--help"])
def test_an_output_that_is_full_or_ascii_is_no_traceback(word):
    command = [sys.executable, "launch.py", word]
    with open("/dev/full", "w") as full:
        told = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert told.returncode == 2
    assert re.fullmatch(r"error: standard output: cannot be written \(No space left on device\); .*\n", told.stderr)
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, timeout=60)
    assert (told.returncode, told.stderr) == (0, b"")
    assert told.stdout.isascii()
    assert b"?" in told.stdout


SLOW_JOB = """
import time
from pathlib import Path
def start(*args, stop):
    print("started", flush=True)
    for _ in range(600):
        time.sleep(0.05)
        if stop.requested and FINISHES: return Path("some/run")
    raise SystemExit("never stopped")
sys.modules["csd3d.run"] = module = types.ModuleType("csd3d.run")
module.start = start
import csd3d; csd3d.run = module
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_once_finishes_twice_aborts(tmp_path, presses):
    (tmp_path / "c.yaml").write_text("task: x")
    process = csd3d_process("--config", str(tmp_path / "c.yaml"), code=f"FINISHES = {presses == 1}" + SLOW_JOB)
    assert process.stdout.readline().startswith(f"csd3d: {tmp_path}/c.yaml; loading")  # at once, before torch
    assert process.stdout.readline() == "started\n"
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = process.communicate(timeout=60)
    assert err.count("finishing with what there is") == 1
    assert "Traceback" not in err
    if presses == 1:
        assert process.returncode == 0
        assert "Stopped before the end. To go on: python launch.py --resume some/run" in out
    else:
        assert process.returncode == 130
        assert "--resume" in err
