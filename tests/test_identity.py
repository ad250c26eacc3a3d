"""What defines a run, and what a record of another version of csd3d may lack."""

from dataclasses import dataclass, field

import pytest

from csd3d.identity import Defining, defining_values, difference


@dataclass
class Loss:
    opacity: float = 1.0
    smoothness: float = 0.0


@dataclass
class Region:
    prompt: str
    feather: float = 2.0


@dataclass
class Sampling:
    steps: int = 50
    eta: float = 0.0


@dataclass
class Config:
    prompt: str = "a duck"
    losses: Loss = field(default_factory=lambda: Loss(opacity=3.0))
    regions: list[Region] = field(default_factory=list)
    colours: dict[str, int] = field(default_factory=lambda: {"red": 1, "blue": 2})
    sampling: Sampling | None = None


def saved(config: Config, *without: str, old: bool = True) -> Defining:
    """The record of a run; of an `old` release, which did not write down what has its default."""
    found = defining_values(config)
    usual = set() if old else found.usual - set(without)
    return Defining({k: v for k, v in found.items() if k not in without}, found.places, usual)


def differs(old: Defining, config: Config) -> tuple | None:
    return difference(old, defining_values(config))


def test_a_default_is_that_of_the_section_above_or_of_the_class():
    config = Config(regions=[Region("x")])
    assert defining_values(config).usual == {
        *("prompt", "losses.opacity", "losses.smoothness", "colours.red", "colours.blue", "sampling"),
        "regions[0].feather",
    }
    assert "losses.opacity" not in defining_values(Config(losses=Loss())).usual  # 1, where the section has 3


@pytest.mark.parametrize("without", [("losses.smoothness",), ("sampling",), ("colours.red", "colours.blue")])
def test_a_new_key_with_its_default_is_no_difference(without):
    assert differs(saved(Config(), *without), Config()) is None


def test_a_new_key_of_an_item_or_of_an_optional_section_is_no_difference():
    config = Config(regions=[Region("x")], sampling=Sampling())
    assert differs(saved(config, "regions[0].feather", "sampling.eta"), config) is None
    config.sampling.eta = 0.5
    assert differs(saved(config, "sampling.eta"), config) == ("sampling.eta", True)


def test_a_new_key_with_another_value_is_one_and_another_prompt_comes_first():
    config = Config(losses=Loss(smoothness=0.5))
    old = saved(Config(), "losses.smoothness")
    assert differs(old, config) == ("losses.opacity", False)
    config.losses.opacity = 3.0
    assert differs(old, config) == ("losses.smoothness", True)
    config.prompt = "a goose"
    assert differs(old, config) == ("prompt", False)


def test_a_key_that_is_gone_is_no_difference_if_its_default_was_recorded():
    before = defining_values(Config())
    now = saved(Config(), "losses.smoothness", old=False)
    assert difference(before, now) is None
    before.usual.clear()
    assert difference(before, now) == ("losses.smoothness", True)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        (Config(), Config(sampling=Sampling()), "sampling.eta"),  # all of its keys have their default
        (Config(regions=[Region("x")]), Config(regions=[Region("x"), Region("y")]), "regions[1].feather"),
        (Config(colours={"red": 1}), Config(), "colours.blue"),
    ],
)
def test_a_section_or_item_that_one_has_is_a_difference_of_no_version(before, after, key, old):
    for one, other in ((before, after), (after, before))[: 1 if old else 2]:
        found = difference(saved(one, old=old), defining_values(other))
        assert not found.unknown
        assert found.key in (key, "regions")
