"""`csd3d vocabulary`, and the warning about words that a model does not know."""

import json
import random
import types

import pytest
import torch

import launch
from csd3d import run as jobs
from csd3d.interrupt import StopRequest
from csd3d.vocabulary import unknown_words, vocabulary_of, words_of
from csd3d.world.language import FAMILIES, NOTHING, caption, sample_edit
from csd3d.world.pairs import sample_scene
from csd3d.world.prompts import distractors, loosen, parse_prompt
from csd3d.world.vocabulary import EXAMPLE, FILLED

TEXT, EDIT = (types.SimpleNamespace(knows="world", edits=edits) for edits in (False, True))


def test_the_command_prints_every_group_without_opening_a_model(capsys, monkeypatch):
    monkeypatch.setattr("csd3d.priors.loading.load_prior", None)
    assert launch.main(["vocabulary"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("robot", "purple", "metal", "stripes", "wearing a", "overhead view", "mint"))
    assert all(name in text for name in FAMILIES)
    assert max(map(len, text.splitlines())) <= 100
    assert launch.main(["vocabulary", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["world"]
    assert "chair" in told["prompts"]["kinds"]
    assert told["instructions"]["hat"]["example"] == "put a red hat on it"


def test_a_mistake_in_the_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        launch.main(["vocabulary", "chair"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_examples_are_in_the_worlds_words():
    assert parse_prompt(EXAMPLE)
    assert set(FILLED) == {"colour", "pattern", "kind", "backdrop"}
    for family, example in vocabulary_of("world").examples.items():
        known = NOTHING if family == "nothing" else [p.format(**FILLED) for p in FAMILIES[family].phrases]
        assert example in known


def test_what_the_world_writes_is_never_warned_of():
    rng = random.Random(0)
    for i in range(400):
        scene = sample_scene(rng)
        said = caption(scene, rng.uniform(0, 360), rng.uniform(0, 90), plate=i % 2 == 0)
        texts = [said, loosen(said, ("kind", "colour", "pattern_colour", "hat", "backdrop"), rng), f"{said}, blurry"]
        assert not unknown_words(TEXT, texts), texts
        if edit := sample_edit(scene, rng):
            assert not unknown_words(EDIT, [f"{edit.instruction.capitalize()}. And {edit.instruction}!"])
    assert not unknown_words(TEXT, [*distractors("a red chair with yellow stripes", 31, 0), "An orange object", ""])
    assert not unknown_words(EDIT, [" and ".join(NOTHING)])


def test_unknown_words_are_told_once_with_the_nearest():
    (line,) = unknown_words(TEXT, ["a Dragon on a chiar", "a dragon"])
    assert "'dragon'" in line
    assert "'chiar' (nearest: chair" in line
    assert line.count("dragon") == 1
    assert "csd3d vocabulary" in line
    assert "\n" not in line
    (line,) = unknown_words(EDIT, ["make it a dragon"])
    assert line.startswith("instruction: ")


def test_models_of_other_worlds_are_not_warned_of():
    assert not unknown_words(types.SimpleNamespace(knows="", edits=False), ["a dragon"])
    assert not unknown_words(types.SimpleNamespace(knows="of another", edits=False), ["a dragon"])
    assert not unknown_words(None, ["a dragon"])


def test_a_hostile_prompt_gives_a_short_line():
    (line,) = unknown_words(TEXT, ["x" * 100_000, "龍\x1b[31m\n " + " ".join(f"w{i}" for i in range(1000))])
    assert len(line) < 600
    assert "\x1b" not in line
    assert "and 998 more" in line
    assert words_of("A green-ish 2nd duck's, it's") == ["a", "green-ish", "2nd", "duck's", "it's"]


def test_every_job_with_a_prompt_warns_before_its_work(monkeypatch, tmp_path, caplog):
    """`work` is what every task goes through."""
    from csd3d.tasks import runner

    monkeypatch.setattr(runner, "run", lambda job: caplog.records.append("work"))
    monkeypatch.setattr(jobs, "banner", lambda job: [])
    source = types.SimpleNamespace(prompt="a wyvern")
    config = types.SimpleNamespace(told="a dragon; a red duck", source=source)
    job = types.SimpleNamespace(
        config=config, prior=TEXT, device=torch.device("cpu"), asked_device="cpu", folder=None, stop=None, warned=[]
    )
    jobs.work(job, tmp_path, StopRequest())
    before = caplog.records[: caplog.records.index("work")]
    (warning,) = [record.getMessage() for record in before if record.levelname == "WARNING"]
    assert "'dragon', 'wyvern'" in warning
