"""Sweeps: bad files before anything starts, finished runs skipped, killed ones started again, the table."""

import json

import pytest
from tiny_jobs import write_job

import launch
from csd3d.errors import InputError
from csd3d.run import read
from csd3d.sweep import main, read_sweep, work
from csd3d.sweep.table import markdown, rows_of


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_prior, tiny_capture):
    home = tmp_path_factory.mktemp("sweep") / "home"
    config = write_job(home, "edit_image", {"edit": tiny_prior}, tiny_capture)
    text = config.read_text().replace("photo.png", str(home / "photo.png"))
    config.write_text(text.replace("model: prior", f"model: {home / 'prior'}"))
    return home


def write(home, text):
    path = home / "sweep.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "config: config.yaml\ngrid: {promt: [a, b]}",
            r"sweep.yaml: grid or set: promt: unknown key; did you mean prom",
        ),
        ("config: config.yaml\nset: {seed: x}\ngrid: {prompt: [a]}", r"sweep.yaml: grid or set: seed: "),
        ("config: config.yaml\ngrid: {}", r"sweep.yaml: grid: empty"),
        ("config: config.yaml", r"sweep.yaml: grid: empty"),
        ("config: config.yaml\ngrid: {seed: []}", r"sweep.yaml: grid.seed: expected a list of at least one value"),
        ("config: config.yaml\ngrid: {seed: 1}", r"sweep.yaml: grid.seed: expected a list"),
        ("config: config.yaml\ngrids: {seed: [1]}", r"sweep.yaml: grids: unknown key of a sweep; did you mean grid\?"),
        ("config: no.yaml\ngrid: {seed: [1]}", r"sweep.yaml: config: no.yaml is neither beside this file nor in"),
        ("grid: {seed: [1]}", r"sweep.yaml: config: missing"),
        ("config: config.yaml\ngrid: {seed: [1, 1]}", r"sweep.yaml: grid: .* is the same run as"),
        ("config: config.yaml\ngrid: {prompt: ['${nope}']}", r"sweep.yaml: .*nope"),
        ("config: config.yaml\ngrid: {seed: ['1']}", r"sweep.yaml: .*seed"),
        ("config: config.yaml\nmetrics: x\ngrid: {seed: [1]}", r"sweep.yaml: metrics: expected a list"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(home, tmp_path, monkeypatch, capsys, text, told):
    monkeypatch.setattr(work, "executors", None)
    path = write(home, text)
    with pytest.raises(InputError, match=told):
        main([str(path), "--output", str(tmp_path / "out")])
    assert launch.main(["sweep", str(path), "--output", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_text_in_quotes_stays_a_text(home):
    path = write(home, 'config: config.yaml\ngrid: {prompt: ["3", "yes", "a: b", "[x"]}')
    runs = read_sweep(path).runs
    prompts = [read(home / "config.yaml", run.overrides).prompt for run in runs]
    assert prompts == ["3", "yes", "a: b", "[x"]


@pytest.mark.parametrize(
    ("place", "options", "told"),
    [
        ("sweep.yaml", [], r"sweep.yaml: cannot be made the folder of the sweep"),
        ("out", ["--device", "xpu"], r"--device: 'xpu' is none of"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_told_before_anything_starts(home, monkeypatch, place, options, told):
    monkeypatch.setattr(work, "Task", None)
    path = write(home, "config: config.yaml\ngrid: {seed: [1]}")
    with pytest.raises(InputError, match=told):
        main([str(path), "--output", str(home / place), *options])


def test_a_run_is_named_by_what_defines_it(home):
    path = write(home, "config: config.yaml\ngrid: {prompt: [a, b], seed: [0, 1]}")
    names = [run.name for run in read_sweep(path).runs]
    assert len(set(names)) == 4
    again = write(home, "config: config.yaml\nset: {prompt: b}\ngrid: {seed: [1], prior.micro_batch: [4]}")
    assert [run.name for run in read_sweep(again).runs] == names[3:]  # micro_batch changes no result
    (home / "photo.png").write_bytes((home / "photo.png").read_bytes() + b"x")
    assert not {run.name for run in read_sweep(path).runs} & set(names)  # another picture, another run


class Job:
    """Stands in for submitit's: does the work at once, or is killed."""

    def __init__(self, task, killed):
        from submitit.core.utils import UncompletedJobError

        self.error = UncompletedJobError("killed") if killed else None
        self.answer = None if killed else task()

    def done(self):
        return True

    def result(self):
        if self.error:
            raise self.error
        return self.answer

    def stderr(self):
        return ""

    def cancel(self):
        """Nothing to do."""


def test_killed_runs_are_started_again_and_finished_ones_skipped(home, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    killed, asked = [True, False, False], []

    class Executor:
        def submit(self, task):
            asked.append(task)
            return Job(task, killed.pop(0) if killed else False)

    monkeypatch.setattr(work, "executors", lambda *_: lambda slot: Executor())
    monkeypatch.setattr(work, "POLL_S", 0)
    path, out = write(home, "config: config.yaml\ngrid: {seed: [0, 1]}"), tmp_path / "out"
    assert main([str(path), "--output", str(out), "--device", "cpu"]) == 0
    assert len(asked) == 3
    assert "was killed, and is resumed" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [run["values"] for run in results["runs"]] == [{"seed": 0}, {"seed": 1}]
    assert all(run["finished"] for run in results["runs"])
    assert "±" in (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    assert "2 of 2 runs are done" in page
    assert all(f'href="{run["name"]}/report.html"' in page for run in results["runs"])
    assert main([str(path), "--output", str(out)]) == 0
    assert len(asked) == 3  # nothing was started again


def test_a_run_that_is_killed_again_and_again_is_told(home, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setattr(
        work, "executors", lambda *_: lambda slot: type("E", (), {"submit": lambda _, t: Job(t, True)})()
    )
    monkeypatch.setattr(work, "POLL_S", 0)
    path, out = write(home, "config: config.yaml\ngrid: {seed: [5]}"), tmp_path / "out"
    assert main([str(path), "--output", str(out), "--retries", "1"]) == 1
    assert "failed: killed" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["runs"][0]["error"] == "killed"


def test_a_slurm_that_is_not_there_is_one_line(home, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setattr(work.shutil, "which", lambda _: None)
    path = write(home, "config: config.yaml\ngrid: {seed: [0]}")
    assert launch.main(["sweep", str(path), "--on", "slurm", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --on slurm: sbatch and srun are not there")
    assert not (tmp_path / "out").exists()


def test_the_table_has_mean_and_deviation_over_seeds():
    runs = [
        {"values": {"prompt": p, "seed": s}, "results": {"sds": {"psnr": 10.0 + 2 * s + k, "seconds": 1}}}
        for k, p in enumerate(("a|b", "c"))
        for s in (0, 1)
    ]
    runs.append({"values": {"prompt": "d", "seed": 0}})  # failed
    rows = rows_of(runs, ["psnr", "none"])
    assert [row[:3] + row[4:] for row in rows[1:]] == [["a|b", "sds", "2", "–"], ["c", "sds", "2", "–"]]
    assert [row[3] for row in rows[1:]] == ["11 ± 1.4", "12 ± 1.4"]  # n − 1: √2
    assert markdown(rows).splitlines()[2].startswith(r"| a\|b | sds | 2 | 11 ± 1.4")
