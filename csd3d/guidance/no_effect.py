"""Keys of a text job that are set and change nothing: warnings for the log."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from csd3d.distillation.step import DistillConfig
from csd3d.distillation.svgd import SVGDConfig
from csd3d.guidance.methods import MethodRun, distill_by_model

KEYS = [field.name for field in dataclasses.fields(DistillConfig) if field.name != "svgd"]
KEYS += [f"svgd.{field.name}" for field in dataclasses.fields(SVGDConfig)]


def overruled(runs: Mapping[str, MethodRun], distill: DistillConfig, keys: Iterable[str]) -> list[str]:
    """A warning for each of `keys` (of `distill`, such as "noise") in whose place a method has a value of its own."""
    found = {key: _own_values(runs, distill, key) for key in keys if key in KEYS}
    told = []
    for key, own in found.items():
        if own:
            named = ", ".join(f"{name} ({value})" for name, value in own.items())
            told.append(f"distill.{key} is set, but has no effect with {named}")
    return told


def changed_in_vain(runs: Mapping[str, MethodRun], distill: DistillConfig) -> list[str]:
    """A warning for each key of `distill` that is not as by default, and that none of the methods takes."""
    default = distill_by_model(distill.steps)
    changed = [key for key in KEYS if _value(distill, key) != _value(default, key)]
    return overruled(runs, distill, [key for key in changed if len(_own_values(runs, distill, key)) == len(runs)])


def alone(runs: Mapping[str, MethodRun], together: int, given: str) -> list[str]:
    """A warning for each method between particles, where they are not `together` but one at a time; `given`: why."""
    names = [name for name, run in runs.items() if run.collaborates] if together == 1 else []
    return [f"{name} acts between particles, of which there is one at a time: {given}" for name in names]


def _own_values(runs: Mapping[str, MethodRun], distill: DistillConfig, key: str) -> dict[str, str]:
    """What methods have in place of `distill`'s value, by name; of those that have something else."""
    found = {}
    for name, run in runs.items():
        if key == "noise" and hasattr(run.method, "noise"):
            found[name] = "noise of its own"
        elif key == "t_late" and run.distill.schedule != "staged":
            found[name] = f"schedule {run.distill.schedule}"
        elif None not in (distill.svgd, run.distill.svgd) or not key.startswith("svgd."):
            value = _value(run.distill, key)
            found |= {name: str(value)} if value != _value(distill, key) else {}
    return found


def _value(distill: DistillConfig, key: str) -> Any:
    for name in key.split("."):
        distill = getattr(distill, name, None)
    return distill
