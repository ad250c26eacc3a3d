"""Typed sections: plain values (from YAML) as dataclasses, and the keys, types and comments that these have.

Conversion loses nothing: no text to number, no number to text, no bool to int. What does not fit raises `BadValue`,
with the dotted key that it stands at. A field can name a registered thing (`csd3d.registry`), which brings its own
keys:

    editors: Annotated[dict[str, Any], ByName("canvas_editor")] = field(default_factory=dict)
    editor: Annotated[Chosen, OneOf("canvas_editor", settings="editors")] = ...

    editor: ip2p                                    # with the settings that `editors` has for it, else its defaults
    editor: {type: ip2p, steps: 5}                  # these keys win over those in `editors`
    editors: {ip2p: {steps: 10}}
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, Union

from csd3d import registry
from csd3d.errors import InputError, closest

_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    type(None): "null",
}


class BadValue(Exception):
    """A value that does not fit, at a dotted key; load_config adds the file."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def incidental(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field that does not change what a run computes (device, previews, the report): a resumed run may change it."""
    given = {} if default_factory is dataclasses.MISSING else {"default_factory": default_factory}
    return (
        dataclasses.field(**given, metadata={"identity": False})
        if given
        else dataclasses.field(default=default, metadata={"identity": False})
    )


def path_key(default: str = "", identity: bool = True) -> Any:
    """A field with the path of a file or folder, or a name that may be one: a run's config.yaml has it absolute."""
    return dataclasses.field(default=default, metadata={"path": True, "identity": identity})


