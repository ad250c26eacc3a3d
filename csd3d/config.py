"""Typed configs: YAML and `key.sub=value` overrides, merged onto the defaults of nested dataclasses.

OmegaConf parses and interpolates (`${seed}`); the conversion is our own, since its structured configs know neither
Literal, nor lists in unions, nor which keys are near a mistyped one. Every mistake becomes an InputError of one line:
file (or "command line"), key, what was expected.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd3d.errors import InputError

Schema = TypeVar("Schema")
MAX_BYTES = 1 << 20
CONFIGS = Path(__file__).parents[1] / "configs"
_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    type(None): "null",
}


class _BadValue(Exception):
    """A value that does not fit, at a dotted key; load_config adds the file."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


# ------------------------------------------------------------------------------------------------------------- reading


def read_config(path: str | Path) -> DictConfig:
    """Parses a YAML file to an OmegaConf tree; InputError when missing, too large or malformed (which line).

    `base: NAME.yaml` names a file of the same folder whose keys hold wherever this one says nothing; lists are replaced
    whole. A base has no base of its own.
    """
    tree = _parse(path)
    base = _base_of(path, tree)
    if base is None:
        return tree
    below = _parse(base)
    if "base" in below:
        raise InputError(f"{base}: base: a base has none of its own; put its keys into {base.name}")
    del tree["base"]
    return OmegaConf.merge(below, tree)


