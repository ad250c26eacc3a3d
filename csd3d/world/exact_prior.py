"""The exact prior of the procedural world: the score of its own pictures. A mixture over true renders, no network.

    ẑ_0(z_t) = Σ_k softmax_k(−‖z_t − √ᾱ_t z_k‖² / 2σ_t²) z_k,   ε(z_t) = (z_t − √ᾱ_t ẑ_0) / σ_t

z_k are latents of true renders, by the VAE of the shipped models:

  edits   of a view under an instruction: that view of every right answer; without an instruction: of every edit of the
          scene that training draws, as often as it does; without the source picture too: `WORLD` random pictures
  texts   under a prompt: `PICTURES` renders of scenes that it allows, as its view word says, on a plate only where the
          prompt says so; with a camera, whatever its view word: such scenes seen from within `NEAR_DEG` of it in
          azimuth, and in elevation from its cell of `CELL_DEG`

With it, what a method loses can be told from what its network loses. Results under it are labelled so. It edits scenes
and makes assets and pictures from text; it knows captures of the world only, at equal cameras, and only its words.

    prior:
      model: world:exact
"""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from csd3d.engine.logs import progress
from csd3d.errors import InputError, short
from csd3d.files import cache_folder
from csd3d.fingerprint import of_files
from csd3d.priors.autoencoder import UnscaledLatent, VaeCodec
from csd3d.priors.camera_embedding import CAMERA_WIDTH, DISTANCE_SCALE, MIDDLE_DISTANCE
from csd3d.priors.condition import Condition
from csd3d.priors.embedding_cache import Embedding, embedding_path, read_embedding, write_embedding
from csd3d.priors.mixture import Bank, posterior_mean, scaled_linear_alphas
from csd3d.priors.opening import SHIPPED, ModelFolder
from csd3d.priors.options import Defaults, Options
from csd3d.priors.prior import Prior
from csd3d.registry import register
from csd3d.world.dataset import DISTANCE, read_scene, true_answers
from csd3d.world.language import FAMILIES, VIEW_WORDS, view_word, write_prompt
from csd3d.world.pairs import FOV_DEG, View, sample_pair
from csd3d.world.prompts import parse_prompt, read_prompt, scenes_of_prompt
from csd3d.world.render import render
from csd3d.world.scene import Scene

if TYPE_CHECKING:
    from csd3d.editors.scene import SceneSource

WORLD, PICTURES = 256, 128
SIZE = 128  # of all pictures, in pixels
NEAR_DEG = 12.0
CELL_DEG = 10.0  # elevations are rounded to this, so that the pictures of a ring can be kept
VIEWS = (*VIEW_WORDS.values(), "side view", "facing left", "facing right", "overhead view")
MODEL = SHIPPED / "ip2p"
MIDDLE = (0.0, 0.0, 0.0)  # where cameras look
VERSION = 2  # of how banks are drawn, for those kept on the disk


class Prompts:
    """In place of a text encoder: the "embedding" [1, 1] of a prompt is its number in the order of first use.

    captions: whether prompts must be empty or captions of the world; InputError for others.
    """

    sees = None

    def __init__(self, captions: bool) -> None:
        self.captions = captions
        self.texts: list[str] = []
        self.parts: dict = {}

    def __call__(self, prompts: Sequence[str], image: Tensor | None = None) -> dict[str, Tensor]:
        for prompt in prompts:
            if prompt not in self.texts:
                said = parse_prompt(prompt) if self.captions and prompt else {}
                if said is None or _view_word(said) not in (None, *VIEWS):
                    raise InputError(
                        f"prior.model: world:exact knows only the world's words, and not {short(prompt)!r}"
                    )
                self.texts.append(prompt)
        return {"text": torch.tensor([[[float(self.texts.index(prompt))]] for prompt in prompts])}

    def release(self) -> None:
        """Nothing to free."""


