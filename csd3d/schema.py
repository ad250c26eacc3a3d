"""What the fields of config dataclasses say about themselves: types, paths, identity, registered things.

A field can have bounds, which every value from a config is checked against before any work is done:

    levels: Annotated[int, Within(1, 64)] = 12

A field can name a registered thing (`csd3d.registry`), which has keys of its own:

    editors: Annotated[dict[str, Any], ByName("canvas_editor")] = field(default_factory=dict)
    editor: Annotated[Chosen, OneOf("canvas_editor", settings="editors")] = ...

    editor: ip2p                                    # with its settings from `editors`, else its defaults
    editor: {type: ip2p, steps: 5}                  # these keys win over those in `editors`
    editors: {ip2p: {steps: 10}}

`csd3d.convert` builds such dataclasses from YAML.
"""

import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from csd3d import registry
from csd3d.errors import InputError

_NAMES = {  # one, many
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    Path: ("a path", "paths"),
    type(None): ("null", "null"),
    dict: ("a mapping", "mappings"),
    list: ("a list", "lists"),
    tuple: ("a list", "lists"),
}


def incidental(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field that does not change what a run computes (device, previews, the report): a resumed run may change it."""
    return dataclasses.field(default=default, default_factory=default_factory, metadata={"identity": False})


def counted_as(counts: Callable[[Any], Any], default: Any) -> Any:
    """A field that a checkpoint's identity has as `counts(value)`; it is left out where that is None."""
    return dataclasses.field(default=default, metadata={"identity": counts})


def path_key(default: str = "", identity: bool = True, made: bool = False) -> Any:
    """A field with the path of a file or folder, or a name that may be one: a run's config.yaml has it absolute.

    made: csd3d makes the folder, so it need not exist.
    """
    return dataclasses.field(default=default, metadata={"path": True, "identity": identity, "made": made})


def path_keys() -> Any:
    """A field with a list of such paths, each with or without ":NUMBER" behind; the files count by what is opened."""
    return dataclasses.field(default_factory=list, metadata={"path": True, "identity": False, "made": False})


@dataclasses.dataclass(frozen=True)
class Within:
    """Marks a number that must be at least `least` and at most `most`."""

    least: float
    most: float


MOST_STEPS = 10_000_000
Steps = Annotated[int, Within(1, MOST_STEPS)]  # of a loop, or between two events in it
Share = Annotated[float, Within(0, 1)]
Amount = Annotated[float, Within(0, 1_000_000)]  # a weight, a length, a duration
Rate = Annotated[float, Within(1e-9, 1000)]  # a learning rate


# ---------------------------------------------------------------------------------------------------- registered things


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a field (or the items of a list) that names a registered thing; its value is a `Chosen`.

    In "NAME+suffix" only NAME is looked up; the task decides what the suffix means.
    """

    kind: str  # of the registry
    settings: str = ""  # the `ByName` field with the settings by name; it must be declared before this field
    also: tuple[str, ...] = ()  # names that are accepted without being registered, such as "all"


@dataclasses.dataclass(frozen=True)
class ByName:
    """Marks a mapping from names of registered things of `kind` to their settings."""

    kind: str


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The value of a `OneOf` field: the `name` as written, and the registered dataclass with its settings."""

    name: str
    thing: Any = None


def choose(kind: str, name: str, **settings: Any) -> Chosen:
    """Return the registered thing `name` with these settings: the default of a `OneOf` field."""
    return Chosen(name, registry.get(kind, name.partition("+")[0]).thing(**settings))


def by_name(chosen: Iterable[Chosen]) -> dict[str, Chosen]:
    """Return {name: chosen} in order; ValueError if a name occurs twice with different settings."""
    found: dict[str, Chosen] = {}
    for one in chosen:
        if found.setdefault(one.name, one) != one:
            raise ValueError(f"{one.name} is named twice, with other settings: call one {one.name}+other")
    return found


def mark_of(annotation: Any) -> OneOf | ByName | None:
    """Return the OneOf or ByName that an annotation carries, if any."""
    metadata = getattr(annotation, "__metadata__", ())
    return next((mark for mark in metadata if isinstance(mark, (OneOf, ByName))), None)


def settings_of(annotation: Any) -> str:
    """Return the name of the field that has the settings of what a `OneOf` field, or a list of such, names; else ""."""
    marks = map(mark_of, (annotation, *typing.get_args(annotation)))
    return next((mark.settings for mark in marks if isinstance(mark, OneOf)), "")


def limits_of(annotation: Any) -> Within | None:
    """Return the bounds that an annotation carries, if any."""
    return next((mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Within)), None)


