"""What a training gains and loses: watched data, perplexity, the adapter's scale, and the best point passed."""

import json
import math

import pytest
import torch
from conftest import flickr_rows, save_flickr
from peft import get_peft_model

from vlm_peft import VisionQwen
from vlm_peft.__main__ import main
from vlm_peft.adapters.export import export_merged
from vlm_peft.adapters.loading import load_model
from vlm_peft.adapters.lora import lora_config
from vlm_peft.adapters.scale import at_scale
from vlm_peft.evaluation.perplexity import SAMPLE, perplexity, read_paragraphs, text_nats
from vlm_peft.evaluation.transfer import compared, compared_text, said, transfer_lines
from vlm_peft.report.report import _best_point, build_report
from vlm_peft.training import sft
from vlm_peft.training.arguments import VisionArguments
from vlm_peft.training.data import watched_text


@torch.inference_mode()
def text_logits(model, ids=(5, 6, 7, 8, 9)):
    return model(input_ids=torch.tensor([list(ids)])).logits


def test_at_scale_0_the_base_is_bit_equal_and_between_lie_the_others(adapter, bases):
    model, processor = load_model(adapter)
    base = VisionQwen.from_vision_text_pretrained(*bases).eval()
    whole = text_logits(model)
    with at_scale(model, 0):
        assert torch.equal(text_logits(model), text_logits(base))
        nats = text_nats(model, processor, ["some text"])
        assert nats == text_nats(base, processor, ["some text"])
    with at_scale(model, 1):
        assert torch.equal(text_logits(model), whole)
    with at_scale(model, 0.5):
        middle = text_logits(model)
    assert not torch.equal(middle, whole)
    assert not torch.equal(middle, text_logits(base))
    # What was set inside is taken back.
    assert torch.equal(text_logits(model), whole)


def test_a_point_of_the_curve_is_exported(adapter, bases, tmp_path, capsys):
    model, _ = load_model(adapter)
    base = VisionQwen.from_vision_text_pretrained(*bases).eval()
    exported = VisionQwen.from_pretrained(export_merged(adapter, tmp_path / "base", scale=0)).eval()
    for name, weight in base.model.language_model.state_dict().items():
        assert torch.equal(exported.model.language_model.state_dict()[name], weight), name
    projector = model.get_base_model().model.multi_modal_projector.modules_to_save["default"].state_dict()
    for name, weight in exported.model.multi_modal_projector.state_dict().items():
        assert torch.equal(projector[name], weight), name
    assert main(["export", str(adapter), str(tmp_path / "some"), "--to", "merged", "--scale", "0.6"]) == 0
    some = VisionQwen.from_pretrained(tmp_path / "some").eval()
    with at_scale(model, 0.6):
        torch.testing.assert_close(text_logits(some), text_logits(model), atol=1e-5, rtol=1e-4)
    assert (text_logits(some) - text_logits(model)).abs().max() > 1e-3


def test_a_scale_that_means_nothing_is_refused(adapter, model, tmp_path):
    loaded, _ = load_model(adapter)
    with pytest.raises(ValueError, match=r"from 0 .the bases. to 1 .as trained., got 1.5"), at_scale(loaded, 1.5):
        pass
    with pytest.raises(ValueError, match="a full save"), at_scale(model, 0.5):
        pass
    dora = get_peft_model(model, lora_config(model, r=2, use_dora=True))
    with pytest.raises(ValueError, match="DoRA trains the lengths"), at_scale(dora, 0.5):
        pass
    loaded.active_peft_config.modules_to_save.append("model.language_model.layers.1")
    with pytest.raises(ValueError, match=r"language_model.layers.1 were trained in full"), at_scale(loaded, 0.5):
        pass
    full = export_merged(adapter, tmp_path / "full")
    with pytest.raises(ValueError, match="a full save"):
        export_merged(full, tmp_path / "again", scale=0.5)


def test_perplexity_is_that_of_the_tokens(model, processor):
    paragraph = "some text"
    ids = processor.tokenizer(paragraph)["input_ids"]
    with torch.inference_mode():
        nats = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = -sum(nats[place, token].item() for place, token in enumerate(ids[1:])) / (len(ids) - 1)
    found = text_nats(model, processor, [paragraph, "other words"])
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert perplexity(found) == pytest.approx(math.exp(sum(found) / 2))
    # Longer than a window, in windows.
    assert math.isfinite(text_nats(model, processor, ["word " * 300])[0])
    with pytest.raises(ValueError, match="two or more tokens, got 'x'"):
        text_nats(model, processor, ["x"])
    assert len(read_paragraphs(SAMPLE)) == 12


