"""What inspect_data shows: labels where they are and not where they should be, all tasks, a page of escaped text."""

import io
import json
import re
import sys

import pytest
from conftest import ROOT
from PIL import Image

from vlm_peft.commands import inspect as inspect_data
from vlm_peft.data.rows import lay_out_row
from vlm_peft.tasks import make_task

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Say."}]}]


def lay_out(processor, *texts: str, images: int = 1) -> dict:
    content = [{"type": "image"}] * images + [{"type": "text", "text": "Say."}]
    return {**vars(processor.encode_row([{"role": "user", "content": content}], list(texts))), "image_ids": []}


def said(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def learnt(pieces) -> str:
    return "".join(piece.text for piece in pieces if piece.learnt)


def options(bases, data, *more: str) -> list[str]:
    vision, text = bases
    return [
        *("--dataset_name", str(data), "--vision_model", str(vision), "--model_name_or_path", str(text)),
        *("--use_peft", "true", "--vision_feature_layer", "-1", "--output_dir", "none", *more),
    ]


def flickr_options(bases, flickr, *more: str) -> list[str]:
    return options(bases, flickr, "--stored_split", "test", "--split_column", "split", *more)


def test_prefix_once_then_each_branch_with_its_labels(processor):
    shown = inspect_data.read_layout(lay_out(processor, "a dog", "two cats"), processor, ["640x480"])
    prefix = "<|im_start|>user\n<16 image tokens: picture 640x480>Say.<|im_end|>\n<|im_start|>assistant"
    assert said(shown.prefix) == prefix
    assert [said(branch) for branch in shown.branches] == ["\na dog<|im_end|>", "\ntwo cats<|im_end|>"]
    assert [learnt(branch) for branch in shown.branches] == ["a dog<|im_end|>", "two cats<|im_end|>"]
    assert learnt(shown.prefix) == ""
    assert (shown.wrong, shown.labels) == (0, len("a dog") + len("two cats") + 2)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_label_mask_shows(processor, shift):
    layout = lay_out(processor, "a dog")
    labels = layout["shift_labels"]
    layout["shift_labels"] = labels[-shift:] + labels[:-shift]
    shown = inspect_data.read_layout(layout, processor, ["1x1"])
    assert shown.wrong >= len("a dog") - 1
    wrong = [(piece.text, piece.label) for piece in [*shown.prefix, *shown.branches[0]] if piece.label is not None]
    assert len(wrong) == shown.wrong
    assert all(text != label for text, label in wrong)
    row = inspect_data.ShownRow("0", sequences=[shown])
    text = inspect_data.as_text(inspect_data.Inspected("caption", {}, [shown.tokens], None, {}, [row]))
    assert "{a}" in text
    assert f"{shown.wrong} LABELS ARE NOT THE NEXT TOKEN" in text


def test_labels_on_the_prompt_show(processor):
    layout = lay_out(processor, "a dog")
    ids = layout["input_ids"]
    layout["shift_labels"] = [*ids[1:], layout["shift_labels"][-1]]
    shown = inspect_data.read_layout(layout, processor, ["1x1"])
    assert "user\n" in learnt(shown.prefix)


def test_a_cut_picture_shows(processor):
    layout = lay_out(processor, "a dog", images=2)
    place = layout["input_ids"].index(processor.image_token_id)
    for name in ("input_ids", "branch_ids", "shift_labels"):
        layout[name] = layout[name][:place] + layout[name][place + 3 :]
    shown = inspect_data.read_layout(layout, processor, ["2x1", "1x2"])
    assert "<16 image tokens: picture 2x1><13 image tokens, expected 16>" in said(shown.prefix)


def test_tokens_of_one_character_are_one_piece(processor):
    shown = inspect_data.read_layout(lay_out(processor, "é🙂x"), processor, ["1x1"])
    assert [(piece.text, len(piece.ids)) for piece in shown.branches[0][1:-1]] == [("é", 2), ("🙂", 4), ("x", 1)]


def test_text_of_the_data_cannot_move_the_cursor():
    assert inspect_data.printable("a\x1b[2J\rb\nc") == "a\\u001b[2J\\u000db⏎c"


def test_percentiles_and_bins():
    lengths = list(range(1, 101))
    assert [inspect_data.percentile(lengths, percent) for percent in (0, 1, 50, 95, 100)] == [1, 1, 50, 95, 100]
    bins = inspect_data.histogram([3, 3, 9, 40])
    assert sum(count for *_, count in bins) == 4
    assert (bins[0][0], bins[0][2]) == (3, 2)
    assert bins[-1][0] <= 40 <= bins[-1][1]
    assert inspect_data.histogram([7, 7]) == [(7, 7, 2)]


def test_the_terminal(bases, flickr, capsys):
    assert inspect_data.main(["--rows", "2", "--ids", *flickr_options(bases, flickr)]) == 0
    printed = capsys.readouterr().out
    assert "24, with 24 pictures" in printed
    assert "<16 image tokens: picture 12x10>Describe the picture.<|im_end|>⏎" in printed
    assert "⏎[red wall<|im_end|>]" in printed
    assert "16x259" in printed
    assert "0 of 24 rows (0.0 %) exceed max_length 1,024" in printed
    assert re.findall(r"^row (.*)$", printed, re.M) == ["0", "12"]
    assert "\x1b" not in printed


def test_colours_on_a_terminal(bases, flickr, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    inspect_data.main(["--rows", "1", "--split", "val", *flickr_options(bases, flickr)])
    assert "⏎\x1b[32mred wall<|im_end|>\x1b[0m" in capsys.readouterr().out


def test_long_rows_are_counted_and_shown_as_their_sequences(bases, flickr, capsys):
    inspect_data.main(["--rows", "1", *flickr_options(bases, flickr, "--max_length", "100")])
    printed = capsys.readouterr().out
    assert "24 of 24 rows (100.0 %) exceed max_length 100" in printed
    assert "sequence 1 of 2" in printed


def test_rows_that_cannot_be_used_are_counted_with_the_reason(bases, tmp_path, capsys):
    data = write_table(tmp_path, [{"caption": "a red wall"}, {"caption": " "}, {"caption": "a wall"}])
    assert inspect_data.main(options(bases, data)) == 0
    printed = capsys.readouterr().out
    assert "1 row left out (1): Expected one or more captions with text, got ' '." in printed
    assert "left out: Expected one or more captions with text" in printed


def test_nothing_but_configurations_and_tokenizer_is_loaded(bases, flickr, tmp_path, capsys):
    import shutil

    vision, text = (shutil.copytree(folder, tmp_path / folder.name) for folder in bases)
    (vision / "model.safetensors").unlink()
    (text / "model.safetensors").unlink()
    assert inspect_data.main(["--rows", "1", *flickr_options((vision, text), flickr)]) == 0
    assert "[red wall<|im_end|>]" in capsys.readouterr().out


def write_table(folder, rows: list[dict], name: str = "train.jsonl"):
    for number, row in enumerate(rows):
        file = io.BytesIO()
        Image.new("RGB", (12, 10), (200, 10 * number, 0)).save(file, "PNG")
        (folder / f"{number}.png").write_bytes(file.getvalue())
        if "image" not in row and "page_1" not in row:
            row["image"] = f"{number}.png"
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_the_page_holds_all_and_only_escaped_text(bases, tmp_path, capsys):
    evil = '<script>alert(1)</script> "&amp; \u2028'
    data = write_table(tmp_path, [{"caption": evil, "id": "<b>0</b>"}, {"caption": "fine", "id": "1"}])
    (tmp_path / "1.png").write_bytes(b"no picture")
    page = tmp_path / "pages" / "page.html"
    assert inspect_data.main([*options(bases, data, "--instruction", "<i>"), "--html", str(page), "--ids"]) == 0
    html = page.read_text()
    assert "<script" not in html
    assert "<b>0</b>" not in html
    assert "&lt;b&gt;0&lt;/b&gt;" in html
    # One byte is one token here.
    tokens = re.findall(r'<span class="learnt" title="([\d ]+)">(.*?)<small>', html)
    assert "".join(text for _, text in tokens).startswith("&lt;script&gt;")
    assert html.count('class="picture" title="16 x 259"') == 2
    assert html.count("data:image/webp;base64,") == 1
    assert "Cannot read the picture" in html
    assert "Content-Security-Policy" in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert list(page.parent.iterdir()) == [page]


TASKS = {
    "vqa": (
        {"questions": [{"question": "What?", "answer": "wall"}, {"question": "Hm?", "answer": "red"}]},
        ["wall", "red"],
    ),
    "chat": (
        {"messages": [{"role": "user", "content": "<image>Hello"}, {"role": "assistant", "content": "Hi there"}]},
        ["Hi there"],
    ),
    "digits": ({"digits": "042"}, ["042"]),
    "slides": (
        {"question": "Which?", "answer": "B", "evidence_pages": [1], "deck_name": "d", "page_1": "0.png"},
        ["B"],
    ),
    "grounding": ({"objects": [{"name": "cat", "box": [1, 2, 6, 8]}]}, ["cat [83, 200, 582, 999]"]),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name, bases, tmp_path, capsys):
    row, answers = TASKS[name]
    data = write_table(tmp_path, [dict(row)])
    inspect_data.main(options(bases, data, "--task", name))
    printed = capsys.readouterr().out
    found = [text.removesuffix("<|im_end|>") for text in re.findall(r"\[(.*<\|im_end\|>)\]$", printed, re.M)]
    assert found[: len(answers)] == answers
    assert "<16 image tokens: picture 12x10>" in printed


def test_mixtures_have_a_part_for_each_data_set(bases, flickr, tmp_path, capsys):
    (tmp_path / "vqa").mkdir()
    questions = write_table(tmp_path / "vqa", [dict(TASKS["vqa"][0])])
    config = tmp_path / "mixture.yaml"
    entries = [
        {"dataset_name": str(flickr), "stored_split": "test", "split_column": "split"},
        {"dataset_name": str(questions), "task": "vqa"},
    ]
    config.write_text(json.dumps({"mixture": entries}))
    page = tmp_path / "page.html"
    rest = options(bases, flickr)[2:]
    assert inspect_data.main(["--rows", "1", "--config", str(config), *rest, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(caption|vqa)$", printed, re.M) == ["caption", "vqa"]
    assert re.findall(r"<h2>(\w+)</h2>", page.read_text()) == ["caption", "vqa"]


def test_streams_show_their_first_rows(bases, flickr, capsys):
    stream = ("--streaming", "true", "--max_steps", "3")
    assert inspect_data.main(["--rows", "2", *flickr_options(bases, flickr, *stream)]) == 0
    assert "⏎[red wall<|im_end|>]" in capsys.readouterr().out


def test_the_demo_needs_no_weights_and_reads_as_the_template_says(capsys):
    config = str(ROOT / "recipes/configs/demo.yaml")
    assert inspect_data.main(["--config", config, "--rows", "1", "--train_limit", "8"]) == 0
    assert "<64 image tokens: picture 112x112>Describe the picture.<|im_end|>⏎" in capsys.readouterr().out


def test_layouts_are_those_of_the_encoded_rows(processor):
    task = make_task("caption", ["image", "caption"])
    layout = lay_out_row(task.example({"caption": ["a", "b"]}), processor, [0], None)[0]
    shown = inspect_data.read_layout(layout, processor, ["1x1"])
    ids = [token for piece in shown.prefix for token in piece.ids]
    # A branch's last token is predicted only.
    ids += [token for branch in shown.branches for piece in branch[:-1] for token in piece.ids]
    assert ids == layout["input_ids"]


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--rows", "many"]])
def test_misuse_is_said(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        inspect_data.main(arguments)
    assert ended.value.code == 2
    assert "--rows" in capsys.readouterr().err
