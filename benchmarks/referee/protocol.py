"""What the referee asks: scenes, instructions and seeds of every level. Definitions: docs/referee.md."""

from dataclasses import dataclass

from csd3d.world.scene import Scene

VERSION = "referee-1"

SCENES = {
    "duck": Scene("duck", "yellow", material="glossy", backdrop="sky blue", sky="gradient", azimuth_deg=30),
    "mug": Scene("mug", "pink", backdrop="beige", sky="gradient", azimuth_deg=75, sun_azimuth_deg=120),
    "chair": Scene("chair", "orange", backdrop="grey", azimuth_deg=200, sun_azimuth_deg=300),
    "robot": Scene("robot", "cyan", backdrop="lavender", sky="horizon", azimuth_deg=10),
    "house": Scene("house", "white", backdrop="mint", sky="gradient", azimuth_deg=60, sun_elevation_deg=40),
    "car": Scene("car", "purple", material="glossy", backdrop="beige", azimuth_deg=140, sun_azimuth_deg=200),
    "snowman": Scene("snowman", "cyan", backdrop="grey", sky="gradient", azimuth_deg=320),
    "table": Scene("table", "pink", backdrop="sky blue", azimuth_deg=25, sun_azimuth_deg=90),
    "cube": Scene("cube", "orange", material="glossy", backdrop="lavender", sky="horizon", azimuth_deg=50),
    "donut": Scene("donut", "black", backdrop="white", sky="gradient", azimuth_deg=100),
}
TUNING_SCENES = {  # rows are tuned on these, and reported on the others
    "tuning-car": Scene("car", "white", backdrop="lavender", sky="gradient", azimuth_deg=250, sun_azimuth_deg=20),
    "tuning-chair": Scene("chair", "pink", material="glossy", backdrop="mint", azimuth_deg=80, sun_azimuth_deg=150),
}


@dataclass(frozen=True)
class Instruction:
    """An instruction, its kind for the tables, and whether its kind was held out of all tuning."""

    text: str
    kind: str
    held_out: bool = True


INSTRUCTIONS = (
    Instruction("paint it a bright colour", "several answers", held_out=False),
    Instruction("give it a pattern", "several answers"),
    Instruction("give it a vivid background", "several answers"),
    Instruction("turn it into a simple solid", "several answers"),
    Instruction("make it green", "one answer", held_out=False),
    Instruction("cover it with snow", "one answer"),
    Instruction("put a red hat on it", "geometry", held_out=False),
    Instruction("make it smaller", "geometry"),
    Instruction("paint it a bright colour and put a white hat on it", "several at once"),
    Instruction("leave it as it is", "nothing"),
)
TUNING_INSTRUCTIONS = ("paint it a bright colour", "turn it blue", "put a yellow hat on it")
_SIX = (0, 1, 2, 4, 6, 9)


@dataclass(frozen=True)
class Level:
    """A level: which prior, whether a scene is fitted to the edited views, and the inputs."""

    number: int | str
    title: str
    model: str  # "" is the shipped editor
    whole: bool
    scenes: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    seeds: tuple[int, ...]
    clip: str = ""  # the demo input of the world whose pictures are edited, instead of scenes: "strip" or "orbit"
    tuning: tuple[str, ...] = tuple(TUNING_SCENES)


_CANVAS = tuple(INSTRUCTIONS[i] for i in (0, 1, 4, 5))
LEVELS: dict[int | str, Level] = {
    1: Level(1, "exact prior, views", "world:exact", False, tuple(SCENES), INSTRUCTIONS, (0, 1, 2)),
    2: Level(
        2, "shipped network, views", "", False, tuple(SCENES)[:6], tuple(INSTRUCTIONS[i] for i in _SIX), (0, 1, 2)
    ),
    3: Level(
        3, "shipped network, whole scenes", "", True, tuple(SCENES)[:4],
        tuple(INSTRUCTIONS[i] for i in (0, 1, 4, 6)), (0, 1),
    ),
    # seeds 0 to 3 were looked at when the defaults of CSD-Edit were chosen: rows are tuned on two of them
    "strips": Level(
        "strips", "shipped network, strips", "", False, tuple(f"strip-{i}" for i in (4, 5, 6, 7)), _CANVAS, (0, 1),
        "strip", ("strip-0", "strip-1"),
    ),
    "videos": Level(
        "videos", "shipped network, videos", "", False, tuple(f"orbit-{i}" for i in (4, 5, 6, 7)), _CANVAS, (0, 1),
        "orbit", ("orbit-0", "orbit-1"),
    ),
}  # fmt: skip