def test_the_text_that_is_watched_is_a_file_or_a_data_set(tmp_path):
    long, short = "one two three four five six seven eight nine ten", "= A heading ="
    (tmp_path / "notes.txt").write_text("First.\n\nSecond.")
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": each}) + "\n" for each in ["", short, *[long] * 300])
    )
    (tmp_path / "named.jsonl").write_text(json.dumps({"words": long}))
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": short}))

    def read(name):
        return watched_text(VisionArguments(watch_text=str(tmp_path / name)))

    assert read("notes.txt") == ["First.", "Second."]
    assert read("corpus.jsonl") == [long] * 200
    assert watched_text(VisionArguments()) == []
    assert watched_text(VisionArguments(watch=[])) == read_paragraphs(SAMPLE)
    with pytest.raises(ValueError, match="a data set with a column text, got the columns id, words"):
        read("named.jsonl")
    with pytest.raises(ValueError, match="expected rows of ten words or more in the column text, found none"):
        read("lines.jsonl")
    with pytest.raises(FileNotFoundError, match=r"--watch_text .*nowhere\.txt is not there"):
        read("nowhere.txt")


def write(folder, values):
    folder.mkdir()
    rows = [{"id": str(key), "prediction": "", "references": ["x"], "cider": value} for key, value in values.items()]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.json").write_text('{"primary": "CIDEr", "metrics": {}, "task": "caption"}')
    return folder


def test_gains_and_losses_are_tested_in_pairs(tmp_path):
    before = write(tmp_path / "before", {key: 1.0 for key in range(40)})
    worse = write(tmp_path / "worse", {key: 0.5 for key in reversed(range(40))})
    row = compared(before, worse, "old")
    assert (row["before"], row["after"], row["difference"], row["n"]) == (1.0, 0.5, -0.5, 40)
    assert row["p_value"] < 0.01
    assert said(row) == "lost"
    assert said(compared(worse, before, "old")) == "gained"
    assert said(compared(before, before, "old")) == "no difference shown"
    # Row by row: as different as rows are from each other, each has gained the same.
    rising = write(tmp_path / "rising", {key: key / 40 for key in range(40)})
    risen = write(tmp_path / "risen", {key: key / 40 + 0.5 for key in reversed(range(40))})
    assert compared(rising, risen, "old")["interval"] == pytest.approx([0.5, 0.5])
    text = compared_text([1.0, 2.0] * 20, [1.5, 2.5] * 20, "text")
    assert said(text) == "lost"
    assert text["perplexity"] == pytest.approx([math.exp(1.5), math.exp(2.0)])
    assert [len(line) for line in transfer_lines([row, text])] == [9, 9, 9]
    with pytest.raises(ValueError, match="hold other rows"):
        compared(before, write(tmp_path / "other", {1: 1.0}), "old")


def test_the_report_says_when_the_best_point_was_passed():
    history = [{"step": step, "loss": 2.0 - step / 10} for step in range(1, 9)]
    history += [{"step": 2, "eval_loss": 1.5}, {"step": 4, "eval_loss": 1.2}, {"step": 8, "eval_loss": 1.45}]
    assert _best_point({}, history) == [
        "The held-out loss was best at step 4 (1.200) and 0.250 worse at step 8, while the training loss went from "
        "1.600 to 1.200."
    ]
    scores = [{"step": 2, "eval_acc1": 0.5}, {"step": 4, "eval_acc1": 0.75}]
    assert _best_point({}, scores) == ["The held-out acc1 was best at the last evaluation (step 4)."]
    assert _best_point({}, history[:8]) == []