# --------------------------------------------------------------------------------------------------------------- types


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """Return the annotations of a dataclass by field name; InputError where one of them cannot be resolved."""
    try:
        hints = typing.get_type_hints(schema, include_extras=True)
    except Exception as error:  # whatever an annotation that is a text raises
        where = f"{inspect.getsourcefile(schema)}: {schema.__name__}"
        raise InputError(f"{where}: the type of one of its fields is not known there ({error})") from None
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union; of any other type a tuple of that type alone."""
    if isinstance(mark_of(annotation), OneOf):
        return (str, annotation)
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def section_of(annotation: Any) -> type | None:
    """Return the dataclass among the alternatives of an annotation, if any."""
    return next((part for part in members(annotation) if dataclasses.is_dataclass(part)), None)


def annotation_at(schema: type, key: str) -> Any:
    """Return the annotation of a dotted key, None if the schema has no such key."""
    annotation: Any = schema
    for name in key.split("."):
        mark = mark_of(annotation)
        if isinstance(mark, ByName):
            annotation = registry.get(mark.kind, name).thing if name in registry.names(mark.kind) else None
        elif isinstance(mark, OneOf):  # its keys depend on its type, unknown here: take the first that has this key
            sections = [entry.thing for entry in registry.entries(mark.kind) if dataclasses.is_dataclass(entry.thing)]
            found = (hints_of(section)[name] for section in sections if name in hints_of(section))
            annotation = str if name == "type" else next(found, None)
        else:
            section = section_of(annotation)
            annotation = hints_of(section).get(name) if section else None
    return annotation


def default_of(field: dataclasses.Field) -> Any:
    """Return a field's default, MISSING if it has none."""
    if not field.init:
        return None
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def describe(annotation: Any, many: bool = False) -> str:
    """Say in words what a key takes: "a number or null", "a list of texts"; `many`: in the plural."""
    if mark := mark_of(annotation):
        one = f"{'names' if many else 'the name'} of a" if isinstance(mark, OneOf) else "sections named after each"
        return f"{one} {mark.kind} ({', '.join(registry.names(mark.kind))})"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if limits := limits_of(annotation):
        return f"{describe(arguments[0], many)} from {limits.least} to {limits.most}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part, many) for part in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if dataclasses.is_dataclass(annotation):
        return f"{'sections' if many else 'a section'} with the keys {', '.join(hints_of(annotation))}"
    name = _NAMES.get(origin or annotation, (str(annotation),) * 2)[many]
    if origin not in (list, tuple):
        return name
    fixed = f"{len(arguments)} " if origin is tuple and arguments[-1] is not Ellipsis else ""
    return f"{name} of {fixed}{describe(arguments[0], many=True)}"


def join(key: str, name: Any) -> str:
    """Return the dotted key of `name` in the section `key` ("" is the top level)."""
    return f"{key}.{name}" if key else str(name)


# ------------------------------------------------------------------------------------------------------------- writing


def show(value: Any) -> str:
    """Return a value as JSON, cut to 60 characters."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):  # a number of thousands of digits, which Python does not write
        text = hex(value) if isinstance(value, int) else f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: Any) -> Any:
    """Return a config as dicts and lists; a `Chosen` becomes its name, or {type: name} with its settings."""
    if isinstance(value, Chosen):
        return value.name if value.thing is None else {"type": value.name, **plain(value.thing)}
    if dataclasses.is_dataclass(value):
        return _settings_by_name(value, {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _settings_by_name(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Move the settings of what `OneOf` fields chose to the `ByName` field, and leave the name in their place.

    Each setting then stands in one place, so `editors.in2n.noise=shared` still acts on a run's config.yaml. A second
    choice of the same thing keeps its settings if they differ.
    """
    for field in dataclasses.fields(config):
        section = settings_of(hints_of(type(config)).get(field.name))
        if not section:
            continue
        known = values[section] = dict(values[section])
        value = getattr(config, field.name)
        if isinstance(value, Chosen) and value.thing is not None:
            known[value.name.partition("+")[0]] = plain(value.thing)  # the main choice comes first
        values[field.name] = _named(values[field.name], known)
    return values


def _named(chosen: Any, known: dict[str, Any]) -> Any:
    """Return the name of each {type: name, **settings} whose settings are in `known`, or can be added there."""
    if isinstance(chosen, list):
        return [_named(item, known) for item in chosen]
    if not isinstance(chosen, dict) or "type" not in chosen:
        return chosen
    settings = {key: value for key, value in chosen.items() if key != "type"}
    same = known.setdefault(chosen["type"].partition("+")[0], settings) == settings
    return chosen["type"] if same else chosen
