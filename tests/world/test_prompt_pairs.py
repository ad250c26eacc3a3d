"""Pairs made by Prompt-to-Prompt, as training reads them."""

import json

import pytest
import torch
from tiny_models import save_tiny_pipeline

from csd3d.errors import InputError
from csd3d.metrics.clip import directional_similarity, load_clip
from csd3d.priors import PriorConfig, load_prior
from csd3d.world.prompt_pairs import Making, main, write_prompt_pairs
from tools.train_shipped.data import gather, open_pairs, texts


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")
    (folder / "csd3d.json").write_text(json.dumps({"defaults": {"working_size": 32}}))
    return load_prior(PriorConfig(model=str(folder), device="cpu"), require="text")


def test_the_trainer_reads_them_and_they_change_as_the_captions_say(prior, tmp_path):
    making = Making(count=3, steps=2, candidates=2, least=-1.0)
    for name in ("a", "b"):
        write_prompt_pairs(tmp_path / name, prior, making)
    for file in ("source.u8", "target.u8", "mask.u8", "pairs.jsonl", "meta.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    pairs, clip = open_pairs(tmp_path / "a"), load_clip()
    assert (len(pairs), pairs.size) == (3, 32)
    assert {record["caption"] for record in pairs.records} < set(texts(pairs))
    for k, record in enumerate(pairs.records):
        assert record["caption"] != record["target_caption"]
        assert 0.1 <= record["self_steps"] <= 0.9
        seen = [clip.embed_images(gather(part, torch.tensor([k]))) for part in (pairs.target, pairs.source)]
        said = clip.embed_texts([record["target_caption"], record["caption"]])
        found = directional_similarity(*seen, *said).item()
        assert found == pytest.approx(record["directional_similarity"], abs=0.1)  # of 8 bits a pixel


def test_pairs_that_are_not_good_enough_are_none(prior, tmp_path):
    with pytest.raises(InputError, match=r"--least is 1.0, which 0 of 20 pairs reached, where 1 are wanted: lower it"):
        write_prompt_pairs(tmp_path / "a", prior, Making(count=1, steps=1, candidates=1, least=1.0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--count", "0"], "--count is 0: give at least 1"), (["--least", "2"], "--least is 2.0"), ([], "not empty")],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, arguments, said):
    (tmp_path / "kept").write_text("mine")
    monkeypatch.setattr("sys.argv", ["prompt_pairs", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert error.count("\n") == 1