def with_paths(config: Any, change: Callable[[str], str]) -> Any:
    """The config with `change` of every `path_key`, wherever it stands."""
    if isinstance(config, Chosen):
        return dataclasses.replace(config, thing=with_paths(config.thing, change))
    if isinstance(config, dict):
        return {name: with_paths(item, change) for name, item in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(with_paths(item, change) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    values = {field: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    changed = {
        field.name: change(value)
        if field.metadata.get("path") and isinstance(value, str)
        else with_paths(value, change)
        for field, value in values.items()
    }
    return dataclasses.replace(config, **{n: v for n, v in changed.items() if v is not getattr(config, n)})


# ---------------------------------------------------------------------------------------------------- registered things


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a field (or the items of a list) whose value names something registered of `kind`, as a `Chosen`.

    settings: the field, declared before this one, with the settings by name (`ByName`).  also: names that are let
    through and stand for nothing registered ("all").  "NAME+suffix" is NAME; the suffix is the task's business.
    """

    kind: str
    settings: str = ""
    also: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ByName:
    """Marks a mapping from names of registered things of `kind` to their settings."""

    kind: str


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a `OneOf` field names: the `name` as it is written, and the registered dataclass with its settings."""

    name: str
    thing: Any = None


def choose(kind: str, name: str, **settings: Any) -> Chosen:
    """The registered thing `name`, with these settings; what `OneOf` fields have as defaults."""
    return Chosen(name, registry.get(kind, name.partition("+")[0]).thing(**settings))


def mark_of(annotation: Any) -> OneOf | ByName | None:
    """The OneOf or ByName that an annotation carries."""
    metadata = getattr(annotation, "__metadata__", ())
    return next((mark for mark in metadata if isinstance(mark, (OneOf, ByName))), None)


def _registered(mark: OneOf | ByName, name: str, key: str) -> type:
    try:
        return registry.get(mark.kind, name.partition("+")[0]).thing
    except InputError as error:
        raise BadValue(key, str(error)) from None


def _convert_chosen(value: Any, mark: OneOf, key: str, default: Any, beside: dict[str, Any]) -> Chosen:
    """`value`, a name or a section with `type`, as Chosen; its settings are based on those for that name."""
    given = {"type": value} if isinstance(value, str) else value
    name = given.get("type", getattr(default, "name", None)) if isinstance(given, dict) else None
    if not isinstance(name, str):
        raise BadValue(key, f"expected the name of one of {', '.join(registry.names(mark.kind))}, or a section "
                             f"with type: NAME and its keys, got {show(value)}")  # fmt: skip
    if name in mark.also:
        if set(given) - {"type"}:
            raise BadValue(join(key, next(iter(set(given) - {"type"}))), f"unknown key; {name} has none of its own")
        return Chosen(name)
    schema = _registered(mark, name, key)
    base = beside.get(mark.settings, {}).get(name.partition("+")[0])
    if base is None and isinstance(default, Chosen) and type(default.thing) is schema:
        base = default.thing
    return Chosen(name, build(schema, {k: v for k, v in given.items() if k != "type"}, key, base))


def _convert_by_name(value: Any, mark: ByName, key: str, default: Any) -> dict[str, Any]:
    """{name: settings} over the default's."""
    if not isinstance(value, dict):
        raise BadValue(key, f"expected sections named after {', '.join(registry.names(mark.kind))}")
    found = dict(default or {})
    for name, given in value.items():
        schema = _registered(mark, str(name), join(key, name))
        if not isinstance(given, (dict, type(None))):
            raise BadValue(join(key, name), f"expected a section with the keys of {name}, got {show(given)}")
        found[name] = build(schema, given or {}, join(key, name), found.get(name))
    return found


# ---------------------------------------------------------------------------------------------------------- converting


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(schema, include_extras=True)
    except NameError as error:
        where = f"{inspect.getsourcefile(schema)}: {schema.__name__}"
        raise InputError(f"{where}: the type of one of its fields is not known there ({error})") from None
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is none is its own."""
    if isinstance(mark_of(annotation), OneOf):
        return (str, annotation)
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def annotation_at(schema: type, key: str) -> Any:
    """The annotation of a dotted key, None where the schema has no such key."""
    annotation: Any = schema
    for name in key.split("."):
        mark = mark_of(annotation)
        if isinstance(mark, ByName):
            annotation = registry.get(mark.kind, name).thing if name in registry.names(mark.kind) else None
            continue
        if isinstance(mark, OneOf):  # whose keys depend on its type: the first that has such a key will do
            sections = [entry.thing for entry in registry.entries(mark.kind) if dataclasses.is_dataclass(entry.thing)]
            annotation = (
                str if name == "type" else next((hints_of(s)[name] for s in sections if name in hints_of(s)), None)
            )
            continue
        section = next((part for part in members(annotation) if dataclasses.is_dataclass(part)), None)
        if section is None:
            return None
        annotation = hints_of(section).get(name)
    return annotation


def build(schema: type, given: dict, key: str, base: Any) -> Any:
    """`schema` with the given keys, every other one from `base` (an instance) or from the field's default."""
    hints, values = hints_of(schema), {}
    for name in given:
        if name not in hints:
            raise BadValue(join(key, name), f"unknown key; {_nearest_key(schema, key, str(name))}")
    for field in dataclasses.fields(schema):
        default = getattr(base, field.name) if base is not None else default_of(field)
        if field.name in given:
            place = join(key, field.name)
            values[field.name] = convert(given[field.name], hints[field.name], place, default, values)
            if field.metadata.get("path"):
                _check_path(values[field.name], place)
        elif isinstance(default, Chosen) and default.thing is not None and mark_of(hints[field.name]) is not None:
            values[field.name] = _convert_chosen({}, mark_of(hints[field.name]), field.name, default, values)
        elif default is dataclasses.MISSING:
            raise BadValue(join(key, field.name), f"missing; expected {describe(hints[field.name])}")
        elif field.init:
            values[field.name] = default
    try:
        return schema(**values)
    except ValueError as error:
        raise BadValue(key, first_line(error)) from None


def _check_path(path: str, key: str) -> None:
    """BadValue for what no system call takes: functions of the standard library raise all kinds of errors then."""
    if "\0" in path or any(len(part.encode()) > 255 for part in path.split("/")) or len(path.encode()) > 4000:
        raise BadValue(key, f"{show(path)} cannot be a path: it is too long, or has a character that none has")
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise BadValue(key, f"{show(path)}: there is no such user, whose home this would be in")


def default_of(field: dataclasses.Field) -> Any:
    if not field.init:
        return None
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def convert(value: Any, annotation: Any, key: str, default: Any, beside: dict[str, Any] | None = None) -> Any:
    """`value` as `annotation`, or BadValue. Lossless only: no text to number, no number to text, no bool to int.

    `beside` are the values of the section's fields before this one, where a `OneOf` finds its settings.
    """
    mark = mark_of(annotation)
    if isinstance(mark, OneOf):
        return _convert_chosen(value, mark, key, default, beside or {})
    if isinstance(mark, ByName):
        return _convert_by_name(value, mark, key, default)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation, key, default)
    if dataclasses.is_dataclass(annotation) and (value is None or isinstance(value, dict)):
        return build(annotation, value or {}, key, default if dataclasses.is_dataclass(default) else None)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    if (origin or annotation) in (list, tuple) and isinstance(value, list):
        return _convert_sequence(value, origin or annotation, arguments, key, beside)
    if (origin or annotation) is dict and isinstance(value, dict):
        item = arguments[1] if arguments else Any
        return {str(name): convert(element, item, join(key, name), None) for name, element in value.items()}
    if annotation is Any:
        return value
    return _convert_scalar(value, annotation, key)


def _convert_scalar(value: Any, annotation: Any, key: str) -> Any:
    number = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and not (isinstance(value, float) and math.isnan(value))
    )
    if annotation is float and number and (isinstance(value, float) or abs(value) < 2**1023):
        return float(value)
    if annotation is int and number and not (isinstance(value, float) and math.isinf(value)) and int(value) == value:
        if not -(2**63) <= value < 2**63:
            raise BadValue(key, f"{show(value)} is too large: expected a whole number of 64 bits")
        return int(value)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if annotation in (bool, str, type(None)) and type(value) is annotation:
        return value
    raise BadValue(key, f"expected {describe(annotation)}, got {show(value)}")


def _convert_sequence(value: list, kind: type, items: tuple, key: str, beside: dict | None) -> list | tuple:
    fixed = kind is tuple and items and items[-1] is not Ellipsis
    if fixed and len(items) != len(value):
        raise BadValue(key, f"expected a list of {len(items)} values, got {len(value)}")
    annotations = items if fixed else [items[0] if items else Any] * len(value)
    pairs = enumerate(zip(value, annotations, strict=True))
    return kind(convert(v, a, f"{key}[{i}]", None, beside) for i, (v, a) in pairs)


def _convert_union(value: Any, annotation: Any, key: str, default: Any) -> Any:
    parts = members(annotation)
    exact = [part for part in parts if type(value) is part]  # 2 stays an int in `float | int`
    sections = [part for part in parts if dataclasses.is_dataclass(part)]
    if isinstance(value, dict) and len(sections) == 1:  # its own message says more than "expected a section or null"
        return convert(value, sections[0], key, default)
    for part in exact + list(parts):
        try:
            return convert(value, part, key, default)
        except BadValue:
            continue
    raise BadValue(key, f"expected {describe(annotation)}, got {show(value)}")


# ------------------------------------------------------------------------------------------------------------ messages


def join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def show(value: Any) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):  # a number of thousands of digits, which Python does not write
        text = hex(value) if isinstance(value, int) else f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe(annotation: Any) -> str:
    if mark := mark_of(annotation):
        one = "the name of a" if isinstance(mark, OneOf) else "sections named after each"
        return f"{one} {mark.kind} ({', '.join(registry.names(mark.kind))})"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if dataclasses.is_dataclass(annotation):
        return f"a section with the keys {', '.join(hints_of(annotation))}"
    if (origin or annotation) in (list, tuple):
        return f"a list of {describe(arguments[0])}" if arguments else "a list"
    return _NAMES.get(annotation, "a mapping" if (origin or annotation) is dict else str(annotation))


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for name, annotation in hints_of(schema).items():
        place = join(prefix, name)
        yield place
        if isinstance(mark := mark_of(annotation), ByName):
            for entry in registry.entries(mark.kind):
                yield from _all_keys(entry.thing, f"{place}.{entry.name}")
        for part in members(annotation):
            if dataclasses.is_dataclass(part):
                yield from _all_keys(part, place)


