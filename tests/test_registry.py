"""Registered things: named by configs with keys of their own, found in plugins, and told apart from mistakes."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest

from csd3d import registry
from csd3d.config import load_config, to_yaml
from csd3d.errors import InputError, closest
from csd3d.identity import defining_values
from csd3d.keys import key_table
from csd3d.registry import get, load_plugins, names, register
from csd3d.run import plugin_path, plugins_of
from csd3d.schema import ByName, Chosen, OneOf, choose, incidental


@dataclass(frozen=True)
class Warm:
    strength: float = 1.0  # how strongly
    words: str = "warm"
    preview: bool = incidental(False)

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(f"strength is {self.strength}: give at least 0")


@dataclass(frozen=True)
class Cold:
    depth: int = 3


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """A kind of thing with two things in it, gone after each test."""
    monkeypatch.setitem(registry._entries, "toy", {})
    monkeypatch.setitem(registry.PACKAGES, "toy", "json")
    register("toy", "warm", title="Warmth")(Warm)
    register("toy", "cold")(Cold)


@dataclass
class Config:
    prompt: str = ""
    toys: Annotated[dict[str, Any], ByName("toy")] = field(default_factory=dict)
    toy: Annotated[Chosen, OneOf("toy", settings="toys")] = field(default_factory=lambda: choose("toy", "warm"))
    compare: list[Annotated[Chosen, OneOf("toy", settings="toys", also=("all",))]] = field(default_factory=list)

    MOVED: ClassVar = {"warmth": "toys.warm.strength", "chill": "there is no chill any more"}

    def __post_init__(self) -> None:
        if any(getattr(one.thing, "words", "") == "hot" for one in self.compare):
            raise ValueError("toys.warm.words is hot: give another")


@pytest.fixture
def load(tmp_path):
    def load(text: str, *overrides: str) -> Config:
        (tmp_path / "c.yaml").write_text(text)
        return load_config(tmp_path / "c.yaml", overrides, Config)

    return load


def message(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "overrides", "wanted"),
    [
        ("{}", (), Chosen("warm", Warm())),
        ("toy: cold", (), Chosen("cold", Cold())),
        ("toy: {type: cold, depth: 5}", (), Chosen("cold", Cold(5))),
        ("toy: {strength: 2}", (), Chosen("warm", Warm(2.0))),
        ("toys: {warm: {strength: 2}}", (), Chosen("warm", Warm(2.0))),
        (
            "{toys: {warm: {strength: 2, words: hot}}, toy: {type: warm, strength: 3}}",
            (),
            Chosen("warm", Warm(3.0, "hot")),
        ),
        ("toy: cold", ("toy.depth=7",), Chosen("cold", Cold(7))),
        ("toy: cold", ("toys.cold.depth=7",), Chosen("cold", Cold(7))),
        ("toy: cold", ("toy=warm", "toy.words=on: fire"), Chosen("warm", Warm(words="on: fire"))),
        ("toy: cold+csd", (), Chosen("cold+csd", Cold())),
    ],
)
def test_a_field_names_a_registered_thing_and_its_keys(load, text, overrides, wanted):
    assert load(text, *overrides).toy == wanted


def test_lists_of_them_have_their_settings_too(load):
    found = load("{compare: [warm, {type: cold, depth: 1}, all], toys: {warm: {strength: 4}}}").compare
    assert found == [Chosen("warm", Warm(4.0)), Chosen("cold", Cold(1)), Chosen("all")]


def test_what_is_written_reads_back_with_its_type(load):
    config = load(
        "{toy: {type: cold, depth: 5}, compare: [warm, all, {type: cold+csd, depth: 6}], toys: {warm: {strength: 2}}}"
    )
    back = load(to_yaml(config))
    assert (back.toy, back.compare) == (config.toy, config.compare)
    assert load(to_yaml(back)) == back


def test_a_key_of_what_is_chosen_acts_on_a_written_config_too(load):
    written = to_yaml(load("toy: {type: cold, depth: 5}"))
    assert load(written, "toys.cold.depth=9").toy == Chosen("cold", Cold(9))
    assert load(written, "toy.depth=9").toy == Chosen("cold", Cold(9))
    assert load(written, "toy=warm").toy == Chosen("warm", Warm())


def test_identity_knows_the_type_and_leaves_out_what_is_incidental(load):
    values = defining_values(load("toy: {type: warm, preview: true}"))
    assert values["toy.type"] == "warm"
    assert values["toy.strength"] == 1.0
    assert "toy.preview" not in values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toy: wram", ["toy", "unknown toy 'wram'", "did you mean warm?", "cold"]),
        ("toy: {type: wram}", ["toy", "did you mean warm?"]),
        ("toy: {type: warm, strenght: 1}", ["toy.strenght", "did you mean toy.strength?"]),
        ("toy: {type: warm, strength: hot}", ["toy.strength", "expected a number"]),
        ("toy: {type: warm, strength: -1}", ["toy", "give at least 0"]),
        ("toy: 3", ["toy", "expected the name of one of warm, cold"]),
        ("toys: {luke: {}}", ["toys.luke", "unknown toy 'luke'"]),
        ("toys: {warm: 3}", ["toys.warm", "expected a section with the keys of warm"]),
    ],
)
def test_mistakes_are_told_at_their_key(load, text, words):
    told = message(load, text)
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("compare=[{type: warm, strenght: 1}]", r"^command line: compare\[0\].strenght: unknown key"),
        ("compare.0=COLD", r"^command line: compare\[0\]: unknown toy 'COLD'; did you mean cold\? Known: all, warm, "),
        ("compare=[ALL]", r"unknown toy 'ALL'; did you mean all\?"),
        ("compare=[{type: warm, words: hot}]", r"c.yaml \+ command line: toys.warm.words is hot"),
    ],
)
def test_what_the_command_line_chooses_is_told_as_from_there(load, override, told):
    assert re.search(told, message(load, "compare: [warm]", override))


def test_keys_that_moved_are_told_together(load):
    told = message(load, "{warmth: 3, chill: 1}", "warmth=4").splitlines()
    assert len(told) == 3
    assert told[0].endswith("warmth: warmth is now toys.warm.strength")
    assert "command line" in told[1]
    assert told[2].endswith("chill: chill is gone: there is no chill any more")


def test_a_moved_key_counts_though_its_value_is_null_and_what_it_leaves_empty_is_let_through(load, monkeypatch):
    monkeypatch.setattr(Config, "MOVED", {"old.psi": "toys.warm.strength", "old.chi": "it is gone"})
    assert message(load, "old: {psi: null}").endswith("old.psi: old.psi is now toys.warm.strength")
    assert load("old: {}") == load("old: null") == load("")
    assert "old: unknown key" in message(load, "old: {other: 1}")


def test_comments_become_a_table_of_keys():
    rows = {row.name: row for row in key_table(Warm)}
    assert rows["strength"].about == "how strongly"
    assert (rows["strength"].takes, rows["strength"].default) == ("a number", "1.0")


# --- plugins ---

PLUGIN = """
from dataclasses import dataclass
from csd3d.registry import register

