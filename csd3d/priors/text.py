"""Prompts to embeddings, as each kind of model was trained to take them and its diffusers pipeline makes them.

An embedding is {"text": [L, D]} and, for SDXL and Stable Diffusion 3, "pooled" [P]: float32, one prompt's. `parts` are
a model's text encoders and tokenizers under their folders' names. Each recipe is a function of (parts, prompt).
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csd3d.errors import InputError
from csd3d.priors.embedding_cache import Embedding, embedding_path, read_embedding, write_embedding

logger = logging.getLogger("csd3d")
Parts = Mapping[str, Any]

IF_TOKENS = 77  # T5 takes more, but DeepFloyd IF was trained with so many
SD3_T5_TOKENS = 256


def embed_sd(parts: Parts, prompt: str) -> Embedding:
    """Stable Diffusion 1.x/2.x: the last hidden state of one CLIP."""
    encoder = parts["text_encoder"]
    tokens = _clip_tokens(encoder, parts["tokenizer"], prompt)
    # diffusers masks the padding for the few text encoders that were trained so, and for no other
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return {"text": encoder(tokens.input_ids, attention_mask=mask)[0][0].float()}


def embed_sdxl(parts: Parts, prompt: str, zero_null: bool) -> Embedding:
    """SDXL: last but one hidden states of two CLIPs side by side, the second's projection as the pooled text.

    With `zero_null`, the pipeline's `force_zeros_for_empty_prompt`, "" (guidance's null branch) is all zeros.
    """
    (first, _), (second, pooled) = (_penultimate(parts, number, prompt) for number in ("", "_2"))
    embedding = {"text": torch.cat([first, second], dim=-1), "pooled": pooled}
    return {name: torch.zeros_like(x) for name, x in embedding.items()} if zero_null and not prompt else embedding


def embed_if(parts: Parts, prompt: str) -> Embedding:
    """DeepFloyd IF: T5 of the lower-cased prompt, its padding masked."""
    tokens = _tokens(parts["text_encoder"], parts["tokenizer"], prompt.lower().strip(), IF_TOKENS)
    return {"text": parts["text_encoder"](tokens.input_ids, attention_mask=tokens.attention_mask)[0][0].float()}


def embed_sd3(parts: Parts, prompt: str, width: int) -> Embedding:
    """Stable Diffusion 3: SDXL's two CLIPs, padded with zeros to `width` features, then T5's tokens, padding unmasked.

    Without a third text encoder, T5's tokens are zeros. The pooled text is both CLIPs' projections.
    """
    (first, pooled), (second, pooled_2) = (_penultimate(parts, number, prompt) for number in ("", "_2"))
    clip = torch.cat([first, second], dim=-1)
    clip = F.pad(clip, (0, width - clip.shape[-1]))
    if "text_encoder_3" in parts:
        tokens = _tokens(parts["text_encoder_3"], parts["tokenizer_3"], prompt, SD3_T5_TOKENS)
        t5 = parts["text_encoder_3"](tokens.input_ids)[0][0].float()
    else:
        t5 = clip.new_zeros(SD3_T5_TOKENS, width)
    return {"text": torch.cat([clip, t5]), "pooled": torch.cat([pooled, pooled_2])}


class TextEncoder:
    """A model's text encoders with what they have embedded so far, in memory and, with a `cache` folder, on disk.

    `model` is the `fingerprint` under which the folder keeps this model's embeddings.
    """

    def __init__(
        self,
        parts: Parts,
        recipe: Callable[[Parts, str], Embedding],
        device: torch.device,
        cache: Path | None = None,
        model: str = "",
    ):
        self.parts = dict(parts)
        self.recipe, self.device, self.cache, self.model = recipe, device, cache, model
        self._embeddings: dict[str, Embedding] = {}
        for network in (part for part in self.parts.values() if isinstance(part, nn.Module)):
            network.eval().requires_grad_(False)

    def __call__(self, prompts: list[str]) -> Embedding:
        """{"text": [B, L, D], "pooled": [B, P] if any}. InputError for a prompt that is new after `release`."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                embedding = self._embed(prompt)
                self._embeddings[prompt] = {name: value.to(self.device) for name, value in embedding.items()}
        found = [self._embeddings[prompt] for prompt in prompts]
        return {name: torch.stack([embedding[name] for embedding in found]) for name in found[0]}

    def release(self) -> None:
        """Frees the text encoders; what they have embedded stays."""
        held = bool(self.parts)
        self.parts.clear()
        if held and self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _embed(self, prompt: str) -> Embedding:
        path = None if self.cache is None else embedding_path(self.cache, self.model, prompt)
        if path is not None and (embedding := read_embedding(path, prompt)) is not None:
            return embedding
        if not self.parts:
            raise InputError(
                f"prior.drop_text_encoder: the text encoder is freed, and prompt {prompt!r} was not embedded before; "
                "embed all prompts of a job first, or set it to false"
            )
        embedding = self.recipe(self.parts, prompt)
        if path is not None:
            write_embedding(path, prompt, embedding)
        return embedding


def _penultimate(parts: Parts, number: str, prompt: str) -> tuple[Tensor, Tensor]:
    """A CLIP's last but one hidden state [L, D] and its first output: of one with a projection, the pooled text [P]."""
    encoder = parts[f"text_encoder{number}"]
    # of CLIPs that share their vocabulary only the first warns
    tokens = _clip_tokens(encoder, parts[f"tokenizer{number}"], prompt, warn=not number)
    output = encoder(tokens.input_ids, output_hidden_states=True)
    return output.hidden_states[-2][0].float(), output[0][0].float()


def _clip_tokens(encoder: nn.Module, tokenizer: Any, prompt: str, warn: bool = True) -> Any:
    limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return _tokens(encoder, tokenizer, prompt, limit, warn)


def _tokens(encoder: nn.Module, tokenizer: Any, prompt: str, limit: int, warn: bool = True) -> Any:
    """`input_ids` and `attention_mask` [1, limit], padded; warns of what is cut off or not in the vocabulary."""
    if warn:
        _warn_of_lost_text(tokenizer, prompt, limit)
    tokens = tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    return tokens.to(next(encoder.parameters()).device)


def _warn_of_lost_text(tokenizer: Any, prompt: str, limit: int) -> None:
    ids = tokenizer(prompt, verbose=False).input_ids
    if len(ids) > limit:
        cut = tokenizer.decode(ids[limit - 1 : -1])
        logger.warning("prompt %r is longer than the text encoder takes (%d tokens): cut off %r", prompt, limit, cut)
    if tokenizer.unk_token_id in ids[:-1]:
        logger.warning("prompt %r holds characters that the text encoder's vocabulary lacks", prompt)
