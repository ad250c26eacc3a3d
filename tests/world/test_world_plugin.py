"""The core works without the world, and asks it through the registry."""

import subprocess
import sys

import pytest
import torch

from csd3d import registry
from csd3d.canvas.clip import DemoConfig
from csd3d.evaluation.ground_truth import text_truth

IMPORT_ALL = """
import importlib, pathlib, sys
import csd3d
root = pathlib.Path(csd3d.__file__).parent
for path in sorted(root.rglob("*.py")):
    name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    if not name.startswith("csd3d.world"):
        importlib.import_module(name)
found = sorted(name for name in sys.modules if name.startswith("csd3d.world"))
sys.exit(f"imported: {', '.join(found)}" if found else 0)
"""


def test_no_module_of_the_core_imports_the_world():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_demos_are_registered_and_bring_their_true_edits():
    config = DemoConfig(width=64, height=32, frames=2)
    strip = registry.get("demo", "strip").thing(config, "paint it a bright colour")
    assert strip.answers.shape == (3, 1, 32, 64, 3)
    orbit = registry.get("demo", "orbit").thing(config, "paint it a bright colour")
    assert orbit.answers.shape == (3, 2, 32, 32, 3)
    assert orbit.is_video


def test_a_prompt_of_the_world_is_known_and_other_words_are_not():
    truth = text_truth("a red chair with yellow stripes")
    assert truth.shape_prompt("a red metal chair with yellow stripes, back view") == "a white chair, back view"
    assert "a blue chair with yellow stripes" in truth.distractors("a red chair with yellow stripes", 31, 0)
    assert truth.true_renders("a red chair", [0.0, 90.0], 30.0, 1, 8, 0).shape == (1, 2, 3, 8, 8)
    assert text_truth("a photograph of my cat") is None


def test_a_plugin_can_bring_another_truth(monkeypatch):
    registry.names("ground_truth")  # the world first
    monkeypatch.setitem(registry._entries, "ground_truth", dict(registry._entries["ground_truth"]))

    @registry.register("ground_truth", "cats")
    class Cats:
        def scene_truth(self, capture, prompt):
            return None

        def knows(self, prompt):
            return "cat" in prompt

    assert isinstance(text_truth("a photograph of my cat"), Cats)
    assert not isinstance(text_truth("a red chair"), Cats)


def test_a_truth_without_its_parts_is_refused():
    with pytest.raises(registry.InputError, match="lacks scene_truth"):
        registry.register("ground_truth", "none")(type("Nothing", (), {"knows": torch.tensor}))
