"""One job by several processes, and by several threads: the same bytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_jobs import files_of, metrics_of, write_job

import launch
from csd3d import ranks
from csd3d.errors import InputError
from csd3d.priors import messages, team
from csd3d.threads import divided, in_threads, pinned
from custom_kernels import native


def results(run: Path) -> dict:
    """What a run has made, without what a clock measured."""
    metrics = metrics_of(run)
    metrics.pop("seconds")
    for figures in metrics["results"].values():
        figures.pop("seconds", None)
    files = {name: data for name, data in files_of(run).items() if "preview" not in name}
    without = ("environment.json",)
    return {"metrics": metrics} | {
        name: data for name, data in files.items() if name not in without and "checkpoint" not in name
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_prior, tiny_capture):
    home = tmp_path_factory.mktemp("ranks") / "home"
    config = write_job(home, "edit_panorama", {"edit": tiny_prior}, tiny_capture)
    text = config.read_text()
    for name in ("photo.png", "model: prior"):
        text = text.replace(name, name.replace(name.split()[-1], str(home / name.split()[-1])))
    config.write_text(text)
    return config


def test_the_same_bytes_by_1_2_and_4_processes_and_after_a_rank_has_died(job, tmp_path):
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("ranks_child.py")), str(job), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    lines = [line for line in done.stdout.splitlines() if line.endswith("]")]
    assert lines == ["1 [0]", "2 [0, 0]", "4 [0, 0, 0, 0]", "dying [2, -9]", "resumed [0, 0]"], done.stderr
    expected = results(tmp_path / "1")
    assert "result.png" in expected
    for run in ("2", "4", "dying"):
        assert results(tmp_path / run) == expected, run
    assert [(tmp_path / f"error4.{rank}").read_text() for rank in (1, 2, 3)] == ["", "", ""]  # rank 0 alone speaks
    told = [line for line in (tmp_path / "dying-error.0").read_text().splitlines() if line.startswith("error:")]
    assert len(told) == 1
    assert "rank 1 does not answer any more" in told[0]
    assert "--resume" in told[0]
    assert json.loads((tmp_path / "4" / "environment.json").read_text())["processes"] == 4


def test_the_same_bytes_by_1_and_3_threads(job, tmp_path):
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        folder = tmp_path / str(threads)
        assert launch.main(["--config", str(job), "--output", str(folder), "--device", "cpu"]) == 0
        found.append(results(folder))
        assert torch.get_num_threads() == threads
        assert not native.is_set()
    assert found[0] == found[1]


def test_parts_depend_on_the_number_of_rows_alone_and_keep_their_order():
    assert [len(range(*part.indices(1000))) for part in divided(50, 16)] == [13, 13, 13, 11]
    assert [part.stop - part.start for part in divided(100, 16)] == [16] * 6 + [4]
    assert [part.stop - part.start for part in divided(8, 16)] == [4, 4]
    assert divided(3, 16) == [slice(0, 3)]
    assert divided(0, 16) == []
    with pinned(), torch.no_grad():
        native.set_num_threads(3)
        assert in_threads(lambda x: (x, torch.get_num_threads(), torch.is_grad_enabled()), [1, 2, 3, 4]) == [
            (x, 1, False) for x in (1, 2, 3, 4)
        ]


def test_messages_keep_every_part():
    from csd3d.priors.condition import Condition

    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    parts = [
        (draw(n, 4, 2, 2), torch.arange(n), Condition(draw(n, 3, 5), image=draw(n, 4, 2, 2), pooled=None))
        for n in (2, 1)
    ]
    for (z, t, c), (z2, t2, c2) in zip(parts, team.unpacked(team.packed(parts)), strict=True):
        assert torch.equal(z, z2)
        assert torch.equal(t, t2)
        assert t2.dtype == torch.long
        assert torch.equal(c.text, c2.text)
        assert torch.equal(c.image, c2.image)
        assert c2.pooled is None


def test_a_rank_with_another_model_or_none_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    sent = []
    monkeypatch.setattr(messages, "send", lambda message, to: sent.append(message))
    monkeypatch.setattr(messages, "receive", lambda *_: sent.pop())
    team.hello("sha256:1")
    team.Team("sha256:1").end()
    team.hello("sha256:2")
    with pytest.raises(InputError, match=r"rank 1 on .*: prior.model: not the same as rank 0's"):
        team.Team("sha256:1")
    team.hello("sha256:1", "cpu float16")
    with pytest.raises(InputError, match=r"rank 1 on .*: how prior runs: not the same as rank 0's"):
        team.Team("sha256:1", "cpu float32")
    team.hello(error="prior.model: not there")
    with pytest.raises(InputError, match=r"rank 1 on .*: prior.model: not there"):
        team.Team("sha256:1")


@pytest.mark.parametrize(
    ("count", "expected"), [("x", "WORLD_SIZE: 'x' is no number"), ("1", "RANK: 1 is not below"), ("2", None)]
)
def test_ranks_are_those_of_torchrun(monkeypatch, capsys, count, expected):
    values = {"RANK": "1", "WORLD_SIZE": count, "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("WORLD_SIZE", count)
    assert ranks.count() == 1
    assert ranks.rank() == 0
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        assert (ranks.count(), ranks.rank()) == (2, 1)
    else:
        with pytest.raises(InputError, match=expected):
            ranks.count()
        assert launch.main(["--config", "no.yaml"]) == 2
        assert re.search(f"^error: .*{expected}", capsys.readouterr().err)


def test_what_is_for_one_process_is_refused_by_torchrun(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.main(["sweep", "sweep.yaml"]) == 2
    assert capsys.readouterr().err == "error: csd3d sweep: is for one process; start it without torchrun\n"
