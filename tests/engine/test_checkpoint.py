"""Checkpoints: exact, whole at every instant, and never believed when damaged."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from csd3d.engine import checkpoint
from csd3d.engine.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from csd3d.engine.state import pack, restore, snapshot, unpack
from csd3d.errors import InputError
from csd3d.identity import Defining, Place

ROOT = Path(__file__).parents[1]
IDENTITY = {"update.method": "csd_edit", "seed": 0, "size": [1, 2]}


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path, "last", {"a": torch.arange(1000.0), "b": torch.ones(3)}, {"step": 4}, identity=IDENTITY)
    return tmp_path / "last"


def test_every_dtype_shape_and_number_comes_back_exactly(tmp_path):
    shared = torch.randn(6, 5)
    tensors = {
        "f64": torch.tensor(math.pi, dtype=torch.float64),
        "f16": torch.randn(3).half(),
        "bf16": torch.randn(3).bfloat16(),
        "odd": torch.tensor([math.nan, math.inf, -0.0]),
        "u8": torch.arange(256, dtype=torch.uint8),
        "i64": torch.tensor([2**62]),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "transposed": shared.T,
        "view": shared[::2],
        "again": shared,
    }
    state = {"lr": 0.1 + 1e-17, "third": 1 / 3, "inf": math.inf, "none": None, "text": "ü", "list": [1, True, "x"]}
    loaded, loaded_state = load_checkpoint(save_checkpoint(tmp_path, "last", tensors, state))
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype
        assert loaded[key].shape == value.shape
        expected = value.clone(memory_format=torch.contiguous_format)
        assert bytes(loaded[key].untyped_storage()) == bytes(expected.untyped_storage())
    assert loaded_state == state


def test_trees_come_back_with_their_key_types():
    tree = {
        "opt": {"state": {0: {"step": torch.tensor(3.0), "m": torch.ones(2)}}, "betas": (0.9, 0.999)},
        "n": [None, 1.5],
    }
    tree |= {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}  # whose paths would be the same
    tensors, state = pack(tree)
    back = unpack(tensors, json.loads(json.dumps(state)))
    assert len(tensors) == 4
    assert torch.equal(back["a/b"], tree["a/b"])
    assert torch.equal(back["a"]["b"], tree["a"]["b"])
    assert list(back["opt"]["state"]) == [0]
    assert back["opt"]["betas"] == (0.9, 0.999)
    assert back["n"] == [None, 1.5]
    with pytest.raises(TypeError, match="x/y: a checkpoint holds"):
        pack({"x": {"y": object()}})


class Training:
    """A small network on random batches: everything that a step depends on is in `parts`."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 1))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        adam = torch.optim.Adam(
            [{"params": net[:2].parameters(), "lr": 1e-2}, {"params": net[2:].parameters(), "lr": 3e-3}]
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.97)
        self.parts = {"net": net, "adam": adam, "schedule": schedule, "rng": generator}

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            x = torch.randn(32, 4, generator=self.parts["rng"])
            loss = (self.parts["net"](x) - x.prod(-1, keepdim=True)).square().mean()
            self.parts["adam"].zero_grad()
            loss.backward()
            self.parts["adam"].step()
            self.parts["schedule"].step()
            losses.append(loss.item())
        return losses


