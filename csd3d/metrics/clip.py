"""CLIP as a metric (Radford et al. 2021, arXiv 2103.00020): opening a model, and scores from its embeddings.

Symbols: E_I, E_T unit embeddings of images and texts, D wide; B images, V views of one object, N particles (NeRFs),
K distractors. Report a score together with the `name` of its network, which is unique.
"""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csd3d.arguments import path_of
from csd3d.cameras import side_seen
from csd3d.errors import InputError, one_line
from csd3d.files import read_json
from csd3d.priors.hub import HUB_NAME, fetch_folder
from csd3d.priors.libraries import quiet
from csd3d.priors.opening import class_of, open_network, open_tokenizer
from csd3d.priors.weights import find_weights

TwoTowers = nn.Module  # transformers' CLIPModel or VisionTextDualEncoderModel
KINDS = {"clip": "transformers.CLIPModel", "vision-text-dual-encoder": "transformers.VisionTextDualEncoderModel"}
WORLD = "world"
WORLD_FOLDER = Path(__file__).parents[1] / "assets" / "clip"
OPEN_CLIP = "open_clip:"
FILES = ("*.json", "merges.txt", "model.safetensors")  # of a CLIP in a hub repository
VIEWS = ("front view", "side view, facing left", "side view, facing right", "back view")
SAID_VIEW = r",?\s*(front|side|back|overhead) view(, facing (left|right))?\s*\.?\s*$"  # at the end of a prompt
MEAN, STD = 0.5, 0.25  # normalisation of pixels in [0, 1] for the shipped CLIP
MODES = {"2": "bilinear", "3": "bicubic"}  # PIL's numbers
INSTALL = 'pip install -c constraints.txt -e ".[metrics]"'


