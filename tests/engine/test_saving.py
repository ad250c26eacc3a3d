"""When a phase writes checkpoints."""

from types import SimpleNamespace

import pytest

from csd3d.engine import phase as module


@pytest.mark.parametrize(("took", "saves"), [(0, 10), (1, 10), (10, 2)])
def test_saves_take_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch, took, saves):
    clock, made = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def write(*_):
        made.append(clock[0])
        clock[0] += took

    job = SimpleNamespace(config=SimpleNamespace(save_seconds=30.0), identity_of=lambda name: {})
    phase = SimpleNamespace(seconds=0.0, save=write)
    save = module._saver(job, phase, tmp_path, "fit")
    for _ in range(310):
        clock[0] += 1
        save(now=False)
    assert len(made) == saves
    assert phase.seconds + took * saves <= clock[0]