def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(tmp_path):
    unbroken = Training(0)
    losses = unbroken.steps(40)
    first = Training(0)
    first.steps(17)
    save_checkpoint(tmp_path, "last", *pack(snapshot(**first.parts) | {"step": 17}))
    first.steps(5)  # work after the save is lost with the process

    second = Training(1)
    tree = unpack(*load_checkpoint(tmp_path / "last"))
    restore(tree, **second.parts)
    assert second.steps(40 - tree["step"]) == losses[17:]
    for a, b in zip(
        unbroken.parts["net"].state_dict().values(), second.parts["net"].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(unbroken.parts["rng"].get_state(), second.parts["rng"].get_state())


@pytest.mark.parametrize("left_out", ["net", "adam", "schedule", "rng"])
def test_each_part_matters(tmp_path, left_out):
    """The test above would notice any part that was not restored."""
    unbroken, second = Training(0), Training(1)
    losses = unbroken.steps(10)
    tree = snapshot(**unbroken.parts)
    losses = unbroken.steps(10)
    tree = unpack(*load_checkpoint(save_checkpoint(tmp_path, "last", *pack(tree))))
    second.steps(3)
    restore(tree, **{name: part for name, part in second.parts.items() if name != left_out})
    assert second.steps(10) != losses


def test_a_save_is_a_snapshot(tmp_path):
    tensor = torch.ones(3)
    path = save_checkpoint(tmp_path, "last", {"x": tensor}, {})
    loaded, _ = load_checkpoint(path)
    tensor.zero_()
    save_checkpoint(tmp_path, "last", {"x": tensor}, {})  # replaces the file that `loaded` came from
    assert loaded["x"].tolist() == [1, 1, 1]
    loaded["x"].add_(1)
    assert load_checkpoint(path)[0]["x"].tolist() == [0, 0, 0]


def test_old_and_interrupted_saves_are_removed(saved):
    (saved / "tensors-7.safetensors").write_bytes(b"half")
    for step in range(3):
        save_checkpoint(saved.parent, "last", {"a": torch.full((2,), float(step))}, {"step": step})
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint.json", "tensors-10.safetensors"]


# ------------------------------------------------------------------------------------------------------- interruptions


class Killed(BaseException):
    pass


@pytest.mark.parametrize("partial", [False, True])
def test_death_at_any_system_call_leaves_the_old_or_the_new(tmp_path, monkeypatch, partial):
    """Dies at the k-th file operation of a save, for every k there is, before it happens or half-way through."""
    steps = {"left": 0}

    def dying(original, spoil=None):
        def call(*args, **kwargs):
            steps["left"] -= 1
            if steps["left"] == 0:
                if partial and spoil:
                    spoil(*args, **kwargs)
                raise Killed
            return original(*args, **kwargs)

        return call

    def half_a_file(_tensors, path):
        Path(path).write_bytes(b"\0" * 10)

    save_checkpoint(tmp_path, "last", {"x": torch.zeros(50)}, {"step": 0})
    for module, name, spoil in [
        (checkpoint, "save_file", half_a_file), (os, "fsync", None), (os, "replace", None), (Path, "unlink", None),
        (Path, "stat", None), (Path, "open", lambda p, *a, **k: a and a[0] == "w" and p.write_bytes(b"{")),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, dying(getattr(module, name), spoil))
    died = 0
    for number in range(1, 60):
        before = load_step(tmp_path)
        steps["left"] = number
        try:
            save_checkpoint(tmp_path, "last", {"x": torch.full((50,), float(number))}, {"step": number})
        except Killed:
            died += 1
            assert load_step(tmp_path) in (before, number)
        else:
            steps["left"] = 0
            assert load_step(tmp_path) == number
            break
    assert died >= 8  # every fsync, both renames, the removal


def load_step(folder: Path) -> int:
    tensors, state = load_checkpoint(folder / "last")
    assert tensors["x"].eq(state["step"]).all()
    return state["step"]


KILLER = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from csd3d.engine.checkpoint import load_checkpoint, save_checkpoint
torch.set_num_threads(1)
folder, last = Path(sys.argv[1]), 0
def save(step):
    save_checkpoint(folder, "last", {"x": torch.full((20000,), float(step))}, {"step": step})
start = time.monotonic()
for step in range(4):
    save(step)
duration = (time.monotonic() - start) / 4
random.seed(0)
for _ in range(25):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"!")
        for step in range(last + 1, 10**9):
            save(step)
    os.read(read, 1)
    time.sleep(random.uniform(0.0, 3 * duration))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "died by itself"
    tensors, state = load_checkpoint(folder / "last")
    assert tensors["x"].eq(float(state["step"])).all(), state
    assert state["step"] >= last, "went back"
    last = state["step"]
    os.close(read), os.close(write)
