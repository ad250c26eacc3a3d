"""The figures of `csd3d score`. docs/score.md says what each means."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d import __version__
from csd3d.evaluation.views import Features, judge_views, nearest_of, prepare_views
from csd3d.metrics.clip import WORLD, ClipModel, load_clip
from csd3d.metrics.image import MSE_FLOOR
from csd3d.score.inputs import Inputs, working_size
from csd3d.threads import pinned

VAE = Path(__file__).parents[1] / "assets" / "ip2p" / "vae"
FEATURES = "VAE features"  # with the name of measures by them
FEATURES_SIDE = 128  # pixels of the longer side for them, at which the VAE was trained
SIDE_LEAST = 16
FAINT = 0.02  # of a view: less overlap than this is no ground to judge on
WORLD_NOTE = "CLIP (world) is the shipped net and knows the toy world only; for photos give --clip open_clip:…"


def measure(inputs: Inputs, clip: str, captions: Sequence[str] | None, device: torch.device) -> dict:
    """All figures, for the JSON: numbers, names and None. clip: as for `load_clip`, "" for none."""
    judge = load_clip(clip, device) if clip else None
    with pinned():  # the same bytes whatever the number of threads
        before, after, scores = _read(inputs)
        source = prepare_views(
            before,
            cameras=inputs.cameras,
            depths=inputs.depths,
            clip=judge,
            captions=captions,
            features=load_features(device),
        )
        figures = judge_views(source, after)
    figures["psnr_source"] = scores.pop("")[0]
    notes = [*inputs.notes, *_notes(inputs, clip, figures)]
    return _arranged(inputs, judge, figures, scores) | {"notes": notes}


def load_features(device: torch.device | str = "cpu") -> Features:
    """The shipped VAE's encoder features of images [B, 3, H, W] in [0, 1], made `FEATURES_SIDE` pixels at most."""
    from csd3d.priors.autoencoder import VaeCodec
    from csd3d.priors.libraries import quiet
    from csd3d.priors.opening import class_of, open_network

    with quiet():
        vae = open_network(VAE, class_of("diffusers.AutoencoderKL"), "diffusion_pytorch_model")
    codec = VaeCodec(vae.to(device))

    def features(images: Tensor) -> list[Tensor]:
        small = _shrunk(images, _features_size(*images.shape[2:]))
        return codec.features(2 * small.to(device) - 1)

    return features


def _features_size(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, FEATURES_SIDE / max(height, width))
    return tuple(max(SIDE_LEAST, 8 * round(side * scale / 8)) for side in (height, width))


def _shrunk(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[2:] == torch.Size(size):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def _read(inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, tuple[float, Tensor]]]:
    """Views before and after [V, h, w, 3] at the working size, and PSNRs of the full ones: (mean, by view) against each
    truth by name, and against the source by "".
    """
    size = working_size(inputs.before.size)
    kept = ([], [])
    by_view: dict[str, list[float]] = {name: [] for name in ("", *inputs.truths)}
    for view in inputs.chosen:
        before, after = inputs.before.read(view), inputs.after.read(view)
        for pictures, picture in zip(kept, (before, after), strict=True):
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
            pictures.append(_shrunk(pixels, size)[0].permute(1, 2, 0))
        by_view[""].append(_psnr(after, before))
        for name, views in inputs.truths.items():
            by_view[name].append(_psnr(after, views.read(view)))
    scores = {
        name: (sum(values) / len(values), torch.tensor(values, dtype=torch.float64)) for name, values in by_view.items()
    }
    return torch.stack(kept[0]), torch.stack(kept[1]), scores


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR of uint8 pictures in dB, at most 100."""
    mse = np.square(a.astype(np.int32) - b).mean() / 255**2
    return float(-10 * np.log10(max(mse, MSE_FLOOR)))


def _notes(inputs: Inputs, clip: str, figures: dict) -> list[str]:
    notes = [WORLD_NOTE] if clip == WORLD else []
    if (overlap := figures["overlap"]) is not None and overlap < FAINT:
        advice = "check --depth-unit and --depth-along" if inputs.depths is not None else "are they neighbours?"
        notes.append(f"neighbouring views share {100 * overlap:.1f} % of their pixels, too few to judge by: {advice}")
    if inputs.cameras is not None and inputs.depths is None and len(inputs.chosen) > 1:
        notes.append("no depth is given: views are compared along optical flow, which does not reach distant views")
    return notes


def _arranged(inputs: Inputs, judge: ClipModel | None, figures: dict, scores: dict[str, tuple[float, Tensor]]) -> dict:
    """The JSON's keys in their order."""
    several = len(inputs.chosen) > 1
    get = partial(_finite, figures)
    found = {
        "csd3d": __version__,
        "before": str(inputs.before.reader.path),
        "after": str(inputs.after.reader.path),
        "views": len(inputs.chosen),
        "size": list(inputs.before.size),
        "compared_at": list(reversed(working_size(inputs.before.size))),
        "warp": ("depth" if inputs.depths is not None else "flow") if several else None,
        "clip": judge.name if judge else None,
        "features": FEATURES,
    }
    shared = ("agreement", "overlap", "warped_error", "warped_error_short", "warped_error_long", "warped_error_before")
    by_net = ("met3r", "lpips_warped", "clip_consistency", "clip_direction_consistency", "clip_directional")
    found |= {key: get(key) for key in (*shared, *by_net)}
    kept = {"psnr": "psnr_source", "lpips_like": "lpips_like", "clip_similarity": "clip_similarity"}
    found["preservation"] = {key: get(name) for key, name in kept.items()}
    nearest = dict.fromkeys(("psnr_truth", "answer", "answer_agreement"))
    if scores:
        nearest = nearest_of({name: by_view for name, (_, by_view) in scores.items()})
        names, table = list(scores), torch.stack([by_view for _, by_view in scores.values()])
        nearest["psnr_by_answer"] = {name: mean for name, (mean, _) in scores.items()}
        nearest["answer_by_view"] = dict(zip(inputs.view_names, [names[i] for i in table.argmax(0)], strict=True))
    return found | nearest


def _finite(figures: dict, key: str) -> float | None:
    value = figures[key]
    return value if value is not None and np.isfinite(value) else None
