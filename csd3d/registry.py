"""The registry of what a config can name: methods, editors, model families, representations, readers and more.

    @register("method", "nfsd", title="NFSD")
    @dataclass(frozen=True)
    class NFSD: ...

The modules of a kind's package (`PACKAGES`) are imported when something of that kind is first asked for. Code outside
csd3d registers in the same way: a config's `plugins:` key names its modules or files, or its package declares the
entry-point group "csd3d.plugins".
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from csd3d.errors import InputError, closest

Thing = TypeVar("Thing")
GROUP = "csd3d.plugins"
PACKAGES = {  # the package or module with csd3d's own things of each kind
    "method": "csd3d.distillation.methods",
    "canvas_editor": "csd3d.editors",
    "scene_editor": "csd3d.editors",
    "family": "csd3d.priors.families",
    "representation": "csd3d.representations",
    "reader": "csd3d.datasets.readers",
    "task": "csd3d.tasks",
    "ground_truth": "csd3d.world.plugin",
    "demo": "csd3d.world.plugin",
    "prior": "csd3d.world.exact_prior",
}
PARTS = {  # the attributes that a thing of each kind must have
    "method": ("queries", "direction"),
    "canvas_editor": ("count_steps", "take_step"),
    "scene_editor": ("update",),
    "family": ("matches", "load"),
    "representation": ("open",),
    "reader": ("matches", "read", "wants"),
    "task": ("open",),
    "ground_truth": ("scene_truth", "knows"),
}
VALUES = ("wants", "edits")  # of these, what is no function
# dataclasses, whose fields are config keys
WITH_KEYS = ("method", "canvas_editor", "scene_editor", "representation", "reader", "task")
RESERVED = {"method": ("csd", "all")}  # names that have another meaning in configs


@dataclass(frozen=True)
class Entry:
    """A registered class or function."""

    kind: str
    name: str  # in configs
    title: str  # in reports
    thing: Any

    @property
    def place(self) -> str:
        """file:line where it is defined."""
        try:
            return f"{inspect.getsourcefile(self.thing)}:{inspect.getsourcelines(self.thing)[1]}"
        except (OSError, TypeError):
            return getattr(self.thing, "__module__", "?")


_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in PACKAGES}
_loaded: set[str] = set()


def register(kind: str, name: str, *, title: str = "") -> Callable[[Thing], Thing]:
    """Register the class or function below; InputError if the name is taken or a required attribute is missing."""
    if kind not in _entries:
        raise InputError(f"register({kind!r}, {name!r}): there is no such kind; known: {', '.join(_entries)}")

    def add(thing: Thing) -> Thing:
        entry = Entry(kind, name, title or name, thing)
        _check(entry)
        other = _entries[kind].get(name)
        # a module that is imported under two names, or run as a script, registers the same thing twice
        if other is not None and other.place != entry.place:
            raise InputError(f"{kind} {name!r} is registered twice: at {other.place} and at {entry.place}")
        _entries[kind][name] = entry
        return thing

    return add


def _check(entry: Entry) -> None:
    """Raise InputError if configs could not name the thing, or it lacks what its kind needs."""
    kind, thing = entry.kind, entry.thing
    at = f"{entry.place}: {kind} {entry.name!r}"
    if not isinstance(entry.name, str) or not re.fullmatch(r"\w+", entry.name):
        raise InputError(f"{at}: a name is a text of letters, digits and underscores, such as my_{kind}")
    if entry.name in RESERVED.get(kind, ()):
        raise InputError(f"{at}: {entry.name} has another meaning in configs; choose another name")
    missing = [part for part in PARTS.get(kind, ()) if not hasattr(thing, part)]
    if missing:
        raise InputError(f"{at} lacks {', '.join(missing)}")
    if uncalled := [part for part in PARTS.get(kind, ()) if part not in VALUES and not callable(getattr(thing, part))]:
        raise InputError(f"{at}: its {uncalled[0]} is no function")
    if kind not in WITH_KEYS:
        return
    if "__dataclass_fields__" not in vars(thing):
        raise InputError(f"{at} is no dataclass: write @dataclass(frozen=True) between @register and the class")
    unset = [f.name for f in dataclasses.fields(thing) if f.init and f.default is f.default_factory]  # both MISSING
    if unset:
        raise InputError(f"{at}: its field {unset[0]} has no default; every key of a config has one")
    if kind != "task" and "type" in {field.name for field in dataclasses.fields(thing)}:
        raise InputError(f"{at} has a key `type`, by which configs choose what it is; call it otherwise")


def get(kind: str, name: str, *, key: str = "", also: Sequence[str] = ()) -> Entry:
    """Return what is registered under `name`, the value of `key`; InputError with the nearest name and all others.

    also: what may be named there without being registered.
    """
    known = names(kind)
    if name in known:
        return _entries[kind][name]
    known = [*also, *known]
    hint = f"did you mean {closest(name, known)}? " if known else ""
    place = f"{key}: " if key else ""
    raise InputError(f"{place}unknown {kind} {name!r}; {hint}Known: {', '.join(known) or 'none'}")


def names(kind: str) -> list[str]:
    """Return every name of a kind, csd3d's own first."""
    _load(kind)
    return list(_entries[kind])


