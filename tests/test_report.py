"""report.html holds what the run wrote, nothing else, and nothing in it can run or load anything."""

import base64
import html.parser
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import HOSTILE
from PIL import Image

from eval import report as script
from vlm_peft.evaluation.records import read_all_scores, write_predictions, write_scores
from vlm_peft.evaluation.task_scores import Scores, score_rows
from vlm_peft.hub.markup import visible
from vlm_peft.metrics.boxes import LabelledBox
from vlm_peft.report import report
from vlm_peft.report.charts import box_overlay, finite_points, step_chart
from vlm_peft.report.explained import ranking
from vlm_peft.report.gallery import best_and_worst, choose_gallery, picture_path, save_gallery_pictures

EVIL = '<script>alert("1")</script>&amp;<img src=x onerror=alert(2)>'
ALLOWED = set(
    "html head meta title style body main h1 h2 h3 p b br small span div dl dt dd table thead tbody tr th td figure "
    "details summary figcaption svg wbr line text polyline circle rect path article img ul li pre".split()
)


class Page(html.parser.HTMLParser):
    """Collects a page's tags, addresses and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                self.sources.append(value)

    def handle_data(self, data):
        self.text += data + "\n"


def make_rows(n: int, evil: str = "") -> list[dict]:
    return [
        {"id": f"{index:03}{evil}", "prediction": f"says {index:03}{evil}", "references": [f"truth {index:03}{evil}"]}
        for index in range(n)
    ]


def make_run(folder: Path, evil: str = "", n: int = 40) -> Path:
    (folder / "eval").mkdir(parents=True)
    summary = {
        "title": f"My run{evil}",
        "date": f"2026-01-02{evil}",
        "command": f"accelerate launch recipes/sft.py{evil}",
        "vision_model": f"clip{evil}",
        "text_model": f"qwen{evil}",
        "dataset": f"scenes{evil}",
        "device": f"CPU{evil}",
        "seed": 7,
        "parameters": 2000,
        "trainable_parameters": 500,
        "trained": [{"module": f"projector{evil}", "parameters": 500, "trainable": 500, "dtype": f"float32{evil}"}],
        "seconds": {f"training{evil}": 173.0},
        "versions": {f"torch{evil}": f"2.13{evil}"},
        "adapter": f"outputs/demo{evil}",
        "notes": [f"a note{evil}"],
    }
    (folder / "run_summary.json").write_text(json.dumps(summary))
    log = [{"step": step, "loss": 5.0 - step / 100} for step in range(0, 300, 10)] + [{"step": 290, "eval_loss": 2.5}]
    (folder / "log_history.json").write_text(json.dumps(log))
    rows, per_picture = make_rows(n, evil), [index / 10 for index in range(n)]
    split = f"test{evil.replace('/', '')}"
    for name, cider in ((split, 1.95), (f"{split}-before", 0.125), (f"{split}-blind", 0.25)):
        scores = Scores(
            {"Bleu_4": 0.25, "CIDEr": cider},
            {"CIDEr": per_picture},
            "CIDEr",
            notes=[f"noted{evil}"],
            skipped={f"METEOR{evil}": f"no Java{evil}"},
            tokenizer=f"ptb-java{evil}",
        )
        write_scores(folder / "eval" / name / "scores.json", scores, decoding={f"num_beams{evil}": f"3{evil}"})
    write_predictions(folder / "eval" / split / "predictions.jsonl", rows, {"CIDEr": per_picture})
    save_pictures(folder, split)
    return folder


def save_pictures(folder: Path, split: str) -> None:
    chosen = choose_gallery(folder / "eval" / split)
    save_gallery_pictures(folder, split, {i: Image.new("RGB", (500, 300), "red") for i in chosen})


def add_split(folder: Path, split: str, task: str, rows: list[dict]) -> Scores:
    rows = [{"id": index, **row} for index, row in enumerate(rows)]
    scores = score_rows(task, rows)
    write_predictions(folder / "eval" / split / "predictions.jsonl", rows, scores.per_row)
    write_scores(folder / "eval" / split / "scores.json", scores, task=task)
    save_pictures(folder, split)
    return scores


def make_mixture(folder: Path, evil: str = "") -> Path:
    """Two splits of questions, one each of boxes, slides and digits."""
    answers = [f"red{evil}"] * 7 + [f"blue{evil}"] * 3
    for split, said in (("one", "red"), ("two", "blue")):
        row = {"references": answers, "answer_type": f"other{evil}"}
        asked = {"question": f"What colour{evil}?", "prediction": f"{said}{evil}", **row}
        add_split(folder, split, "vqa", [asked, {**asked, "prediction": f"none{evil}"}])
    box = {"label": f"dog{evil}", "box": [0, 0, 499, 499]}
    add_split(folder, "boxes", "grounding", [{"prediction": f"dog{evil} [500, 0, 999, 999]", "boxes": [box]}])
    pages = {"prediction": f"Berlin{evil} (page 3)", "references": [f"Berlin{evil}"], "evidence_pages": [3, 4]}
    add_split(folder, "decks", "slides", [pages])
    add_split(folder, "numbers", "digits", [{"prediction": f"12{evil}", "references": ["123"]}])
    logged = {"eval_vqa_accuracy": 0.25, "eval_page_f1": 0.5, "eval_runtime": 3.0, "eval_two_f1": 0.5}
    log = [{"step": step, f"eval_{evil}_f1": 0.125, **logged} for step in (10, 20)]
    (folder / "log_history.json").write_text(json.dumps(log))
    return folder


@pytest.mark.parametrize("evil", ["", EVIL])
def test_page_is_self_contained_and_everything_in_it_is_text(tmp_path, evil):
    path = report.build_report(make_run(tmp_path / "run", evil))
    assert path == tmp_path / "run" / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert set(page.tags) <= ALLOWED
    assert page.tags.count("img") == 24
    assert all(address.startswith("data:image/webp;base64,") for address in page.sources)
    assert "url(" not in source
    assert "@import" not in source
    assert "http" not in source.replace("http-equiv", "")
    for said in ("My run", "accelerate launch recipes/sft.py", "projector", "noted", "METEOR", "says 039", "truth 000"):
        assert said + evil in page.text
    for said in ("500 of 2,000 parameters (25.0 %)", "2 min 53 s", "1.950", "0.125", "0.250", "Not in this report"):
        assert (said in page.text) == (said != "Not in this report")
    assert f"from_adapter({'outputs/demo' + evil!r})" in page.text
    assert str(tmp_path) not in source
    for chart in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        ElementTree.fromstring(chart)
    assert source.count("<svg") == 2


def page_of(folder: Path, said: list[str]) -> Page:
    """Of a run in which all that can come from elsewhere are these texts."""
    make_run(folder, said[0], n=1)
    rows = [{"prediction": each, "references": [each], "question": each, "answer_type": each} for each in said]
    add_split(folder, "asked", "vqa", rows)
    boxes = [{"prediction": "none", "boxes": [{"label": each, "box": [1, 1, 9, 9]}]} for each in said]
    add_split(folder, "boxes", "grounding", boxes)
    return Page(report.build_report(folder).read_text(encoding="utf-8"))


def test_no_text_of_a_row_becomes_part_of_the_page(tmp_path):
    # Short ones: names of the fixture's files are made of some.
    texts = [each for each in HOSTILE if len(each) < 1000]
    page, plain = (
        page_of(tmp_path / name, said)
        for name, said in (("a", texts), ("b", [f"plain {n}" for n in range(len(texts))]))
    )
    assert page.tags == plain.tags
    seen = " ".join(page.text.split())
    for each in texts:
        assert seen.count(" ".join(visible(each).split())) >= 3
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.text.replace("\r", ""))


@pytest.mark.parametrize("evil", ["", EVIL, "\ud800"])
def test_page_of_several_tasks_is_text_too(tmp_path, evil):
    source = report.build_report(make_mixture(tmp_path, evil)).read_text(encoding="utf-8")
    page = Page(source)
    assert set(page.tags) <= ALLOWED
    shown = evil.replace("\ud800", "\ufffd")
    for said in ("What colour{}?", "red{} (7 of 10)", "blue{} (3 of 10)", "other{}", "dog{}", "Berlin{} (page 3)"):
        assert said.format(shown) in page.text
    for chart in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        ElementTree.fromstring(chart)


def test_each_split_is_shown_by_the_metric_of_its_task(tmp_path):
    text = Page(report.build_report(make_mixture(tmp_path)).read_text(encoding="utf-8")).text
    # One of two is right: min(1, 7 / 3), and min(1, 3 / 3) but 2 / 3 where one of those three is left out, is 0.9.
    lead = re.findall(r"^(\w+) on (\w+): \n(0\.\d+|1\.\d+)", text.split("Scores")[0], re.MULTILINE)
    assert lead == [
        ("f1_50", "boxes", "0.000"),
        ("f1", "decks", "1.000"),
        ("exact_match", "numbers", "0.000"),
        ("vqa_accuracy", "one", "0.500"),
        ("vqa_accuracy", "two", "0.450"),
    ]
    assert re.findall(r"^(\w+): \w+, with its 95 % interval", text, re.MULTILINE) == [
        "grounding",
        "slides",
        "digits",
        "vqa",
    ]
    assert "vqa_accuracy on one by answer_type" in text
    # Digits: 12 for 123, two of three right. Pages: one named of two.
    table = text.split("Scores")[1].split("by step")[0].split()
    for value in ("0.667", "0.500", "0.450"):
        assert value in table
    assert "CIDEr" not in text
    shown = [line for line in text.splitlines() if re.fullmatch(r"[a-z]\w* [01]\.\d\d", line)]
    assert shown.count("vqa_accuracy 1.00") == 1
    assert shown.count("vqa_accuracy 0.90") == 1
    assert {"f1_50 0.00", "f1 1.00", "exact_match 0.00"} <= set(shown)
    assert "pages 3, 4" in text
    # Of what was scored in training, the metrics that stand for the tasks.
    drawn = re.findall(r"^(.*) by step, on held-out rows$", text, re.MULTILINE)
    assert drawn == ["f1", "f1 on two", "vqa_accuracy"]


def test_scores_in_training_are_drawn_before_any_other(tmp_path):
    log = [{"step": s, "eval_CIDEr": s / 10, "eval_test_anls": 0.5, "eval_loss": 1.0, "eval_x": 1} for s in (5, 10)]
    (tmp_path / "log_history.json").write_text(json.dumps(log))
    source = report.build_report(tmp_path).read_text(encoding="utf-8")
    drawn = re.findall(r"^(.*) by step, on held-out rows$", Page(source).text, re.MULTILINE)
    assert drawn == ["CIDEr", "anls on test"]
    assert "CIDEr by step; at the end score 1.000" in source


def test_boxes_lie_over_the_picture_as_it_is_shown():
    true = LabelledBox("dog", (0, 500, 499, 999))
    drawn = box_overlay([LabelledBox("cat", (500, 0, 999, 249))], [true], 300, 150)
    # The longer side is 1000, whatever the picture's size; both corners of a box belong to it.
    assert 'viewBox="0 0 1000 500"' in drawn
    assert '<rect class="reference" x="0" y="250" width="500" height="250"/>' in drawn
    assert '<rect class="predicted" x="500" y="0" width="500" height="125"/>' in drawn
    assert re.findall(r'<text class="(\w+)".*?text-anchor="(\w+)">(\w+)<', drawn) == [
        ("reference", "start", "dog"),
        ("predicted", "end", "cat"),
    ]
    assert "<text" not in box_overlay([], [], 7, 1)


def test_boxes_of_the_gallery_are_those_of_the_row(tmp_path):
    box = {"label": "dog", "box": [0, 0, 499, 499]}
    add_split(tmp_path, "test", "grounding", [{"prediction": "a dog; dog [500, 0, 999, 999]", "boxes": [box]}])
    source = report.build_report(tmp_path).read_text(encoding="utf-8")
    # 500 x 300 pixels.
    assert '<rect class="reference" x="0" y="0" width="500" height="300"/>' in source
    assert source.count('<rect class="predicted"') == 1
    assert "dog [0, 0, 499, 499]" in Page(source).text
    path = tmp_path / "eval" / "test" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"label"', '"name"'))
    with pytest.raises(ValueError, match=r"row 0: expected a list of .* as boxes, got"):
        report.build_report(tmp_path)


def test_every_metric_is_explained_with_its_range(tmp_path):
    text = Page(report.build_report(make_run(tmp_path)).read_text(encoding="utf-8")).text
    assert "rare ones counting more; 0 to 10\n" in text
    assert "that a reference has, too; 0 to 1\n" in text


def test_scores_from_before_there_were_tasks(tmp_path):
    run = make_run(tmp_path)
    for path in run.rglob("scores.json"):
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({key: stored[key] for key in stored.keys() - {"task", "primary"}}))
    text = Page(report.build_report(run).read_text(encoding="utf-8")).text
    assert re.findall(r"^(\w+) on (\w+): \n([0-9.]+)", text, re.MULTILINE) == [("CIDEr", "test", "1.95")]


def test_a_scores_file_says_what_was_scored_and_old_ones_are_read_by_their_names(tmp_path):
    rows = [{"prediction": "red", "references": ["red"] * 10, "answer_type": "a=b]"}]
    add_split(tmp_path, "test", "vqa", rows)
    add_split(tmp_path, "test-blind", "vqa", rows)
    path = tmp_path / "eval" / "test-blind" / "scores.json"
    stored = json.loads(path.read_text())
    assert stored["breakdowns"] == {"vqa_accuracy": {"answer_type": {"a=b]": 1.0}}}
    found = read_all_scores(tmp_path)
    assert {split: list(each) for split, each in found.items()} == {"test": ["after", "blind"]}
    for condition, expected in (
        ("before", {"test": ["after"], "test-blind": ["before"]}),
        ("after", {"test": ["after"], "test-blind": ["after"]}),
        ("blind", {"test": ["after", "blind"]}),
    ):
        path.write_text(json.dumps(stored | {"condition": condition}))
        assert {split: list(each) for split, each in read_all_scores(tmp_path).items()} == expected
    del stored["breakdowns"], stored["condition"]
    path.write_text(json.dumps(stored))
    assert read_all_scores(tmp_path)["test"]["blind"] == found["test"]["blind"]
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"test-blind/scores.json: expected a JSON object, got list"):
        read_all_scores(tmp_path)


def test_best_pictures_come_first_then_the_worst(tmp_path):
    text = Page(report.build_report(make_run(tmp_path)).read_text(encoding="utf-8")).text
    shown = re.findall(r"^says (\d+)$", text, re.MULTILINE)
    assert shown == [f"{index:03}" for index in [*range(39, 27, -1), *range(12)]]
    assert re.findall(r"^CIDEr (\d\.\d\d)$", text, re.MULTILINE)[0] == "3.90"


def test_gallery_choice(tmp_path):
    rows = [{"id": index, "cider": score} for index, score in enumerate([0.0, 3.0, None, 1.0, 0.0, 2.0])]
    best, worst = best_and_worst(rows, ["CIDEr"], 5)
    assert ([r["id"] for r in best], [r["id"] for r in worst]) == ([1, 5, 3], [4, 0])
    assert best_and_worst([], ["CIDEr"]) == ([], [])
    said = {"123": "1", "45": "45", "678": "678", "90": "91"}
    rows = [{"prediction": text, "references": [truth]} for truth, text in said.items()]
    scores = add_split(tmp_path, "test", "digits", rows)
    assert scores.per_row["exact_match"] == [0, 1, 1, 0]
    # Row 3 has one digit of two, row 0 one of three.
    assert choose_gallery(tmp_path / "eval" / "test") == [1, 2, 0, 3]
    assert choose_gallery(tmp_path / "eval" / "test", 2) == [1, 0]
    assert ranking({"primary": "f1", "intervals": {"anls": [0, 1], "f1": [0, 1]}}) == ["f1", "anls"]


@pytest.mark.parametrize("picture_id", ["../../x", "/etc/x", "..", "a/b.jpg", "x" * 500, "\ud800", 7, "", "%2e"])
def test_picture_files_stay_in_their_folder(tmp_path, picture_id):
    save_gallery_pictures(tmp_path, "test", {picture_id: Image.new("L", (4, 4))})
    path = picture_path(tmp_path, "test", picture_id)
    assert [p.resolve() for p in tmp_path.rglob("*.webp")] == [path.resolve()]
    assert path.resolve().parent == (tmp_path / "eval" / "test" / "pictures").resolve()


def test_thumbnails_are_small_and_may_come_from_the_caller(tmp_path):
    run = make_run(tmp_path / "run", n=2)
    for path in run.rglob("*.webp"):
        path.unlink()
    Image.new("RGBA", (1000, 500), "blue").save(tmp_path / "blue.png")
    pictures = {("test", "000"): tmp_path / "blue.png", ("test", "001"): Image.new("P", (20, 10))}
    page = Page(report.build_report(run, pictures).read_text(encoding="utf-8"))
    sizes = []
    for source in page.sources:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
            sizes.append(image.size)
    assert sorted(sizes) == [(20, 10), (336, 168)]


def test_missing_parts_are_named_and_left_out(tmp_path):
    (tmp_path / "log_history.json").write_text("[]")
    source = report.build_report(tmp_path).read_text(encoding="utf-8")
    page = Page(source)
    assert f"from_adapter({tmp_path.name!r})" in page.text
    assert str(tmp_path.parent) not in source
    for said in ("run_summary.json", "the loss curve", "the scores", "the gallery"):
        assert said in page.text.split("Not in this report")[1]
    assert not {"svg", "img", "table"} & set(page.tags)
    scores = Scores({"CIDEr": 1.0}, {"CIDEr": [1.0]}, "CIDEr")
    write_scores(tmp_path / "eval" / "val" / "scores.json", scores)
    text = Page(report.build_report(tmp_path).read_text(encoding="utf-8")).text.split("Not in this report")[1]
    assert "the scores before training" in text
    assert "the blind control" in text


def test_bad_inputs_are_named(tmp_path, capsys):
    assert script.main([str(tmp_path)]) == 2
    assert "nothing to report" in capsys.readouterr().err
    (tmp_path / "run_summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"run_summary.json is damaged, expected JSON"):
        report.build_report(tmp_path)
    (tmp_path / "run_summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run_summary.json is damaged, expected a JSON object, got a list"):
        report.build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_loss_curve_is_in_place_and_skips_what_is_no_number():
    log = [{"step": s, "loss": v} for s, v in ((20, 1.0), (10, 3.0), (30, float("nan")))] + [
        {"train_loss": 1, "step": 30}
    ]
    points = finite_points(log, "loss")
    assert points == [(10.0, 3.0), (20.0, 1.0)]
    drawn = re.search(r'class="line train" points="([^"]+)"', step_chart("Loss", {"train": points}))[1]
    (x1, y1), (x2, y2) = [tuple(map(float, pair.split(","))) for pair in drawn.split()]
    # Left and right edge of the plot; 3.0 is the top tick and 1.0 a third of the height above 0.
    assert (x1, x2, y1) == (48.0, 468.0, 14.0)
    assert y2 == pytest.approx(14 + 242 * 2 / 3, abs=0.1)
    assert "<circle" in step_chart("Loss", {"train": [(5.0, 1.0)], "held-out": []})
    long = step_chart("Loss", {"train": [(float(step), 1.0) for step in range(100_000)]})
    assert len(long) < 10_000
