"""Every number that a config can have: far too large, or a whole one below 0, it is refused or does no harm."""

import math
import re
import types
import typing

import pytest
import torch

from csd3d import memory, registry
from csd3d.canvas.clip import DemoConfig
from csd3d.convert import BadValue, build
from csd3d.editors.csd_edit_scene import CSDEditScene
from csd3d.errors import InputError
from csd3d.evaluation.text import EvaluateConfig
from csd3d.export import MeshConfig
from csd3d.fields import FieldConfig
from csd3d.guidance.views import ViewsConfig
from csd3d.keys import DOCUMENTED
from csd3d.memory import SHARE, check_fits, memory_bytes, size_text
from csd3d.rendering import RenderConfig
from csd3d.representations.batch import AssetConfig, LossConfig, ShadingConfig, check_memory
from csd3d.representations.descent import OptimConfig
from csd3d.representations.fit import FitConfig, check_rays
from csd3d.schema import choose, hints_of, limits_of, section_of
from csd3d.tasks.text_to_3d import TextTo3DConfig
from csd3d.tasks.text_to_image import TextToImageConfig

LIMITS = {  # most of something that the input decides: a large one changes nothing
    ("PriorConfig", "micro_batch"),
    ("SceneConfig", "max_pixels"),
    ("SceneConfig", "holdout_every"),
    *((f"Edit{kind}Config", "max_pixels") for kind in ("Image", "Panorama", "Video")),
    ("EditVideoConfig", "max_frames"),
}
HUGE, NEGATIVE = 10**9, -1
NEEDED = {"prompt": "a cat", "prompts": ["a cat"]}  # by tasks
SMALL = AssetConfig(resolution=[(0, 16)])


def configs() -> list[type]:
    """Every dataclass with keys, at any depth, of tasks and of what can be chosen by name."""
    found: list[type] = []

    def add(schema: type) -> None:
        if schema not in found:
            found.append(schema)
            for annotation in hints_of(schema).values():
                if section := section_of(annotation):
                    add(section)

    for kind in DOCUMENTED:
        for entry in registry.entries(kind):
            if entry.thing.__module__.startswith("csd3d."):
                add(entry.thing)
    return found


def whole_numbers(annotation: object) -> bool:
    """Whether an annotation takes whole numbers, itself or in lists."""
    return annotation is int or any(map(whole_numbers, typing.get_args(annotation)))


def values_of(annotation: object, number: int) -> list[object]:
    """The number as the annotation takes it: in pairs, in either place."""
    if typing.get_origin(annotation) is list:
        return [[(0, number)], [(0, 1), (number, 1)]]
    return [number]


KEYS = [(schema, name) for schema in configs() for name, hint in hints_of(schema).items() if whole_numbers(hint)]


def test_the_keys_are_found():
    names = {(schema.__name__, name) for schema, name in KEYS}
    wanted = {("FieldConfig", "hidden"), ("AssetConfig", "resolution"), ("VSD", "rank"), ("IP2P", "steps")}
    assert wanted | LIMITS <= names
    assert len(KEYS) > 60


@pytest.mark.parametrize(("schema", "name"), KEYS, ids=[f"{schema.__name__}.{name}" for schema, name in KEYS])
def test_a_number_out_of_bounds_is_refused_in_one_line(schema, name):
    allowed = {HUGE, NEGATIVE} if name == "seed" else {HUGE} if (schema.__name__, name) in LIMITS else set()
    if (schema.__name__, name) == ("Photos", "seed"):
        allowed = {HUGE}
    given = {key: value for key, value in NEEDED.items() if hints_of(schema).get(key) in (str, list[str])}
    for number in (HUGE, NEGATIVE):
        for value in values_of(hints_of(schema)[name], number):
            if number in allowed:
                build(schema, given | {name: value}, "section", None)
                continue
            with pytest.raises((BadValue, InputError)) as caught:
                build(schema, given | {name: value}, "section", None)
            told = f"{getattr(caught.value, 'key', '')}: {caught.value}"
            assert name in told
            assert "\n" not in told
            assert re.search(r"from -?\d+ to \d+|at least|above 0|positive", told), told


def fractions(annotation: object) -> bool:
    """Whether an annotation takes numbers with a fraction, itself or in lists."""
    return annotation is float or any(map(fractions, typing.get_args(annotation)))


def filled(annotation: object, number: float) -> object:
    """The number as the annotation takes it: alone where it can, else in place of the first of a list or section."""
    parts, origin = typing.get_args(annotation), typing.get_origin(annotation)
    if annotation is float or float in parts or origin in (typing.Union, types.UnionType, typing.Annotated):
        return {dict: {"a": number}, list: [number], tuple: [number] * len(parts)}.get(origin, number)
    return {"a": filled(parts[1], number)} if origin is dict else [filled(parts[0], number)]


FRACTIONS = [(schema, name) for schema in configs() for name, hint in hints_of(schema).items() if fractions(hint)]


def test_the_keys_with_fractions_are_found():
    names = {(schema.__name__, name) for schema, name in FRACTIONS}
    assert {("OptimConfig", "learning_rate"), ("ViewsConfig", "distance"), ("LossConfig", "opacity")} <= names
    assert len(FRACTIONS) > 100


@pytest.mark.parametrize(("schema", "name"), FRACTIONS, ids=[f"{schema.__name__}.{name}" for schema, name in FRACTIONS])
def test_a_number_that_is_not_finite_in_32_bits_is_refused_in_one_line(schema, name):
    given = {key: value for key, value in NEEDED.items() if hints_of(schema).get(key) in (str, list[str])}
    for number in (math.inf, -math.inf, math.nan, 1e99):
        with pytest.raises((BadValue, InputError)) as caught:
            build(schema, given | {name: filled(hints_of(schema)[name], number)}, "section", None)
        told = f"{getattr(caught.value, 'key', '')}: {caught.value}"
        assert name in told
        assert "\n" not in told


