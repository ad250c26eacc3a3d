"""Does the edits of a level, scene by scene: each edit is a line of JSON in the scene's file, and is done once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.lines import LineShare, measured, rounded
from benchmarks.referee.canvas import CanvasBench
from benchmarks.referee.inputs import Input, judge, open_capture
from benchmarks.referee.protocol import SCENES, TUNING_SCENES, VERSION, Level
from benchmarks.referee.rows import CONFIG, count_updates, editor_of
from benchmarks.referee.views import edit_views
from benchmarks.referee.whole import Whole, judge_whole
from csd3d.editors.scene import SceneSource
from csd3d.evaluation.views import SourceViews, judge_views, prepare_views
from csd3d.metrics import load_clip
from csd3d.priors import load_prior
from csd3d.run import read
from csd3d.world.language import caption

EVERY = 3  # levels of views alone take each third training view: 12 of 36
PROXY_SEEDS = (0,)  # edits with these seeds are also judged by what needs no truth
ALL_SCENES = {**SCENES, **TUNING_SCENES}


@dataclass(frozen=True)
class Asked:
    """One edit: a row under a name, with the editor's keys."""

    row: str
    keys: str  # JSON
    instruction: str
    kind: str
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two edits of a scene the same."""
        asked = {"row": self.row, "editor": json.loads(self.keys), "instruction": self.instruction, "seed": self.seed}
        return {"version": VERSION, **asked}


@dataclass
class Share(LineShare):
    """The edits of one scene, as a process of its own does them."""

    KEYS: ClassVar[tuple[str, ...]] = ("version", "row", "editor", "instruction", "seed")

    level: Level
    scene: str
    asked: Sequence[Asked]
    work: Path

    @property
    def name(self) -> str:
        return self.scene

    @property
    def file(self) -> Path:
        return self.work / f"level-{self.level.number}" / f"{self.scene}.jsonl"

    def lines(self, missing: Sequence[Asked]) -> Iterator[dict[str, Any]]:
        """Do the edits, those of one instruction together."""
        level, scene = self.level, self.scene
        bench = CanvasBench(level, scene) if level.clip else Bench(level, scene, self.work)
        for instruction in dict.fromkeys(one.instruction for one in missing):
            for one in missing:
                if one.instruction == instruction:
                    yield {"version": VERSION, "level": level.number, "scene": scene} | rounded(bench.edit(one))


class Bench:
    """An open prior, a scene, and what judges its edits."""

    def __init__(self, level: Level, scene: str, work: Path):
        config = read(CONFIG, [])
        prior = replace(config.prior, model=level.model or config.prior.model)
        self.level, self.prior = level, load_prior(prior, require="edit")
        capture = open_capture(work / "captures" / scene, ALL_SCENES[scene], 1 if level.whole else EVERY)
        self.given, self.clip = Input(scene, ALL_SCENES[scene], capture), load_clip()
        self.whole = Whole(self.given, self.prior, work / "reconstructed" / scene) if level.whole else None
        self.sources: dict[str, SceneSource] = {}
        self.prepared: SourceViews | None = None

    def source(self, instruction: str) -> SceneSource:
        """The photos with an instruction; only the last is kept, because the exact prior knows one."""
        if instruction not in self.sources:
            self.sources = {instruction: SceneSource(self.prior, self.given.capture, instruction)}
            _ = self.sources[instruction].image, self.sources[instruction].z
        return self.sources[instruction]

    def edit(self, one: Asked) -> dict[str, Any]:
        """The line of an edit."""
        return measured(one.identity | {"kind": one.kind}, lambda: self.figures(one))

    def figures(self, one: Asked) -> dict[str, Any]:
        """What is measured of an edit."""
        editor, source = editor_of(one.keys), self.source(one.instruction)
        if self.whole is not None:
            edited = self.whole.edit(source, json.loads(one.keys)["type"], editor, one.seed)
            after, cost = edited.pictures, edited.cost
            figures = judge_whole(self.whole, one.instruction, edited)
        else:
            steps = count_updates(editor, len(self.given.capture.train))
            after, cost = edit_views(self.given, self.prior, source, editor, steps, one.seed)
            figures = judge(self.given, one.instruction, after)
        judged = one.seed in PROXY_SEEDS and one.kind != "tuning"
        proxies = self.proxies(one.instruction, figures["answer"], after) if judged else {}
        return figures | cost | proxies

    def proxies(self, instruction: str, answer: int, after: Tensor) -> Mapping[str, float | None]:
        """What is measured without knowing the truth, except for the captions."""
        if self.prepared is None:
            before = self.given.before
            self.prepared = prepare_views(
                self.given.photos, cameras=self.given.cameras, depths=before.depth, masks=before.mask, clip=self.clip,
                features=self.prior.features,
            )  # fmt: skip
        texts = [caption(scene) for scene in (self.given.scene, self.given.edit(instruction).answers[answer])]
        found = judge_views(replace(self.prepared, captions=self.clip.embed_texts(texts).cpu()), after)
        return {name: value for name, value in found.items() if name not in ("warped_error_before", "overlap")}