@pytest.fixture(scope="module")
def watched(tmp_path_factory, bases):
    """A run that watches an old task, a conversation without pictures, and text; and its options."""
    folder = tmp_path_factory.mktemp("watched")
    data = save_flickr(folder / "data", flickr_rows())
    chats = [
        {"id": str(index), "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab cd"}]}
        for index in range(4)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "config.yaml").write_text(
        f"""\
dataset_name: {data}
stored_split: test
split_column: split
eval_splits: [test]
score_before: true
watch:
- {{dataset_name: {data}, stored_split: test, split_column: split, eval_splits: [val], instruction: "What?"}}
- {{dataset_name: {folder / "chats.jsonl"}, task: chat, eval_splits: [train]}}
vision_model: {bases[0]}
model_name_or_path: {bases[1]}
feature_cache_dir: {folder / "features"}
output_dir: {folder / "out"}
use_peft: true
lora_r: 2
use_cpu: true
max_steps: 4
learning_rate: 0.05
max_new_tokens: 4
save_strategy: "no"
logging_steps: 2
report_to: none
disable_tqdm: true
"""
    )
    assert sft.main(["--config", str(folder / "config.yaml")]) == 0
    return folder


def test_a_run_tells_what_was_gained_and_lost(watched):
    rows = json.loads((watched / "out" / "transfer.json").read_text())
    assert [row["name"] for row in rows] == ["test", "watch-caption-val", "watch-chat-train", "text"]
    for row in rows[:3]:
        scores = json.loads((watched / "out" / "eval" / row["name"] / "scores.json").read_text())
        before = json.loads((watched / "out" / "eval" / f"{row['name']}-before" / "scores.json").read_text())
        if row["metric"] != "CIDEr":
            assert row["after"] == pytest.approx(scores["metrics"][row["metric"]])
        assert row["n"] == scores["n"] == before["n"] == 4
    model, processor = load_model(watched / "out")
    paragraphs = read_paragraphs(SAMPLE)
    assert rows[3]["perplexity"][1] == pytest.approx(perplexity(text_nats(model, processor, paragraphs)), rel=1e-5)
    with at_scale(model, 0):
        start = perplexity(text_nats(model, processor, paragraphs))
    assert rows[3]["perplexity"][0] == pytest.approx(start, rel=1e-5)
    page = build_report(watched / "out").read_text()
    assert "<h2>Gained and lost</h2>" in page
    assert "watch-chat-train" in page


def test_the_sweep_is_a_curve_of_new_against_old(watched, tmp_path, capsys):
    command = ["sweep", watched / "out", "--config", watched / "config.yaml", "--output_dir", tmp_path]
    assert main([str(each) for each in [*command, "--scales", 1, 0]]) == 0
    points = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["scale"] for point in points] == [0, 1]
    rows = {row["name"]: row for row in json.loads((watched / "out" / "transfer.json").read_text())}
    assert points[0]["perplexity"] == pytest.approx(rows["text"]["perplexity"][0], rel=1e-5)
    assert points[1]["perplexity"] == pytest.approx(rows["text"]["perplexity"][1], rel=1e-5)
    # Nothing but text: at scale 0 the base answers.
    chats = points[0]["old"]["watch-chat-train"]
    assert chats["score"] == pytest.approx(rows["watch-chat-train"]["before"])
    there = json.loads((watched / "out" / "eval" / "test" / "scores.json").read_text())
    assert points[1]["new"]["test"]["score"] == pytest.approx(there["metrics"]["CIDEr"])
    assert (tmp_path / "sweep.svg").read_text().startswith("<svg xmlns=")
    assert "perplexity" in capsys.readouterr().out


def test_data_sets_of_one_name_have_a_folder_each(watched, model, processor):
    from vlm_peft.training.arguments import parse_arguments
    from vlm_peft.training.data import load_watched

    options = parse_arguments(["--config", str(watched / "config.yaml")])[0]
    options.watch = [options.watch[0]] * 4
    options.feature_cache = False
    names = list(load_watched(options, model, processor))
    assert len(names) == len(set(names)) == 4


def test_a_text_that_has_no_end_is_refused():
    with pytest.raises(ValueError, match="/dev/zero: expected a text file, got a folder, pipe or device"):
        read_paragraphs("/dev/zero")


def test_watch_is_checked_before_anything_runs(watched):
    config = watched / "wrong.yaml"
    text = (watched / "config.yaml").read_text()
    config.write_text(text.replace("task: chat", "tasks: chat"))
    with pytest.raises(SystemExit, match=r"Entry 2 of watch: unknown option 'tasks' .did you mean 'task'"):
        sft.main(["--config", str(config)])
    config.write_text(text.replace(f"dataset_name: {watched / 'chats.jsonl'}, ", ""))
    with pytest.raises(SystemExit, match="Entry 2 of watch: expected dataset_name"):
        sft.main(["--config", str(config)])
