"""Checkpoints: complete, written whole, safetensors and JSON only, loaded back bit for bit.

A checkpoint is a folder (`checkpoints/last`): `checkpoint.json` and the one `tensors-N.safetensors` it names. Both
carry a SHA-256: that of the tensors is in checkpoint.json, that of checkpoint.json's body at its beginning. A save
writes the tensors under a new N, syncs them, then replaces `checkpoint.json`: that single rename is the commit. So the
folder always holds a complete checkpoint, old or new, even after SIGKILL; the next save removes the remains of an
interrupted one.

    parts = dict(field=field, adam=optimizer, rng=generator)
    save_checkpoint(folder, "last", *pack(snapshot(**parts) | {"step": 7}), identity=values)
    tree = unpack(*load_checkpoint(folder / "last", identity=values))
    restore(tree, **parts)  # with `engine.state`
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from csd3d.engine.environment import another_version
from csd3d.errors import InputError
from csd3d.files import make_folder, sync_to_disk, write_bytes
from csd3d.fingerprint import PREFIX
from csd3d.identity import Defining, Place, difference

VERSION = 2
MANIFEST = "checkpoint.json"
MAX_MANIFEST_BYTES = 64 << 20
TENSORS = re.compile(r"tensors-([0-9]{1,200})\.safetensors")
RECORD = {"file": str, "bytes": int, "sha256": str}
OTHERWISE = "resume from another checkpoint or start afresh"
WRITTEN = re.compile(rb'\{"version": \d+, "sha256": "([0-9a-f]{64})", "body": (.*)\}')


# -------------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    folder: str | Path,
    name: str,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    identity: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/name`, replacing the checkpoint there in one step; return its path.

    Args:
        tensors: of any shape, dtype and device; stored contiguous, on the CPU.
        state: JSON-able; floats are restored exactly, including NaN and infinities.
        identity: the values that define the run (`identity.defining_values`); load_checkpoint refuses others.

    Raises:
        InputError: the folder cannot be written.
    """
    target = Path(folder) / name
    try:
        make_folder(target)
        file = target / f"tensors-{_next_number(target)}.safetensors"
        save_file({key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}, str(file))
        sync_to_disk(file)
        record = {"file": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}
        usual = {key: identity.places[key] for key in sorted(identity.usual)} if isinstance(identity, Defining) else {}
        body = json.dumps({"identity": identity, "usual": usual, "tensors": record, "state": state}).encode()
        head = f'{{"version": {VERSION}, "sha256": "{hashlib.sha256(body).hexdigest()}", "body": '.encode()
        write_bytes(target / MANIFEST, head + body + b"}", sync=True)
        _remove_others(target, file.name)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{target}: cannot write the checkpoint ({error}); free some space, then --resume, or change --output"
        ) from error
    return target


