"""The methods by name: what each sets in a DistillConfig, and what it needs beside a text."""

from dataclasses import dataclass, field, replace

from csd3d.distillation.distill import DistillConfig
from csd3d.distillation.svgd import SVGDConfig


@dataclass(frozen=True)
class Method:
    """The settings that make the method, over what the rest of a config says; `needs` names what a job must have."""

    title: str
    settings: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()


ANNEALED = {"schedule": "annealed", "t_max": 0.98, "t_min": 0.25, "weight": "x0"}
TEXT_METHODS = {
    "sds": Method("SDS (DreamFusion)", {"method": "sds"}),
    "bridge": Method("SDS-Bridge", {"method": "bridge"}),
    "sdi": Method("SDI", {"method": "sds", "noise": "inverted", **ANNEALED}),
    "fsd": Method("FSD", {"method": "sds", "noise": "camera", "schedule": "annealed"}),
    "nfsd": Method("NFSD", {"method": "nfsd"}),
    "vsd": Method("VSD (ProlificDreamer)", {"method": "vsd"}, ("lora",)),
    "lmc": Method("LMC-SDS", {"method": "lmc"}, ("expected",)),
}
SOURCE_METHODS = ("csd_edit", "dds", "pds")  # they edit something that exists


def method_names() -> tuple[str, ...]:
    """Every method of a text alone: "csd" is "sds+csd", and "+csd" collaborates under any of them."""
    return ("sds", "csd", *(name for name in TEXT_METHODS if name != "sds"))


def find_method(name: str) -> tuple[Method, bool]:
    """The method and whether its particles collaborate; ValueError, saying why, for what a text alone cannot drive."""
    base, plus, rest = ("sds", "+", "csd") if name == "csd" else name.partition("+")
    if base in SOURCE_METHODS:
        raise ValueError(f"method {name!r} edits a source and a text alone has none: use task edit_scene, or one of "
                         f"{', '.join(method_names())}")  # fmt: skip
    if base not in TEXT_METHODS or (plus and rest != "csd"):
        raise ValueError(f"method is {name!r}: choose one of {', '.join(method_names())}, or METHOD+csd")
    return TEXT_METHODS[base], bool(plus)


def method_config(name: str, config: DistillConfig) -> DistillConfig:
    """`config` as the method `name` wants it: its own settings win, and SVGD is on exactly where "csd" is named."""
    method, collaborative = find_method(name)
    return replace(config, **method.settings, svgd=(config.svgd or SVGDConfig()) if collaborative else None)
