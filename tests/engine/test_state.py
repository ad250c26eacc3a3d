"""State that is restored: checked against what it belongs to, and named where it does not fit."""

import copy
import math
import shutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from csd3d.engine.logs import last_step
from csd3d.engine.phase import Phase, run_steps
from csd3d.engine.state import check_alike, is_finite, restore, snapshot
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.representations.descent import Average


@pytest.fixture
def parts():
    """A model after one step of Adam, with its average."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    adam, average = torch.optim.Adam(net.parameters()), Average(net, 0.9)
    net(torch.randn(8, 3)).square().sum().backward()
    adam.step()
    average.update()
    return {"net": net, "adam": adam, "average": average}


NAN = torch.tensor(math.nan)


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("net/0.weight", lambda x: x.to(torch.int8), "net: .*0.weight: is of torch.int8, expected torch.float32"),
        ("net/0.weight", lambda x: x * NAN, "net: .*0.weight: has values that are not finite"),
        ("net/1.num_batches_tracked", lambda x: x.float(), "1.num_batches_tracked: is of torch.float32"),
        ("net/0.weight", lambda _: "x", "0.weight: is a str, expected a Tensor"),
        ("adam/state/0/exp_avg", lambda _: torch.zeros(3), r"adam: .*exp_avg: is of shape \(3,\), expected \(4, 3\)"),
        ("adam/state/0/exp_avg", lambda _: torch.zeros(()), r"state/0/exp_avg: is of shape \(\), expected \(4, 3\)"),
        ("adam/state/0/exp_avg", lambda x: x.int(), "state/0/exp_avg: is of torch.int32"),
        ("adam/state/0/exp_avg_sq", lambda x: x + math.inf, "state/0/exp_avg_sq: has values that are not finite"),
        ("adam/state/0/exp_avg_sq", lambda _: "x", "state/0/exp_avg_sq: is a str, expected a Tensor"),
        ("adam/state/0/step", lambda _: torch.zeros(4), r"state/0/step: is of shape \(4,\), expected \(\)"),
        ("adam/state/0/step", lambda x: x * 0 - 1, "state/0/step: is negative"),  # Adam would divide by 1 - 0.9**0
        ("adam/state/0/exp_avg_sq", lambda x: x - 1e-3, "state/0/exp_avg_sq: is negative"),
        ("adam/state/0/exp_avg", lambda x: x + 1e30, "state/0/exp_avg: is larger than exp_avg_sq allows"),
        ("adam/param_groups/0/lr", lambda _: -0.1, "param_groups/0/lr: is -0.1, expected a number from 0"),
        ("adam/param_groups/0/lr", lambda _: "x", "param_groups/0/lr: is 'x', expected a number"),
        ("adam/param_groups/0/lr", lambda _: math.nan, "param_groups/0/lr: is nan, expected a number"),
        ("average/means/0", lambda _: torch.zeros(3), r"average: .*means/0: is torch.float32 \(3,\), .*\(4, 3\)"),
        ("average/means/0", lambda x: x * NAN, "means/0: has values that are not finite"),
        ("average/means", lambda x: x[:1], "means: are 1, expected one for each of 4 parameters"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_named(parts, path, change, said):
    tree = copy.deepcopy(snapshot(**parts))
    restore(copy.deepcopy(tree), **parts)
    *above, last = path.split("/")
    place = tree
    for key in above:
        place = place[int(key) if isinstance(place, list) or int_keys(place) else key]
    last = int(last) if isinstance(place, list) else last
    place[last] = change(place[last])
    with pytest.raises(InputError, match=said):
        restore(tree, **parts)


@pytest.mark.parametrize(
    ("key", "value"), [("betas", (2, 3)), ("weight_decay", 2**70), ("amsgrad", True), ("capturable", True), ("eps", -1)]
)
def test_settings_of_an_optimiser_are_the_runs_not_the_checkpoints(parts, key, value):
    """Each of the values would end the next step in a traceback, or in NaN."""
    adam, tree = parts["adam"], snapshot(**parts)
    before = adam.param_groups[0][key]
    tree["adam"]["param_groups"][0] |= {key: value, "lr": 0.5}
    restore(tree, **parts)
    assert (adam.param_groups[0][key], adam.param_groups[0]["lr"]) == (before, 0.5)
    adam.step()
    assert all(bool(p.isfinite().all()) for p in parts["net"].parameters())


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999), (0.0, 0.9), (0.95, 0.9)])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_moments_of_any_gradients_are_loaded(kind, betas):
    """Of gradients of all sizes, among them the worst for the bound: g_i ∝ (β₁/β₂)^i, i steps ago."""
    x, generator = torch.nn.Parameter(torch.ones(3)), torch.Generator().manual_seed(0)
    adam = kind([x], betas=betas)
    for step in range(200):
        noise = torch.randn((), generator=generator).item()
        spread = 10 ** (20 * torch.rand((), generator=generator).item() - 12)
        x.grad = torch.tensor([noise * spread, max(betas[0] / betas[1], 1e-3) ** (200 - step), noise * 1e-25])
        adam.step()
        restore(snapshot(adam=adam), adam=adam)


def int_keys(place) -> bool:
    return isinstance(place, dict) and all(isinstance(key, int) for key in place)


def test_what_is_not_finite_by_itself_may_be_so_when_saved():
    check_alike(
        {"box": torch.tensor([math.inf]), "best": math.inf}, {"box": torch.tensor([math.inf]), "best": math.inf}
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64):
        assert is_finite(torch.ones(3).to(dtype))
        assert not is_finite(torch.tensor([1, math.nan]).to(dtype))
    assert is_finite(torch.zeros(0))


def test_an_average_that_will_start_anew_does_so_after_it_is_restored(parts):
    net, average = parts["net"], parts["average"]
    net[0].weight.data = torch.ones(4, 5)
    again = Average(net, 0.9)
    again.load_state_dict(average.state_dict())
    for one in (average, again):
        one.update()
        assert torch.equal(one.means[0], torch.ones(4, 5))


# -------------------------------------------------------------------------------------------------------------- phases


@dataclass(kw_only=True)
class Toy(Phase):
    z: Tensor

    TENSORS: ClassVar = ("z",)


def toy(**changed) -> Toy:
    phase = Toy(torch.Generator(), steps=40, z=torch.zeros(2, 3))
    for key, value in changed.items():
        setattr(phase, key, value)
    return phase


def test_a_phase_comes_back(tmp_path):
    toy(step=40, seconds=1.5, skipped=3, kernel_mean=0.5, z=torch.ones(2, 3)).save(tmp_path, "toy", {})
    back = toy()
    back.load(tmp_path, "toy", {})
    assert (back.step, back.seconds, back.skipped, back.kernel_mean, back.z.sum()) == (40, 1.5, 3, 0.5, 6)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        *(("step", value, "a whole number from 0 to 40") for value in (-1, 1.5, math.nan, "2", None, True, 41, 10**30)),
        *(("seconds", value, "a number from 0") for value in (-5, "x", None, math.inf, math.nan)),
        *(("unet_evaluations", value, "a whole number from 0") for value in ("x", None, -4)),
        *(("skipped", value, "a whole number from 0 to 0") for value in ("a", 99)),
        *(("kernel_mean", value, "a number from 0") for value in ("x", [1], {}, math.nan)),
        *(("z", value, "z: ") for value in (torch.zeros(2), torch.zeros(2, 3).int(), torch.zeros(2, 3) + math.nan, 5)),
    ],
)
def test_a_counter_or_tensor_that_cannot_be_is_damage(tmp_path, key, value, said):
    toy(**{key: value}).save(tmp_path, "toy", {})
    with pytest.raises(InputError) as caught:
        toy().load(tmp_path, "toy", {})
    assert str(caught.value).startswith(f"{tmp_path / 'toy'}: damaged ({key}")
    assert said in str(caught.value)


@dataclass(kw_only=True)
class LaterToy(Toy):
    """The phase of a later release, which counts something more."""

    turns: int = 7

    COUNTERS: ClassVar = Toy.COUNTERS | {"turns": (int,)}


def test_a_counter_that_an_older_checkpoint_lacks_is_as_at_the_start(tmp_path):
    toy(step=30, skipped=2).save(tmp_path, "toy", {})
    later = LaterToy(torch.Generator(), steps=40, z=torch.ones(2, 3))
    later.load(tmp_path, "toy", {})
    assert (later.step, later.skipped, later.turns) == (30, 2, 7)
    later.turns = -1
    later.save(tmp_path, "toy", {})
    with pytest.raises(InputError, match=r"damaged \(turns is -1, expected a whole number from 0\)"):
        later.load(tmp_path, "toy", {})


def test_a_counter_of_a_later_release_is_refused_with_the_version(tmp_path):
    LaterToy(torch.Generator(), z=torch.zeros(2, 3)).save(tmp_path / "checkpoints", "toy", {})
    told = "toy: it holds 'turns', which this csd3d does not keep: the run was made by another version of csd3d"
    for made, by in (("", ";"), ('{"git": "0123456789abcdef"}', r" \(commit 0123456789abcdef\);")):
        (tmp_path / "environment.json").write_text(made)
        with pytest.raises(InputError, match=f"{told}{by} resume with that version$"):
            toy().load(tmp_path / "checkpoints", "toy", {})


def test_a_checkpoint_without_its_step_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "COUNTERS", {key: kinds for key, kinds in Toy.COUNTERS.items() if key != "step"})
    toy().save(tmp_path, "toy", {})
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"damaged \(step is None, expected a whole number"):
        toy().load(tmp_path, "toy", {})


def test_a_phase_that_lost_its_checkpoint_starts_afresh_with_a_warning(tmp_path, caplog):
    config = SimpleNamespace(save_seconds=100)
    job = SimpleNamespace(
        folder=tmp_path,
        config=config,
        prior=None,
        stop=StopRequest(),
        identity_of=lambda _: {},
        announce=lambda *_: None,
    )
    assert last_step(tmp_path, "toy") is None
    for lost, warned in ((False, 0), (False, 0), (True, 1)):
        if lost:
            shutil.rmtree(tmp_path / "checkpoints")
        run_steps(job, toy(), "toy", 11, lambda *_: {"skipped": 0}, str)
        assert last_step(tmp_path, "toy") == 10
        assert caplog.text.count("its curves go up to step 10, but it has no checkpoint") == warned