@dataclasses.dataclass(eq=False)
class KnownViews:
    """The views of a capture of the world: `image` [N, C, h, w], their image conditions, and its true edits.

    latents(scene) -> [N, C, h, w]: the latents of another scene seen by the same cameras.
    """

    image: Tensor
    scene: Scene
    latents: Callable[[Scene], Tensor]

    @cached_property
    def identity(self) -> str:
        """What the latents of a scene's views depend on."""
        return hashlib.sha256(repr(self.scene).encode() + self.image.cpu().numpy().tobytes()).hexdigest()

    def row(self, image: Tensor) -> int:
        """The number of the view with this image condition [C, h, w]; InputError where there is none."""
        distances = (self.image - image).square().flatten(1).mean(1)
        found = int(distances.argmin())
        if distances[found] > 1e-6:
            raise InputError("prior.model: world:exact: a source picture is no training view of the capture")
        return found

    def flat(self, scene: Scene) -> Tensor:
        """`latents`, flat, [N, D]."""
        return self.latents(scene).flatten(1)

    def answers(self, prompt: str) -> dict[Scene, float]:
        """The right answers to an instruction, equally likely; InputError for words that the world lacks."""
        answers = true_answers(self.scene, prompt)
        if not answers:
            raise InputError(f"prior.model: world:exact knows only the world's instructions, and not {short(prompt)!r}")
        return dict.fromkeys(answers, 1.0)

    def edits(self, prompt: str) -> dict[Scene, float]:
        """Every edit of the scene with its probability in training, and the answers to `prompt`, which may be none."""
        found: dict[Scene, float] = {}
        for family in FAMILIES.values():
            choices = [answers for _, answers in family.answers(self.scene)]
            for answers in choices:
                for scene in answers:
                    found[scene] = found.get(scene, 0.0) + family.weight / len(choices) / len(answers)
        least = min(found.values())
        return found | {scene: least for scene in self.answers(prompt) if scene not in found}


