"""The weight files of a network: whole or in shards, in full precision or as a variant ("fp16", "bf16", ...).

diffusers and transformers write, for a STEM such as "diffusion_pytorch_model":

    STEM.safetensors            STEM-00001-of-00002.safetensors         STEM.safetensors.index.json
    STEM.fp16.safetensors       STEM.fp16-00001-of-00002.safetensors    STEM.safetensors.index.fp16.json
    (older)                     STEM-00001-of-00002.fp16.safetensors    STEM.safetensors.fp16.index.json

All functions raise InputError in one line that names the file.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open

from csd3d.errors import InputError, one_line
from csd3d.files import read_json

Found = TypeVar("Found")
MOST_HEADER = 100_000_000  # bytes: the limit of the safetensors library
HALVES = {
    "float16": ("fp16", "bf16"),
    "bfloat16": ("bf16", "fp16"),
}  # variants, best first
NAME = (
    r"{stem}(?:\.(?P<variant>[\w-]+?))?(?:-(?P<shard>\d+)-of-(?P<shards>\d+))?(?:\.(?P<older>[\w-]+))?\.safetensors"
    r"(?:(?:\.(?P<index_older>[\w-]+))?(?P<index>\.index)(?:\.(?P<index_variant>[\w-]+))?\.json)?"
)


@dataclass
class WeightSet:
    """One variant of a network's weights: a whole file, or shards with their index; names without a folder."""

    whole: str = ""
    shards: dict[int, str] = field(default_factory=dict)  # by number, from 1
    count: int = 0  # how many shards their names say that there are
    indices: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """The files to open: shards with an index, which diffusers opens before a whole file, or the whole file."""
        sharded = [*(self.shards[i] for i in sorted(self.shards)), *self.indices]
        return sharded if self.indices or not self.whole else [self.whole]

    @property
    def missing(self) -> str:
        """The name of the first shard that is not there; "" if all are, by their names."""
        lost = [i for i in range(1, self.count + 1) if i not in self.shards]
        if self.files == [self.whole] or not self.shards or not lost:
            return ""
        known, name = next(iter(self.shards.items()))
        return name.replace(f"-{known:05}-of-", f"-{lost[0]:05}-of-")


def weights_name(part: str) -> str:
    """The file name of a part's weights without its suffix; transformers names text encoders, diffusers the rest."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_sets(stem: str, names: Iterable[str]) -> dict[str | None, WeightSet]:
    """The sets of weights called `stem` among file names, by variant; None is full precision."""
    found: dict[str | None, WeightSet] = {}
    pattern = re.compile(NAME.format(stem=re.escape(stem)))
    for name in sorted(names):
        if not (match := pattern.fullmatch(name)):
            continue
        parts = match.groupdict()
        variant = parts["variant"] or parts["older"] or parts["index_older"] or parts["index_variant"]
        one = found.setdefault(variant, WeightSet())
        if parts["index"]:
            one.indices.append(name)
        elif parts["shard"]:
            one.shards[int(parts["shard"])] = name
            one.count = max(one.count, int(parts["shards"]))
        else:
            one.whole = name
    return {variant: one for variant, one in found.items() if one.whole or one.shards or one.indices}


def preferred(sets: Mapping[str | None, WeightSet], kept: str = "float32") -> str | None:
    """The variant to open if weights are kept in `kept` precision; KeyError of an empty mapping.

    Half weights come from a half variant if there is one, float32 from full precision; then from any other half
    variant, then from what there is, such as "non_ema".
    """
    halves, plain = HALVES.get(kept, HALVES["float16"]), (None,)
    for variant in (*halves, *plain) if kept in HALVES else (*plain, *halves):
        if variant in sets:
            return variant
    if not sets:
        raise KeyError("no weights")
    return min(sets, key=str)


def find_weights(folder: Path, stem: str, kept: str = "float32") -> str | None:
    """The variant of the safetensors weights to open in a folder, of which no shard is missing."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    sets = weight_sets(stem, names)
    if not sets:
        if pickles := [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]:
            raise InputError(
                f"{folder}: has only {pickles[0].name}, a pickle, which can run code and is not opened; save the "
                "pipeline again with save_pretrained(folder, safe_serialization=True)"
            )
        raise InputError(f"{folder}: {stem}.safetensors is missing")
    variant = preferred(sets, kept)
    check_shards(folder, sets[variant])
    return variant


def check_shards(folder: Path, found: WeightSet) -> None:
    """Raise InputError where the index of shards, a shard that it lists, or a tensor of a shard is missing.

    Every file's header is read, so that one that is cut off, empty or a folder is told before anything is opened.
    """
    if found.files == [found.whole]:
        tensor_shapes(folder / found.whole)
        return
    lost = found.missing
    if not found.indices:
        raise InputError(f"{folder}: has the shard {next(iter(found.shards.values()))}, but no index of the shards")
    listed = read_json(folder / found.indices[0], "an index of shards").get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{folder / found.indices[0]}: weight_map must say the shard of each tensor")
    files = sorted(set(listed.values()))
    if outside := next((name for name in files if Path(name).name != name), ""):
        raise InputError(f"{folder / found.indices[0]}: {outside!r} is no name of a file in the same folder")
    lost = next((name for name in files if not (folder / name).is_file()), lost)
    if lost:
        raise InputError(f"{folder}: the shard {lost} is missing, of {max(found.count, len(files))}")
    inside = {name: tensor_shapes(folder / name) for name in files}
    if wrong := next((name for name, file in listed.items() if name not in inside[file]), ""):
        raise InputError(f"{folder / listed[wrong]}: lacks {wrong}, which the index of the shards says is in it")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a safetensors file, by its header alone.

    Raises InputError for a header larger than the file or 100 MB, and for anything that is not safetensors.
    """
    return _of_header(path, lambda tensor: tuple(tensor.get_shape()))


def tensor_types(path: Path) -> dict[str, str]:
    """The names and types ("F32", "BF16", "I8", ...) of the tensors of a safetensors file, as `tensor_shapes`."""
    return _of_header(path, lambda tensor: tensor.get_dtype())


def check_types(path: Path, takes_fractions: Callable[[str], bool]) -> None:
    """Raise InputError where a file has whole numbers in a tensor whose name says that it `takes_fractions`."""
    for name, kind in tensor_types(path).items():
        if not kind.startswith(("F", "BF")) and takes_fractions(name):
            raise InputError(f"{path}: tensor {name} holds {kind} numbers; its weights are to be F32, F16 or BF16")


def _of_header(path: Path, read: Callable[[Any], Found]) -> dict[str, Found]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > min(size - 8, MOST_HEADER):
            raise InputError(f"{path}: is no safetensors file, or cut off: its header would have {header} bytes")
        with safe_open(str(path), "pt") as file:
            return {name: read(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except InputError:
        raise
    except Exception as error:  # the library's own errors, OSError
        raise InputError(f"{path}: cannot be read as safetensors ({one_line(error)})") from None


def weight_files(folder: Path, stem: str, kept: str = "float32") -> list[Path]:
    """The safetensors files of the variant that `find_weights` says to open."""
    variant = find_weights(folder, stem, kept)
    names = weight_sets(stem, (file.name for file in folder.iterdir()))[variant].files
    return [folder / name for name in names if name.endswith(".safetensors")]


def shapes_in(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """`tensor_shapes` of several files together."""
    return {name: shape for file in files for name, shape in tensor_shapes(file).items()}
