"""Tables of config keys, made from the fields of configs, methods and editors and from the comments beside them."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from csd3d import registry
from csd3d.schema import Chosen, default_of, describe, hints_of, join, mark_of, plain, section_of, show

DOCUMENTED = {  # the kinds in docs/keys.md, and their headings
    "task": "Tasks",
    "method": "Methods: `methods.NAME`, or `method: {type: NAME, …}`",
    "canvas_editor": "Editors of pictures, panoramas and videos: `editors.NAME`",
    "scene_editor": "Editors of scenes: `editors.NAME`",
    "representation": "Representations: `representation` of scenes, `asset.representation` of text to 3D",
    "reader": "Readers of captures: `scene.reader: {type: NAME, …}`",
}
ABOUT = """# Keys

Every key of csd3d with its default, made from the comments in the source. Do not edit: `csd3d keys --markdown >
docs/keys.md` writes this file. `csd3d keys NAME` shows one table, also of what a plugin registers.
"""
_BAR = r"\|"  # a | inside a cell of a Markdown table


@dataclasses.dataclass(frozen=True)
class Key:
    """A row of a table of keys: dotted name, type in words, default as YAML, and the comment beside the field."""

    name: str
    takes: str
    default: str
    about: str

    @property
    def text(self) -> str:
        """The comment and, unless that makes it long, the type; of numbers also their bounds."""
        short = len(self.takes) < 20 or self.takes.startswith(("a whole number from", "a number from"))
        return f"{self.about} ({self.takes})" if self.about and short else self.about or self.takes


def key_table(schema: type, prefix: str = "", base: Any = None) -> list[Key]:
    """Return every key of a config, in order. Defaults are those of the instance `base`, if given, else of the fields.

    Sections are listed key by key. Of a registered thing that is chosen by name, only the settings whose defaults
    differ from its own are listed.
    """
    hints, comments, rows = hints_of(schema), _comments(schema), []
    for field in dataclasses.fields(schema):
        if not field.init or (field.name == "task" and not prefix):  # a task's own name, which is fixed
            continue
        name, annotation = join(prefix, field.name), hints[field.name]
        default = default_of(field) if base is None else getattr(base, field.name)
        section = section_of(annotation)
        listed = section is not None and mark_of(annotation) is None
        if section not in (None, annotation) and (listed or default is not None):  # it can be null
            shown = "null" if default is None else "{…}"
            rows.append(Key(name, describe(annotation), shown, comments.get(field.name, "")))
        if listed:
            rows += key_table(section, name, default if isinstance(default, section) else None)
            continue
        chosen = default if isinstance(default, Chosen) else None
        shown = "" if default is dataclasses.MISSING else show(chosen.name if chosen else plain(default))
        rows.append(Key(name, describe(annotation), shown, comments.get(field.name, "")))
        if chosen and chosen.thing is not None:
            own = key_table(type(chosen.thing), name)
            rows += [key for key in key_table(type(chosen.thing), name, chosen.thing) if key not in own]
    return rows


def _comments(schema: type) -> dict[str, str]:
    """The comment beside each field, or the one right above it, from the source of the class and of its bases."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        try:
            lines = inspect.getsource(owner).splitlines() if dataclasses.is_dataclass(owner) else []
        except (OSError, TypeError):
            continue
        above: list[str] = []
        for line in lines:
            field = re.match(r"    (\w+): [^#]*(?:#\s*(.+))?$", line)
            if field:
                found[field[1]] = (field[2] or " ".join(above)).strip()
            comment = re.match(r"    #\s*(.+)", line)
            above = [*above, comment[1]] if comment else []
    return found


# -------------------------------------------------------------------------------------------------------- docs/keys.md


def markdown() -> str:
    """Return the text of docs/keys.md: the keys of all tasks, methods, editors, representations and readers."""
    return "\n".join([ABOUT, *(line for kind in DOCUMENTED for line in _tables(kind))])


def _tables(kind: str) -> Iterator[str]:
    # plugins register things too, and tests do; the order of registration depends on what was imported first
    entries = [entry for entry in registry.entries(kind) if entry.thing.__module__.startswith("csd3d.")]
    tables = {entry: key_table(entry.thing) for entry in sorted(entries, key=lambda entry: entry.name)}
    yield f"## {DOCUMENTED[kind]}\n"
    if bare := [f"`{entry.name}`" for entry, keys in tables.items() if not keys]:
        yield f"Without keys: {', '.join(bare)}.\n"
    for entry, keys in tables.items():
        if keys:
            yield f"### {entry.name}: {entry.title}\n\n| key | default | |\n|---|---|---|"
            for key in keys:
                default = f"`{key.default}`" if key.default else ""
                cells = (f"`{key.name}`", default, re.sub(r"([*<])", r"\\\1", key.text))
                yield f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |"
            yield ""
