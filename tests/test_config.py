"""Typed configs: what is accepted comes out typed, what is not is refused by name, and what is written reads back."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csd3d import registry
from csd3d.config import load_config, task_name, to_yaml
from csd3d.errors import InputError
from csd3d.identity import defining_values
from csd3d.schema import incidental, path_key


@dataclass
class Kernel:
    kernel: Literal["rbf", "imq"] = "rbf"
    bandwidth: float | Literal["median"] = "median"


@dataclass
class Update:
    method: Literal["csd_edit", "in2n"] = "csd_edit"
    steps: int = 10
    svgd: Kernel = field(default_factory=lambda: Kernel(kernel="imq"))
    extra: Kernel | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass
class Config:
    prompt: str
    task: Literal["demo"] = "demo"
    seed: int = 0
    lr: float = 0.1
    preview: bool = incidental(True)
    model: str | None = None
    video: str = path_key()
    folder: Path = Path("data")
    size: tuple[int, int] = (1, 2)
    number: int | float | None = None
    scale: float | None = None
    compare: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    update: Update = field(default_factory=Update)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give at least 0")


@pytest.fixture
def load(tmp_path):
    def load(text: str, *overrides: str) -> Config:
        (tmp_path / "c.yaml").write_text(text)
        return load_config(tmp_path / "c.yaml", overrides, Config)

    return load


def message(load, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_type_is_converted(load):
    config = load(
        "prompt: hi\nlr: 1e-3\nseed: 1e4\nmodel: x/y\nfolder: a/b\nsize: [3, 4]\nnumber: 2\ncompare: [in2n]\n"
        "weights: {a: 1}\nupdate: {method: in2n, svgd: {bandwidth: 2}, extra: {kernel: imq}}"
    )
    expected = Config(
        "hi", lr=1e-3, seed=10000, model="x/y", folder=Path("a/b"), size=(3, 4), number=2, compare=["in2n"],
        weights={"a": 1.0}, update=Update("in2n", svgd=Kernel("imq", 2.0), extra=Kernel("imq")),
    )  # fmt: skip
    assert config == expected
    assert [type(v) for v in (config.seed, config.number, config.weights["a"], config.update.svgd.bandwidth)] == [
        int, int, float, float,
    ]  # fmt: skip


def test_a_partial_section_keeps_the_parents_own_default(load):
    assert load("prompt: a\nupdate: {svgd: {bandwidth: 3.0}}").update.svgd.kernel == "imq"  # not Kernel's own "rbf"
    assert load("prompt: a\nupdate: {}").update == Update()
    assert load("prompt: a", "update.svgd.kernel=rbf").update.svgd == Kernel("rbf", "median")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("prompt=make it: red # now", "prompt", "make it: red # now"),
        ("prompt=yes", "prompt", "yes"),
        ("prompt=3", "prompt", "3"),
        ("prompt='quoted'", "prompt", "quoted"),
        ("prompt=[a", "prompt", "[a"),
        ("prompt=a=b", "prompt", "a=b"),
        ("model=null", "model", None),
        ("model=123", "model", "123"),
        ("seed=7", "seed", 7),
        ("lr=1e-2", "lr", 0.01),
        ("preview=false", "preview", False),
        ("compare=[in2n, x]", "compare", ["in2n", "x"]),
        ("compare=[]", "compare", []),
        ("number=null", "number", None),
    ],
)
def test_overrides(load, override, key, value):
    result = getattr(load("prompt: a\nseed: 1\nmodel: m\nnumber: 3\ncompare: [z]", override), key)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("prompt: a\nupdate: {mehtod: in2n}", [], ["c.yaml", "update.mehtod", "did you mean update.method?"]),
        ("prompt: a\nsede: 1", [], ["c.yaml", "sede", "did you mean seed?"]),
        ("prompt: a\nsteps: 1", [], ["did you mean update.steps?"]),
        ("prompt: a", ["updat.steps=1"], ["command line", "did you mean update?"]),
        ("prompt: a\n1: 2", [], ["c.yaml: 1: unknown key"]),
        ("prompt: 12", [], ["c.yaml: prompt: expected text, got 12"]),
        ("prompt: a\nseed: true", [], ["seed: expected a whole number, got true"]),
        ("prompt: a\nseed: 1.5", [], ["seed: expected a whole number, got 1.5"]),
        ("prompt: a\nseed: .inf", [], ["seed: expected a whole number"]),
        ("prompt: a\nlr: .nan", [], ["lr: expected a number"]),
        ("prompt: a\nlr: '0.1'", [], ['lr: expected a number, got "0.1"']),
        ("prompt: a\npreview: 1", [], ["preview: expected true or false, got 1"]),
        ("prompt: a\ncompare: in2n", [], ["compare: expected a list of texts"]),
        ("prompt: a\ncompare: [in2n, 3]", [], ["compare[1]: expected text, got 3"]),
        ("prompt: a\nsize: [1, 2, 3]", [], ["size: expected a list of 2 values, got 3"]),
        ("prompt: a\nupdate: {method: csd}", [], ["update.method: expected one of csd_edit, in2n"]),
        ("prompt: a\nupdate: {svgd: {bandwidth: x}}", [], ["svgd.bandwidth: expected a number or one of median"]),
        ("prompt: a\nupdate: {extra: {kernl: rbf}}", [], ["update.extra.kernl: unknown key", "update.extra.kernel?"]),
        ("prompt: a\nupdate: 3", [], ["update: expected a section with the keys method, steps"]),
        ("prompt: a\nupdate: {steps: 0}", [], ["c.yaml: update: steps must be at least 1, got 0"]),
        ("prompt: a", ["update.steps=0"], ["c.yaml + command line: update: steps must be at least 1, got 0"]),
        ("prompt: a\nseed: 1", ["seed=x"], ['command line: seed: expected a whole number, got "x"']),
        ("prompt: a", ["seed=[1"], ["command line: seed: "]),
        ("prompt: a", ["seed"], ["'seed' is not an override; write key.sub=value"]),
        ("prompt: a", ["seed.x=3"], ["seed: expected a whole number"]),
        ("prompt: a\ncompare: [in2n, x]", ["compare.y=3"], ["line: compare.y: compare is a list of items 0 to 1"]),
        ("prompt: a\ncompare: [in2n]", ["compare.1=x"], ["compare.1: compare is a list of items 0 to 0"]),
        ("prompt: a\ncompare: []", ["compare.0=x"], ["compare is a list of no items; give compare=[…]"]),
        ("seed: 1", [], ["prompt: missing; expected text"]),
        ("prompt: ${nowhere}", [], ["prompt: Interpolation key 'nowhere' not found"]),
        ("prompt: ${", [], ["c.yaml: prompt: "]),
        ("prompt: 'a ${oc.env:HOME}'", [], ["c.yaml: prompt: '${oc.env:HOME}': only the name of another key"]),
        ("prompt: ${${task}:HOME}\ntask: oc.env", [], ["c.yaml: prompt: '${${task}:HOME}': only the name"]),
        ("prompt: a", ["model=${oc.env:HOME}"], ["command line: model: '${oc.env:HOME}': only the name"]),
        ("prompt: a\nlr: 1e30", [], ["c.yaml: lr: expected a number from -1e+09 to 1e+09, got 1e+30"]),
        ("prompt: a", ["scale=1e30"], ["command line: scale: expected a number from -1e+09 to 1e+09, got 1e+30"]),
        ("prompt: a\nscale: x", [], ['scale: expected a number or null, got "x"']),
        ("prompt: a", ["seed=-1"], ["c.yaml + command line: seed is -1"]),
        ("prompt: a\nseed: -1", ["lr=0.5"], ["c.yaml: seed is -1"]),
        ("prompt: a\nseed: [1,", [], ["c.yaml: line 3"]),
        ("prompt: a\nprompt: b", [], ["c.yaml: line 2", "duplicate key prompt"]),
        ("prompt: &x [*x]", [], ["recursive aliases"]),
        ("- a", [], ["c.yaml: expected `key: value` lines"]),
        ("prompt: !!python/object/apply:os.system ['touch hacked']", [], ["c.yaml: line 1", "python/object"]),
        ("a" * (1 << 20) + ": 1", [], ["larger than 1 MiB"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_naming_file_and_key(load, text, overrides, parts):
    text = message(load, text, *overrides)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "line",
    [
        'k{i}: "${{k{j}}}${{k{j}}}"',
        'k{i}: {{a: "${{k{j}}}", b: ["${{k{j}}}"]}}',
        'k{i}: {{a: "${{..k{j}}}${{..k{j}}}"}}',
        'k{i}: {{a: "${{r{i}.a}}${{r{i}.a}}"}}\nr{i}: ${{k{j}}}',
        "k{i}: &k{i} [*k{h}, *k{h}]",
    ],
)
def test_references_that_double_with_every_line_are_refused_at_once(load, line):
    text = "k0: &k0 x\n" + "\n".join(line.format(h=i - 1, i=i, j=i + 1) for i in range(1, 60)) + "\nk60: x"
    assert re.search("larger than 2 MiB|YAML node expansion exceeds", message(load, text))


def test_a_base_that_doubles_what_the_config_names_is_refused(tmp_path):
    lines = [f'k{i}: "${{k{i + 1}}}${{k{i + 1}}}"' for i in range(60)]
    (tmp_path / "b.yaml").write_text("\n".join(lines[::2]))
    (tmp_path / "c.yaml").write_text("base: b.yaml\n" + "\n".join(lines[1::2]))
    with pytest.raises(InputError, match=r"c.yaml: .* larger than 2 MiB"):
        load_config(tmp_path / "c.yaml", [], Config)


def test_chains_of_interpolations_and_circles_of_sections_are_no_bombs(load):
    text = "prompt: ${compare[0]}\ncompare: ['${update.method}', b]\nupdate: {method: in2n, steps: '${seed}'}\nseed: 3"
    config = load(text)
    assert (config.prompt, config.compare, config.update.steps) == ("in2n", ["in2n", "b"], 3)


def test_a_base_holds_where_the_file_says_nothing(tmp_path):
    (tmp_path / "b.yaml").write_text("prompt: a\ntask: demo\ncompare: [x, y]\nupdate: {steps: 3, svgd: {kernel: rbf}}")
    (tmp_path / "c.yaml").write_text("base: b.yaml\ncompare: [z]\nupdate: {method: in2n, svgd: {bandwidth: 2.0}}")
    config = load_config(tmp_path / "c.yaml", ["seed=4"], Config)
    assert (config.prompt, config.compare, config.seed) == ("a", ["z"], 4)
    assert config.update == Update("in2n", 3, Kernel("rbf", 2.0))
    assert task_name(tmp_path / "c.yaml", [], ["demo"]) == "demo"


@pytest.mark.parametrize(
    ("base", "own", "parts"),
    [
        ("prompt: 3", "seed: 1", ["b.yaml: prompt: expected text, got 3"]),
        ("prompt: a\nseed: 2", "seed: x", ["c.yaml: seed: expected a whole number"]),
        ("prompt: a\nupdate: {stesp: 2}", "update: {steps: 3}", ["b.yaml: update.stesp", "did you mean update.steps?"]),
        ("prompt: a\nbase: c.yaml", "seed: 1", ["b.yaml: base: a base has none of its own"]),
        ("- a", "seed: 1", ["b.yaml: expected `key: value` lines"]),
        ("prompt: a\ncompare: {x: 1}", "compare: [y]\nseed: x", ["c.yaml: seed: expected a whole number"]),
        ("prompt: a\nupdate: {steps: 3}", "update: [[]]", ["c.yaml: update: expected a section"]),
    ],
)
def test_mistakes_name_the_file_that_made_them(tmp_path, load, base, own, parts):
    (tmp_path / "b.yaml").write_text(base)
    text = message(load, f"base: b.yaml\n{own}")
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("name", ["../b.yaml", "/etc/b.yaml", "3", "[b.yaml]"])
def test_a_base_is_a_file_of_the_same_folder(load, name):
    assert "is no file name; name a config of the same folder" in message(load, f"base: {name}\nprompt: a")


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"prompt: \xe9")
    for name, part in [("none.yaml", "no such config file"), (".", "cannot be read"), ("latin.yaml", "UTF-8")]:
        with pytest.raises(InputError, match=part) as caught:
            load_config(tmp_path / name, [], Config)
        assert str(tmp_path / name) in str(caught.value)


def test_task_name(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: edit_scen")
    assert task_name(path, ["task=edit_scene"], {"edit_scene": ""}) == "edit_scene"
    with pytest.raises(InputError, match=r"c\.yaml: task: unknown task 'edit_scen'; did you mean edit_scene\?"):
        task_name(path, [], {"edit_scene": "", "text_to_3d": ""})
    with pytest.raises(InputError, match="command line: task: unknown task 'x'"):
        task_name(path, ["task=x"], {"edit_scene": ""})
    path.write_text("task: [edit_scene]")
    with pytest.raises(InputError, match="task: missing"):
        task_name(path, [], {"edit_scene": ""})


printable = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    ["${seed}", r"\${a}", r"\\${a", "$", "yes", "null", "1e3", "1", "", " a ", "a: b", "# c", "'", '"', "- x", "???"]
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=printable, model=st.none() | printable, lr=st.floats(-1e9, 1e9), seed=st.integers(0, 2**62),
    compare=st.lists(printable, max_size=3), number=st.none() | st.integers(-5, 5) | st.floats(-1e9, 1e9),
)  # fmt: skip
def test_what_is_written_reads_back(tmp_path, prompt, model, lr, seed, compare, number):
    config = Config(prompt, model=model, lr=lr, seed=seed, compare=compare, number=number)
    (tmp_path / "round.yaml").write_text(to_yaml(config), encoding="utf-8", newline="")
    back = load_config(tmp_path / "round.yaml", [], Config)
    assert back == config
    assert defining_values(back) == defining_values(config)


def test_what_defines_a_run_is_every_key_that_is_not_incidental():
    base = defining_values(Config("a"))
    assert base == defining_values(Config("a", preview=False))
    for other in (Config("b"), Config("a", lr=0.1 + 1e-12), Config("a", update=Update(svgd=Kernel("imq", 0.5)))):
        assert defining_values(other) != base
    assert base["update.svgd.kernel"] == "imq"
    assert "preview" not in base


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: " + "[" * 25000, "nested deeper than"),
        ("prompt: !!bool x", "does not fit the !!tag"),
        ("prompt: !!timestamp x", "does not fit the !!tag"),
        ("prompt: a\nseed: " + "9" * 400, "seed: 9999"),
        ("prompt: a\nmodel: 0x" + "f" * 5000, "model: expected text or null, got 0xff"),
        ("prompt: a\nvideo: " + "x" * 300, "video: "),
        ("prompt: a\nvideo: ~nobody_of_this_name/x", "there is no such user"),
    ],
)
def test_hostile_configs_are_one_line(load, text, words):
    told = message(load, text)
    assert words in told
    assert len(told) < 400


def test_a_config_without_end_is_not_read_to_it():
    with pytest.raises(InputError, match="larger than"):
        load_config("/dev/zero", [], Config)


@pytest.mark.parametrize("override", ["seed=" + "9" * 400, "seed=!!timestamp x", "seed=" + "[" * 25000])
def test_hostile_overrides_are_one_line(load, override):
    assert message(load, "prompt: a", override).startswith("command line: seed: ")


@pytest.mark.parametrize("text", ["update: null", "update:", "update: ~"])
def test_a_section_is_not_null(load, text):
    with pytest.raises(InputError, match=r"c\.yaml: update: a section cannot be null; for the defaults leave "):
        load(f"prompt: a\n{text}")
    with pytest.raises(InputError, match="command line: update: a section cannot be null"):
        load("prompt: a", "update=null")


@pytest.mark.parametrize("key", ["editors.in2n.nosuch=1", "editors.nosuch.steps=1", "editors.in2n.ddim_steps=x"])
def test_settings_of_an_editor_that_is_not_chosen_are_checked_too(tmp_path, key):
    path = tmp_path / "c.yaml"
    path.write_text("task: edit_scene\nprompt: a\n")
    thing = registry.get("task", "edit_scene").thing
    with pytest.raises(InputError, match=f"editors.{key.split('.')[1]}"):
        load_config(path, ["compare=[]", key], thing)
    assert load_config(path, ["editors.in2n.ddim_steps=3"], thing).editors["in2n"].ddim_steps == 3
