"""Typed configs: YAML and `key.sub=value` overrides, merged onto the defaults of nested dataclasses.

OmegaConf parses and interpolates (`config_files`). The conversion is our own (`csd3d.convert`): OmegaConf's structured
configs support neither Literal nor lists in unions, and do not suggest a key for a mistyped one. Every mistake becomes
an InputError of one line: file (or "command line"), key, what was expected.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd3d import registry
from csd3d.config_files import check_interpolations, file_of, parse_value, read_config
from csd3d.convert import BadValue, build, convert, first_line, nearest
from csd3d.errors import InputError, InputErrors
from csd3d.schema import OneOf, annotation_at, hints_of, mark_of, members, plain, settings_of

Schema = TypeVar("Schema")


# ------------------------------------------------------------------------------------------------------------- reading


def task_name(path: str | Path, overrides: Collection[str], tasks: Collection[str]) -> str:
    """Return the `task` that a config names, one of `tasks`; InputError for anything else."""
    written = OmegaConf.to_container(read_config(path), resolve=False).get("task")
    given = dict(_split(text) for text in overrides)
    name, place = given.get("task", written), "command line" if "task" in given else file_of(path, "task")
    if not isinstance(name, str):
        raise InputError(f"{path}: task: missing; write task: NAME, one of {', '.join(sorted(tasks))}")
    if name not in tasks:
        raise InputError(
            f"{place}: task: unknown task {name!r}; {nearest(name, tasks)} Known: {', '.join(sorted(tasks))}"
        )
    return name


def load_config(path: str | Path, overrides: Collection[str], schema: type[Schema]) -> Schema:
    """Build `schema` from its defaults, then the YAML file, then overrides `key.sub=value`.

    Values of overrides are YAML, but taken literally for keys that hold text: `prompt=make it: red` needs no quotes.

    Raises:
        InputError: file unreadable or malformed, unknown key (with the nearest known one), wrong type, or refused by a
            `__post_init__`. Keys that have moved (`schema.MOVED`, old to new) are reported together, one a line.
    """
    tree = read_config(path)
    _check_moved(tree, overrides, path, schema)
    # types first, which decide about the keys of the file, not about those of the command line
    ordered = sorted(overrides, key=lambda text: not text.partition("=")[0].endswith(".type"))
    overridden = [_apply(tree, text, schema) for text in ordered]
    try:
        check_interpolations(tree)
        return build(schema, OmegaConf.to_container(tree, resolve=True), "", None)
    except BadValue as error:
        place = _place(path, overridden, schema, error.key, str(error))
        raise InputError(": ".join(filter(None, (place, error.key, str(error))))) from None
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or ""
        raise InputError(f"{_place(path, overridden, schema, key)}: {key}: {first_line(error)}") from None


def _place(path: str | Path, overridden: Collection[str], schema: type, key: str, message: str = "") -> str:
    """Where the value of `key` is from: the file, the command line, or both; for "", of the keys in the message."""
    dotted = re.sub(r"\[(\d+)\]", r".\1", key)  # an item is method[0] in messages, method.0 on the command line
    if any(f"{dotted}.".startswith(f"{o}.") for o in overridden):
        return "command line"
    file = file_of(path, key)
    named = set(re.findall(r"\w+", message))
    # a message about methods.cfd.fresh, or a method, may be about compare=[{type: cfd, fresh: 1}]
    sections = {name: settings_of(annotation) for name, annotation in hints_of(schema).items()}
    named |= {name for name, section in sections.items() if section and named & {section, section.removesuffix("s")}}
    both = (o.startswith(f"{dotted}.") if key else o.partition(".")[0] in named for o in overridden)
    return f"{file} + command line" if any(both) else str(file)


def _check_moved(tree: DictConfig, overrides: Collection[str], path: str | Path, schema: type) -> None:
    """Raise InputError with a line for each key of an earlier release."""
    lines = []
    moved = getattr(schema, "MOVED", {})
    for old, new in moved.items():
        if _holds(tree, old):
            lines.append(f"{file_of(path, old)}: {old}: {_moved(old, new)}")
        lines += [
            f"command line: {text}: {_moved(old, new)}"
            for text in overrides
            if re.match(rf"{re.escape(old)}[.=]", text)
        ]
    if lines:
        raise InputErrors(lines)
    fields = {field.name for field in dataclasses.fields(schema)}
    for section in {old.partition(".")[0] for old in moved} - fields:
        if section in tree.keys() and not OmegaConf.select(tree, section, throw_on_resolution_failure=False):  # noqa: SIM118
            del tree[section]  # its keys have been taken out, one by one


def _holds(tree: DictConfig, key: str) -> bool:
    """Whether a dotted key is there, be its value null."""
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(tree, section, throw_on_resolution_failure=False) if section else tree
    return isinstance(parent, DictConfig) and name in parent.keys()  # noqa: SIM118 (`in` resolves the value)


def _moved(old: str, new: str) -> str:
    return f"{old} is now {new}" if re.fullmatch(r"[\w.]+", new) else f"{old} is gone: {new}"


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise InputError(f"command line: {text!r} is not an override; write key.sub=value")
    return key, value


def _apply(tree: DictConfig, text: str, schema: type) -> str:
    """Put one override into the tree and return its key."""
    key, raw = _split(text)
    _open_sections(tree, key, schema)
    _check_items(tree, key)
    if key.endswith(".type"):
        _drop_keys_of_others(tree, key.removesuffix(".type"), raw, schema)
    try:
        OmegaConf.update(tree, key, _override_value(raw, key, annotation_at(schema, key)), merge=False)
    except InputError:
        raise
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise InputError(f"command line: {key}: {first_line(error)}") from None
    return key


def _above(tree: DictConfig, key: str) -> Iterator[tuple[str, Any, str]]:
    """Each place above a key, from the top: where it is, what the tree has there, the name that follows in the key."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        place = ".".join(parts[:count])
        yield place, OmegaConf.select(tree, place, throw_on_resolution_failure=False), parts[count]


