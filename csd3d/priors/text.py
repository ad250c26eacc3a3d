"""Prompts to embeddings, which are kept in memory and on disk; and the text encoders that several families share.

The embedding of a prompt is {"text": [L, D]} and, for some models, "pooled" [P], in float32. `parts` are a model's text
encoders and tokenizers by folder name. A family's `embed` is a function of (parts, prompt), or of (parts, prompt,
picture) where the text encoder sees the source picture too.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csd3d.errors import InputError, short
from csd3d.priors.condition import Condition
from csd3d.priors.embedding_cache import Embedding, embedding_path, fingerprint, read_embedding, write_embedding
from csd3d.priors.libraries import MISFITS, one_line
from csd3d.priors.lost_text import note_lost_text, told_once
from csd3d.priors.opening import ModelFolder

Parts = Mapping[str, Any]
SEEN_BYTES = 4 << 30  # most memory for embeddings about pictures; of 1024² pixels, each takes 20 MB


class TextEncoder:
    """A model's text encoders, and the embeddings so far: in memory and, with a `cache` folder, on disk.

    Other `parts` are ignored. `recipe` names what `embed` does; different recipes have separate files in the cache.
    `sees`: for a text encoder that sees the source picture, the picture (uint8, on the CPU) of one row of
    `Condition.image`. Raises InputError where the cache folder cannot be made.
    """

    def __init__(
        self,
        folder: ModelFolder,
        parts: Parts,
        embed: Callable[..., Embedding],
        recipe: str,
        device: torch.device,
        cache: str = "",
        sees: Callable[[Tensor], Tensor] | None = None,
    ):
        self.parts = {part: value for part, value in parts.items() if part.startswith(("text_encoder", "tokenizer"))}
        self.folder, self.embed, self.device, self.sees = folder, embed, device, sees
        self.cache, self.model = None, ""
        if cache:
            self.cache = _made(Path(cache).expanduser())
            self.model = fingerprint({part: folder.part(part) for part in self.parts} | dict(folder.added), recipe)
        self._embeddings: dict[str, Embedding] = {}
        self._form: dict | None = None  # `form` of what was embedded; None: nothing was yet
        for network in (part for part in self.parts.values() if isinstance(part, nn.Module)):
            network.eval().requires_grad_(False)

    def __call__(self, prompts: Sequence[str], image: Tensor | None = None) -> Embedding:
        """{"text": [B, L, D], "pooled": [B, P] if any, "mask": [B, L] where the prompts differ in length}.

        `image` [B, ...], see `Condition`, is used where the text encoder `sees` it. InputError for a new prompt after
        `release`, ValueError where the picture is missing.
        """
        if self.sees is None:
            with told_once():
                for prompt in dict.fromkeys(prompts):
                    if prompt not in self._embeddings:
                        embedding = self._embed(prompt)
                        self._embeddings[prompt] = {name: value.to(self.device) for name, value in embedding.items()}
            return _stacked([self._embeddings[prompt] for prompt in prompts])
        if image is None:
            raise ValueError("this model's text encoder sees the source picture: build conditions with an image")
        with told_once():
            found = [self._embed_seen(prompt, self.sees(row)) for prompt, row in zip(prompts, image, strict=True)]
        return {name: value.to(self.device) for name, value in _stacked(found).items()}

    def release(self) -> None:
        """Free the text encoders; the embeddings stay."""
        had_parts = bool(self.parts)
        self.parts.clear()
        if had_parts and self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def keeping_nothing(self) -> Iterator[None]:
        """Embed inside the block without the embeddings so far and the cache, and keep none."""
        kept = self.cache, self._embeddings
        self.cache, self._embeddings = None, {}
        try:
            yield
        finally:
            self.cache, self._embeddings = kept

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Have the encoders on the device inside the block, from where they are kept (`prior.offload`)."""
        networks = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        kept = [next(network.parameters()).device for network in networks]
        for network, place in zip(networks, kept, strict=True):
            if place.type != self.device.type:
                network.to(self.device)
        try:
            yield
        finally:
            for network, place in zip(networks, kept, strict=True):
                if place.type != self.device.type:
                    network.to(place)

    def _embed_seen(self, prompt: str, picture: Tensor) -> Embedding:
        """The embedding of a prompt about one picture, which has a row for every patch.

        The last used are kept, in the host's memory: windows of a panorama are other pictures in every step.
        """
        shown = hashlib.sha256(f"{tuple(picture.shape)}".encode() + picture.numpy().tobytes()).hexdigest()
        key = f"{prompt}\0{shown}"
        embedding = self._embeddings.pop(key, None)
        if embedding is None:
            embedding = {name: value.cpu() for name, value in self._embed(prompt, key, picture).items()}
        self._embeddings[key] = embedding  # the last used is the last
        while len(self._embeddings) > 1 and sum(map(_bytes, self._embeddings.values())) > SEEN_BYTES:
            del self._embeddings[next(iter(self._embeddings))]
        return embedding

    def _fits(self, embedding: Embedding) -> bool:
        """Whether an embedding from a file has a text, and the form of those that the model made."""
        whole = "text" in embedding and all(value.ndim and value.numel() for value in embedding.values())
        return whole and self._form in (None, form(embedding))

    @torch.no_grad()
    def _embed(self, prompt: str, key: str = "", *picture: Tensor) -> Embedding:
        """The embedding by `embed`, or from the file of `key` (the prompt by default)."""
        key = key or prompt
        path = None if self.cache is None else embedding_path(self.cache, self.model, key)
        if path is not None and (embedding := read_embedding(path, key, self._fits)) is not None:
            return embedding
        if not self.parts:
            raise InputError(
                f"prior.drop_text_encoder: the text encoder is freed, and prompt {short(prompt)!r} was not embedded "
                "before; embed all prompts of a job first, or set it to false"
            )
        try:
            with self._at_work():
                embedding = self.embed(self.parts, prompt, *picture)
        except (InputError, torch.OutOfMemoryError):
            raise
        except MISFITS as error:  # of sizes in a config that do not fit
            reason = f"its text encoder cannot embed {short(prompt)!r} ({one_line(error)})"
            raise InputError(f"{self.folder}: {reason}") from error
        self._form = form(embedding)
        if path is not None:
            write_embedding(path, key, embedding)
        return embedding


