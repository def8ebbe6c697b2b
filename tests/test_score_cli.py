"""eval/score.py as a user runs it, the files it reads and writes, and the statistics it prints."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import score
from coco_caption.caption_scores import score_captions
from predictions import read_predictions, write_predictions, write_scores, write_text
from significance import bootstrap_interval, paired_difference

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
    assert "The first 5 of 12 pictures are scored." in output
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
    assert "2 pictures are only in the first and 0 only in the second" in failure([good, other], capsys)
    rows = make_rows()
    rows[3]["references"] = ["another one"]
    write_predictions(other, rows)
    assert "picture '3' has other references" in failure([good, other], capsys)


def test_written_predictions_come_back(tmp_path):
    rows = [
        {"id": "a/b", "prediction": "one\u2028two \ud800", "references": ["x\ny"], "source": "kept"},
        {"id": 2, "prediction": "", "references": ["é", "z"]},
    ]
    path = tmp_path / "new" / "p.jsonl"
    write_predictions(path, rows, per_picture=[1.5, 0.0])
    assert read_predictions(path) == [{**rows[0], "cider": 1.5}, {**rows[1], "cider": 0.0}]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    with pytest.raises(ValueError, match="expected a CIDEr for each of 2 rows, got 1"):
        write_predictions(path, rows, per_picture=[1.5])
    with pytest.raises(ValueError, match="row 1: id 'a/b' was already in row 0"):
        write_predictions(path, [rows[0], rows[0]])


def test_scores_file_has_the_promised_keys(tmp_path):
    scores = score_captions(["a dog", "a cat"], [["a dog"], ["a cow"]], tokenizer="treebank-python")
    write_scores(tmp_path / "s.json", scores, model="m", dataset="d", split="test", decoding={"num_beams": 3})
    written = json.loads((tmp_path / "s.json").read_text())
    low, high = written["intervals"].pop("CIDEr")
    assert low <= scores.metrics["CIDEr"] <= high
    assert written == {
        "n": 2,
        "metrics": scores.metrics,
        "intervals": {},
        "model": "m",
        "dataset": "d",
        "split": "test",
        "decoding": {"num_beams": 3},
        "tokenizer": "treebank-python",
        "skipped": {},
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
