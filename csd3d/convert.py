"""Builds config dataclasses (`csd3d.schema`) from plain values, as YAML gives them.

Conversion is lossless: text never becomes a number, a number never text, a bool never an int. A value that does not fit
raises `BadValue` with its dotted key.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, Union

from csd3d import registry
from csd3d.errors import InputError, closest
from csd3d.schema import ByName, Chosen, OneOf, default_of, describe, hints_of, join, limits_of, mark_of, members, show

NULL = "a section cannot be null"
LARGEST = 1e9  # of a number without limits of its own; what computes with it does so in 32 bits


class BadValue(Exception):
    """A value that does not fit, at a dotted key; load_config adds the file."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def build(schema: type, given: dict, key: str, base: Any) -> Any:
    """Return `schema` with the given keys; every other one is from `base` (an instance) or the field's default.

    key: where the section stands. Raises BadValue for unknown keys and values that do not fit.
    """
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
                for path in values[field.name] if isinstance(values[field.name], list) else [values[field.name]]:
                    _check_path(path, place)
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
    """Raise BadValue for a text that no system call accepts; the standard library would raise many kinds of errors."""
    if "\0" in path or any(len(part.encode()) > 255 for part in path.split("/")) or len(path.encode()) > 4000:
        raise BadValue(key, f"{show(path)} cannot be a path: it is too long, or has a character that none has")
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise BadValue(key, f"{show(path)}: there is no such user, whose home this would be in")


# ---------------------------------------------------------------------------------------------------------- converting


def convert(value: Any, annotation: Any, key: str, default: Any, beside: dict[str, Any] | None = None) -> Any:
    """Return `value` as `annotation`, or raise BadValue.

    beside: the values of the section's earlier fields, where a `OneOf` finds its settings.
    """
    mark = mark_of(annotation)
    if isinstance(mark, OneOf):
        return _convert_chosen(value, mark, key, default, beside or {})
    if isinstance(mark, ByName):
        return _convert_by_name(value, mark, key, default)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if limits := limits_of(annotation):
        inner = arguments[0]  # without a limit of its own where it is float
        number = _convert_scalar(value, float, key, math.inf) if inner is float else convert(value, inner, key, default)
        if not limits.least <= number <= limits.most:
            raise BadValue(key, f"expected {describe(annotation)}, got {show(value)}")
        return number
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation, key, default)
    if dataclasses.is_dataclass(annotation) and value is None:
        raise BadValue(key, f"{NULL}; for the defaults leave {key} out, else give {describe(annotation)}")
    if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        return build(annotation, value, key, default if dataclasses.is_dataclass(default) else None)
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


def _convert_scalar(value: Any, annotation: Any, key: str, most: float = LARGEST) -> Any:
    number = type(value) in (int, float) and value == value  # neither a bool nor NaN
    if annotation is float and number and (isinstance(value, float) or abs(value) < 2**1023):
        if abs(value) > most:
            raise BadValue(key, f"expected a number from {-LARGEST:g} to {LARGEST:g}, got {show(value)}")
        return float(value)
    if annotation is int and number and abs(value) != math.inf and int(value) == value:
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
    out_of_range = None
    for part in exact + list(parts):
        try:
            return convert(value, part, key, default)
        except BadValue as error:
            if part is float and type(value) in (int, float) and value == value:  # not NaN
                out_of_range = error  # which says more than "expected a number or null"
    if out_of_range:
        raise out_of_range
    raise BadValue(key, f"expected {describe(annotation)}, got {show(value)}")


# ---------------------------------------------------------------------------------------------------- registered things


def _registered(mark: OneOf | ByName, name: str, key: str) -> type:
    also, (base, plus, _) = getattr(mark, "also", ()), name.partition("+")
    if plus and base in also:
        raise BadValue(key, f"{show(name)}: {base} stands by itself; leave out what follows it")
    try:
        return registry.get(mark.kind, base, also=also).thing
    except InputError as error:
        raise BadValue(key, str(error)) from None


def _convert_chosen(value: Any, mark: OneOf, key: str, default: Any, beside: dict[str, Any]) -> Chosen:
    """Return `value`, a name or a section with `type`, as Chosen; keys not given are from `beside` or the default."""
    given = {"type": value} if isinstance(value, str) else value
    name = given.get("type", getattr(default, "name", None)) if isinstance(given, dict) else None
    if not isinstance(name, str):
        raise BadValue(key, f"expected the name of one of {', '.join(registry.names(mark.kind))}, or a section "
                             f"with type: NAME and its keys, got {show(value)}")  # fmt: skip
    settings = {k: v for k, v in given.items() if k != "type"}
    if name in mark.also:
        if settings:
            raise BadValue(join(key, next(iter(settings))), f"unknown key; {name} has none of its own")
        return Chosen(name)
    schema = _registered(mark, name, key)
    base = beside.get(mark.settings, {}).get(name.partition("+")[0])
    if base is None and isinstance(default, Chosen) and type(default.thing) is schema:
        base = default.thing
    return Chosen(name, build(schema, settings, key, base))


def _convert_by_name(value: Any, mark: ByName, key: str, default: Any) -> dict[str, Any]:
    """Return {name: settings}, each over those of the default."""
    if not isinstance(value, dict):
        raise BadValue(key, f"expected sections named after {', '.join(registry.names(mark.kind))}")
    found = dict(default or {})
    for name, given in value.items():
        schema = _registered(mark, str(name), join(key, name))
        if given is None:
            raise BadValue(join(key, name), f"{NULL}; for the defaults of {name} leave {join(key, name)} out")
        if not isinstance(given, dict):
            raise BadValue(join(key, name), f"expected a section with the keys of {name}, got {show(given)}")
        found[name] = build(schema, given, join(key, name), found.get(name))
    return found


# ------------------------------------------------------------------------------------------------------------ messages


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def nearest(name: str, known: Collection[str]) -> str:
    """Return a hint that names the known key or name most like `name`."""
    return f"did you mean {closest(name, known)}?" if known else "there are no keys here"


def _nearest_key(schema: type, section: str, name: str) -> str:
    """Return a hint: a similar key of the section, else a similar one in any section below, else the nearest at all."""
    known = [join(section, other) for other in _all_keys(schema)]
    beside = difflib.get_close_matches(name, list(hints_of(schema)), n=1, cutoff=0.6)
    if beside:
        return f"did you mean {join(section, beside[0])}?"
    below = [key for key in known if difflib.SequenceMatcher(None, key.rpartition(".")[2], name).ratio() > 0.8]
    return f"did you mean {below[0]}?" if below else nearest(join(section, name), known)


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
