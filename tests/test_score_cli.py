"""eval/score.py as a user runs it, the files it reads and writes, and the statistics it prints."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from vlm_peft.commands import score
from vlm_peft.evaluation.records import read_predictions, write_predictions, write_scores, write_text
from vlm_peft.evaluation.task_scores import score_rows
from vlm_peft.metrics.captions import score_captions
from vlm_peft.metrics.significance import bootstrap_interval, paired_difference

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--tokenizer", "treebank-python", "--metrics", "Bleu_4", "CIDEr"]
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def make_rows(wrong: int = 0) -> list[dict]:
    """Twelve pictures; the first `wrong` of them get another picture's caption."""
    captions = [f"a {colour} {animal} runs" for colour in COLOURS for animal in ("dog", "cat")]
    return [
        {
            "id": index,
            "prediction": captions[(index + 3) % 12] if index < wrong else caption,
            "references": [caption, f"{caption} home"],
        }
        for index, caption in enumerate(captions)
    ]


@pytest.fixture
def good(tmp_path) -> Path:
    write_predictions(tmp_path / "good.jsonl", make_rows())
    return tmp_path / "good.jsonl"


@pytest.fixture
def bad(tmp_path) -> Path:
    write_predictions(tmp_path / "bad.jsonl", reversed(make_rows(wrong=10)))
    return tmp_path / "bad.jsonl"


def ten(**counts: int) -> list[str]:
    """Ten people's answers."""
    assert sum(counts.values()) == 10
    return [answer for answer, count in counts.items() for _ in range(count)]


# An answer that k of 10 people gave: (k x min(1, (k - 1) / 3) + (10 - k) x min(1, k / 3)) / 10.
QUESTIONS = [
    {"id": 0, "question": "Is it?", "prediction": "Yes.", "references": ten(yes=2, no=8), "answer_type": "yes/no"},
    {
        "id": 1,
        "question": "How many?",
        "prediction": "two",
        "references": ten(**{"2": 1, "3": 9}),
        "answer_type": "number",
    },
    {"id": 2, "question": "What?", "prediction": "a dog", "references": ten(dog=3, cat=7), "answer_type": "other"},
]
ACCURACIES = [0.6, 0.3, 0.9]


def write_rows(path: Path, rows: list[dict]) -> str:
    write_predictions(path, rows)
    return str(path)


