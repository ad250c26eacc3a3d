"""Embeddings of prompts on disk, so that a large text encoder need not read the same prompt in every run.

One safetensors file a prompt, named by a hash of the model's text encoders and of the prompt. Its metadata hold the
prompt and a digest of the tensors: a file that is cut off, altered or another prompt's is not used but written anew.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger("csd3d")
Embedding = dict[str, Tensor]  # "text" [L, D] and, for models that take it, "pooled" [P]; float32

WHOLE_BYTES = 1 << 20  # a file up to this size is hashed as a whole
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a larger one so many pieces


def fingerprint(parts: Mapping[str, Path], recipe: str) -> str:
    """A hash of what a prompt's embedding depends on: the folders of the model's text encoders, and how they are used.

    Weights are hashed by name, size, time of change and evenly spaced samples: reading gigabytes through would take as
    long as embedding. A copy of a model may thus have another fingerprint (its prompts are embedded again), but two
    models do not share one.
    """
    digest = hashlib.sha256(recipe.encode())
    for part, folder in sorted(parts.items()):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            large = f"{path.stat().st_mtime_ns}" if size > WHOLE_BYTES else ""
            digest.update(f"\0{part}/{path.relative_to(folder)}\0{size}\0{large}\0".encode())
            digest.update(_sampled(path, size))
    return digest.hexdigest()


def embedding_path(folder: Path, model: str, prompt: str) -> Path:
    """The file of a prompt under a model's `fingerprint`."""
    name = hashlib.sha256(f"{model}\0{prompt}".encode()).hexdigest()
    return folder / f"{name}.safetensors"


def read_embedding(path: Path, prompt: str) -> Embedding | None:
    """A prompt's embedding, or None (with a warning, where there is a file) if it can't be had from `path`."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            metadata, embedding = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        intact = metadata.get("prompt") == prompt and metadata.get("sha256") == _digest(embedding)
    except Exception as error:  # whatever a broken file makes the library raise
        logger.warning("%s: unreadable (%s), embedding again", path, type(error).__name__)
        return None
    if not intact:
        logger.warning("%s: does not hold what was written there, embedding again", path)
        return None
    return embedding


def write_embedding(path: Path, prompt: str, embedding: Embedding) -> None:
    """Writes the file whole, then renames it into place; a failure costs a warning only."""
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in embedding.items()}
    data = save(tensors, {"prompt": prompt, "sha256": _digest(tensors)})
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s: not written (%s)", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _sampled(path: Path, size: int) -> bytes:
    if size <= WHOLE_BYTES:
        return path.read_bytes()
    with path.open("rb") as file:
        pieces = []
        for i in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            pieces.append(file.read(SAMPLE_BYTES))
    return b"".join(pieces)


def _digest(embedding: Embedding) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(embedding.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
