"""Tables of keys: what a config, a method or an editor can be told, from its fields and the comments beside them."""

import dataclasses
import inspect
import re

from csd3d.schema import default_of, describe, hints_of, join, mark_of, members, plain, show


@dataclasses.dataclass(frozen=True)
class Key:
    """A row of a table of keys: dotted name, what it takes, its default as YAML has it, and what it is."""

    name: str
    takes: str
    default: str
    about: str


def key_table(schema: type, prefix: str = "") -> list[Key]:
    """Every key of a config, in order, with the comment that stands beside its field (or right above it)."""
    hints, comments, rows = hints_of(schema), _comments(schema), []
    for field in dataclasses.fields(schema):
        if not field.init or (field.name == "task" and not prefix):  # a task's own name, which is fixed
            continue
        name, annotation = join(prefix, field.name), hints[field.name]
        default = default_of(field)
        section = next((part for part in members(annotation) if dataclasses.is_dataclass(part)), None)
        if section not in (None, annotation) and default is not None:  # it can be null
            rows.append(Key(name, describe(annotation), "{…}", comments.get(field.name, "")))
        if section is not None and mark_of(annotation) is None and default is not None:
            rows += key_table(section, name)
            continue
        shown = "" if default is dataclasses.MISSING else show(plain(default))
        rows.append(Key(name, describe(annotation), shown, comments.get(field.name, "")))
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
