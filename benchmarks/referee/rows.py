"""The rows of the referee's tables: read from rows.yaml, and made into editors with their keys."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.lines import as_text, merged
from csd3d.config_files import read_config
from csd3d.editors.scene import SceneEditor
from csd3d.errors import InputError
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
    """The rows of a file, by name; InputError that names the row and the key for what is no row."""
    tree = OmegaConf.to_container(read_config(path), resolve=False)
    for name, given in tree.items():
        _check(given, f"{path}: {name}", tree)
    return {name: Row(name, **given | {"trials": tuple(given.get("trials", ()))}) for name, given in tree.items()}


KINDS = {"title": str, "editor": dict, "trials": list, "of": str, "attention": bool, "free": bool}


def _check(given: Any, where: str, tree: Mapping[str, Any]) -> None:
    """Raise InputError unless this is a row, whose keys have the right types; the editor's own are checked later."""
    for key, value in given.items() if isinstance(given, dict) else ():
        if key not in KINDS:
            raise InputError(f"{where}.{key}: unknown key; a row has {', '.join(KINDS)}")
        if not isinstance(value, KINDS[key]):
            raise InputError(f"{where}.{key}: {value!r:.60}; expected a {KINDS[key].__name__}")
    if not isinstance(given, dict) or not {"title", "editor"} <= set(given):
        raise InputError(f"{where}: expected a row with title and editor, see docs/referee.md")
    odd = next((trial for trial in given.get("trials", ()) if not isinstance(trial, dict)), None)
    if odd is not None:
        raise InputError(f"{where}.trials: {odd!r:.60}; expected keys of the editor")
    if len({as_text(trial) for trial in given.get("trials", ())}) < len(given.get("trials", ())):
        raise InputError(f"{where}.trials: one stands there twice; expected different ones")
    if "of" not in given and not isinstance(given["editor"].get("type"), str):
        raise InputError(f"{where}.editor: has no type; expected the name of an editor")
    base = tree.get(given.get("of"))
    if "of" in given and (not isinstance(base, dict) or "of" in base or given.get("trials")):
        raise InputError(f"{where}.of: {given['of']!r:.60}; expected a row that is no ablation, and no trials here")


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
