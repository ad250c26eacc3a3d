"""What the command line lists: told by the code, for what csd3d has and for what others bring."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import launch
from csd3d import registry
from csd3d.catalogue import answer, described
from csd3d.keys import key_table

PLUGIN = '''
from dataclasses import dataclass
from csd3d.registry import register

@register("method", "zero", title="Nothing at all")
@dataclass(frozen=True)
class Zero:
    """Standing still (A. Nobody 2020, arXiv 2001.00001), Eq. 1.

        zero = Zero(strength=3)

        Δ = 0 · ε
    """

    strength: float = 1.0  # of what does not happen

    def queries(self, step): return {}
    def direction(self, eps, step): return 0 * step.z
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plugin's file, gone after the test."""
    for kind in registry.PACKAGES:
        registry.names(kind)
    monkeypatch.setattr(registry, "_entries", {kind: dict(found) for kind, found in registry._entries.items()})
    (tmp_path / "zero.py").write_text(PLUGIN)
    yield f"plugins={tmp_path / 'zero.py'}"
    for name in [name for name in sys.modules if name.startswith("csd3d_plugin_zero")]:
        del sys.modules[name]


def printed(capsys, *argv: str) -> str:
    assert launch.main(argv) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["method", "family", "reader", "task", "demo"])
def test_everything_that_is_registered_is_listed(kind, capsys):
    word = {"family": "families"}.get(kind, f"{kind}s")
    text = printed(capsys, word)
    for entry in registry.entries(kind):
        assert entry.name in text
        assert entry.title in text
        assert entry.place.rpartition("/")[2] in text


def test_a_method_shows_its_paper_and_equation(capsys, plugin):
    text = printed(capsys, "methods", plugin)
    assert "arXiv 2310.17590" in text
    assert "Δ = δ_D + ω (ε(y) − ε(∅))" in text
    assert "Nothing at all" in text
    assert "zero.py:5" in text
    assert "Δ = 0 · ε" in text


def test_every_method_of_csd3d_has_an_equation_and_a_paper():
    for entry in registry.entries("method"):
        summary, equation, paper = described(entry.thing)
        if entry.place.startswith(str(launch.__file__.removesuffix("launch.py"))):
            assert summary, entry.name
            assert equation, entry.name
            assert paper, entry.name


def test_keys_with_their_defaults_and_comments(capsys, plugin, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # lines are folded to the terminal's width
    assert "strength  1.0  of what does not happen (a number)" in printed(capsys, "keys", "zero", plugin)
    text = printed(capsys, "keys", "edit_scene")
    assert "scene.downscale" in text
    assert "factor by which pictures are made smaller" in text
    assert "has no keys of its own" in printed(capsys, "keys", "stable_diffusion")


def test_defaults_are_those_of_the_task_and_not_of_a_section_alone():
    scene = {key.name: key.default for key in key_table(registry.get("task", "edit_scene").thing)}
    assert (scene["reconstruct.steps"], scene["fit.steps"], scene["representation"]) == ("500", "600", '"hashgrid"')
    assert "representation.field.hidden" not in scene  # as `csd3d keys hashgrid` has it
    asset = {key.name: key.default for key in key_table(registry.get("task", "text_to_3d").thing)}
    assert asset["asset.representation.field.hidden"] == "32"
    assert asset["distill.steps"] == "600"


def test_the_documented_keys_are_those_of_the_code(plugin):
    registry.load_plugins([plugin.partition("=")[2]])  # what others register is not in the file
    file = Path(launch.__file__).parent / "docs" / "keys.md"
    told = "docs/keys.md is stale: python launch.py keys --markdown > docs/keys.md"
    assert f"{answer(['keys', '--markdown'])}\n" == file.read_text(encoding="utf-8"), told


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["keys", "edit_scen"], "did you mean edit_scene?"),
        (["keys"], "give one name"),
        (["methods", "sds"], "is not expected"),
        (["methods", "plugins=/nowhere.py"], "no such file"),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys):
    assert launch.main(argv) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("word", ["methods", "families", "keys"])
def test_a_word_has_its_own_help(word, capsys):
    assert f"usage: csd3d {word}" in printed(capsys, word, "--help")


def test_a_reader_may_stop_before_the_end():
    command = f"{sys.executable} {launch.__file__} methods"
    piped = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    piped.stdout.close()
    assert piped.stderr.read() == b""
    assert piped.wait() == 0


def test_a_class_without_words_is_told_by_its_module():
    @dataclass
    class Silent:
        depth: int = 1

    assert (
        described(Silent)[0]
        == "What the command line lists: told by the code, for what csd3d has and for what others bring."
    )


@pytest.mark.parametrize("word", ["families", "readers", "tasks", "editors"])
def test_lists_and_keys_fit_a_narrow_terminal(word, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = [*answer([word]).splitlines(), *answer(["keys", "edit_scene"]).splitlines()]
    assert max(map(len, shown)) <= 80
