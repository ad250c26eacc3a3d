"""How well what was made fits its text, by a CLIP: of pictures, and of assets seen from held-out cameras.

Symbols: I [V,D] embeddings of views, T [K,V,D] of K texts as said of each view, the first the right one.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.errors import InputError
from csd3d.evaluation.ground_truth import text_truth
from csd3d.metrics.clip import (
    ClipModel,
    load_clip,
    mean_pairwise_distance,
    retrieval_rank,
    text_image_score,
    view_word_accuracy,
)
from csd3d.metrics.fid import frechet_distance

logger = logging.getLogger("csd3d")
DISTRACTORS = 31
Say = Callable[[str, int], str]  # (prompt, view) -> the prompt as said of that view


@dataclass(frozen=True)
class Judge:
    """Figures by one CLIP, whose name goes with them."""

    clip: ClipModel

    @property
    def name(self) -> str:
        """The CLIP's name, "CLIP (world)" for the shipped one."""
        return self.clip.name

    def rank(self, embedded: Tensor, prompt: str, say: Say, seed: int) -> int | None:
        """Place of the prompt among 32 by mean cosine over the views; None where no ground truth knows it."""
        truth = text_truth(prompt)
        if truth is None:
            return None
        prompts = [prompt, *truth.distractors(prompt, DISTRACTORS, seed)]
        texts = [say(text, view) for text in prompts for view in range(len(embedded))]
        told = self.clip.embed_texts(texts).view(len(prompts), *embedded.shape)
        return retrieval_rank(embedded, told[0], told[1:])

    def score(self, embedded: Tensor, prompt: str, say: Say) -> float:
        """Mean cosine of the views [V,D] and the prompt."""
        texts = self.clip.embed_texts([say(prompt, view) for view in range(len(embedded))])
        return text_image_score(embedded, texts).mean().item()

    def score_pictures(self, pictures: list[Tensor], texts: list[str], seed: int) -> dict[str, float]:
        """Means over prompts: of each prompt's particles [N,3,S,S]."""
        rows = []
        for images, text in zip(pictures, texts, strict=True):
            embedded = self.clip.embed_images(images)
            ranks = [self.rank(one[None], text, lambda t, v: t, seed) for one in embedded]
            row = {"clip_score": self.score(embedded, text, lambda t, v: t)}
            if None not in ranks:
                row["ranked_first"] = sum(rank == 1 for rank in ranks) / len(ranks)
            if len(images) > 1:
                row["clip_diversity"] = mean_pairwise_distance(embedded)
            rows.append(row)
        keys = set.intersection(*(set(row) for row in rows))
        return {key: sum(row[key] for row in rows) / len(rows) for key in sorted(keys)}

    def score_assets(
        self, colour: Tensor, shape: Tensor, prompt: str, azimuths_deg: list[float], say: Say, seed: int
    ) -> dict[str, float | int | None]:
        """Figures of N assets seen in V views: `colour` and `shape` (white, lit) [N,V,3,S,S] in [0, 1]."""
        embedded = torch.stack([self.clip.embed_images(views) for views in colour])
        shapes = torch.stack([self.clip.embed_images(views) for views in shape])
        truth = text_truth(prompt)
        plain = truth.shape_prompt(prompt) if truth else prompt
        ranks = [self.rank(views, prompt, say, seed) for views in embedded]
        words = [view_word_accuracy(self.clip, views, say(prompt, 0), azimuths_deg)["accuracy"] for views in colour]
        report: dict[str, float | int | None] = {
            "clip_colour": _mean([self.score(views, prompt, say) for views in embedded]),
            "clip_geometry": _mean([self.score(views, plain, say) for views in shapes]),
            "rank": None if None in ranks else max(ranks),
            "ranked_first": None if None in ranks else _mean([float(rank == 1) for rank in ranks]),
            "view_words": _mean(words),
            "fid": self.fid(embedded, say(prompt, 0), azimuths_deg, colour.shape[-1], seed),
            "diversity": mean_pairwise_distance(embedded) if len(colour) > 1 else None,
        }
        if len(colour) > 1 and truth is not None:
            found = truth.open_attribute_values(self.clip, colour, say(prompt, 0))
            report |= {f"distinct_{attribute}": len(set(values)) for attribute, values in found.items()}
        return report

    def fid(self, embedded: Tensor, prompt: str, azimuths_deg: list[float], size: int, seed: int) -> float | None:
        """Fréchet distance of this CLIP's embeddings to those of true renders of the prompt's scenes."""
        truth = text_truth(prompt)
        if truth is None:
            return None
        true = truth.true_renders(prompt, azimuths_deg, 30.0, 16, size, seed)
        return frechet_distance(embedded.flatten(0, 1), self.clip.embed_images(true.flatten(0, 1)))


def load_judge(source: str, device: torch.device | str = "cpu") -> Judge | None:
    """The judge of config key `clip` ("" and "world": the shipped one); None, with a warning, where that is missing."""
    try:
        return Judge(load_clip(source or "world", device))
    except InputError as error:
        if source:
            raise
        logger.warning("no figures by a CLIP: %s", error)
        return None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