def nearest(name: str, known: Collection[str]) -> str:
    return f"did you mean {closest(name, known)}?" if known else "there are no keys here"


def _nearest_key(schema: type, section: str, name: str) -> str:
    """A neighbour spelt alike, else the same name in any section below, else the nearest neighbour."""
    known = [join(section, other) for other in _all_keys(schema)]
    beside = difflib.get_close_matches(name, list(hints_of(schema)), n=1, cutoff=0.6)
    if beside:
        return f"did you mean {join(section, beside[0])}?"
    below = [key for key in known if difflib.SequenceMatcher(None, key.rpartition(".")[2], name).ratio() > 0.8]
    return f"did you mean {below[0]}?" if below else nearest(join(section, name), known)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def plain(value: Any) -> Any:
    if isinstance(value, Chosen):
        return value.name if value.thing is None else {"type": value.name, **plain(value.thing)}
    if dataclasses.is_dataclass(value):
        return _settings_by_name(value, {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _settings_by_name(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A section as plain values, in which what `OneOf` fields chose is a name and its settings stand under it.

    A key has one place then: `editors.in2n.noise=shared` still acts on a run whose config.yaml has been written. What
    differs from the settings under its name (a second choice of it) keeps its own.
    """
    for field in dataclasses.fields(config):
        annotation = hints_of(type(config)).get(field.name)
        items = [annotation, *typing.get_args(annotation)]
        mark = next((m for m in map(mark_of, items) if isinstance(m, OneOf) and m.settings), None)
        if mark is None:
            continue
        known = values[mark.settings] = dict(values[mark.settings])

        def named(chosen: Any, known: dict[str, Any] = known) -> Any:
            if not isinstance(chosen, dict) or "type" not in chosen:
                return chosen
            settings = {key: value for key, value in chosen.items() if key != "type"}
            same = known.setdefault(chosen["type"].partition("+")[0], settings) == settings
            return chosen["type"] if same else chosen

        value = getattr(config, field.name)
        if isinstance(value, Chosen) and value.thing is not None:
            known[value.name.partition("+")[0]] = plain(value.thing)  # the main choice comes first
        shown = values[field.name]
        values[field.name] = [named(item) for item in shown] if isinstance(shown, list) else named(shown)
    return values