class ExactPrior(Prior):
    """See the module. `introduce` tells it the views of a capture before an edit."""

    def __init__(self, codec: VaeCodec, options: Options, edits: bool, files: dict[str, Path]):
        self.views: KnownViews | None = None
        self.points: dict[tuple, Tensor] = {}
        self.after: dict[tuple[str, int], Bank] = {}
        self.instruction = ""
        chunks = f"{options.micro_batch} {options.vae_slicing}"  # a VAE's bytes depend on how many go through at once
        self.made_by = f"{of_files(files)} {options.dtype} {options.device.type} {chunks}"
        network = nn.Module()
        network.register_parameter("nothing", nn.Parameter(torch.zeros(())))
        network.config = {}
        defaults = Defaults(
            text_scale=3.0, image_scale=1.0, sampling_text_scale=1.5, sampling_image_scale=1.5, guidance_scale=1.0,
            t_max=0.8, bandwidth=10.24, working_size=SIZE,
        )  # fmt: skip
        super().__init__(
            codec, network, Prompts(captions=not edits), scaled_linear_alphas().float(), _no_forward,
            defaults=defaults, options=options, source=UnscaledLatent() if edits else None,
            camera_width=0 if edits else CAMERA_WIDTH, files=files, family=TITLE, knows="world", scenes_only=True,
        )  # fmt: skip

    def introduce(self, source: "SceneSource", image: Tensor) -> None:
        """Take the capture's training views, with their image conditions; InputError for what it does not know."""
        from csd3d.world.plugin import WorldSceneTruth

        scene = read_scene(source.capture.folder)
        if scene is None:
            raise InputError(
                f"scene.path: {source.capture.folder}: prior.model=world:exact knows only captures of the world; "
                "python -m csd3d.world.dataset writes one"
            )
        self._check_latent(image.shape[1:])
        truth, train = WorldSceneTruth(source.capture, scene, ()), source.capture.train

        def latents(scene: Scene) -> Tensor:
            return self.encode(source.shown(truth.views(scene, train).rgb))

        self.views = KnownViews(image, scene, latents)
        self.points = {key: points for key, points in self.points.items() if key[0] != "edit"}
        self.after, self.instruction = {}, source.prompt

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
        """The exact ε(z_t) [B, C, h, w]; see `Prior.predict_noise`."""
        self._check(z_t, t, condition)
        self.unet_evaluations += len(z_t)
        alpha_bar = self.alphas_cumprod[torch.as_tensor(t, device=self.device).expand(len(z_t))].double()
        banks = [self.bank(condition[row : row + 1], z_t.shape[1:]) for row in range(len(z_t))]
        z_t = z_t.double()
        clean = posterior_mean(z_t.flatten(1), alpha_bar, banks).reshape(z_t.shape)
        root, sigma = (x.sqrt()[:, None, None, None] for x in (alpha_bar, 1 - alpha_bar))
        return ((z_t - root * clean) / sigma).float()

    def bank(self, condition: Condition, shape: torch.Size) -> Bank:
        """The pictures that one row's condition allows."""
        prompt = self.text.texts[int(condition.text[0, 0, 0])]
        if condition.image is not None and bool(condition.image.any()):
            if self.views is None:
                raise InputError("prior.model: world:exact edits captures of the world only")
            return self.edit_bank(prompt, self.views.row(condition.image[0]))
        self._check_latent(shape)
        if condition.image is not None or prompt == "":
            points = self.kept(("world",), WORLD, self.world_bank)
        else:
            camera = told_camera(condition.camera[0]) if condition.camera is not None else None
            if camera is not None:
                points = self.near(prompt, *camera)
            else:
                points = self.kept(("text", prompt), PICTURES, lambda: self.text_bank(prompt))
        return Bank(points)

    def check_size(self, height: int, width: int) -> None:
        """See `Prior.check_size`."""
        if (height, width) != (SIZE, SIZE):
            raise InputError(f"prior.model=world:exact has pictures of {SIZE}x{SIZE} only, not of {width}x{height}")

    def _check_latent(self, shape: torch.Size) -> None:
        height, width = (side * self.codec.downscale for side in shape[1:])
        self.check_size(height, width)

    def kept(self, key: tuple, count: int, make: Callable[[], Tensor]) -> Tensor:
        """Latents [count, D] in memory, from the disk, or made when they are first asked for."""
        if key not in self.points:
            about = self.views.identity if key[0] == "edit" else ""
            name = json.dumps([VERSION, about, *key])
            path = embedding_path(cache_folder("exact-prior"), self.made_by, name)
            shape = (count, math.prod(self.latent_shape(SIZE, SIZE)))

            def fits(found: Embedding) -> bool:
                return found.keys() == {"points"} and found["points"].shape == shape

            found = read_embedding(path, name, fits)
            if found is None:
                found = {"points": make()}
                write_embedding(path, name, found)
            self.points[key] = found["points"].to(self.device).double()
        return self.points[key]

    def edit_bank(self, prompt: str, row: int) -> Bank:
        """The pictures of one view after the edit `prompt`; after any edit for ""."""
        if (prompt, row) not in self.after:
            views = self.views
            shares = views.edits(self.instruction) if prompt == "" else views.answers(prompt)
            count = len(views.image)
            scenes = [self.kept(("edit", repr(scene)), count, partial(views.flat, scene)) for scene in shares]
            weights = torch.tensor(list(shares.values()), dtype=torch.float64, device=self.device).log()
            for number, points in enumerate(torch.stack(scenes, 1)):
                self.after[prompt, number] = Bank(points, weights)
        return self.after[prompt, row]

    def world_bank(self) -> Tensor:
        """Latents [K, D] of the world at large."""
        rng = random.Random("world")
        drawn = [sample_pair(rng) for _ in range(WORLD)]
        return self.rendered([scene for _, _, scene, _ in drawn], [view for *_, view in drawn])

    def text_bank(self, prompt: str) -> Tensor:
        """Latents [K, D] of pictures under a prompt, by cameras of which its view word is true."""
        rng = random.Random(prompt)
        scenes, word = _scenes(prompt, PICTURES, rng), _view_word(read_prompt(prompt))
        return self.rendered(scenes, [_view(scene, word, rng) for scene in scenes])

    def near(self, prompt: str, azimuth_deg: float, elevation_deg: float, distance: float) -> Tensor:
        """Latents [K, D] of pictures under a prompt from near a camera: an arc of a ring."""
        said = read_prompt(prompt)
        words = write_prompt({key: value for key, value in said.items() if key not in ("view", "facing")})
        cell = (round(elevation_deg / CELL_DEG) * CELL_DEG, round(distance, 1))
        ring = self.kept(("ring", words, *cell), _around(), lambda: self.ring(words, *cell))
        first = round((azimuth_deg - NEAR_DEG) / 360 * len(ring))
        return ring[(first + torch.arange(PICTURES, device=ring.device)) % len(ring)]

    def ring(self, prompt: str, elevation_deg: float, distance: float) -> Tensor:
        """Latents [K, D] of pictures under a prompt from all around, `PICTURES` in each arc of `near`, by azimuth."""
        rng = random.Random(f"{prompt} {elevation_deg} {distance}")
        scenes = _scenes(prompt, _around(), rng)
        lifts = [elevation_deg + rng.uniform(-CELL_DEG, CELL_DEG) / 2 for _ in scenes]
        views = [View(360 * number / len(scenes), lift, distance, FOV_DEG, MIDDLE) for number, lift in enumerate(lifts)]
        return self.rendered(scenes, views)

    def rendered(self, scenes: Sequence[Scene], views: Sequence[View]) -> Tensor:
        """Latents [K, D] of scenes, each seen by its view."""
        found, cameras = [], np.stack([view.row(SIZE) for view in views])
        starts = range(0, len(scenes), PICTURES)
        for start in progress(starts, "true pictures") if len(starts) > 2 else starts:
            part = slice(start, start + PICTURES)
            rgb = render(scenes[part], cameras[part], SIZE, SIZE).rgb
            found.append(self.encode(torch.from_numpy(rgb).permute(0, 3, 1, 2)).flatten(1))
        return torch.cat(found)


