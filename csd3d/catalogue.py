"""Lists of what a config can name: `csd3d methods`, `csd3d keys edit_scene`.

Title and place come from the registry. The summary (first sentence) and the equation (first indented block that is one)
come from the docstring of the registered class or function, or of its module if it has none.
"""

import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csd3d import registry
from csd3d.errors import InputError, closest
from csd3d.keys import key_table, markdown
from csd3d.registry import Entry

WORDS = {  # what is asked for on the command line, and the kinds of the registry that it shows
    "methods": ("method",),
    "editors": ("scene_editor", "canvas_editor", "editor"),
    "families": ("family",),
    "representations": ("representation",),
    "readers": ("reader",),
    "tasks": ("task",),
    "demos": ("demo",),
    "truths": ("ground_truth",),
}
PAPER = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")


def is_asked(argv: Sequence[str]) -> bool:
    """Whether a command line asks for a list, not a job."""
    return bool(argv) and argv[0] in (*WORDS, "keys")


def answer(argv: Sequence[str]) -> str:
    """What `csd3d WORD`, `keys NAME` or `keys --markdown` prints; loads `plugins=…` first. Raises InputError."""
    from csd3d.run import plugins_of

    if {"-h", "--help"}.intersection(argv):
        return help_of(argv[0])
    words = [word for word in argv if not word.startswith("plugins=")]
    for word in argv:
        if word.startswith("plugins="):
            registry.load_plugins(plugins_of(word))
    if words == ["keys", "--markdown"]:
        return markdown()
    if words[0] == "keys":
        if len(words) != 2:
            raise InputError("csd3d keys: give one name, of a task, a method, an editor, …; such as edit_scene")
        return "\n\n".join(keys_of(entry) for entry in find(words[1]))
    if len(words) != 1:
        raise InputError(f"csd3d {words[0]}: {' '.join(words[1:])} is not expected; only plugins=FILE.py may follow")
    kinds = [kind for kind in WORDS[words[0]] if kind in registry.PACKAGES and registry.names(kind)]
    found = [section(words[0] if len(kinds) == 1 else f"{kind.replace('_', ' ')}s", kind) for kind in kinds]
    return "\n\n".join(found) or f"no {words[0]} are registered"


def help_of(word: str) -> str:
    """Return the help on `csd3d WORD`."""
    about = f"List the {word} that csd3d knows, each with its source file and what it does."
    if word == "keys":
        word, about = "keys NAME", "Show the keys of a task, method, editor or other thing, with their defaults."
    lists = f"Lists of names: csd3d {' | '.join(WORDS)}."
    return f"usage: csd3d {word} [plugins=FILE.py]\n\n{about}\nplugins= loads a plugin first.\n{lists}"


def section(head: str, kind: str) -> str:
    """Return the list of all things of a kind."""
    entries = registry.entries(kind)
    width = max(len(entry.name) for entry in entries)
    return "\n".join([head, *(row(entry, width) for entry in entries)])


def row(entry: Entry, width: int) -> str:
    """Return name, title and place, then the summary with its paper, then the equation."""
    summary, equation, paper = described(entry.thing)
    head = f"  {entry.name:{width}}  {entry.title}"
    columns = shutil.get_terminal_size((150, 0)).columns
    lines = textwrap.wrap(summary, max(min(110, columns - 6), 40)) + (
        [f"arXiv {paper}"] if paper and paper not in summary else []
    )
    beside = f"{head:<60}  {shown_place(entry)}"
    head = beside if len(beside) <= columns else f"{head}\n      {shown_place(entry)}"
    return "\n".join([head, *(f"      {line}" for line in lines), *(f"          {line}" for line in equation)])


def described(thing: Any) -> tuple[str, list[str], str]:
    """Return the first sentence, the lines of the equation and the first arXiv number of a docstring; "" if missing."""
    around = inspect.getdoc(inspect.getmodule(thing)) or ""
    text = inspect.getdoc(thing) or ""
    if not text or text.startswith(f"{thing.__name__}("):  # the docstring that dataclasses generate
        text = around
    blocks = [block.strip("\n") for block in re.split(r"\n\s*\n", text)]
    first, *rest = blocks
    lines = first.splitlines()
    summary = lines[0] if lines and lines[0].endswith((".", ":")) else " ".join(lines)
    # inspect.getdoc removes the indentation if everything after the first line is indented
    indented = [block for block in rest if block.startswith("    ")] or [b for b in rest if not b.endswith(".")]
    equation = next(filter(is_equation, indented), "")
    cited = PAPER.search(summary) or PAPER.search(text) or PAPER.search(around)
    return summary, [line.strip() for line in equation.splitlines()], cited[1] if cited else ""


def is_equation(block: str) -> bool:
    """Whether an indented block is an equation, not an example: it has Greek letters or a long minus, and an equals."""
    return bool(re.search(r"[Α-ω∂∇∅√−]", block)) and bool(re.search(r"[=←∝]", block))


def shown_place(entry: Entry) -> str:
    """Return file:line, relative to the current folder if it is inside."""
    path, _, line = entry.place.rpartition(":")
    try:
        return f"{Path(path).relative_to(Path.cwd())}:{line}"
    except ValueError:
        return entry.place


def find(name: str) -> list[Entry]:
    """Return everything of that name, of any kind; InputError with the nearest name if there is nothing."""
    kinds = [kind for kind in itertools.chain(*WORDS.values()) if kind in registry.PACKAGES]
    found = [registry.get(kind, name) for kind in kinds if name in registry.names(kind)]
    if not found:
        known = list(dict.fromkeys(itertools.chain(*(registry.names(kind) for kind in kinds))))
        hint = f"did you mean {closest(name, known)}? "
        raise InputError(f"nothing is registered as {name!r}; {hint}Known: {', '.join(known)}")
    return found


def keys_of(entry: Entry) -> str:
    """Return the table of keys of a registered dataclass: name, default, and comment with type."""
    head = f"{entry.kind.replace('_', ' ')} {entry.name}: {entry.title}, {shown_place(entry)}"
    keys = key_table(entry.thing) if dataclasses.is_dataclass(entry.thing) else []
    if not keys:
        return f"{head}\n  has no keys of its own"
    name_width = max(len(key.name) for key in keys)
    default_width = min(max(len(key.default) for key in keys), 24)
    margin = name_width + default_width + 6
    columns = max(shutil.get_terminal_size((150, 0)).columns, 60)
    width, below = columns - margin, columns - margin < 30
    lines = []
    for key in keys:
        default = key.default if len(key.default) <= default_width else f"{key.default[: default_width - 1]}…"
        head_of_key = f"  {key.name:{name_width}}  {default:{default_width}}  "
        if below:  # no room beside the names
            lines += [
                head_of_key.rstrip(),
                *textwrap.wrap(key.text, columns, initial_indent=" " * 6, subsequent_indent=" " * 6),
            ]
            continue
        wrapped = textwrap.wrap(key.text, width) or [""]
        lines.append(f"{head_of_key}{wrapped[0]}")
        lines += [" " * margin + rest for rest in wrapped[1:]]
    return "\n".join([head, *lines])
