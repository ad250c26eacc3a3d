"""Config files: YAML parsed to OmegaConf trees, with limits, `base` and the names of the shipped ones.

Depth, size and what interpolations (`${seed}`) expand to are limited: a small file could otherwise crash the process or
fill the memory. Every mistake becomes an InputError of one line.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd3d.convert import BadValue, first_line
from csd3d.errors import InputError

MAX_BYTES = 1 << 20
MAX_DEPTH = 100  # of sections and lists in each other
MAX_EXPANDED = 2 << 20  # characters of a config with its interpolations written out
NODE_SIZE = 16  # characters that a key or a list item counts as, beside its text
_REFERENCE = re.compile(r"(\\*)\$\{(?:\s*(\.*)([^\s${}:]*)\s*\})?")  # backslashes, and what is in ${...} if it is a key
CONFIGS = Path(__file__).parents[1] / "configs"


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
    _check_whole(merged, path)
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
    _check_whole(tree, path)
    return tree


def _check_whole(tree: DictConfig, path: str | Path) -> None:
    try:
        check_interpolations(tree)
    except BadValue as error:
        raise InputError(": ".join(filter(None, (str(path), error.key, str(error))))) from None


def _check_depth(text: str) -> None:
    """Raise InputError for text nested so deep that YAML's recursive parser would crash the process."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        opens = isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
        closes = isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
        depth += opens - closes
        if depth > MAX_DEPTH:
            raise InputError(f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")


def check_interpolations(tree: DictConfig) -> None:
    """Raise BadValue for an interpolation that is no key, or that would expand a tree past `MAX_EXPANDED`.

    Only `${key}` is one, not OmegaConf's resolvers or keys in keys: with `${oc.env:NAME}` a config of another author
    would write a secret of this machine into its results. `a: ${b}${b}`, `b: ${c}${c}`, ... doubles with every line.
    The size of each value is computed once, from the sizes of the values it refers to; a circle counts as an eighth of
    the limit.
    """
    root = OmegaConf.to_container(tree, resolve=False)
    sizes: dict[tuple, int] = {}

    def size_of(place: tuple, value: Any) -> int:
        if place in sizes:
            return sizes[place]
        sizes[place] = MAX_EXPANDED // 8  # met again before it is measured: a circle
        size = NODE_SIZE
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                size += len(str(key)) + size_of((*place, key), item)
        elif isinstance(value, str):
            size += len(value)
            for dots, key in _references(value, place):
                names = tuple(re.findall(r"[^.\[\]]+", key))
                above = place[: len(place) - len(dots)] if dots else ()
                size += size_of(*_reach(root, (*above, *names)))
        if size > MAX_EXPANDED:
            key = ".".join(map(str, place))
            raise BadValue(key, f"interpolation makes {'this' if key else 'it'} larger than {MAX_EXPANDED >> 20} MiB")
        sizes[place] = size
        return size

    try:
        size_of((), root)
    except RecursionError:
        raise BadValue("", "its interpolations refer to each other in too long a chain") from None


def _references(text: str, place: tuple) -> list[tuple[str, str]]:
    """The (dots, key) of each `${key}` in a text; BadValue for one that is no key."""
    found = []
    for match in _REFERENCE.finditer(text):
        slashes, dots, key = match.groups()
        if len(slashes) % 2:  # `\${` is written where no interpolation is meant
            continue
        if not key:
            part = text[match.start() : match.start() + 40]
            right = "only the name of another key can be in ${...}; write \\${ where the text itself is meant"
            raise BadValue(".".join(map(str, place)), f"{part!r}: {right}")
        found.append((dots, key))
    return found


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


def file_of(path: str | Path, key: str) -> str | Path:
    """Return the file that sets `key`: the base if only that does, else the given file."""
    base = _base_of(path, tree := _parse(path))
    if base is None or _says(tree, key) or not _says(_parse(base), key):
        return path
    return base


def _says(tree: DictConfig, key: str) -> bool:
    return OmegaConf.select(tree, key, throw_on_resolution_failure=False) is not None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or first_line(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