SIGNED = {  # negative guidance goes away from a prompt, negative repulsion together, ...
    *("scale", "text_scale", "image_scale", "guidance_scale", "guidance_final", "classifier_scale", "source_scale"),
    *("inversion_scale", "repulsion", "entropy", "eta", "eta_start", "blob_scale", "elevation_deg"),
}


def signed(schema: type, name: str) -> bool:
    return name in SIGNED or not (limits_of(hints_of(schema)[name]) or hints_of(schema)[name] in (float, float | None))


@pytest.mark.parametrize(
    ("schema", "name"),
    [pair for pair in FRACTIONS if not signed(*pair)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_number_that_cannot_be_negative_is_refused_in_one_line(schema, name):
    if (limits := limits_of(hints_of(schema)[name])) and limits.least < 0:
        return
    given = {key: value for key, value in NEEDED.items() if hints_of(schema).get(key) in (str, list[str])}
    with pytest.raises((BadValue, InputError)) as caught:
        build(schema, given | {name: -1.0}, "section", None)
    assert name in f"{getattr(caught.value, 'key', '')}: {caught.value}"


@pytest.mark.parametrize(
    ("schema", "name", "value"),
    [
        (TextToImageConfig, "learning_rate", 0.0), (CSDEditScene, "later_t_max", 5.0),
        (MeshConfig, "keep_fraction", 2.0), (MeshConfig, "smoothing", -1.0), (MeshConfig, "threshold", 0.0),
        (ViewsConfig, "position_jitter", -1.0), (OptimConfig, "clip", -1.0), (TextTo3DConfig, "save_seconds", -1.0),
        (LossConfig, "opacity", -1.0), (LossConfig, "opacity", [0, 0, 5, -1]),
        (LossConfig, "empty", 2.0), (LossConfig, "empty", [0, 0.5, 5, 1.5]), (ShadingConfig, "normal_step", 0.0),
    ],
)  # fmt: skip
def test_a_weight_or_share_out_of_its_range_is_refused(schema, name, value):
    given = {"prompt": "a cat"} if schema is TextTo3DConfig else {}
    with pytest.raises((BadValue, InputError)) as caught:
        build(schema, given | {name: value}, "section", None)
    assert name in f"{getattr(caught.value, 'key', '')}: {caught.value}"


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def small_machine(monkeypatch):
    """One with 1 GiB."""
    monkeypatch.setattr("csd3d.memory.memory_bytes", lambda: 2**30)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: FieldConfig(levels=16, log2_hashmap_size=22, features_per_level=8), "levels 16, .*hashmap_size 22"),
        (lambda: FieldConfig(hidden=8192, colour_layers=10), "hidden 8192"),
        (lambda: RenderConfig(resolution=512), "render.resolution: 512 with levels 5"),
        (lambda: MeshConfig(resolution=512), "resolution 512"),
        (lambda: MeshConfig(texture_size=8192), "texture_size 8192"),
        (lambda: DemoConfig(width=8192, height=8192), "width 8192, height 8192"),
        (lambda: DemoConfig(height=512, frames=1000), "frames 1000"),
        (lambda: check_memory(AssetConfig(), 64, 64), "particles 64 × views_per_step 64 at asset.resolution 64"),
        (lambda: check_memory(AssetConfig(resolution=[(0, 1)]), 1000, 1), "particles 1000: training them"),
        (
            lambda: check_rays(FitConfig(samples=2**26, rays=2**20), choose("representation", "hashgrid").thing, "fit"),
            "fit: samples 67108864, rays 1048576",
        ),
        (
            lambda: TextTo3DConfig(prompt="a", asset=SMALL, guidance_size=4096, views_per_step=8).open(
                torch.device("cpu")
            ),
            "guidance_size 4096 with 1 × 8 views",
        ),
        (
            lambda: TextTo3DConfig(prompt="a", asset=SMALL, evaluate=EvaluateConfig(size=2048, views=100)).open(
                torch.device("cpu")
            ),
            "evaluate.size 2048 with evaluate.views 100 of 1 × 1 assets",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_made(small_machine, make, told):
    with pytest.raises(InputError, match=told) as caught:
        make()
    assert re.search(r"takes about [\d.]+ GiB, this machine has 1 GiB; lower ", str(caught.value))
    assert "\n" not in str(caught.value)


def test_memory_is_estimated_at_what_parameters_take():
    made_of = choose("representation", "hashgrid").thing
    scene = made_of.open(torch.tensor([-1.0, -1, -1, 1, 1, 1]), torch.Generator())
    assert made_of.field.training_bytes == 16 * sum(parameter.numel() for parameter in scene.field.parameters())


def test_sizes_have_digits():
    sizes = {0: "0 bytes", 900: "900 bytes", 3 * 2**9: "1.5 KiB", 40 * 2**20: "40 MiB", 2**33: "8 GiB"}
    assert {size: size_text(size) for size in sizes} == sizes
    check_fits(SHARE * memory_bytes() - 1, "this")


def test_a_containers_memory_limit_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER", limit)
    whole = memory.memory_bytes()
    limit.write_text("max\n")
    assert memory.memory_bytes() == whole
    limit.write_text(f"{1 << 30}\n")
    assert memory.memory_bytes() == 1 << 30
