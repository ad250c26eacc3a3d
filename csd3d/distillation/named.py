"""Methods by the names that configs have: "sds", "csd" (SDS with SVGD), "vsd+csd" (any method with SVGD)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from csd3d import registry
from csd3d.distillation.method import Method
from csd3d.distillation.step import DistillConfig, configured
from csd3d.distillation.svgd import SVGDConfig


def parse_name(name: str) -> tuple[str, bool]:
    """The registered name, and whether the particles collaborate; InputError, a ValueError, for an unknown name."""
    base, plus, rest = ("sds", "+", "csd") if name == "csd" else name.partition("+")
    if plus and rest != "csd":
        raise ValueError(f"method is {name!r}: after the + stands csd, as in {base}+csd")
    registry.get("method", base)
    return base, bool(plus)


def create_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method with its own `settings`; ValueError naming a key that it does not have."""
    base, _ = parse_name(name)
    kind = registry.get("method", base).thing
    keys = [field.name for field in dataclasses.fields(kind)]
    for key in settings or {}:
        if key not in keys:
            raise ValueError(f"method {base} has no key {key!r}; it has {', '.join(keys) or 'none'}")
    for field in dataclasses.fields(kind):
        given = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.init and not given and field.name not in (settings or {}):
            raise ValueError(f"method {base} needs its key {field.name}: give methods.{base}.{field.name}")
    return kind(**(settings or {}))


def named_config(name: str, method: Method, config: DistillConfig) -> DistillConfig:
    """`config` as the method wants it, with SVGD exactly where the name says so or the method itself."""
    _, collaborates = parse_name(name)
    # a method that fixes keys of svgd is one of several particles by itself
    collaborates |= isinstance(getattr(method, "fixed", {}).get("svgd"), Mapping)
    return configured(method, dataclasses.replace(config, svgd=(config.svgd or SVGDConfig()) if collaborates else None))


def method_title(name: str) -> str:
    """What reports call it."""
    base, collaborates = parse_name(name)
    title = registry.title("method", base)
    return "CSD" if name == "csd" else f"{title} + CSD" if collaborates else title


def names_for(have: Iterable[str] = ()) -> list[str]:
    """The names whose `needs` a job meets that has `have`, of "source" and "image"; "csd" stands behind "sds"."""
    have = set(have)
    found = [e.name for e in registry.entries("method") if set(getattr(e.thing, "needs", ())) <= have]
    found.sort(key=lambda name: (name != "sds", name))
    return [*found[:1], "csd", *found[1:]] if "sds" in found else found
