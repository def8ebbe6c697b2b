"""The adapter folder's README.md: what the run wrote, and nothing that it did not."""

import json

import pytest
from model_card import write_model_card
from yaml import safe_load

SUMMARY = {
    "title": "run",
    "date": "2026-01-01 00:00 UTC",
    "command": "accelerate launch recipes/sft.py",
    "vision_model": "openai/clip-vit-base-patch32",
    "text_model": "recipes/demo/qwen3",
    "dataset": "nlphuji/flickr30k",
    "device": "cpu",
    "seed": 7,
    "parameters": 1000,
    "trainable_parameters": 10,
    "seconds": {"train": 1.5},
    "versions": {"torch": "2"},
}


def write_scores(folder, name, cider, **extra):
    path = folder / "eval" / name / "scores.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"n": 5, "metrics": {"CIDEr": cider}, "tokenizer": "t", "decoding": {}, **extra}))


def test_card_has_every_score_with_its_control_and_interval(tmp_path):
    (tmp_path / "run_summary.json").write_text(json.dumps(SUMMARY))
    write_scores(tmp_path, "test", 1.25, intervals={"CIDEr": [1.0, 1.5]})
    write_scores(tmp_path, "test-blind", 0.125)
    text = write_model_card(tmp_path).read_text()
    assert "| test | 5 | 1.250 [1.00, 1.50] |" in text
    assert "| test-blind | 5 | 0.125 |" in text
    assert "10 trained of 1,000 parameters" in text
    front = safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "image-text-to-text"
    # The local folder is no id of the Hub.
    assert front["base_model"] == ["openai/clip-vit-base-patch32"]


def test_without_scores_there_is_no_table(tmp_path):
    (tmp_path / "run_summary.json").write_text(json.dumps(SUMMARY))
    assert "## Scores" not in write_model_card(tmp_path).read_text()


def test_without_a_run_there_is_no_card(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
