"""Typed configs: YAML and `key.sub=value` overrides, merged onto the defaults of nested dataclasses.

OmegaConf parses and interpolates (`${seed}`). The conversion is our own (`csd3d.convert`): OmegaConf's structured
configs support neither Literal nor lists in unions, and do not suggest a key for a mistyped one. Every mistake becomes
an InputError of one line: file (or "command line"), key, what was expected.
"""

import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd3d import registry
from csd3d.convert import BadValue, build, convert, first_line, nearest
from csd3d.errors import InputError, InputErrors
from csd3d.schema import Chosen, OneOf, annotation_at, join, mark_of, members, plain

Schema = TypeVar("Schema")
MAX_BYTES = 1 << 20
MAX_DEPTH = 100  # of sections and lists in each other
MAX_EXPANDED = 2 << 20  # characters of a config with its interpolations written out
NODE_SIZE = 16  # characters that a key or a list item counts as, beside its text
_REFERENCE = re.compile(r"\$\{(?:oc\.env:[^${}]*|(\.*)([^\s${}:]*))\}")
CONFIGS = Path(__file__).parents[1] / "configs"


# ------------------------------------------------------------------------------------------------------------- reading


def read_config(path: str | Path) -> DictConfig:
    """Parse a YAML file to an OmegaConf tree; InputError if it is missing, too large or malformed (with the line).

    `base: NAME.yaml` names a file of the same folder, with values for all keys that this file does not set; sections
    are merged, anything else is replaced whole. A base cannot have a base.
    """
    tree = _parse(path)
    base = _base_of(path, tree)
    if base is None:
        return tree
    below = _parse(base)
    if "base" in below:
        raise InputError(f"{base}: base: a base has none of its own; put its keys into {base.name}")
    del tree["base"]
    merged = OmegaConf.create(_merged(*(OmegaConf.to_container(each, resolve=False) for each in (below, tree))))
    _check_interpolations(merged, path)
    return merged


def _merged(below: dict, above: dict) -> dict:
    """`below` with the values of `above`; OmegaConf's own merge refuses a list in place of a section."""
    both = {key: (below[key], value) for key, value in above.items() if key in below}
    sections = {key: pair for key, pair in both.items() if all(isinstance(value, dict) for value in pair)}
    return below | above | {key: _merged(*pair) for key, pair in sections.items()}