def failure(arguments: list, capsys) -> str:
    assert score.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_script_runs_from_any_folder_and_writes_scores(good, tmp_path):
    command = [sys.executable, str(ROOT / "eval" / "score.py"), "good.jsonl", "--output", "out/scores.json", *QUICK]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["file", "n", "Bleu_4", "CIDEr", "tokenizer"]
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert lines[1].split()[:2] == ["good.jsonl", "12"]
    assert lines[1].split()[3] == f"{written['metrics']['CIDEr']:.4f}"
    assert lines[0].index("tokenizer") == lines[1].index("treebank-python")
    unknown = dict.fromkeys(("model", "dataset", "split", "decoding"))
    assert {key: written[key] for key in ("n", "tokenizer", *unknown)} == {
        "n": 12,
        "tokenizer": "treebank-python",
        **unknown,
    }
    assert (written["task"], written["primary"]) == ("caption", "CIDEr")
    rows = make_rows()
    expected = score_captions(
        [row["prediction"] for row in rows], [row["references"] for row in rows], tokenizer="treebank-python"
    )
    assert written["metrics"] == {name: expected.metrics[name] for name in ("Bleu_4", "CIDEr")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.jsonl", "out"]


def test_skipped_metrics_and_limits_are_said(good, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert score.main([str(good), "--limit", "5"]) == 0
    output = capsys.readouterr().out
    assert "METEOR skipped: needs Java" in output
    assert "SPICE skipped: needs Java" in output
    assert "The first 5 of 12 rows are scored." in output
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score.main([str(good), "--limit", "1", *QUICK]) == 0
    assert "CIDEr of a single picture is always 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "prediction": "a"}', "line 2: references missing, the keys are id, prediction"),
        ('{"id": 1}', "line 2: prediction and references missing"),
        ('{"id": 1, "prediction": null, "references": ["a"]}', "line 2: expected text as prediction, got None"),
        ('{"id": 1, "prediction": "a", "references": []}', "line 2: expected a list of one or more texts"),
        ('{"id": 1, "prediction": "a", "references": "a"}', "line 2: expected a list of one or more texts"),
        ('{"id": true, "prediction": "a", "references": ["a"]}', "line 2: expected text or a whole number as id"),
        ('{"id": "0", "prediction": "a", "references": ["a"]}', "line 2: id '0' was already in"),
        ("[1]", "line 2: expected an object, got list"),
        ("{oh", "line 2: expected JSON, got '{oh'"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, capsys, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 0, "prediction": "a\u2028b", "references": ["a"]}\n' + line + "\n", encoding="utf-8")
    assert message in failure([path], capsys)


def test_unreadable_files_are_named(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    assert "p.jsonl" in failure([path], capsys)
    path.write_text('\ufeff{"id": 0, "prediction": "a", "references": ["a"]}', encoding="utf-8")
    assert read_predictions(path)[0]["id"] == 0
    path.write_text("\n")
    assert "expected at least one prediction, got an empty file" in failure([path], capsys)
    path.write_bytes(b'{"id": 0, "prediction": "caf\xe9", "references": ["a"]}')
    assert "expected UTF-8 text, got byte 0xe9" in failure([path], capsys)
    with pytest.raises(SystemExit):
        score.main([str(path), "--format", "coco"])
    with pytest.raises(SystemExit):
        score.main([str(path), "--limit", "0"])


def test_coco_files(tmp_path, capsys):
    rows = make_rows(wrong=4)
    annotations = {"annotations": [{"image_id": r["id"], "caption": c} for r in rows for c in r["references"]]}
    results = [{"image_id": row["id"], "caption": row["prediction"]} for row in rows]
    for name, content in (("ann.json", annotations), ("res.json", results), ("part.json", results[:5])):
        (tmp_path / name).write_text(json.dumps(content))
    write_predictions(tmp_path / "p.jsonl", rows)
    coco = ["--format", "coco", "--references", str(tmp_path / "ann.json")]
    assert score.main([str(tmp_path / "res.json"), *coco, *QUICK]) == 0
    as_coco = capsys.readouterr().out.splitlines()[1].split()[1:]
    assert score.main([str(tmp_path / "p.jsonl"), *QUICK]) == 0
    assert as_coco == capsys.readouterr().out.splitlines()[1].split()[1:]
    assert score.main([str(tmp_path / "part.json"), *coco, *QUICK]) == 0
    assert "5 of 12 annotated pictures have a result" in capsys.readouterr().out

    def refused(content) -> str:
        (tmp_path / "wrong.json").write_text(json.dumps(content))
        return failure([tmp_path / "wrong.json", *coco], capsys)

    unknown = [*results, {"image_id": 98, "caption": "a"}, {"image_id": 99, "caption": "a"}]
    assert "2 of 14 results are for pictures that" in refused(unknown)
    assert "the first being image_id 98" in refused(unknown)
    assert "result 12: id 0 was already in" in refused([*results, results[0]])
    assert "result 0: expected the keys image_id and caption, got image_id" in refused([{"image_id": 1}])
    assert "expected a list of results, got dict" in refused(annotations)
    assert "expected at least one result" in refused([])
    swapped = ["--format", "coco", "--references", tmp_path / "res.json", tmp_path / "res.json"]
    assert 'expected an object with the list "annotations", got list' in failure(swapped, capsys)


def test_two_files_are_compared_picture_by_picture(good, bad, tmp_path, capsys):
    assert score.main([str(bad), str(good), "--output", str(tmp_path / "both.json"), *QUICK]) == 0
    assert "good.jsonl - " in capsys.readouterr().out
    written = json.loads((tmp_path / "both.json").read_text())
    (entry,) = written["comparisons"]
    cider = [written["files"][str(path)]["metrics"]["CIDEr"] for path in (bad, good)]
    assert entry["difference"] == pytest.approx(cider[1] - cider[0])
    assert entry["p_value"] < 0.01
    assert 0 < entry["interval"][0] < entry["difference"] < entry["interval"][1]


def test_pictures_are_paired_by_id(bad, tmp_path, capsys):
    write_predictions(tmp_path / "turned.jsonl", read_predictions(bad)[::-1])
    assert score.main([str(bad), str(tmp_path / "turned.jsonl"), *QUICK]) == 0
    assert "CIDEr +0.0000, 95 % [+0.0000, +0.0000], p = 1.0000" in capsys.readouterr().out


def test_files_for_other_pictures_or_references_are_not_compared(good, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    write_predictions(other, make_rows()[2:])
    assert "2 rows are only in the first and 0 only in the second" in failure([good, other], capsys)
    rows = make_rows()
    rows[3]["references"] = ["another one"]
    write_predictions(other, rows)
    assert "row '3' has other references" in failure([good, other], capsys)


def test_questions_are_scored_by_their_task(tmp_path, capsys):
    path = write_rows(tmp_path / "vqa.jsonl", QUESTIONS)
    better = write_rows(tmp_path / "better.jsonl", [{**QUESTIONS[0], "prediction": "no"}, *QUESTIONS[1:]])
    assert score.main([path, better, "--task", "vqa", "--output", str(tmp_path / "s.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines[:3]] == [["n", "vqa_accuracy"], ["3", "0.6000"], ["3", "0.7333"]]
    # One of 27 draws is the worst row three times over, which is more than the 2.5 % of a tail.
    assert lines[3] == f"{path}: 95 % vqa_accuracy [0.3000, 0.9000] (bootstrap over 3 rows)"
    assert lines[4] == f"{path}: vqa_accuracy by answer_type: number 0.3000, other 0.9000, yes/no 0.6000"
    # (1.0 - 0.6) / 3: one row of three differs, and exchanged or not it differs as much.
    assert f"{better} - {path}: vqa_accuracy +0.1333, 95 % [+0.0000, +0.4000], p = 1.0000" in lines[7]
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["comparisons"][0]["metric"] == "vqa_accuracy"
    assert written["files"][path]["metrics"] == pytest.approx(
        {"vqa_accuracy": 0.6}
        | {f"vqa_accuracy[answer_type={kind}]": v for kind, v in (("number", 0.3), ("other", 0.9), ("yes/no", 0.6))}
    )


def test_digits_are_scored_by_their_task(tmp_path, capsys):
    read = {"12345": "2345", "7": "7.", "12": "99"}
    rows = [{"id": truth, "prediction": text, "references": [truth]} for truth, text in read.items()]
    path = write_rows(tmp_path / "digits.jsonl", rows)
    assert score.main([path, "--task", "digits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # One of three is right; 4 of 5, 1 of 1 and 0 of 2 digits.
    assert [line.split()[1:] for line in lines[:2]] == [
        ["n", "exact_match", "digit_accuracy"],
        ["3", "0.3333", "0.6000"],
    ]
    assert "exact_match [0.0000, 1.0000], digit_accuracy [0.0000, 1.0000] (bootstrap over 3 rows)" in lines[2]
    assert score.main([path, "--task", "digits", "--metrics", "digit_accuracy"]) == 0
    output = capsys.readouterr().out
    assert "digit_accuracy [" in output
    assert "exact_match" not in output


def test_task_is_that_of_the_scores_beside_the_file(tmp_path, capsys):
    path = write_rows(tmp_path / "run" / "predictions.jsonl", QUESTIONS)
    write_scores(tmp_path / "run" / "scores.json", score_rows("vqa", QUESTIONS), task="vqa")
    assert score.main([path]) == 0
    output = capsys.readouterr().out
    assert output.split()[:3] == ["file", "n", "vqa_accuracy"]
    assert f"Scored as vqa, which {tmp_path / 'run' / 'scores.json'} names" in output
    assert score.main([path, "--task", "chat", "--metrics", "exact_match"]) == 0
    output = capsys.readouterr().out
    assert output.split()[:3] == ["file", "n", "exact_match"]
    assert "Scored as" not in output
    other = write_rows(tmp_path / "other" / "predictions.jsonl", QUESTIONS)
    (tmp_path / "other" / "scores.json").write_text('{"task": "chat"}')
    assert "expected files of one task, found vqa (" in failure([path, other], capsys)
    for unknown in ("{", "[]", '{"task": null}', '{"task": "unheard"}', '{"task": [1]}'):
        (tmp_path / "other" / "scores.json").write_text(unknown)
        assert score.find_task([Path(other)]) == ("caption", None)


def test_each_task_has_its_metrics(tmp_path, capsys):
    box = {"label": "dog", "box": [0, 0, 99, 99]}
    rows = [{"id": i, "prediction": f"{i} (page 3)", "references": ["1"], "evidence_pages": [3]} for i in range(2)]
    asked = {"question": "detect: dog; cat", "boxes": [box]}
    grounded = [{"id": i, "prediction": "dog [0, 0, 99, 99]", **asked} for i in range(2)]
    classes = [
        {"id": i, "prediction": "1", "references": ["1"], "probabilities": dict.fromkeys("123456", 0.1)} for i in (0, 1)
    ]
    rows_of = {"grounding": grounded, "classify": classes}
    for task, names in score.METRICS.items():
        options = {"tokenizer": "treebank-python"}
        found = score_rows(task, rows_of.get(task, rows), **options)
        assert set(found.metrics) == set(names) - {"METEOR", "SPICE"}, task
        assert found.primary in names
    path = write_rows(tmp_path / "boxes.jsonl", grounded)
    assert score.main([path, "--task", "grounding"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == ["2", *["1.0000"] * 7]
    moved = write_rows(tmp_path / "m.jsonl", [grounded[0], {**grounded[1], "boxes": []}])
    assert "row '1' has other boxes" in failure([path, moved, "--task", "grounding"], capsys)
    message = failure([path, "--task", "digits", "--metrics", "CIDEr"], capsys)
    assert "expected some of exact_match digit_accuracy for the task digits, got CIDEr" in message
    assert "row 0: expected a list of one or more texts as references" in failure([path, "--task", "vqa"], capsys)
    with pytest.raises(SystemExit):
        score.main([path, "--format", "coco", "--references", path, "--task", "vqa"])


@pytest.mark.parametrize("form", ["jsonl", "list", "coco"])
def test_cider_of_a_part_with_the_whole_set_for_rarity(tmp_path, capsys, form):
    rows = make_rows(wrong=4)
    whole = score_rows("caption", rows, tokenizer="treebank-python").per_row["CIDEr"]
    path = tmp_path / ("all.jsonl" if form == "jsonl" else "all.json")
    references = [{"id": str(row["id"]), "references": row["references"]} for row in rows]
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in references))
    elif form == "list":
        path.write_text(json.dumps(references))
    else:
        said = [{"image_id": row["id"], "caption": text} for row in rows for text in row["references"]]
        path.write_text(json.dumps({"annotations": said}))
    part = [rows[index] for index in (7, 2, 9)]
    further, _ = score.further_references(part, path)
    alone = score_rows("caption", part, tokenizer="treebank-python").per_row["CIDEr"]
    scored = score_rows("caption", part, tokenizer="treebank-python", idf_references=further).per_row["CIDEr"]
    assert scored == [whole[7], whole[2], whole[9]]
    assert scored != alone

    command = [write_rows(tmp_path / "one.jsonl", rows[7:8]), "--idf_references", str(path), *QUICK]
    assert score.main([*command, "--output", str(tmp_path / "s.json")]) == 0
    output = capsys.readouterr().out
    assert "by the references of 12 rows: the 1 scored and 11 further ones" in output
    assert "CIDEr of a single picture" not in output
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]["CIDEr"] == whole[7]
    rows[7]["references"] = ["another set"]
    command[0] = write_rows(tmp_path / "one.jsonl", rows[7:8])
    assert "row 7 has other references than in the predictions" in failure(command, capsys)


def test_files_without_references_for_rarity_are_named(good, tmp_path, capsys):
    for name, content, message in (
        ("a.json", "[]", "expected at least one row with references, got none"),
        ("a.jsonl", "", "expected at least one row with references, got none"),
        ("a.json", '{"images": []}', "expected an object with the list \"annotations\", got ['images']"),
        ("a.json", '[{"id": 1}]', "row 0: references missing"),
        ("a.json", "7", "expected an object, got int"),
    ):
        (tmp_path / name).write_text(content)
        assert message in failure([good, "--idf_references", tmp_path / name], capsys)
    message = failure([good, "--idf_references", good, "--task", "chat"], capsys)
    assert "--idf_references is for CIDEr, which is not scored here (task chat)" in message


def test_written_predictions_come_back(tmp_path):
    rows = [
        {"id": "a/b", "prediction": "one\u2028two \ud800", "references": ["x\ny"], "source": "kept"},
        {"id": 2, "prediction": "", "boxes": []},
    ]
    path = tmp_path / "new" / "p.jsonl"
    write_predictions(path, rows, {"CIDEr": [1.5, 0.0], "f1": [1, 0.5]})
    assert read_predictions(path) == [{**rows[0], "cider": 1.5, "f1": 1.0}, {**rows[1], "cider": 0.0, "f1": 0.5}]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    with pytest.raises(ValueError, match="expected a f1 for each of 2 rows, got 1"):
        write_predictions(path, rows, {"f1": [1.5]})
    with pytest.raises(ValueError, match="row 1: id 'a/b' was already in row 0"):
        write_predictions(path, [rows[0], rows[0]])


def test_scores_file_has_the_promised_keys(tmp_path):
    rows = [{"prediction": text, "references": ["a dog"]} for text in ("a dog", "a cat")]
    scores = score_rows("slides", [{**row, "id": index} for index, row in enumerate(rows)])
    write_scores(
        tmp_path / "s.json",
        scores,
        model="m",
        dataset="d",
        task="slides",
        split="test",
        condition="blind",
        decoding={"num_beams": 3},
    )
    written = json.loads((tmp_path / "s.json").read_text())
    # "dog" is 1 and "cat" 0 in each; the mean of two draws from them is 0 a quarter of the time.
    assert written["intervals"] == {name: [0.0, 1.0] for name in ("exact_match", "f1", "anls")}
    assert written == {
        "n": 2,
        "task": "slides",
        "primary": "f1",
        "metrics": {"exact_match": 0.5, "f1": 0.5, "anls": 0.5},
        "breakdowns": {},
        "intervals": written["intervals"],
        "model": "m",
        "dataset": "d",
        "split": "test",
        "condition": "blind",
        "decoding": {"num_beams": 3},
        "tokenizer": None,
        "skipped": dict.fromkeys(("page_precision", "page_recall", "page_f1"), "the rows have no evidence_pages"),
        "notes": [],
    }


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    write_text(path, "old")

    def interrupt(self, target):
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("s.json", "old")]


def test_bootstrap_interval():
    values = [index % 10 for index in range(400)]
    low, high = bootstrap_interval(values)
    # Mean 4.5, standard error 2.872 / sqrt(400) = 0.1436, times 1.96 = 0.2815.
    assert (low, high) == pytest.approx((4.5 - 0.2815, 4.5 + 0.2815), abs=0.03)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval([])


def test_paired_difference():
    first = [1.0, 2.0, 3.0, 4.0]
    result = paired_difference(first, [value + 1 for value in first], samples=20_000)
    # All four exchanged or none: 2 of 16 ways give a mean as far from 0.
    assert result.difference == 1.0
    assert result.p_value == pytest.approx(2 / 16, abs=0.01)
    assert paired_difference(first, first).p_value == 1.0
    assert paired_difference([0.0] * 50, [1.0] * 50, samples=999).p_value == pytest.approx(1 / 1000)
    with pytest.raises(ValueError, match="got 4 and 3 scores"):
        paired_difference(first, first[:3])