def form(embedding: Embedding) -> dict[str, tuple[int, int]]:
    """What all embeddings of a model have in common: their tensors' names, with the dimensions and the last's size."""
    return {name: (value.ndim, value.shape[-1]) for name, value in embedding.items()}


def _bytes(embedding: Embedding) -> int:
    return sum(value.nbytes for value in embedding.values())


def _stacked(embeddings: Sequence[Embedding]) -> Embedding:
    """Embeddings as one batch; texts of different lengths are padded with zeros, and get a mask."""
    lengths = torch.tensor([len(embedding["text"]) for embedding in embeddings])
    if len(set(lengths.tolist())) == 1:
        return {name: torch.stack([embedding[name] for embedding in embeddings]) for name in embeddings[0]}
    texts = nn.utils.rnn.pad_sequence([embedding["text"] for embedding in embeddings], batch_first=True)
    mask = torch.arange(texts.shape[1]) < lengths[:, None]
    rest = {name: torch.stack([e[name] for e in embeddings]) for name in embeddings[0] if name != "text"}
    return {"text": texts, "mask": mask.to(texts.device), **rest}


def _made(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"prior.embedding_cache: {cache} can't be made a folder ({one_line(error)})") from None
    return cache


def embed_two_clips(parts: Parts, prompt: str) -> tuple[Tensor, list[Tensor]]:
    """SDXL's and SD3's text: the two CLIPs' last but one hidden states side by side [L, D1 + D2], and their outputs.

    The output of a CLIP with a projection is its pooled text [P].
    """
    states, outputs = [], []
    for number in ("", "_2"):
        encoder = parts[f"text_encoder{number}"]
        # both CLIPs have the same vocabulary: one warning is enough
        tokens = clip_tokens(encoder, parts[f"tokenizer{number}"], prompt, warn=not number)
        output = encoder(tokens.input_ids, output_hidden_states=True)
        states.append(output.hidden_states[-2][0].float())
        outputs.append(output[0][0].float())
    return torch.cat(states, dim=-1), outputs


def pooled_text(condition: Condition) -> Tensor:
    """The pooled text [B, P] of a condition; ValueError without one."""
    if condition.pooled is None:
        raise ValueError("this model takes pooled text too: build conditions with prior.condition(prompts)")
    return condition.pooled


def clip_tokens(encoder: nn.Module, tokenizer: Any, prompt: str, warn: bool = True) -> Any:
    """`tokenized` with the length that a CLIP takes."""
    limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return tokenized(encoder, tokenizer, prompt, limit, warn)


def tokenized(encoder: nn.Module, tokenizer: Any, prompt: str, limit: int, warn: bool = True) -> Any:
    """`input_ids` and `attention_mask` [1, limit], padded; warns of text that is cut off or not in the vocabulary."""
    if warn:
        note_lost_text(tokenizer, prompt, limit)
    tokens = tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    return tokens.to(next(encoder.parameters()).device)
