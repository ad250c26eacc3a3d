"""The rows of the tables, from the YAML files beside this: overrides of a config, under several priors.

A set is a file: `about`, `prompts`, `seeds`, `against` (the row that others are compared with), `under` (the priors of
rows that name none) and `rows`. A row: title; config, a shipped config's name; keys, its overrides; under, its priors.
A prior of priors.yaml: title; keys; backdrops, those of the config that are kept, so that fewer banks are rendered.
The row NAME under a prior is PRIOR/NAME. The `against` row is under every prior: the bounds of each table.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lines import merged
from csd3d.errors import InputError
from csd3d.run import read
from csd3d.tasks.text_to_3d import TextTo3DConfig

FOLDER = Path(__file__).parent
CONFIGS = FOLDER.parents[1] / "configs"
SETS = ("methods", "schedules", "diverse")


@dataclass(frozen=True)
class Row:
    """A method, or a schedule, under a prior."""

    name: str
    title: str
    config: str
    keys: Mapping[str, Any]
    backdrops: tuple[str, ...] = ()

    @property
    def prior(self) -> str:
        """The name of its prior in priors.yaml."""
        return self.name.partition("/")[0]

    @property
    def as_keys(self) -> dict[str, Any]:
        """All that makes it differ from another row, as JSON has it."""
        return {"config": self.config, "keys": dict(self.keys), "backdrops": list(self.backdrops)}


@dataclass(frozen=True)
class Set:
    """The rows of one table by name, and what they are run on."""

    name: str
    about: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    against: str
    rows: Mapping[str, Row]


def read_set(name: str) -> Set:
    """Read a set; its rows are in the order of the priors and then of the file."""
    tree = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    priors = yaml.safe_load((FOLDER / "priors.yaml").read_text())
    rows = {}
    for prior, said in priors.items():
        for row, given in tree["rows"].items():
            if prior in given.get("under", tree["under"]) or row == tree["against"]:
                keys = merged(given.get("keys", {}), said.get("keys", {}))
                title = f"{given['title']}, {said['title']}"
                config = given.get("config", "csd-text-to-3d")
                made = Row(f"{prior}/{row}", title, config, keys, tuple(said.get("backdrops", ())))
                rows[made.name] = made
    return Set(name, tree["about"], tuple(tree["prompts"]), tuple(tree["seeds"]), tree["against"], rows)


def chosen(rows: Mapping[str, Row], patterns: Sequence[str] | None) -> dict[str, Row]:
    """The rows whose name, with or without its prior, fits one of the patterns (`exact/*`, `sds`); InputError if none.

    None chooses all.
    """
    if patterns is None:
        return dict(rows)
    for pattern in patterns:
        if not any(fits(name, pattern) for name in rows):
            raise InputError(f"--rows: {pattern!r} fits no row; there are {', '.join(rows)}")
    return {name: row for name, row in rows.items() if any(fits(name, pattern) for pattern in patterns)}


def fits(name: str, pattern: str) -> bool:
    """Whether a row PRIOR/NAME fits a pattern for that, or for NAME alone."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition("/")[2], pattern)


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The keys `a.b.c` of a tree with their values: an override of a whole section would drop the config's own keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def config_of(keys: Mapping[str, Any], prompt: str, seed: int) -> TextTo3DConfig:
    """The config of `Row.as_keys` for a prompt and a seed; InputError for keys that are wrong."""
    given = [f"{key}={json.dumps(value)}" for key, value in leaves(keys["keys"])]
    about = [f"prompt={json.dumps(prompt)}", f"seed={seed}", "compare=[]"]
    config = read(CONFIGS / f"{keys['config']}.yaml", [*given, *about])
    if not keys["backdrops"]:
        return config
    kept = {name: config.prompts.backdrops[name] for name in keys["backdrops"]}
    return replace(config, prompts=replace(config.prompts, backdrops=kept))