print(last)
"""


def test_sigkill_in_a_save_loop_always_leaves_a_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 3  # it was saving when it was killed


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(folder: Path, *parts: str, identity=None) -> None:
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder, identity=identity)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_none_there(tmp_path):
    assert not has_checkpoint(tmp_path / "last")
    refused(tmp_path / "last", "checkpoint.json", "there is no checkpoint")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_truncated_tensors(saved, size):
    path = saved / "tensors-1.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(saved, "tensors-1.safetensors", "truncated")


def test_missing_or_swapped_tensors(saved, tmp_path):
    path = saved / "tensors-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(saved, "tensors-1.safetensors", "SHA-256")
    path.unlink()
    refused(saved, "tensors-1.safetensors", "cannot be read")


def test_truncated_manifest(saved):
    path = saved / "checkpoint.json"
    text = path.read_text()
    for size in range(0, len(text), 7):
        path.write_text(text[:size])
        refused(saved, "checkpoint.json", "truncated or damaged")


@pytest.mark.parametrize(
    "change",
    [
        *({"tensors": {"file": name, "bytes": 1, "sha256": ""}} for name in ("", "x", "..", "../../secret", "a\0b")),
        *({"tensors": {"file": name, "bytes": 1, "sha256": ""}} for name in ("\ud800", "x" * 5000, "tensors-².x")),
        {"tensors": {"file": "tensors-1.safetensors", "bytes": True, "sha256": ""}},
        {"tensors": None},
        {"tensors": {"file": "x"}},
        {"state": []},
        {"usual": [1]},
        {"usual": {"seed": 1}},
    ],
)
def test_strange_manifests(saved, change):
    """Complete, with the right checksum, and still not what a checkpoint says: in a short line, and nothing is lost."""
    path = saved / "checkpoint.json"
    body = json.dumps(json.loads(path.read_text())["body"] | change)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(f'{{"version": {checkpoint.VERSION}, "sha256": "{checksum}", "body": {body}}}')
    with pytest.raises(InputError, match=r"checkpoint.json: damaged") as caught:
        load_checkpoint(saved)
    assert len(str(caught.value)) < len(str(path)) + 200
    assert checkpoint.remove_remains(saved.parent) == []
    assert (saved / "tensors-1.safetensors").exists()


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ('"x"', "str"), ("null", "NoneType")])
def test_a_manifest_that_is_no_object_is_damaged_not_of_another_version(saved, text, kind):
    (saved / "checkpoint.json").write_text(text)
    refused(saved, f"checkpoint.json: damaged (it holds a {kind}); resume from another checkpoint or start afresh")


def test_another_version_is_refused(saved):
    path = saved / "checkpoint.json"
    for version in (1, None, "2"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
        refused(saved, f"version: {version!r} is not the 2 this csd3d reads")


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_refused_in_one_line(saved):
    path = saved / "checkpoint.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        refused(saved, "checkpoint.json")
    path.write_bytes(whole)
    assert load_checkpoint(saved)[1] == {"step": 4}


def test_a_fifo_is_no_manifest(saved):
    (saved / "checkpoint.json").unlink()
    os.mkfifo(saved / "checkpoint.json")
    refused(saved, "checkpoint.json: not a file")


@pytest.mark.parametrize("target", ["checkpoint.json", "nowhere"])
def test_a_link_that_leads_nowhere_is_damage_not_a_new_run(saved, target):
    (saved / "checkpoint.json").unlink()
    (saved / "checkpoint.json").symlink_to(target)
    assert has_checkpoint(saved)
    refused(saved, "checkpoint.json: a link that leads to no file")


def test_a_pipe_in_place_of_the_tensors_is_told_without_waiting(saved):
    (saved / "tensors-1.safetensors").unlink()
    os.mkfifo(saved / "tensors-1.safetensors")
    refused(saved, "tensors-1.safetensors: not a file")


def test_other_content_of_an_input_is_refused_by_its_key(tmp_path):
    place = save_checkpoint(tmp_path, "last", {}, {}, identity={"image": "sha256:12"})
    with pytest.raises(InputError, match=r"last: image: this is not the input .* say where it is now with image=PATH"):
        load_checkpoint(place, identity={"image": "sha256:34"})


def test_what_a_killed_save_left_is_deleted(saved):
    (saved / "tensors-9.safetensors").write_bytes(b"half")
    checkpoint.remove_remains(saved.parent)
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint.json", "tensors-1.safetensors"]
    (saved / "checkpoint.json").write_text("damaged")
    assert checkpoint.remove_remains(saved.parent) == []


def test_a_huge_or_nested_manifest_is_refused(saved):
    path = saved / "checkpoint.json"
    path.write_text("[" * 100_000)
    refused(saved, "checkpoint.json: truncated or damaged")
    with path.open("wb") as handle:
        handle.truncate(checkpoint.MAX_MANIFEST_BYTES + 1)  # sparse
    refused(saved, "checkpoint.json: larger than 64 MiB")


def test_another_config_is_refused_by_key(saved):
    assert load_checkpoint(saved, identity=dict(IDENTITY, size=(1, 2)))[1] == {"step": 4}
    refused(saved, "last: update.method", '"csd_edit"', '"in2n"', identity=IDENTITY | {"update.method": "in2n"})
    refused(saved, "new.key", "absent", identity=IDENTITY | {"new.key": None})
    refused(saved, "seed", "absent", identity={k: v for k, v in IDENTITY.items() if k != "seed"})


def test_a_key_of_another_version_is_told_with_the_commit_unless_it_has_its_default(tmp_path):
    place = save_checkpoint(tmp_path / "checkpoints", "sds", {}, {}, identity=Defining({"prompt": "a duck"}))
    wanted = Defining({"prompt": "a duck", "losses.new": 0}, {"losses.new": Place()}, ["losses.new"])
    refused(place, "losses.new: the checkpoint belongs to a run with absent", "undo that change", identity=dict(wanted))
    (tmp_path / "environment.json").write_text(json.dumps({"git": "0123456789abcdef"}))
    assert load_checkpoint(place, identity=wanted) == ({}, {})
    wanted["losses.new"], wanted.usual = 1, set()
    refused(place, "sds: losses.new", "another version of csd3d (commit 0123456789abcdef), without", identity=wanted)
    refused(place, "sds: prompt", '"a duck", this one has "a goose"; undo', identity=wanted | {"prompt": "a goose"})
    refused(place, "sds: prompt", "(commit 0123456789abcdef), and this one has no such key", identity=Defining())


def test_state_of_another_shape_is_refused_by_name():
    tree = snapshot(net=nn.Linear(2, 3))
    with pytest.raises(InputError, match=r"^net: does not fit this run .*size mismatch"):
        restore(tree, net=nn.Linear(2, 4))
    with pytest.raises(InputError, match=r"^rng: does not fit"):
        restore(tree, rng=torch.Generator())
    with pytest.raises(InputError, match="do not belong together"):
        unpack({}, pack(tree)[1])


def test_an_unwritable_folder_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "file", "last", {}, {})