def entries(kind: str) -> list[Entry]:
    """Return everything that is registered of a kind."""
    _load(kind)
    return list(_entries[kind].values())


def title(kind: str, name: str) -> str:
    """Return the title of a name for reports, or the name itself if nothing is registered under it."""
    _load(kind)
    return _entries[kind][name].title if name in _entries[kind] else name


def entry_of(kind: str, thing: Any) -> Entry | None:
    """Return the entry whose class `thing` is, or is an instance of; None if there is none."""
    wanted = thing if isinstance(thing, type) else type(thing)
    return next((entry for entry in entries(kind) if entry.thing is wanted), None)


def returned(kind: str, thing: Any, part: str, value: Any, wanted: type) -> Any:
    """Return `value`, which `part` of a registered thing gave; InputError, one line, if it is no `wanted`."""
    if isinstance(value, wanted):
        return value
    entry = entry_of(kind, thing)
    at = f"{entry.place}: {kind} {entry.name!r}" if entry else f"{kind} {type(thing).__name__}"
    raise InputError(f"{at}: {part} returned a {type(value).__name__}; expected a {wanted.__name__}")


def load_plugins(plugins: Sequence[str]) -> None:
    """Import plugins: modules by name, or files that end in .py; InputError, one line, if one cannot be imported."""
    for plugin in plugins:
        if plugin.endswith(".py"):
            _guarded(plugin, lambda plugin=plugin: _import_file(Path(os.path.expanduser(plugin))))
        else:
            _guarded(plugin, lambda plugin=plugin: importlib.import_module(plugin))


def _load(kind: str) -> None:
    """Import csd3d's own modules of a kind, and, once, the installed plugins."""
    if kind not in _entries:
        raise InputError(f"there is no kind {kind!r} of things to register; known: {', '.join(_entries)}")
    if kind not in _loaded:
        _loaded.add(kind)
        _import_package(PACKAGES[kind])
    if GROUP not in _loaded:
        _loaded.add(GROUP)
        for point in importlib.metadata.entry_points(group=GROUP):
            _guarded(f"{point.name} ({point.value})", point.load)


def _import_package(name: str) -> None:
    """Import a package with all its modules, or a single module."""
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        importlib.import_module(f"{name}.{found.name}")


def _import_file(path: Path) -> ModuleType:
    if not os.path.isfile(path):  # also False for a text too long to be a path
        raise InputError(f"plugins: {path}: no such file")
    # a unique name for each file, as two folders may both have a plugin.py
    name = f"csd3d_plugin_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _guarded(plugin: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except InputError as error:
        raise InputError(f"plugin {plugin}: {str(error).removeprefix('plugins: ')}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # other people's code can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{plugin}.".startswith(f"{error.name}."):
            raise InputError(f"plugin {plugin}: no such module; a file is named with its .py") from None
        place = _own_line(error)
        reason = _reason(error)
        if isinstance(error, SyntaxError) and error.filename:
            place, reason = (error.filename, error.lineno), f"{type(error).__name__}: {error.msg}"
        raise InputError(f"plugin {plugin}: cannot be imported ({reason}, at {place[0]}:{place[1]})") from None


def plugin_fault(error: Exception) -> str | None:
    """Return one line that blames a plugin for `error`; None where no code of a plugin, or call of it, failed.

    A call with the wrong arguments fails before any line of the plugin runs; its message begins with the name.
    """
    outside = [entry for kind in _entries.values() for entry in kind.values() if not _is_ours(entry.thing)]
    frames = traceback.extract_tb(error.__traceback__)
    for entry in outside:
        file = inspect.getsourcefile(entry.thing)
        inside = [frame for frame in frames if frame.filename == file]
        called = isinstance(error, TypeError) and str(error).startswith(f"{entry.thing.__qualname__}.")
        if inside or called:
            place = f"{file}:{inside[-1].lineno}" if inside else entry.place
            return f"{entry.kind} {entry.name!r} of a plugin failed ({_reason(error)}, at {place})"
    return None


def _is_ours(thing: Any) -> bool:
    return f"{getattr(thing, '__module__', '')}.".startswith("csd3d.")


def _reason(error: BaseException) -> str:
    """The error's kind and text on one line, even of one whose text cannot be made."""
    try:
        text = str(error)
    except Exception:
        text = "its text cannot be made"
    return " ".join(f"{type(error).__name__}: {text}".split())[:200]


def _own_line(error: BaseException) -> tuple[str, int | None]:
    """File and line where a plugin failed: its own deepest line, not that of a library that it called."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    ours = (__file__, importlib.__file__, importlib.metadata.__file__)
    own = next((frame.filename for frame in frames if frame.filename not in ours), frames[-1].filename)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(own).parent)]
    return inside[-1].filename, inside[-1].lineno
