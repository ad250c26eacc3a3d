"""Embeddings of prompts on disk, so that a large text encoder does not embed the same prompt in every run.

Each prompt has a safetensors file, named by a hash of the model's text encoders and the prompt. Its metadata hold the
prompt and a digest of the tensors; a file that does not match them, or its model, is written again. A file that can't
be read or written costs a warning and the time to embed, nothing else.
"""

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from csd3d.errors import one_line
from csd3d.files import make_folder

logger = logging.getLogger("csd3d")
Embedding = dict[str, Tensor]  # "text" [L, D] and, for models that take it, "pooled" [P]; float32

WHOLE_BYTES = 1 << 20  # files up to this size are hashed completely
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # number and size of the samples of a larger file


def fingerprint(parts: Mapping[str, Path], recipe: str) -> str:
    """A hash of what embeddings depend on: folders or files of the text encoders, and the `recipe` for using them.

    Large files are hashed by name, size, modification time and evenly spaced samples, because reading gigabytes would
    take as long as embedding. So a copy of a model may have another fingerprint, and its prompts are embedded again.
    """
    digest = hashlib.sha256(recipe.encode())
    for part, folder in sorted(parts.items()):
        files = [folder] if folder.is_file() else folder.rglob("*")
        for path in sorted(path for path in files if path.is_file()):
            size = path.stat().st_size
            large = f"{path.stat().st_mtime_ns}" if size > WHOLE_BYTES else ""
            digest.update(f"\0{part}/{path.relative_to(folder)}\0{size}\0{large}\0".encode())
            digest.update(_sampled(path, size))
    return digest.hexdigest()


def embedding_path(folder: Path, model: str, prompt: str) -> Path:
    """The file of a prompt under a model's `fingerprint`."""
    name = hashlib.sha256(f"{model}\0{prompt}".encode()).hexdigest()
    return folder / f"{name}.safetensors"


def read_embedding(path: Path, prompt: str, fits: Callable[[Embedding], bool]) -> Embedding | None:
    """A prompt's embedding from `path`; None without a file, or with a warning if the file is broken.

    fits: whether tensors are such as the model makes; any that is not finite, or not float32, is not.
    """
    try:
        if not path.is_file():
            return None
        with safe_open(str(path), "pt") as file:
            metadata, embedding = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        intact = metadata.get("prompt") == prompt and metadata.get("sha256") == _digest(embedding)
    except Exception as error:  # a broken file can raise any error of the library
        logger.warning("%s: unreadable (%s), computing it again", path, one_line(error) or type(error).__name__)
        return None
    if not intact:
        logger.warning("%s: content was changed, computing it again", path)
        return None
    usual = all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in embedding.values())
    if not (usual and fits(embedding)):
        logger.warning("%s: not of this model, computing it again", path)
        return None
    return embedding


def write_embedding(path: Path, prompt: str, embedding: Embedding) -> None:
    """Write a temporary file, in a folder made for it, and rename it into place; a failure is only a warning."""
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in embedding.items()}
    data = save(tensors, {"prompt": prompt, "sha256": _digest(tensors)})
    temporary = None
    try:
        make_folder(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        _tell_once(path.parent, error.strerror or str(error))
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@functools.cache
def _tell_once(folder: Path, why: str) -> None:
    logger.warning("%s: not written (%s), so what would be kept there is computed again by the next run", folder, why)


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