def _parse(path: str | Path) -> DictConfig:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        too_large = len(raw) > MAX_BYTES
        text = "" if too_large else raw.decode("utf-8")
        _check_depth(text)
        tree = OmegaConf.create(text)
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file{_others(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a UTF-8 text file ({first_line(error)})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {_yaml_problem(error)}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        key = getattr(error, "full_key", None)
        raise InputError(f"{path}: {key}: {_why(error)}" if key else f"{path}: {_why(error)}") from None
    if too_large:
        raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which no config is; pass a YAML file")
    if not isinstance(tree, DictConfig):
        raise InputError(f"{path}: expected `key: value` lines at the top level, got a {type(tree).__name__}")
    _check_interpolations(tree, path)
    return tree


def _check_depth(text: str) -> None:
    """Raise InputError for text nested so deep that YAML's recursive parser would crash the process."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        opens = isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
        closes = isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
        depth += opens - closes
        if depth > MAX_DEPTH:
            raise InputError(f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")


def _check_interpolations(tree: DictConfig, path: str | Path) -> None:
    """Raise InputError where OmegaConf's interpolation would expand a tree past `MAX_EXPANDED`.

    `a: ${b}${b}`, `b: ${c}${c}`, ... doubles with every line. The size of each value is computed once, from the sizes
    of the values it refers to. An interpolation whose target is unknown before it is resolved (nested, a resolver, a
    circle) counts as an eighth of the limit.
    """
    root = OmegaConf.to_container(tree, resolve=False)
    unknown = MAX_EXPANDED // 8
    sizes: dict[tuple, int] = {}

    def size_of(place: tuple, value: Any) -> int:
        if place in sizes:
            return sizes[place]
        sizes[place] = unknown  # met again before it is measured: a circle
        size = NODE_SIZE
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                size += len(str(key)) + size_of((*place, key), item)
        elif isinstance(value, str):
            found = list(_REFERENCE.finditer(value))
            size += len(value) + unknown * (value.count("${") - len(found))
            for dots, key in (match.groups() for match in found if match[2]):
                names = tuple(re.findall(r"[^.\[\]]+", key))
                above = place[: len(place) - len(dots)] if dots else ()
                size += size_of(*_reach(root, (*above, *names)))
        if size > MAX_EXPANDED:
            key = ".".join(map(str, place)) or "all keys together"
            raise InputError(f"{path}: {key}: interpolation makes this larger than {MAX_EXPANDED >> 20} MiB")
        sizes[place] = size
        return size

    try:
        size_of((), root)
    except RecursionError:
        raise InputError(f"{path}: its interpolations refer to each other in too long a chain") from None


def _reach(root: Any, place: tuple) -> tuple[tuple, Any]:
    """Where `place` leads in a tree: (place, value) of it, or of the first text on the way, which may refer to it."""
    value, own = root, ()
    for name in place:
        if isinstance(value, str):
            break
        try:
            key = int(name) if isinstance(value, list) else name
            value, own = value[key], (*own, key)
        except (KeyError, ValueError, IndexError, TypeError):
            return place, None
    return own, value


def parse_value(text: str, key: str) -> Any:
    """Parse the value of an override on the command line as YAML; InputError if it is malformed."""
    try:
        _check_depth(text)
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except yaml.YAMLError as error:
        raise InputError(f"command line: {key}: {_yaml_problem(error)}") from None
    except Exception as error:
        raise InputError(f"command line: {key}: {_why(error)}") from None


def _why(error: Exception) -> str:
    """Return OmegaConf's message; for a wrong tag such as `!!bool x`, where YAML can raise anything, an explanation."""
    known = isinstance(error, (OmegaConfBaseException, ValueError, RecursionError))
    return first_line(error) if known else "a value does not fit the !!tag before it; leave the tag out"


def _others(path: Path) -> str:
    """Return a hint for a missing config: the nearest name, and the names of the shipped configs."""
    shipped = list_configs()
    known = {file.stem: file for file in [*sorted(path.parent.glob("*.yaml")), *shipped]}
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.6)
    guess = f"; did you mean {_shortest(known[near[0]])}?" if near else ";"
    return f"{guess} {CONFIGS.name}/ has {', '.join(file.stem for file in shipped)}" if shipped else guess.rstrip(";")


def _shortest(path: Path) -> str:
    """Return a path relative to the current folder if it is inside, else absolute."""
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative


def list_configs() -> list[Path]:
    """Return the configs of a checkout of csd3d, which is how it is installed."""
    return sorted(CONFIGS.glob("*.yaml"))


def _base_of(path: str | Path, tree: DictConfig) -> Path | None:
    """Return the file that `base` names, if any."""
    name = OmegaConf.to_container(tree, resolve=False).get("base")
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(f"{path}: base: {name!r} is no file name; name a config of the same folder")
    return Path(path).parent / name


def _file_of(path: str | Path, key: str) -> str | Path:
    """Return the file that sets `key`: the base if only that does, else the given file."""
    base = _base_of(path, tree := _parse(path))
    if base is None or _says(tree, key) or not _says(_parse(base), key):
        return path
    return base


def _says(tree: DictConfig, key: str) -> bool:
    return OmegaConf.select(tree, key, throw_on_resolution_failure=False) is not None


def task_name(path: str | Path, overrides: Collection[str], tasks: Collection[str]) -> str:
    """Return the `task` that a config names, one of `tasks`; InputError for anything else."""
    written = OmegaConf.to_container(read_config(path), resolve=False).get("task")
    name = dict(_split(text) for text in overrides).get("task", written)
    if not isinstance(name, str):
        raise InputError(f"{path}: task: missing; write task: NAME, one of {', '.join(sorted(tasks))}")
    if name not in tasks:
        raise InputError(
            f"{path}: task: unknown task {name!r}; {nearest(name, tasks)} Known: {', '.join(sorted(tasks))}"
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
    _check_interpolations(tree, path)

    def source(key: str) -> str:
        if any(f"{key}.".startswith((f"{o}.", f"{o}[")) for o in overridden):
            return "command line"
        file = _file_of(path, key)
        return f"{file} + command line" if any(o.startswith(f"{key}.") for o in overridden) else str(file)

    try:
        return build(schema, OmegaConf.to_container(tree, resolve=True), "", None)
    except BadValue as error:
        raise InputError(": ".join(filter(None, (source(error.key), error.key, str(error))))) from None
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or ""
        raise InputError(f"{source(key)}: {key}: {first_line(error)}") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or first_line(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _check_moved(tree: DictConfig, overrides: Collection[str], path: str | Path, schema: type) -> None:
    """Raise InputError with a line for each key of an earlier release."""
    lines = []
    moved = getattr(schema, "MOVED", {})
    for old, new in moved.items():
        if _holds(tree, old):
            lines.append(f"{_file_of(path, old)}: {old}: {_moved(old, new)}")
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
    if key.endswith(".type"):
        _drop_keys_of_others(tree, key.removesuffix(".type"), raw, schema)
    try:
        OmegaConf.update(tree, key, _override_value(raw, key, annotation_at(schema, key)), merge=False)
    except InputError:
        raise
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise InputError(f"command line: {key}: {first_line(error)}") from None
    return key


def _open_sections(tree: DictConfig, key: str, schema: type) -> None:
    """Turn each name above `key` into a section: method.scale=5 after `method: nfsd` sets a key of that method."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        place = ".".join(parts[:count])
        value = OmegaConf.select(tree, place, throw_on_resolution_failure=False)
        if isinstance(value, str) and isinstance(mark_of(annotation_at(schema, place)), OneOf):
            OmegaConf.update(tree, place, {"type": value}, merge=False)


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


def defining_values(config: Any, content: Callable[[str], str] = str) -> dict[str, Any]:
    """Return {dotted key: value} of all fields that a result depends on: those not marked `identity: False`.

    Marked fields are the device, previews, and what is written at the end.  content: gives the value that stands for
    a `path_key`, such as the fingerprint of the file there.
    """
    flat: dict[str, Any] = {}

    def visit(value: Any, key: str, is_path: bool = False) -> None:
        if isinstance(value, Chosen) and value.thing is not None:
            flat[join(key, "type")] = value.name
            value = value.thing
        if dataclasses.is_dataclass(value) and not isinstance(value, Chosen):
            for field in dataclasses.fields(value):
                counts, item = field.metadata.get("identity", True), getattr(value, field.name)
                if callable(counts):
                    item = counts(item)
                    counts = item is not None
                if counts:
                    visit(item, join(key, field.name), field.metadata.get("path", False))
        elif isinstance(value, dict) and value:
            for name, item in value.items():
                visit(item, join(key, name))
        elif isinstance(value, (list, tuple)) and any(dataclasses.is_dataclass(item) for item in value):
            for number, item in enumerate(value):
                visit(item, f"{key}[{number}]")
        else:
            value = content(value) if is_path and isinstance(value, str) else value
            flat[key] = json.loads(json.dumps(plain(value), default=str))

    visit(config, "")
    return flat