def _parse(path: str | Path) -> DictConfig:
    try:
        too_large = Path(path).stat().st_size > MAX_BYTES
        tree = OmegaConf.create("" if too_large else Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file{_others(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a UTF-8 text file ({_first_line(error)})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {_yaml_problem(error)}") from None
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        key = getattr(error, "full_key", None)
        raise InputError(f"{path}: {key}: {_first_line(error)}" if key else f"{path}: {_first_line(error)}") from None
    if too_large:
        raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which no config is; pass a YAML file")
    if not isinstance(tree, DictConfig):
        raise InputError(f"{path}: expected `key: value` lines at the top level, got a {type(tree).__name__}")
    return tree


def _others(path: Path) -> str:
    """The config that a missing one was perhaps meant to be, and the names of those that come with csd3d."""
    shipped = list_configs()
    known = {file.stem: file for file in [*sorted(path.parent.glob("*.yaml")), *shipped]}
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.6)
    guess = f"; did you mean {_shortest(known[near[0]])}?" if near else ";"
    return f"{guess} {CONFIGS.name}/ has {', '.join(file.stem for file in shipped)}" if shipped else guess.rstrip(";")


def _shortest(path: Path) -> str:
    """A path as a user in the current folder writes it."""
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative


def list_configs() -> list[Path]:
    """The configs that come with a checkout of csd3d, which is how it is installed."""
    return sorted(CONFIGS.glob("*.yaml"))


def _base_of(path: str | Path, tree: DictConfig) -> Path | None:
    """The file that `base` names, None without one."""
    name = OmegaConf.to_container(tree, resolve=False).get("base")
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(f"{path}: base: {name!r} is no file name; name a config of the same folder")
    return Path(path).parent / name


def _file_of(path: str | Path, key: str) -> str | Path:
    """The file that says `key`: the base where it alone does, else the one given."""
    base = _base_of(path, tree := _parse(path))
    if base is None or _says(tree, key) or not _says(_parse(base), key):
        return path
    return base


def _says(tree: DictConfig, key: str) -> bool:
    return OmegaConf.select(tree, key, throw_on_resolution_failure=False) is not None


def task_name(path: str | Path, overrides: Collection[str], tasks: Collection[str]) -> str:
    """The `task` a config names, one of `tasks`; it decides which schema load_config is given."""
    written = OmegaConf.to_container(read_config(path), resolve=False).get("task")
    name = dict(_split(text) for text in overrides).get("task", written)
    if not isinstance(name, str):
        raise InputError(f"{path}: task: missing; write task: NAME, one of {', '.join(sorted(tasks))}")
    if name not in tasks:
        raise InputError(
            f"{path}: task: unknown task {name!r}; {_nearest(name, tasks)} Known: {', '.join(sorted(tasks))}"
        )
    return name


def load_config(path: str | Path, overrides: Collection[str], schema: type[Schema]) -> Schema:
    """Builds `schema` from its defaults, then the YAML file, then overrides `key.sub=value`.

    Values of overrides are YAML, except that keys which hold text take theirs literally: `prompt=make it: red` needs no
    quotes.

    Raises:
        InputError: file unreadable or malformed, unknown key (naming the nearest known one), wrong type, or refused by
            a `__post_init__`.
    """
    tree = read_config(path)
    overridden = [_apply(tree, text, schema) for text in overrides]

    def source(key: str) -> str:
        if any(f"{key}.".startswith((f"{o}.", f"{o}[")) for o in overridden):
            return "command line"
        file = _file_of(path, key)
        return f"{file} + command line" if any(o.startswith(f"{key}.") for o in overridden) else str(file)

    try:
        return _build(schema, OmegaConf.to_container(tree, resolve=True), "", None)
    except _BadValue as error:
        raise InputError(": ".join(filter(None, (source(error.key), error.key, str(error))))) from None
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or ""
        raise InputError(f"{source(key)}: {key}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or _first_line(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise InputError(f"command line: {text!r} is not an override; write key.sub=value")
    return key, value


def _apply(tree: DictConfig, text: str, schema: type) -> str:
    """Puts one override into the tree; returns its key."""
    key, raw = _split(text)
    try:
        OmegaConf.update(tree, key, _override_value(raw, _annotation_at(schema, key)), merge=False)
    except yaml.YAMLError as error:
        raise InputError(f"command line: {key}: {_yaml_problem(error)}") from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise InputError(f"command line: {key}: {_first_line(error)}") from None
    return key


def _override_value(raw: str, annotation: Any) -> Any:
    parts = _members(annotation)
    holds_text = str in parts or Path in parts or any(typing.get_origin(part) is Literal for part in parts)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)["value"]
        if not holds_text or (isinstance(value, str) and raw[:1] in "\"'"):
            return value
        _convert(value, annotation, "", None)
    except (yaml.YAMLError, _BadValue, OmegaConfBaseException):
        if not holds_text:
            raise
        return raw
    return raw if isinstance(value, str) else value  # YAML would have dropped what follows a #


# ---------------------------------------------------------------------------------------------------------- converting


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is none is its own."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _annotation_at(schema: type, key: str) -> Any:
    """The annotation of a dotted key, None where the schema has no such key."""
    annotation: Any = schema
    for name in key.split("."):
        section = next((part for part in _members(annotation) if dataclasses.is_dataclass(part)), None)
        if section is None:
            return None
        annotation = _hints(section).get(name)
    return annotation


def _build(schema: type, given: dict, key: str, base: Any) -> Any:
    """`schema` with the given keys, every other one from `base` (an instance) or from the field's default."""
    hints, values = _hints(schema), {}
    for name in given:
        if name not in hints:
            raise _BadValue(_join(key, name), f"unknown key; {_nearest_key(schema, key, str(name))}")
    for field in dataclasses.fields(schema):
        default = getattr(base, field.name) if base is not None else _default(field)
        if field.name in given:
            values[field.name] = _convert(given[field.name], hints[field.name], _join(key, field.name), default)
        elif default is dataclasses.MISSING:
            raise _BadValue(_join(key, field.name), f"missing; expected {_describe(hints[field.name])}")
        elif field.init:
            values[field.name] = default
    try:
        return schema(**values)
    except ValueError as error:
        raise _BadValue(key, _first_line(error)) from None


def _default(field: dataclasses.Field) -> Any:
    if not field.init:
        return None
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _convert(value: Any, annotation: Any, key: str, default: Any) -> Any:
    """`value` as `annotation`, or _BadValue. Lossless only: no text to number, no number to text, no bool to int."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation, key, default)
    if dataclasses.is_dataclass(annotation) and (value is None or isinstance(value, dict)):
        return _build(annotation, value or {}, key, default if dataclasses.is_dataclass(default) else None)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    if (origin or annotation) in (list, tuple) and isinstance(value, list):
        return _convert_sequence(value, origin or annotation, arguments, key)
    if (origin or annotation) is dict and isinstance(value, dict):
        item = arguments[1] if arguments else Any
        return {str(name): _convert(element, item, _join(key, name), None) for name, element in value.items()}
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
    if annotation is int and number and math.isfinite(value) and int(value) == value:
        return int(value)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if annotation in (bool, str, type(None)) and type(value) is annotation:
        return value
    raise _BadValue(key, f"expected {_describe(annotation)}, got {_show(value)}")


def _convert_sequence(value: list, kind: type, items: tuple, key: str) -> list | tuple:
    fixed = kind is tuple and items and items[-1] is not Ellipsis
    if fixed and len(items) != len(value):
        raise _BadValue(key, f"expected a list of {len(items)} values, got {len(value)}")
    annotations = items if fixed else [items[0] if items else Any] * len(value)
    return kind(_convert(v, a, f"{key}[{i}]", None) for i, (v, a) in enumerate(zip(value, annotations, strict=True)))


def _convert_union(value: Any, annotation: Any, key: str, default: Any) -> Any:
    members = _members(annotation)
    exact = [part for part in members if type(value) is part]  # 2 stays an int in `float | int`
    sections = [part for part in members if dataclasses.is_dataclass(part)]
    if isinstance(value, dict) and len(sections) == 1:  # its own message says more than "expected a section or null"
        return _convert(value, sections[0], key, default)
    for part in exact + list(members):
        try:
            return _convert(value, part, key, default)
        except _BadValue:
            continue
    raise _BadValue(key, f"expected {_describe(annotation)}, got {_show(value)}")


# ------------------------------------------------------------------------------------------------------------ messages


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if dataclasses.is_dataclass(annotation):
        return f"a section with the keys {', '.join(_hints(annotation))}"
    if (origin or annotation) in (list, tuple):
        return f"a list of {_describe(arguments[0])}" if arguments else "a list"
    return _NAMES.get(annotation, "a mapping" if (origin or annotation) is dict else str(annotation))


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for name, annotation in _hints(schema).items():
        yield _join(prefix, name)
        for part in _members(annotation):
            if dataclasses.is_dataclass(part):
                yield from _all_keys(part, _join(prefix, name))


def _nearest(name: str, known: Collection[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"did you mean {matches[0]}?" if matches else "there are no keys here"


def _nearest_key(schema: type, section: str, name: str) -> str:
    """A neighbour spelt alike, else the same name in any section below, else the nearest neighbour."""
    known = [_join(section, other) for other in _all_keys(schema)]
    beside = difflib.get_close_matches(name, list(_hints(schema)), n=1, cutoff=0.6)
    if beside:
        return f"did you mean {_join(section, beside[0])}?"
    below = [key for key in known if difflib.SequenceMatcher(None, key.rpartition(".")[2], name).ratio() > 0.8]
    return f"did you mean {below[0]}?" if below else _nearest(_join(section, name), known)


# ------------------------------------------------------------------------------------------------------------- writing


def to_dict(config: Any) -> dict[str, Any]:
    """The whole config as plain JSON-able values (paths as text, tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _escape(value: Any) -> Any:
    """Text that OmegaConf reads back as it is: `${` escaped, with the backslashes before it doubled."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {name: _escape(item) for name, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value


def to_yaml(config: Any) -> str:
    """Every key of a config, defaults included, as YAML that load_config reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config))))


def defining_values(config: Any, ignore: Collection[str] = ()) -> dict[str, Any]:
    """What a result depends on: {dotted key: value}, without the keys and sections in `ignore` (device, previews)."""
    flat: dict[str, Any] = {}

    def visit(value: Any, key: str) -> None:
        if key in ignore:
            return
        if not isinstance(value, dict) or not value:
            flat[key] = value
            return
        for name, item in value.items():
            visit(item, _join(key, name))

    visit(to_dict(config), "")
    return flat


def fingerprint(config: Any, ignore: Collection[str] = ()) -> str:
    """16 hexadecimal digits (SHA-256) of defining_values: equal exactly when two configs define the same run."""
    text = json.dumps(defining_values(config, ignore), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
