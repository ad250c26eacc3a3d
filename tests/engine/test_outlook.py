"""How long the rest of a run takes: known paces, resumed phases, phases of no length."""

from pathlib import Path

import pytest

from csd3d.engine.outlook import Outlook
from csd3d.run import read

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def timed(costs):
    clock = Clock()
    return clock, Outlook(costs, clock)


def test_the_rest_takes_as_long_for_its_cost_as_what_is_done():
    clock, outlook = timed({"a": 2.0, "b": 4.0, "c": 1.0})
    assert outlook.begin("a") is None
    clock.now += 20
    assert outlook.begin("b") == pytest.approx(50)  # 10 s for each unit, 5 units to come
    clock.now += 10  # faster than expected
    assert outlook.begin("c") == pytest.approx(30 / 6)


def test_a_resumed_phase_counts_with_what_it_had_left_and_a_finished_one_not_at_all():
    clock, outlook = timed({"a": 2.0, "b": 4.0, "c": 1.0})
    outlook.begin("a", share=0.0)  # was finished before
    clock.now += 0.2
    assert outlook.begin("b", share=0.25) is None
    clock.now += 7
    assert outlook.begin("c") == pytest.approx(7)


def test_nothing_is_said_while_little_is_known():
    clock, outlook = timed({"a": 1.0, "b": 50.0, "c": 1.0})
    outlook.begin("a")
    clock.now += 5
    assert outlook.begin("b") is None
    clock.now += 50
    assert outlook.begin("c") == pytest.approx(55 / 51)


def test_a_phase_without_a_cost_changes_nothing():
    clock, outlook = timed({"a": 1.0, "b": 1.0})
    outlook.begin("a")
    clock.now += 5
    assert outlook.begin("unheard of") == pytest.approx(0)
    clock.now += 5
    assert outlook.begin("b") == pytest.approx(5)


@pytest.mark.parametrize("name", ["csd-edit-scene", "csd-text-to-3d", "csd-edit-video"])
def test_every_phase_of_a_task_has_a_cost(name):
    config = read(ROOT / f"configs/{name}.yaml", [])
    assert list(config.costs) == list(config.phases)
    assert all(cost > 0 for cost in config.costs.values())
