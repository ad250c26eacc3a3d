"""A sweep's file: read and checked as a whole, every run's config included, before anything starts."""

import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd3d import fingerprint
from csd3d.config_files import CONFIGS, read_config
from csd3d.convert import first_line
from csd3d.errors import InputError, closest
from csd3d.identity import defining_values
from csd3d.paths import with_paths
from csd3d.run import read, settle

KEYS = {"config": str, "set": dict, "grid": dict, "metrics": list, "slurm": dict}
MAX_RUNS = 10_000


@dataclass(frozen=True)
class Run:
    """One combination of the grid."""

    name: str  # 12 hexadecimal digits of the SHA-256 of what defines it, contents of files included
    values: dict[str, Any]  # key of the grid -> its value
    overrides: list[str]


@dataclass(frozen=True)
class Sweep:
    """A sweep's file."""

    config: Path
    runs: list[Run]
    metrics: list[str]
    slurm: dict[str, Any]


def read_sweep(path: Path) -> Sweep:
    """Raises InputError, with file and key, for anything wrong with the file or with the config of any run."""
    try:
        tree = OmegaConf.to_container(read_config(path), resolve=True)
    except OmegaConfBaseException as error:  # of interpolations
        raise InputError(f"{path}: {getattr(error, 'full_key', None) or 'a key'}: {first_line(error)}") from None
    for key, value in tree.items():
        if key not in KEYS:
            raise InputError(f"{path}: {key}: unknown key of a sweep; did you mean {closest(str(key), KEYS)}?")
        if not isinstance(value, KEYS[key]):
            raise InputError(f"{path}: {key}: expected a {KEYS[key].__name__}, got {value!r:.60}")
    if "config" not in tree:
        raise InputError(f"{path}: config: missing; name the config that all runs start from")
    near = [place for place in (path.parent / tree["config"], CONFIGS / tree["config"]) if place.is_file()]
    if not near:
        raise InputError(f"{path}: config: {tree['config']} is neither beside this file nor in {CONFIGS}")
    grid = tree.get("grid", {})
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: grid.{key}: expected a list of at least one value, got {values!r:.60}")
    if not grid:
        raise InputError(f"{path}: grid: empty; give at least one key with its values, such as seed: [0, 1]")
    count = math.prod(len(values) for values in grid.values())
    if count > MAX_RUNS:
        raise InputError(f"{path}: grid: {count} runs; at most {MAX_RUNS}, so split it")
    common = [override(key, value) for key, value in tree.get("set", {}).items()]
    runs = [
        run_of(path, near[0], common, dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    ]
    names: dict[str, dict] = {}
    for run in runs:
        if run.name in names:
            raise InputError(f"{path}: grid: {run.values} is the same run as {names[run.name]}; leave one out")
        names[run.name] = run.values
    return Sweep(near[0], runs, [str(name) for name in tree.get("metrics", [])], tree.get("slurm", {}))


def run_of(path: Path, config_file: Path, common: list[str], values: dict[str, Any]) -> Run:
    """The run of one combination; InputError if its config is not right."""
    overrides = [*common, *(override(key, value) for key, value in values.items())]
    try:
        config = with_paths(read(config_file, overrides), settle)
    except InputError as error:
        raise InputError(str(error).replace("command line: ", f"{path}: grid or set: ", 1)) from None
    defining = json.dumps(defining_values(config, fingerprint.of_path), sort_keys=True, default=str)
    return Run(hashlib.sha256(defining.encode()).hexdigest()[:12], values, overrides)


def override(key: str, value: Any) -> str:
    """key=value as on the command line, where a text in quotes stays a text, such as "3" or "a: b"."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