@register("toy", "{name}", title="Hot")
@dataclass(frozen=True)
class Hot:
    heat: float = {heat}
"""


@pytest.fixture
def plugin(tmp_path):
    def write(name: str, text: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    yield write
    for name in [name for name in sys.modules if name.startswith("csd3d_plugin_")]:
        del sys.modules[name]


def test_a_file_brings_a_thing_with_its_keys_and_title(load, plugin):
    load_plugins([plugin("hot", PLUGIN.format(name="hot", heat=9.0))])
    assert names("toy") == ["warm", "cold", "hot"]
    assert load("toy: {type: hot, heat: 4}").toy.thing.heat == 4.0
    assert get("toy", "hot").title == "Hot"
    assert get("toy", "hot").place.endswith("hot.py:5")


METHOD = """from dataclasses import dataclass
from csd3d.registry import register
{top}
@register("method", "{name}")
@dataclass
class Mine:
    {key}: "float" = 1.0
    def queries(self, step): return {{}}
    def direction(self, eps, step): return None
"""

NO_CALL = "    queries = 4\n"

READER = """from dataclasses import dataclass
from csd3d.registry import register
@register("reader", "mine")
@dataclass
class Mine:
    def matches(path): return True
    def read(self, path): return None
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_the_kind", ["cannot be imported", "ModuleNotFoundError", "bad.py:1"]),
        ("x = 1\ny = 1 / 0", ["ZeroDivisionError", "bad.py:2"]),
        ("def (", ["SyntaxError", "bad.py:1"]),
        ("import sys\nsys.exit(3)", ["SystemExit", "bad.py:2"]),
        (METHOD.format(name="my+one", top="", key="x"), ["a name is a text of letters"]),
        (METHOD.format(name="all", top="", key="x"), ["choose another name"]),
        (METHOD.format(name="mine", top="", key="x").replace("@dataclass", ""), ["no dataclass", "@register and"]),
        (METHOD.format(name="mine", top="", key="type"), ["has a key `type`"]),
        (METHOD.format(name="mine", top="", key="x").replace("= 1.0", ""), ["its field x has no default"]),
        (METHOD.format(name="mine", top="", key="x").replace("= 1.0", "= 1.0; y: int"), ["non-default", "bad.py:5"]),
        (METHOD.format(name="mine", top="", key="x").replace("= 1.0", "= []"), ["mutable default", "bad.py:5"]),
        (METHOD.format(name="mine", top="", key="x") + NO_CALL, ["queries is no"]),
        ("class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd", ["Odd: its text cannot be made"]),
        ("raise GeneratorExit('enough')", ["GeneratorExit: enough", "bad.py:1"]),
        (READER, ["reader 'mine' lacks wants"]),
        (PLUGIN.format(name="warm", heat=1.0), ["toy 'warm' is registered twice", "test_registry.py", "bad.py"]),
        ("from csd3d.registry import register\n@register('method', 'none')\nclass None_:\n    pass", ["lacks queries"]),
        ("from csd3d.registry import register\n@register('toyy', 'none')\nclass None_:\n    pass", ["no such kind"]),
    ],
)
def test_a_plugin_at_fault_is_one_line_that_names_it(plugin, text, words):
    path = plugin("bad", text)
    told = message(load_plugins, [path])
    assert "\n" not in told
    assert path in told
    assert all(word in told for word in words), told


