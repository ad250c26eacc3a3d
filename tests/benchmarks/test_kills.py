"""The jobs that are killed can be read, and kills go to every phase."""

import random

import pytest
from tiny_jobs import MORE, write_job

from benchmarks.kills import Job, Watch, kind_of
from csd3d import run as jobs

LINE = "2026-01-01 00:00:00,000 INFO csd3d: {}\n"


@pytest.mark.parametrize("name", MORE)
def test_the_jobs_can_be_read(name, tmp_path):
    for folder in ("prior", "capture"):
        (tmp_path / folder).mkdir()
    priors = dict.fromkeys(("edit", "text"), tmp_path / "prior")
    config = write_job(tmp_path / "home", name, priors, tmp_path / "capture")
    assert jobs.read(config, []).task == name.partition("+")[0]


def test_each_phase_is_dealt_a_kill_before_any_gets_its_second(tmp_path):
    job = Job("edit_image", tmp_path, dict.fromkeys(("opening", "csd_edit", "ip2p", "results"), 1.0))
    chance, seen = random.Random(0), []
    for _ in range(2):
        seen += (dealt := job.dealt(2, chance))
        assert dealt == sorted(dealt, key=list(job.seconds).index)
        job.kills.update(dealt)
    assert sorted(seen) == sorted(job.seconds)
    assert [kind_of(phase) for phase in job.seconds] == ["before the steps", "steps", "steps", "results"]


def test_a_watch_waits_for_its_phase_in_what_this_process_adds_to_the_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(LINE.format("phase 2 of 3: ip2p") + LINE.format("done after 3 s"))
    watch = Watch(tmp_path, until=("ip2p", 0.0))
    assert not watch.look()
    with log.open("a") as file:
        file.write(LINE.format("phase 1 of 3: csd_edit"))
        file.flush()
        assert not watch.look()
        assert watch.phase == "csd_edit"
        file.write(LINE.format("phase 2 of 3: ip2p, 1 of 4 steps done before"))
        file.flush()
        assert watch.look()
    assert not watch.ended
    log.write_text(log.read_text() + LINE.format("done after 5 s"))
    watch.look()
    assert watch.ended