def told_camera(camera: Tensor) -> tuple[float, float, float] | None:
    """Azimuth and elevation in degrees, and distance, of a camera embedding; None for zeros, which tell no camera."""
    if not bool(camera.any()):
        return None
    waves = (len(camera) - 4) // 2
    azimuth = torch.rad2deg(torch.atan2(camera[0], camera[waves]))
    elevation = torch.rad2deg(torch.atan2(camera[2 * waves], camera[2 * waves + 1]))
    distance = float(camera[2 * waves + 2]) * DISTANCE_SCALE + MIDDLE_DISTANCE
    return float(azimuth), float(elevation), distance


def _around() -> int:
    """Pictures in a ring."""
    return round(PICTURES * 180 / NEAR_DEG)


def _scenes(prompt: str, count: int, rng: random.Random) -> list[Scene]:
    """Random scenes that a prompt allows, on a plate if it says so."""
    plate = "plate" in read_prompt(prompt)
    return [dataclasses.replace(scene, plate=plate) for scene in scenes_of_prompt(prompt, count, rng.randrange(2**31))]


def _view_word(said: dict[str, Any]) -> str | None:
    """Where a prompt says that it is seen from: one of `VIEWS`, or None."""
    return ", ".join(said[key] for key in ("view", "facing") if key in said) or None


def _view(scene: Scene, word: str | None, rng: random.Random) -> View:
    """A random camera such that `word` is true."""
    while True:
        azimuth = rng.uniform(0, 360)
        elevation = rng.uniform(61, 85) if word == "overhead view" else rng.uniform(2, 58)
        seen = view_word(scene, azimuth, elevation)
        if word is None or seen is None or word in seen:
            return View(azimuth, elevation, DISTANCE, FOV_DEG, MIDDLE)


def _no_forward(*_: object) -> Tensor:
    raise InputError("prior.model: world:exact has no network, and so no gradient")


TITLE = "exact prior of the procedural world"


@register("prior", "world", title=TITLE)
def open_exact(
    options: Options, require: Literal["edit", "text"] | None, kind: type[ExactPrior] = ExactPrior
) -> ExactPrior:
    """The prior for edits, or for texts; `kind`: a class of its own."""
    from diffusers import AutoencoderKL

    folder = ModelFolder(MODEL)
    vae = folder.open("vae", AutoencoderKL, torch.float32).to(options.device)
    files = {"vae": folder.part("vae") / "diffusion_pytorch_model.safetensors"}
    return kind(VaeCodec(vae, slicing=options.vae_slicing), options, require != "text", files)
