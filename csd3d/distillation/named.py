"""Methods by their names in configs: "sds", "csd" (SDS with SVGD), "vsd+csd" (any method with SVGD)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from csd3d import registry
from csd3d.distillation.method import Method
from csd3d.distillation.step import DistillConfig, configured
from csd3d.distillation.svgd import SVGDConfig


def parse_name(name: str) -> tuple[str, bool]:
    """The registered name, and whether particles collaborate; InputError (a ValueError) for an unknown name."""
    base, plus, rest = ("sds", "+", "csd") if name == "csd" else name.partition("+")
    if plus and rest != "csd":
        raise ValueError(f"method is {name!r}: after the + stands csd, as in {base}+csd")
    registry.get("method", base)
    return base, bool(plus)


def create_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method with its own `settings`; ValueError for an unknown or a missing key."""
    base, _ = parse_name(name)
    kind, settings = registry.get("method", base).thing, settings or {}
    keys = {field.name: field for field in dataclasses.fields(kind)}
    for key in settings:
        if key not in keys:
            raise ValueError(f"method {base} has no key {key!r}; it has {', '.join(keys) or 'none'}")
    for key, field in keys.items():
        required = field.init and field.default is field.default_factory is dataclasses.MISSING
        if required and key not in settings:
            raise ValueError(f"method {base} needs its key {key}: give methods.{base}.{key}")
    return kind(**settings)


def named_config(name: str, method: Method, config: DistillConfig) -> DistillConfig:
    """`config` with the method's fixed keys, and with SVGD exactly if the name or the method asks for it."""
    _, collaborates = parse_name(name)
    # a method that fixes keys of svgd needs collaboration under any name
    collaborates |= isinstance(getattr(method, "fixed", {}).get("svgd"), Mapping)
    return configured(method, dataclasses.replace(config, svgd=(config.svgd or SVGDConfig()) if collaborates else None))


def method_title(name: str) -> str:
    """The method's title in reports."""
    base, collaborates = parse_name(name)
    title = registry.title("method", base)
    return "CSD" if name == "csd" else f"{title} + CSD" if collaborates else title


def names_for(have: Iterable[str] = ()) -> list[str]:
    """The methods for a job that has `have`, of "source" and "image", by name; "sds" and "csd" come first."""
    have = set(have)
    names = [e.name for e in registry.entries("method") if set(getattr(e.thing, "needs", ())) <= have]
    names.sort(key=lambda name: (name != "sds", name))
    return [*names[:1], "csd", *names[1:]] if "sds" in names else names
