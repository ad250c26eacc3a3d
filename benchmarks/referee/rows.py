"""The rows of the referee's tables: read from rows.yaml, and made into editors with their keys."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lines import merged
from csd3d.editors.scene import SceneEditor
from csd3d.run import read

HERE = Path(__file__).parent
FILE = HERE / "rows.yaml"  # of scenes
FILES = {"": FILE, "strip": HERE / "strip_rows.yaml", "orbit": HERE / "video_rows.yaml"}  # by what a level edits
CONFIG = Path(__file__).parents[2] / "configs" / "csd-edit-scene.yaml"


@dataclass(frozen=True)
class Row:
    """A row; see rows.yaml."""

    name: str
    title: str
    editor: Mapping[str, Any]
    trials: tuple[Mapping[str, Any], ...] = ()
    of: str = ""
    attention: bool = False
    free: bool = False

    def keys(self, trial: Mapping[str, Any]) -> dict[str, Any]:
        """The editor's keys with those of a trial."""
        return merged(self.editor, trial)


def read_rows(path: Path = FILE) -> dict[str, Row]:
    """The rows of a file, by name."""
    tree = yaml.safe_load(path.read_text())
    rows = {}
    for name, given in tree.items():
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        rows[name] = Row(name, **given)
    return rows


@cache
def editor_of(keys: str) -> SceneEditor:
    """The editor with these keys, in JSON, for views alone: its rounds follow each other without a fit between them.

    Raises InputError for keys that are wrong.
    """
    config = read(CONFIG, [f"editor={keys}", "compare=[]", "editors={}"])
    editor = config.editor.thing
    return replace(editor, edit_every=1) if hasattr(editor, "edit_every") else editor


def count_updates(editor: SceneEditor, views: int) -> int:
    """The number of updates that make the editor's whole edit, on views alone."""
    if hasattr(editor, "edits_per_view"):
        return max(1, round((editor.edits_per_view or 1) * views))
    return getattr(editor, "rounds", 1)
