"""eval/run.py in this process, on an untrained adapter whose projector and LoRA are drawn at random."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, flickr_rows, save_flickr

from vlm_peft import VisionQwen, VisionQwenProcessor, console
from vlm_peft.adapters.loading import find_model
from vlm_peft.commands import evaluate as run_py
from vlm_peft.tasks import TASK_FILE, TaskSettings


@pytest.fixture
def evaluate(tmp_path, flickr, adapter, monkeypatch):
    """Runs `main` and returns predictions and scores."""
    # The module-wide list of loggers and bars is the script's own business; a test must not keep it quiet.
    monkeypatch.setattr(run_py, "quiet_imports", lambda: None)
    monkeypatch.setattr(run_py, "quiet_progress", lambda is_main: None)

    def run(*options, model=adapter, dataset=flickr, output="scores"):
        data = ("--dataset", dataset, "--stored_split", "test", "--split_column", "split", "--split", "test")
        cache = ("--feature_cache_dir", tmp_path / "features")
        fast = ("--no-meteor", "--tokenizer", "treebank-python")
        arguments = ("--model", model, *data, "--output_dir", tmp_path / output, *cache, *fast, *options)
        assert run_py.main([str(each) for each in arguments]) == 0
        predictions = [json.loads(line) for line in (tmp_path / output / "predictions.jsonl").open()]
        return predictions, json.loads((tmp_path / output / "scores.json").read_text())

    return run


def texts(predictions):
    return [row["prediction"] for row in predictions]


def test_files_and_table(evaluate, adapter, flickr, capsys):
    predictions, scores = evaluate()
    assert [row["id"] for row in predictions] == ["28", "29", "30", "31"]
    assert len(set(texts(predictions))) > 1
    assert all(len(row["references"]) == 5 for row in predictions)
    assert set(scores["metrics"]) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    assert (scores["n"], scores["model"], scores["dataset"], scores["split"]) == (4, str(adapter), str(flickr), "test")
    printed = capsys.readouterr().out
    assert "split  n  Bleu_1" in printed
    assert "predictions.jsonl" in printed


def test_the_model_is_asked_as_in_training_unless_told_otherwise(evaluate):
    as_trained, scores = evaluate()
    assert (scores["decoding"]["num_beams"], scores["decoding"]["max_new_tokens"]) == (2, 6)
    assert evaluate("--instruction", "Say what you see.")[0] == as_trained
    assert texts(evaluate("--instruction", "What is this?")[0]) != texts(as_trained)
    greedy, scores = evaluate("--num_beams", "1", "--max_new_tokens", "3")
    assert (scores["decoding"]["num_beams"], scores["decoding"]["max_new_tokens"]) == (1, 3)
    assert texts(greedy) != texts(as_trained)


def test_batches_and_the_feature_cache_change_nothing(evaluate):
    predictions, _ = evaluate()
    assert texts(evaluate("--batch_size", "1")[0]) == texts(predictions)
    assert texts(evaluate("--no-feature_cache")[0]) == texts(predictions)


def test_blind_swaps_the_pictures(evaluate):
    seen, blind = texts(evaluate()[0]), evaluate("--blind")
    assert texts(blind[0]) == seen[2:] + seen[:2]
    assert blind[1]["decoding"]["blind"] is True
    assert blind[1]["condition"] == "blind"


def test_swapping_gives_every_row_as_many_wrong_pictures():
    from vlm_peft.evaluation.evaluate import _swapped

    assert _swapped([[0], [1], [2], [3]]) == [[2], [3], [0], [1]]
    # Two questions about one picture, a row of text alone, and decks of which one has a length of its own.
    rows = [[0], [0], [1], [], [2, 3], [4, 5], [6, 7, 8]]
    for own, other in zip(rows, _swapped(rows), strict=True):
        assert len(own) == len(other)
        assert not set(own) & set(other)
    with pytest.raises(ValueError, match="another picture than a row's own"):
        _swapped([[0], [0]])


def test_clip_scores_of_captions_are_added_on_request(evaluate):
    predictions, scores = evaluate("--clip_model", str(ROOT / "recipes" / "demo" / "clip"))
    assert 0 < scores["metrics"]["CLIPScore"] < 2.5
    assert scores["metrics"]["CLIPScore"] == pytest.approx(sum(row["clipscore"] for row in predictions) / 4)
    assert "RefCLIPScore" in scores["intervals"]
    assert "CLIPScore" not in evaluate()[1]["metrics"]


def test_limit(evaluate):
    predictions, scores = evaluate("--limit", "3")
    assert scores["n"] == len(predictions) == 3


def test_full_save_gives_what_the_adapter_gives(evaluate, adapter, tmp_path, capsys):
    folder = tmp_path / "full"
    VisionQwen.from_adapter(adapter, merge=True).save_pretrained(folder)
    VisionQwenProcessor.from_pretrained(adapter).save_pretrained(folder)
    (folder / TASK_FILE).write_text((adapter / TASK_FILE).read_text())
    assert texts(evaluate(model=folder)[0]) == texts(evaluate()[0])
    (folder / TASK_FILE).unlink()
    capsys.readouterr()
    evaluate(model=folder)
    assert f"has no {TASK_FILE}: see --task and --instruction" in capsys.readouterr().out
    with pytest.raises(ValueError, match="leave --vision, --text and --load_in_4bit out"):
        evaluate("--vision", "elsewhere", model=folder)


def test_a_decoder_in_4_bits_is_asked_for_by_an_option(evaluate):
    # The tiny decoder is too narrow for 4 bits on a CPU, so that the option is seen to arrive.
    with pytest.raises(ValueError, match="multiple of 64"):
        evaluate("--load_in_4bit")


def test_bases_that_moved(evaluate, adapter, bases, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in adapter.iterdir():
        text = file.read_bytes()
        (moved / file.name).write_bytes(text.replace(str(bases[0]).encode(), b"/was/here/clip"))
    with pytest.raises(FileNotFoundError, match="vision"):
        evaluate(model=moved)
    assert evaluate("--vision", bases[0], model=moved)[0] == evaluate()[0]


def test_bad_rows_stop_or_are_skipped_with_a_count(evaluate, tmp_path):
    rows = flickr_rows()
    rows["image"][29]["bytes"] = rows["image"][29]["bytes"][:40]
    rows["caption"][30] = ["  "]
    data = save_flickr(tmp_path / "bad", rows)
    with pytest.raises(ValueError, match=r"2 of 4 rows of test cannot be scored(.|\n)*row 29: (.|\n)*row 30: "):
        evaluate(dataset=data)
    predictions, scores = evaluate("--on_bad_row", "skip", dataset=data)
    assert [row["id"] for row in predictions] == ["28", "31"]
    assert "2 of 4 rows left out" in scores["notes"][0]


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ((), "/no/such/folder", "The model /no/such/folder is not there"),
        ((), "nobody/nothing", "is no folder here, and the Hub does not give it"),
        (("--text_column", "words"), None, "no column 'words'; it has caption, filename, id, image"),
        (("--image_column", "photo"), None, "no column 'photo'"),
        (("--split", "dev"), None, "No row of .* has split = 'dev'; found test, train, val"),
    ],
)
def test_what_is_wrong_is_said(evaluate, adapter, options, model, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(*options, model=model or adapter)


def test_folder_without_a_model_is_said(evaluate, bases):
    with pytest.raises(ValueError, match=r"holds no trained model: .*it holds config\.json, model\.safetensors"):
        evaluate(model=bases[0])


def test_broken_task_file_is_said(tmp_path):
    (tmp_path / TASK_FILE).write_text("[")
    with pytest.raises(ValueError, match=r"task\.json: expected a JSON object with task, instruction"):
        TaskSettings.read(tmp_path)


def test_errors_of_use_are_one_line_and_others_keep_their_traceback(capsys):
    def user():
        # A check of ours, called from a script.
        find_model("/no/such/folder")

    assert console.run_script(user, "run.py") == 2
    assert capsys.readouterr().err.startswith("run.py: The model /no/such/folder is not there")

    def bug():
        torch.zeros(2).view(3, 3, [])

    with pytest.raises(TypeError):
        console.run_script(bug, "run.py")

    def theirs():
        json.loads("{")

    with pytest.raises(json.JSONDecodeError):
        console.run_script(theirs, "run.py")


def test_an_error_inside_a_library_that_lies_beside_the_scripts_keeps_its_traceback(capsys):
    """`make` puts `.venv` into the clone."""
    for folder, is_ours in ((ROOT / ".venv" / "lib" / "site-packages", False), (ROOT / "vlm_peft" / "data", True)):
        names: dict = {}
        exec(compile("def fail():\n    raise ValueError('here')\n", str(folder / "code.py"), "exec"), names)
        if is_ours:
            assert console.run_script(names["fail"], "run.py") == 2
            assert capsys.readouterr().err == "run.py: here\n"
        else:
            with pytest.raises(ValueError, match="here"):
                console.run_script(names["fail"], "run.py")


def test_help_is_quick():
    command = [sys.executable, "-X", "importtime", ROOT / "eval" / "run.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: run.py" in done.stdout
    assert "--num_beams" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vlm_peft.commands.evaluate" in loaded
    assert not loaded & {"torch", "transformers"}
