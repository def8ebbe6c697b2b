"""report.html holds what the run wrote, nothing else, and nothing in it can run or load anything."""

import base64
import html.parser
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import report
from coco_caption.caption_scores import CaptionScores
from gallery import best_and_worst, choose_gallery, picture_path, save_gallery_pictures
from PIL import Image
from predictions import write_predictions, write_scores
from report_charts import finite_points, loss_chart

EVIL = '<script>alert("1")</script>&amp;<img src=x onerror=alert(2)>'
ALLOWED = set(
    "html head meta title style body main h1 h2 h3 p b br small span div dl dt dd table thead tbody tr th td figure "
    "details summary figcaption svg line text polyline circle rect path article img ul li pre".split()
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
        scores = CaptionScores(
            {"Bleu_4": 0.25, "CIDEr": cider},
            per_picture,
            f"ptb-java{evil}",
            skipped={f"METEOR{evil}": f"no Java{evil}"},
            notes=[f"noted{evil}"],
        )
        write_scores(folder / "eval" / name / "scores.json", scores, decoding={f"num_beams{evil}": f"3{evil}"})
    write_predictions(folder / "eval" / split / "predictions.jsonl", rows, per_picture)
    chosen = choose_gallery([{**row, "cider": score} for row, score in zip(rows, per_picture, strict=True)])
    save_gallery_pictures(folder, split, {i: Image.new("RGB", (500, 300), "red") for i in chosen})
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


def test_best_pictures_come_first_then_the_worst(tmp_path):
    text = Page(report.build_report(make_run(tmp_path)).read_text(encoding="utf-8")).text
    shown = re.findall(r"^says (\d+)$", text, re.MULTILINE)
    assert shown == [f"{index:03}" for index in [*range(39, 27, -1), *range(12)]]
    assert re.findall(r"^CIDEr (\d\.\d\d)$", text, re.MULTILINE)[0] == "3.90"


def test_gallery_choice():
    rows = [{"id": index, "cider": score} for index, score in enumerate([0.0, 3.0, None, 1.0, 0.0, 2.0])]
    assert choose_gallery(rows, 4) == [1, 5, 4, 0]
    assert choose_gallery(rows) == [1, 5, 3, 4, 0]
    best, worst = best_and_worst(rows, 5)
    assert ([r["id"] for r in best], [r["id"] for r in worst]) == ([1, 5, 3], [4, 0])
    assert choose_gallery([]) == []


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
    scores = CaptionScores({"CIDEr": 1.0}, [1.0], "ptb-java")
    write_scores(tmp_path / "eval" / "val" / "scores.json", scores)
    text = Page(report.build_report(tmp_path).read_text(encoding="utf-8")).text.split("Not in this report")[1]
    assert "the scores before training" in text
    assert "the blind control" in text


def test_bad_inputs_are_named(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "nothing to report" in capsys.readouterr().err
    (tmp_path / "run_summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"run_summary.json: expected JSON"):
        report.build_report(tmp_path)
    (tmp_path / "run_summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run_summary.json: expected a JSON dict, got list"):
        report.build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_loss_curve_is_in_place_and_skips_what_is_no_number():
    log = [{"step": s, "loss": v} for s, v in ((20, 1.0), (10, 3.0), (30, float("nan")))] + [
        {"train_loss": 1, "step": 30}
    ]
    points = finite_points(log, "loss")
    assert points == [(10.0, 3.0), (20.0, 1.0)]
    drawn = re.search(r'class="line train" points="([^"]+)"', loss_chart(points, []))[1]
    (x1, y1), (x2, y2) = [tuple(map(float, pair.split(","))) for pair in drawn.split()]
    # Left and right edge of the plot; 3.0 is the top tick and 1.0 a third of the height above 0.
    assert (x1, x2, y1) == (48.0, 468.0, 14.0)
    assert y2 == pytest.approx(14 + 242 * 2 / 3, abs=0.1)
    assert "<circle" in loss_chart([(5.0, 1.0)], [])
    long = loss_chart([(float(step), 1.0) for step in range(100_000)], [])
    assert len(long) < 10_000