def remove_remains(folder: Path) -> list[Path]:
    """Delete the tensors that killed saves have left in the checkpoints of a folder; return the files.

    Nothing is deleted beside a checkpoint that is damaged, or whose own tensors are not there.
    """
    left = []
    for target in (path.parent for path in folder.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(InputError):  # told when the checkpoint is loaded
            current = check_checkpoint(target)["tensors"]["file"]
            if os.path.isfile(target / current):
                left += [path for path in target.glob("tensors-*.safetensors*") if path.name != current]
                _remove_others(target, current)
    return left


def _next_number(target: Path) -> int:
    """Return a number above those of all tensor files there, so that no file in use is overwritten."""
    found = [TENSORS.fullmatch(path.name) for path in target.glob("tensors-*.safetensors")]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _remove_others(target: Path, current: str) -> None:
    for path in target.glob("tensors-*.safetensors*"):
        if path.name != current:
            with contextlib.suppress(OSError):  # the next save tries again
                path.unlink()


# ------------------------------------------------------------------------------------------------------------- loading


def load_checkpoint(
    folder: str | Path, *, identity: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint to (tensors on the CPU, state), after verifying every byte.

    Raises:
        InputError: missing, truncated or damaged (with the file), of another version, or of another config (with the
            key).
    """
    manifest = check_checkpoint(folder, identity=identity)
    path = Path(folder) / manifest["tensors"]["file"]
    _verify(path, manifest["tensors"])
    try:
        # cloned, as the last bit of a sum can depend on alignment, which differs in a mapped file
        return {key: value.clone() for key, value in load_file(str(path)).items()}, manifest["state"]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); {OTHERWISE}") from None


def check_checkpoint(folder: str | Path, *, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the verified body of checkpoint.json; the tensors are not read. Raises InputError as `load_checkpoint`."""
    body = _read_manifest(Path(folder) / MANIFEST)
    if identity is not None:
        places = {key: Place(*place) for key, place in body.get("usual", {}).items()}
        _check_identity(Path(folder), Defining(body["identity"], places, places), identity)
    return body


def has_checkpoint(folder: str | Path) -> bool:
    """Whether this folder holds a checkpoint, be it damaged."""
    return os.path.lexists(Path(folder) / MANIFEST)


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the body of checkpoint.json, which has the checksum at its beginning."""
    try:
        _check_file(path)
        too_large = path.stat().st_size > MAX_MANIFEST_BYTES
        raw = b"" if too_large else path.read_bytes()
        manifest = None if too_large else json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found, so there is no checkpoint to continue from; start the run afresh"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path}: truncated or damaged; {OTHERWISE}") from None
    if too_large:
        raise InputError(f"{path}: larger than {MAX_MANIFEST_BYTES >> 20} MiB, so not a checkpoint of csd3d")
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: damaged (it holds a {type(manifest).__name__}); {OTHERWISE}")
    version = manifest.get("version")
    if version != VERSION:
        raise InputError(
            f"{path}: version: {version!r:.40} is not the {VERSION} this csd3d reads; use the release that wrote it"
        )
    written = WRITTEN.fullmatch(raw)
    if written is None or hashlib.sha256(written[2]).hexdigest().encode() != written[1]:
        raise InputError(f"{path}: damaged (its SHA-256 is not the one at its beginning); {OTHERWISE}")
    return _check_body(path, manifest["body"])


def _check_file(path: Path) -> None:
    """Raise InputError for what is there and is no file: a pipe would be waited for without end."""
    if os.path.lexists(path) and not os.path.isfile(path):
        what = "a link that leads to no file" if path.is_symlink() else "not a file"
        raise InputError(f"{path}: {what}, so no part of a checkpoint of csd3d; {OTHERWISE}")


def _check_body(path: Path, body: Any) -> dict[str, Any]:
    wanted = {"identity": (dict, type(None)), "tensors": dict, "state": dict}
    record = body.get("tensors") if isinstance(body, dict) else None
    complete = isinstance(record, dict) and all(isinstance(body.get(key), kind) for key, kind in wanted.items())
    if not complete or not all(type(record.get(key)) is kind for key, kind in RECORD.items()):
        raise InputError(f"{path}: damaged; {OTHERWISE}")
    if not TENSORS.fullmatch(record["file"]):
        named = f"{record['file']!a:.60}"
        raise InputError(f"{path}: damaged (tensors.file is {named}, expected tensors-NUMBER.safetensors); {OTHERWISE}")
    usual = body.get("usual", {})  # older checkpoints have none
    places = usual.values() if isinstance(usual, dict) else [None]
    if not all(isinstance(each, list) and len(each) == 2 and all(type(x) is str for x in each) for each in places):
        raise InputError(f"{path}: damaged (usual); {OTHERWISE}")
    return body


def _check_identity(folder: Path, saved: Defining, identity: Mapping[str, Any]) -> None:
    own = identity if isinstance(identity, Defining) else Defining()
    wanted = Defining(json.loads(json.dumps(identity)), own.places, own.usual)
    found = difference(saved, wanted)
    if found is None:
        return
    key = found.key
    if all(str(values.get(key)).startswith(PREFIX) for values in (saved, wanted)):
        raise InputError(
            f"{folder}: {key}: this is not the input that the run was started with, its content differs; "
            f"bring that back, or say where it is now with {key}=PATH"
        )
    was, now = (f"{json.dumps(values[key]):.200}" if key in values else "absent" for values in (saved, wanted))
    other = another_version(folder.parent.parent) if found.unknown else None
    what = "undo that change"
    if other and key in wanted:
        what = f"the run was made by {other}, without this key: give it its default, or resume with that version"
    elif other:
        what = f"the run was made by {other}, and this one has no such key: resume with that version"
    raise InputError(f"{folder}: {key}: the checkpoint belongs to a run with {was}, this one has {now}; {what}")


def _verify(path: Path, record: Mapping[str, Any]) -> None:
    try:
        _check_file(path)
        size = path.stat().st_size
        if size != record["bytes"]:
            raise InputError(
                f"{path}: truncated or damaged ({size} bytes, not {record['bytes']}); resume from another checkpoint"
            )
        if _sha256(path) != record["sha256"]:
            raise InputError(f"{path}: damaged (its SHA-256 is not the recorded one); resume from another checkpoint")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); resume from another checkpoint") from None