def test_two_files_of_one_name_are_two_plugins(plugin, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "hot.py"
    other.write_text(PLUGIN.format(name="hotter", heat=2.0))
    load_plugins([plugin("hot", PLUGIN.format(name="hot", heat=1.0)), str(other)])
    assert names("toy") == ["warm", "cold", "hot", "hotter"]


def test_a_plugin_that_is_not_there_is_told():
    assert "no such file" in message(load_plugins, ["/nowhere/none.py"])
    assert "no such module" in message(load_plugins, ["no_such_module_at_all"])


@pytest.mark.parametrize(
    ("given", "meant"), [("nfds", "nfsd"), ("esdd", "esd"), ("pix2vdeo", "pix2video"), ("VSD", "vsd")]
)
def test_swapped_letters_and_capitals_are_the_nearest(given, meant):
    assert closest(given, ["rfds", "pds", "vsd", "esd", "sds", "nfsd", "pix2video"]) == meant


@pytest.mark.parametrize("value", ["3", "[3]", "{a: b}", "[a", '[""]', "!!bool x"])
def test_plugins_that_are_no_list_of_names_are_told(value):
    assert "command line: plugins: " in message(plugins_of, f"plugins={value}")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("", []), ("null", []), ("[]", []), ("a.py", ["a.py"]), ("[a, b]", ["a", "b"])],
)
def test_plugins_are_a_name_a_list_or_nothing(value, wanted):
    assert plugins_of(f"plugins={value}") == wanted


@pytest.mark.parametrize("plugin", ["x" * 300 + ".py", "~nobody_of_this_name/a.py"])
def test_a_plugin_that_no_path_can_be_is_not_there(plugin):
    assert "no such file" in message(load_plugins, [plugin_path(plugin, Path())])


def test_a_plugin_that_fails_at_work_is_blamed_and_nobody_else(plugin, monkeypatch):
    monkeypatch.setitem(registry._entries, "toy", {})  # which are of this file
    text = METHOD.format(name="mine", top="", key="x").replace("return {}", "return 1 / 0")
    load_plugins([plugin("bad", text)])
    mine = get("method", "mine").thing()

    def told(call) -> str | None:
        try:
            call()
        except Exception as error:
            return registry.plugin_fault(error)

    blamed = r"method 'mine' of a plugin failed \(%s.*bad\.py:\d+\)"
    assert re.search(blamed % "ZeroDivisionError", told(lambda: mine.queries(0)))
    assert re.search(blamed % r"TypeError: Mine.queries\(\)", told(mine.queries))
    assert told(lambda: 1 / 0) is None
    registry._entries["method"].pop("mine")


@pytest.mark.parametrize("value", [None, 3, "x"])
def test_a_part_that_returns_the_wrong_thing_is_named_with_its_place(value):
    entry = registry.get("method", "sds")
    with pytest.raises(InputError, match=rf"sds\.py:\d+: method 'sds': queries returned a {type(value).__name__}"):
        registry.returned("method", entry.thing(), "queries", value, dict)
    assert registry.returned("method", entry.thing(), "queries", {}, dict) == {}
