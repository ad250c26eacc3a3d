"""The old table of methods, until its callers have moved to `named`."""

from collections.abc import Iterable
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
METHODS = {
    "sds": Method("SDS (DreamFusion)", {"method": "sds"}),
    "bridge": Method("SDS-Bridge", {"method": "bridge"}),
    "sdi": Method("SDI", {"method": "sds", "noise": "inverted", **ANNEALED}),
    "fsd": Method("FSD", {"method": "sds", "noise": "camera", "schedule": "annealed"}),
    "nfsd": Method("NFSD", {"method": "nfsd"}),
    "vsd": Method("VSD (ProlificDreamer)", {"method": "vsd"}, ("lora",)),
    "lmc": Method("LMC-SDS", {"method": "lmc"}, ("expected",)),
    "dds": Method("DDS", {"method": "dds"}, ("source",)),
    "pds": Method("PDS", {"method": "pds"}, ("source",)),
}


def method_names(source: bool = False) -> tuple[str, ...]:
    """Every method of a text, and with a `source` to edit also those that need it: "csd" is "sds+csd", and "+csd"
    collaborates under any of them."""
    return ("sds", "csd", *(name for name in list(METHODS)[1:] if source or "source" not in METHODS[name].needs))


def check_methods(names: Iterable[str], config: DistillConfig, source: bool = False) -> None:
    """ValueError, saying why, for a name that is no method and for a method that `config` does not suit or that has no
    source."""
    for name in names:
        if "source" in find_method(name)[0].needs and not source:
            raise ValueError(f"method {name!r} edits a source, and there is none: use task text_to_image with "
                             f"source.image, or one of {', '.join(method_names())}")  # fmt: skip
        method_config(name, config)


def find_method(name: str) -> tuple[Method, bool]:
    """The method and whether its particles collaborate; ValueError for another name."""
    base, plus, rest = ("sds", "+", "csd") if name == "csd" else name.partition("+")
    if base == "csd_edit":
        raise ValueError(f"method {name!r} edits a source scene by an instruction: use task edit_scene")
    if base not in METHODS or (plus and rest != "csd"):
        raise ValueError(f"method is {name!r}: choose one of {', '.join(method_names())}, METHOD+csd, or to edit a "
                         "picture (text_to_image's source) dds, pds")  # fmt: skip
    return METHODS[base], bool(plus)


def method_config(name: str, config: DistillConfig) -> DistillConfig:
    """`config` as the method `name` wants it: its own settings win, and SVGD is on exactly where "csd" is named."""
    method, collaborative = find_method(name)
    return replace(config, **method.settings, svgd=(config.svgd or SVGDConfig()) if collaborative else None)
