"""The paths in a config: finding and changing the values of `path_key` and `path_keys` fields."""

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

from csd3d.schema import Chosen, join


def split_number(text: str) -> tuple[str, str]:
    """A path with a number behind as (path, ":NUMBER"); (path, "") without one."""
    place, colon, number = text.rpartition(":")
    return (place, colon + number) if place and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", number) else (text, "")


def with_paths(config: Any, change: Callable[[str], str]) -> Any:
    """Return the config with `change` applied to every `path_key`, at any depth."""
    if isinstance(config, Chosen):
        return dataclasses.replace(config, thing=with_paths(config.thing, change))
    if isinstance(config, dict):
        return {name: with_paths(item, change) for name, item in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(with_paths(item, change) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    values = {field: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    changed = {
        field.name: [change(path) + number for path, number in map(split_number, value)]
        if field.metadata.get("path") and isinstance(value, list)
        else change(os.path.abspath(os.path.expanduser(value)) if value and field.metadata["made"] else value)
        if field.metadata.get("path") and isinstance(value, str)
        else with_paths(value, change)
        for field, value in values.items()
    }
    return dataclasses.replace(config, **{n: v for n, v in changed.items() if v is not getattr(config, n)})


def paths_of(config: Any, key: str = "") -> dict[str, str]:
    """Return {dotted key: value} of every `path_key` that names an input and is not empty, at any depth."""
    if isinstance(config, Chosen):
        return paths_of(config.thing, key)
    if isinstance(config, dict):
        parts = {join(key, name): item for name, item in config.items()}
    elif isinstance(config, (list, tuple)):
        parts = {f"{key}[{number}]": item for number, item in enumerate(config)}
    elif dataclasses.is_dataclass(config):
        fields = {join(key, field.name): (field, getattr(config, field.name)) for field in dataclasses.fields(config)}
        parts = {place: value for place, (field, value) in fields.items() if not field.metadata.get("path")}
        own = {place: value for place, (f, value) in fields.items() if place not in parts and not f.metadata["made"]}
        found = {place: value for place, value in own.items() if value and isinstance(value, str)}
        lists = {place: value for place, value in own.items() if isinstance(value, list)}
        found |= {
            f"{place}[{i}]": split_number(text)[0] for place, texts in lists.items() for i, text in enumerate(texts)
        }
        return found | {k: v for place, item in parts.items() for k, v in paths_of(item, place).items()}
    else:
        return {}
    return {k: v for place, item in parts.items() for k, v in paths_of(item, place).items()}