def _open_sections(tree: DictConfig, key: str, schema: type) -> None:
    """Turn each name above `key` into a section: method.scale=5 after `method: nfsd` sets a key of that method."""
    for place, value, _ in _above(tree, key):
        if isinstance(value, str) and isinstance(mark_of(annotation_at(schema, place)), OneOf):
            OmegaConf.update(tree, place, {"type": value}, merge=False)


def _check_items(tree: DictConfig, key: str) -> None:
    """InputError where a name, or the number of an item that is not there, follows a list in `key`."""
    for place, value, item in _above(tree, key):
        if isinstance(value, ListConfig) and not (item.isdecimal() and int(item) < len(value)):
            has = f"items 0 to {len(value) - 1}" if value else "no items"
            raise InputError(f"command line: {key}: {place} is a list of {has}; give {place}=[…], or the number of one")


def _drop_keys_of_others(tree: DictConfig, place: str, name: str, schema: type) -> None:
    """Before a section becomes another thing: drop keys that only other things have, as `field` of a NeRF."""
    mark = mark_of(annotation_at(schema, place))
    section = OmegaConf.select(tree, place, throw_on_resolution_failure=False)
    if not isinstance(mark, OneOf) or not isinstance(section, DictConfig):
        return
    keys = {
        entry.name: {field.name for field in dataclasses.fields(entry.thing)}
        for entry in registry.entries(mark.kind)
        if dataclasses.is_dataclass(entry.thing)
    }
    own = keys.get(name, set())
    for key in set().union(*keys.values()) - own if own else ():
        section.pop(key, None)


def _override_value(raw: str, key: str, annotation: Any) -> Any:
    parts = members(annotation)
    names_a_thing = isinstance(mark_of(annotation), OneOf)  # for which {type: NAME} is a section, not text
    holds_text = str in parts or Path in parts or any(typing.get_origin(part) is Literal for part in parts)
    try:
        value = parse_value(raw, key)
        if names_a_thing or not holds_text or (isinstance(value, str) and raw[:1] in "\"'"):
            return value
        convert(value, annotation, "", None)
    except (InputError, BadValue, OmegaConfBaseException):
        if not holds_text:
            raise
        return raw
    return raw if isinstance(value, str) else value  # YAML would have dropped what follows a #


# ------------------------------------------------------------------------------------------------------------- writing


def to_dict(config: Any) -> dict[str, Any]:
    """Return the whole config as JSON-able values: paths as text, tuples as lists, chosen things with their `type`."""
    return json.loads(json.dumps(plain(config), default=str))


def _escape(value: Any) -> Any:
    """Escape `${`, and double the backslashes before it, so that OmegaConf reads texts back unchanged."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {name: _escape(item) for name, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value


def to_yaml(config: Any) -> str:
    """Return every key of a config as YAML, defaults included; load_config reads it back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config))))
