"""The judge of patterns: all of one for a model that knows the picture, nothing for one that knows its mean."""

import json

import pytest
from tiny_models import save_tiny_pipeline

from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from tools.train_shipped import judge_patterns
from tools.train_shipped.__main__ import main
from tools.train_shipped.start import ASSETS

PROMPT = "a white ball with black dots"


class Knows:
    """The shipped prior, but ε is that of the last pictures that were encoded, or of a plain one in their place."""

    def __init__(self, plain: bool):
        self.prior = load_prior(PriorConfig(model=str(ASSETS / "t2i"), device="cpu"), "text")
        self.plain, self.asked = plain, []

    def __getattr__(self, name):
        return getattr(self.prior, name)

    def encode(self, pictures):
        self.z_0 = self.prior.encode(pictures)
        plain = pictures.clone()
        for picture in plain:
            object_ = (picture - picture[:, :1, :1]).abs().amax(0) > 0.02
            picture[:, object_] = picture[:, object_].mean(1, keepdim=True)
        self.known = self.prior.encode(plain) if self.plain else self.z_0
        return self.z_0

    def predict(self, queries):
        query = queries["text"]
        self.asked.append(query)
        alpha_bar = self.prior.alphas_cumprod[query.t]
        return {"text": (query.z_t - alpha_bar.sqrt() * self.known) / (1 - alpha_bar).sqrt()}


def test_a_model_that_knows_the_picture_keeps_what_the_autoencoder_keeps():
    prior = Knows(plain=False)
    kept = judge_patterns.patterns_kept(prior, PROMPT, scenes=1, seed=0, times=(0.1, 0.5))
    assert kept["autoencoder"] > 0.4
    assert kept["t 0.1"] == pytest.approx(kept["autoencoder"], abs=2e-3)
    assert kept["t 0.5"] == pytest.approx(kept["autoencoder"], abs=2e-3)
    assert [query.t for query in prior.asked] == [100, 500]
    assert prior.asked[0].prompts[0] == f"{PROMPT}, grey background, front view"
    assert prior.asked[0].prompts[6] == f"{PROMPT}, grey background, back view"
    assert prior.asked[0].view[3].tolist() == [90.0, 30.0, 4.0]


def test_a_model_that_knows_one_colour_keeps_nothing():
    kept = judge_patterns.patterns_kept(Knows(plain=True), PROMPT, scenes=1, seed=0, times=(0.1,))
    assert kept["t 0.1"] < 0.1 < 0.4 < kept["autoencoder"]


def test_the_command_writes_the_numbers_of_every_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge_patterns, "PROMPTS", (PROMPT,))
    monkeypatch.setattr(judge_patterns, "VIEWS", 4)
    assert main(["judge-patterns", "--scenes", "1", "--json", str(tmp_path / "kept.json")]) == 0
    report = json.loads((tmp_path / "kept.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    kept = report[str(ASSETS / "t2i")][PROMPT]
    assert list(kept) == ["autoencoder", *(f"t {time:g}" for time in judge_patterns.TIMES)]
    assert kept["t 0.02"] > kept["t 0.8"]


def test_a_plain_prompt_is_refused():
    with pytest.raises(InputError, match="asks for no pattern"):
        judge_patterns.patterns_kept(Knows(plain=False), "a red ball", scenes=1, seed=0, times=())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scenes", "0"], "--scenes is 0; give 1 to 1000"),
        (["--scenes", "10" * 12], "give 1 to 1000"),
        (["--model", "TINY"], "takes no camera"),
        (["--model", str(ASSETS / "t2i"), "/nowhere"], "/nowhere"),
        (["--json", "/dev/full"], "--json: /dev/full is a pipe or a device"),
        (["--json", "/etc"], "--json: '/etc' is a folder"),
        (["--json", "/nowhere/kept.json"], "--json: /nowhere is no folder"),
        (["--seed", "9" * 23], "give a whole number from 0 to"),
        (["--threads", "-2"], "--threads is -2; give a whole number from 1"),
    ],
)
def test_what_cannot_be_judged_is_one_line_before_the_work(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_patterns, "patterns_kept", lambda *_: pytest.fail("began the work"))
    folder = save_tiny_pipeline(tmp_path / "tiny", "text")
    assert main(["judge-patterns", *(str(folder) if word == "TINY" else word for word in options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