@dataclass(frozen=True)
class ClipModel:
    """A CLIP with the name for its scores; the towers map images [B,3,H,W] and texts to unit embeddings [B,D]."""

    name: str
    image_tower: Callable[[Tensor], Tensor]
    text_tower: Callable[[list[str]], Tensor]
    batch: int = 64

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [B,D] of images [B,3,H,W] in [0, 1]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images [B, 3, H, W], got {tuple(images.shape)}")
        return torch.cat([self.image_tower(part) for part in images.split(self.batch)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings [B,D] of texts, which are cut at the tower's length."""
        texts = list(texts)
        return torch.cat([self.text_tower(texts[i : i + self.batch]) for i in range(0, len(texts), self.batch)])


def load_clip(source: str | Path = WORLD, device: torch.device | str = "cpu") -> ClipModel:
    """Open `world` (the shipped CLIP), a folder of a transformers CLIP, or `open_clip:ARCHITECTURE/WEIGHTS`.

    A folder holds a CLIPModel or a VisionTextDualEncoderModel. The name is "CLIP (world)" or "CLIP (SOURCE)". Raises
    InputError where it is missing, broken or of another kind.
    """
    given = str(source)
    if given.startswith(OPEN_CLIP):
        return _load_open_clip(given, device)
    folder = find_clip(given)
    return _load_folder(folder, WORLD if folder.resolve() == WORLD_FOLDER.resolve() else given, device)


def find_clip(given: str) -> Path:
    """The folder of a transformers CLIP, downloaded if it is a hub name; InputError where there is none."""
    try:
        folder = WORLD_FOLDER if given == WORLD else path_of(given)
    except ArgumentTypeError as error:
        raise InputError(f"CLIP: {error}") from None
    if not folder.exists() and re.fullmatch(HUB_NAME, given):
        return fetch_folder(given, FILES, "CLIP")
    if not folder.is_dir():
        raise InputError(
            f"CLIP: {given!r} is no folder ({folder}); give {WORLD}, a folder that transformers' CLIPModel was saved "
            f"to, a hub name, or {OPEN_CLIP}ARCHITECTURE/WEIGHTS"
        )
    return folder


def _load_folder(folder: Path, name: str, device: torch.device | str) -> ClipModel:
    model, tokenizer = open_towers(folder)
    model = model.eval().requires_grad_(False).to(device, torch.float32)
    prepare = partial(clip_pixels, **read_preparation(folder, model.config.vision_config.image_size))
    length = model.config.text_config.max_position_embeddings

    def embed(texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return embed_tokens(model, tokenizer(texts, **options).input_ids.to(device))

    return ClipModel(f"CLIP ({name})", lambda images: embed_images(model, images.to(device), prepare), embed)


def check_clip(given: str) -> None:
    """Raise InputError where `load_clip` would for a folder, as far as that shows without opening its weights."""
    from transformers import CLIPTokenizer

    folder = find_clip(given)
    _kind_of(folder)
    find_weights(folder, "model")
    with quiet():
        open_tokenizer(folder, CLIPTokenizer)
    vision = _read_json(folder / "config.json").get("vision_config")
    size = vision.get("image_size") if isinstance(vision, dict) else None
    if isinstance(size, int):
        read_preparation(folder, size)


def _kind_of(folder: Path) -> str:
    """The kind of CLIP in a folder, one of KINDS."""
    if (kind := _read_json(folder / "config.json").get("model_type")) not in tuple(KINDS):
        raise InputError(f"{folder}/config.json: holds a {kind}, a {' or '.join(KINDS)} is needed")
    return kind


def open_towers(folder: Path) -> tuple[TwoTowers, Any]:
    """The model and its tokenizer; InputError where the folder is broken or of another kind."""
    from transformers import CLIPTokenizer

    from csd3d.metrics import conv_clip  # noqa: F401 (registers the image tower of the shipped CLIP)

    kind = _kind_of(folder)
    with quiet():
        model = open_network(folder, class_of(KINDS[kind]), "model")
        tokenizer = open_tokenizer(folder, CLIPTokenizer)
    if len(tokenizer) > model.config.text_config.vocab_size:
        rows = model.config.text_config.vocab_size
        raise InputError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the text tower {rows}")
    return model, tokenizer


def check_open_clip(source: str) -> None:
    """Fetch the weights that `source` names without opening them; InputError where that fails."""
    open_clip, architecture, weights = _open_clip(source)
    if Path(weights).is_file():
        return
    if not (about := open_clip.get_pretrained_cfg(architecture, weights)):
        raise InputError(f"CLIP: open_clip knows no {source}; open_clip.list_pretrained() has those that it knows")
    try:
        open_clip.download_pretrained(about)
    except Exception as error:  # no network or a broken download
        raise InputError(f"CLIP: open_clip could not fetch {source} ({one_line(error, 160)})") from None


def _open_clip(source: str) -> tuple[Any, str, str]:
    """The package open_clip, and the architecture and weights that `source` names."""
    architecture, _, weights = source.removeprefix(OPEN_CLIP).partition("/")
    if not architecture or not weights:
        raise InputError(f"CLIP: {source!r} should read {OPEN_CLIP}ViT-bigG-14/laion2b_s39b_b160k")
    try:
        import open_clip
    except ImportError as error:
        raise InputError(f"CLIP: {source} needs packages that are not installed ({error}): {INSTALL}") from None
    return open_clip, architecture, weights


def _load_open_clip(source: str, device: torch.device | str) -> ClipModel:
    """A model of the open_clip package, which downloads the weights once."""
    open_clip, architecture, weights = _open_clip(source)
    try:
        model = open_clip.create_model(architecture, pretrained=weights, device=device).eval()
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # an unknown name, no network or a broken download
        raise InputError(f"CLIP: open_clip gave no {source} ({' '.join(str(error).split())[:160]})") from None
    config = model.visual.preprocess_cfg
    size, mode = config["size"], config.get("resize_mode", "shortest")
    size = size if isinstance(size, int) else size[0]
    if mode not in ("shortest", "squash"):
        raise InputError(f"CLIP: {source} resizes by {mode!r}; shortest and squash are supported")
    prepare = partial(
        clip_pixels,
        size=size,
        edge=size if mode == "shortest" else None,
        mode=config.get("interpolation", "bicubic"),
        mean=config["mean"],
        std=config["std"],
    )
    return ClipModel(
        f"CLIP ({source})",
        lambda images: F.normalize(model.encode_image(prepare(images.to(device))).float(), dim=-1),
        lambda texts: F.normalize(model.encode_text(tokenizer(texts).to(device)).float(), dim=-1),
    )


def read_preparation(folder: Path, image_size: int) -> dict[str, Any]:
    """The arguments of `clip_pixels` that preprocessor_config.json asks for, for a tower of `image_size`² pixels.

    Missing keys have CLIPImageProcessor's defaults. Raises InputError for unsupported settings.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    path = folder / "preprocessor_config.json"
    config = _read_json(path)
    if not all(config.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")):
        raise InputError(f"{path}: do_resize, do_rescale and do_normalize must be true")
    if (mode := MODES.get(str(config.get("resample", 3)))) is None:
        raise InputError(f"{path}: resample {config['resample']!r} is none of 2 (bilinear), 3 (bicubic)")
    resize, cropped = config.get("size", {"shortest_edge": 224}), config.get("do_center_crop", True)
    edge = resize.get("shortest_edge") if isinstance(resize, dict) else resize
    side = (_square(config.get("crop_size", 224)) if cropped else None) if edge else _square(resize)
    if side != image_size or not isinstance(edge, int | None) or (edge or side) < side:
        needed = f"{image_size} × {image_size} pixels"
        raise InputError(f"{path}: size and crop_size do not lead to the {needed} that the model takes")
    mean, std = config.get("image_mean", OPENAI_CLIP_MEAN), config.get("image_std", OPENAI_CLIP_STD)
    for key, values in (("image_mean", mean), ("image_std", std)):
        numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if (
            not numbers
            or len(values) != 3
            or not all(map(math.isfinite, values))
            or (key == "image_std" and 0 in values)
        ):
            raise InputError(f"{path}: {key} {values!r:.60}: expected three numbers, a channel each")
    return {"size": side, "edge": edge, "mode": mode, "mean": tuple(mean), "std": tuple(std)}


def _square(size: int | dict[str, int]) -> int | None:
    """The side of a square given as a number or as height and width, else None."""
    if isinstance(size, dict):
        return size.get("height") if size.get("height") == size.get("width") else None
    return size


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, "what transformers' CLIPModel and its processor save")


def clip_pixels(
    images: Tensor,
    size: int,
    edge: int | None = None,
    mode: str = "bilinear",
    mean: float | Sequence[float] = MEAN,
    std: float | Sequence[float] = STD,
) -> Tensor:
    """The input [B,3,size,size] of an image tower for images [B,3,H,W] in [0, 1], resized with antialiasing.

    edge: the shorter side is resized to this and the centre is cropped (None: both sides are resized to `size`). Unlike
    in PIL, nothing is rounded to 8 bits in between.
    """
    height, width = images.shape[-2:]
    shape = (size, size)
    if edge is not None:
        short = min(height, width)
        shape = (edge * height // short, edge * width // short)
    if (height, width) != shape:
        images = F.interpolate(images, shape, mode=mode, antialias=True, align_corners=False)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    images = images[..., top : top + size, left : left + size].clamp(0, 1)
    mean, std = (torch.as_tensor(x).to(images).reshape(-1, 1, 1) for x in (mean, std))
    return (images - mean) / std


def embed_images(model: TwoTowers, images: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Unit embeddings [B,D] of images [B,3,H,W] in [0, 1]; `prepare` defaults to the shipped CLIP's `clip_pixels`."""
    return project_images(model, image_features(model, images, prepare))


def image_features(model: TwoTowers, images: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The image tower's features of images [B,3,H,W] before the projection; arguments as in `embed_images`."""
    pixels = prepare(images) if prepare else clip_pixels(images, model.config.vision_config.image_size)
    return model.vision_model(pixel_values=pixels).pooler_output


def project_images(model: TwoTowers, features: Tensor) -> Tensor:
    """Unit embeddings [B,D] of `image_features`."""
    return F.normalize(model.visual_projection(features).float(), dim=-1)


def embed_tokens(model: TwoTowers, tokens: Tensor) -> Tensor:
    """Unit embeddings [B,D] of tokens [B,L]."""
    return F.normalize(model.text_projection(model.text_model(input_ids=tokens).pooler_output).float(), dim=-1)


def said_view(caption: str) -> str | None:
    """The member of `VIEWS` that a caption ends with, or None."""
    return next((view for view in VIEWS if caption.endswith(view)), None)


def text_image_score(images: Tensor, text: Tensor) -> Tensor:
    """cos(E_I, E_T) of images `[V, D]` and one text `[D]`, or one text per image `[V, D]` → `[V]`."""
    return F.cosine_similarity(images, text.expand_as(images), dim=-1)


def retrieval_rank(images: Tensor, text: Tensor, distractors: Tensor) -> int:
    """Rank of the text among all texts by mean cosine over the views, from 1 (best) to K + 1.

    images `[V, D]`, text `[D]`, distractors `[K, D]`; with one text per view `[V, D]`, `[K, V, D]`. Ties count against
    the text, so a CLIP that scores everything equally ranks it last.
    """
    _expect(images, 2, "images [V, D]")
    texts = torch.cat([text[None], distractors])
    texts = texts if texts.ndim == 3 else texts[:, None]
    scores = F.cosine_similarity(images[None], texts, dim=-1).mean(1)
    return 1 + int((scores[1:] >= scores[0]).sum())


def directional_similarity(edited: Tensor, source: Tensor, edited_text: Tensor, source_text: Tensor) -> Tensor:
    """cos(E_I(edited) − E_I(source), E_T(edited) − E_T(source)) (Gal et al. 2021, StyleGAN-NADA, eq. 2) → `[B]`.

    Images `[B, D]`, texts `[D]`; 0 for an image or a text that did not change.
    """
    return F.cosine_similarity(edited - source, (edited_text - source_text)[None], dim=-1)


def image_similarity(edited: Tensor, source: Tensor) -> Tensor:
    """cos(E_I(edited), E_I(source)) of each pair, `[B, D]` → `[B]`."""
    return F.cosine_similarity(edited, source, dim=-1)


def image_consistency(images: Tensor, closed: bool = False) -> Tensor:
    """cos(E_I(v), E_I(v + 1)) of neighbouring views or frames, `[V, D]` → `[V − 1]`; `closed`: an orbit, → `[V]`."""
    _expect(images, 2, "images [V, D]")
    following = images.roll(-1, 0)
    similarity = F.cosine_similarity(images, following, dim=-1)
    return similarity if closed else similarity[:-1]


def mean_pairwise_distance(particles: Tensor) -> float:
    """Mean of 1 − cos(E_i, E_j) over pairs of particles i < j, `[N, D]`, and over equal views of them, `[N, V, D]`."""
    if particles.ndim not in (2, 3) or len(particles) < 2:
        raise ValueError(f"expected at least two particles [N, D] or [N, V, D], got {tuple(particles.shape)}")
    first, second = torch.triu_indices(len(particles), len(particles), offset=1, device=particles.device)
    return float((1 - F.cosine_similarity(particles[first], particles[second], dim=-1)).mean())


def expected_view(azimuth_deg: float, thresholds_deg: tuple[float, float] = (45.0, 135.0)) -> str:
    """The view words at an azimuth from the object's front, which ends at the first threshold; its back begins at the
    second."""
    front, back = thresholds_deg
    return dict(zip(("front", "left", "right", "back"), VIEWS, strict=True))[side_seen(azimuth_deg, front, 180 - back)]


def view_word_accuracy(
    clip: ClipModel,
    images: Tensor,
    prompt: str,
    azimuths_deg: Sequence[float],
    thresholds_deg: tuple[float, float] = (45.0, 135.0),
) -> dict[str, Any]:
    """Share of views for which the caption with the right view words scores higher than the three with wrong ones.

    images `[V, 3, H, W]` in [0, 1]; azimuths_deg [V] from the object's front, repeated ones are averaged. Returns
    `accuracy` (chance: 1/4), `by_azimuth` {"30": share, …} and `by_view` {"front view": share, …}.
    """
    if len(images) != len(azimuths_deg):
        raise ValueError(f"{len(images)} images and {len(azimuths_deg)} azimuths")
    bare = re.sub(SAID_VIEW, "", prompt, flags=re.IGNORECASE)
    scores = clip.embed_images(images) @ clip.embed_texts([f"{bare}, {view}" for view in VIEWS]).T
    words = [expected_view(azimuth, thresholds_deg) for azimuth in azimuths_deg]
    correct = torch.tensor([[VIEWS.index(word)] for word in words], device=scores.device)
    wrong = scores.scatter(1, correct, -torch.inf).amax(1)
    right = (scores.gather(1, correct)[:, 0] > wrong).tolist()
    return {
        "accuracy": sum(right) / len(right),
        "by_azimuth": _shares([f"{azimuth:g}" for azimuth in azimuths_deg], right),
        "by_view": _shares(words, right),
    }


def _shares(keys: list[str], right: list[bool]) -> dict[str, float]:
    grouped: dict[str, list[bool]] = {}
    for key, hit in zip(keys, right, strict=True):
        grouped.setdefault(key, []).append(hit)
    return {key: sum(hits) / len(hits) for key, hits in grouped.items()}


def _expect(x: Tensor, ndim: int, what: str) -> None:
    if x.ndim != ndim:
        raise ValueError(f"expected {what}, got {tuple(x.shape)}")
