"""The adapter folder's README.md: what the run wrote, and nothing that it did not."""

import json

import pytest
from conftest import HOSTILE
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from yaml import safe_load

from vlm_peft.hub.licences import common_licence, licence_line, stated_licence
from vlm_peft.hub.markup import code, markdown, one_line
from vlm_peft.report.gallery import picture_path
from vlm_peft.report.model_card import LONGEST, write_model_card

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


@pytest.fixture
def folder(tmp_path):
    write_summary(tmp_path)
    return tmp_path


def write_summary(folder, **more):
    (folder / "run_summary.json").write_text(json.dumps(SUMMARY | more))


def write_scores(folder, name, metrics, **extra):
    path = folder / "eval" / name / "scores.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"n": 5, "metrics": metrics, **extra}))


def front(text):
    return safe_load(text.split("---")[1])


def test_each_score_has_its_interval_and_the_controls_beside_it(folder):
    write_scores(folder, "test", {"CIDEr": 1.25}, intervals={"CIDEr": [1.0, 1.5]}, tokenizer="ptb")
    write_scores(folder, "test-before", {"CIDEr": 0.0})
    write_scores(folder, "test-blind", {"CIDEr": 0.125}, intervals={"CIDEr": [0.1, 0.15]})
    text = write_model_card(folder).read_text()
    assert "| test | caption | CIDEr | 5 | 1.250 [1.000, 1.500] | 0.000 | 0.125 [0.100, 0.150] |" in text
    assert "- test: tokenizer of the metrics: ptb" in text
    assert "10 trained of 1,000 parameters, 1.00 %" in text


def test_scores_of_any_task_are_in_the_table_and_in_the_metadata_that_the_hub_shows(folder):
    write_summary(folder, dataset_revision="abc")
    write_scores(folder, "test", {"vqa_accuracy": 0.5, "broken": float("nan")}, task="vqa", decoding={"num_beams": 1})
    write_scores(folder, "test-blind", {"vqa_accuracy": 0.25}, task="vqa")
    write_scores(folder, "val", {"Bleu_4": 0.3, "CIDEr": 0.75})
    text = write_model_card(folder).read_text()
    assert "| test | vqa | vqa_accuracy | 5 | 0.500 |  | 0.250 |" in text
    card = ModelCard(text)
    found = {
        (each.dataset_split, each.task_name, each.metric_type, each.metric_name): each
        for each in card.data.eval_results
    }
    assert {key: each.metric_value for key, each in found.items()} == {
        ("test", "vqa", "vqa_accuracy", "vqa_accuracy"): 0.5,
        ("val", "caption", "bleu", "Bleu_4"): 0.3,
        ("val", "caption", "cider", "CIDEr"): 0.75,
    }
    assert {(each.dataset_type, each.dataset_revision) for each in found.values()} == {("nlphuji/flickr30k", "abc")}


def test_the_metadata_names_what_is_on_the_hub_only(folder):
    data = front(write_model_card(folder).read_text())
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "image-text-to-text")
    # The decoder is a local folder, no id of the Hub.
    assert data["base_model"] == ["openai/clip-vit-base-patch32"]
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["nlphuji/flickr30k"]
    assert "license" not in data
    assert "model-index" not in data


def test_samples_are_the_best_and_the_worst_that_the_run_kept(folder):
    write_scores(folder, "test", {"CIDEr": 1.0})
    rows = [
        {"id": f"a/{index}", "prediction": f"<b>|{index}", "references": ["r"], "cider": cider}
        for index, cider in enumerate([3.0, 9.0, 5.0, 1.0])
    ]
    (folder / "eval" / "test" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The run kept no picture of the best row.
    for index in (0, 2, 3):
        path = picture_path(folder, "test", f"a/{index}")
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    text = write_model_card(folder).read_text()
    shown = [line for line in text.splitlines() if line.startswith("| ![")]
    assert shown == [
        r"| ![test, best](eval/test/pictures/a%252F2.webp) | best | \<b\>\|2 | r |",
        r"| ![test, worst](eval/test/pictures/a%252F3.webp) | worst | \<b\>\|3 | r |",
    ]
    assert "the 1 best and the 1 worst by CIDEr" in text


def test_samples_are_ranked_by_the_metric_of_the_task_and_show_the_question(folder):
    write_scores(folder, "test", {"f1": 0.5}, task="slides", primary="f1")
    rows = [
        {"id": str(index), "prediction": f"says {index}", "references": ["a", "b", "b"], "question": "Why?", **scores}
        for index, scores in enumerate([{"f1": 0.1, "cider": 9.0}, {"f1": 0.9, "cider": 0.0}])
    ]
    add_pictures(folder, rows)
    text = write_model_card(folder).read_text()
    assert "the 1 best and the 1 worst by f1" in text
    assert "| best | Why? | says 1 | b (2 of 3) |" in text
    assert "| worst | Why? | says 0 | b (2 of 3) |" in text


def test_boxes_are_what_is_right_for_a_row_without_references(folder):
    write_scores(folder, "test", {"f1_50": 0.5}, task="grounding", primary="f1_50")
    add_pictures(folder, [{"id": 1, "prediction": "dog", "boxes": [{"label": "dog", "box": [0, 1, 2, 3]}]}])
    assert r"| first | dog | dog \[0, 1, 2, 3\] |" in write_model_card(folder).read_text()


def parsed(markdown_text):
    """Block and inline elements in their order, and all text."""
    elements, said = [], ""
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown_text):
        elements.append((token.type, token.tag))
        said += token.content if token.type in ("fence", "code_block", "html_block") else ""
        for child in token.children or []:
            # In a code span a bar is escaped, too, but here no table has one.
            elements += [(child.type, child.tag)] * (child.type not in ("text", "code_inline"))
            said += child.content
    return elements, said


def write_everywhere(folder, said):
    """A run in which all that can come from elsewhere is one text."""
    names = ("title", "date", "command", "vision_model", "text_model", "device", "adapter", "dataset")
    # Some are looked for as files.
    texts = dict.fromkeys((*names, "vision_revision", "dataset_revision"), said[:200])
    data = {said: {"rows": 1, "content_hash": said}}
    write_summary(folder, **texts, seed=said, seconds={said: 1.0}, versions={said: said}, data=data)
    found = {"tokenizer": said, "decoding": {said: said}, "skipped": {said: said}, "notes": [said], "dataset": said}
    write_scores(folder, "test", {"f1": 0.5, f"f1[kind={said}]": 1.0}, task=said, primary="f1", **found)
    add_pictures(folder, [{"id": 1, "prediction": said, "references": [said], "question": said, "f1": 1.0}])


def add_pictures(folder, rows):
    (folder / "eval" / "test" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        path = picture_path(folder, "test", row["id"])
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmless")
    write_everywhere(folder, "plain words")
    return parsed(ModelCard(write_model_card(folder).read_text()).text)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_from_a_run_or_its_data_is_markup(folder, harmless, hostile):
    write_everywhere(folder, hostile)
    text = write_model_card(folder).read_text(encoding="utf-8")
    card = ModelCard(text)
    elements, said = parsed(card.text)
    assert elements == harmless[0]
    shown = one_line(hostile)
    # Six of them are in JSON, which may write it otherwise.
    assert said.count(shown[: LONGEST - 1]) >= harmless[1].count("plain words") - 6
    assert "\r" not in text
    assert all(len(line) < 8 * LONGEST for line in text.splitlines() if line.startswith("| !"))
    assert not [c for c in text if (ord(c) < 32 and c != "\n") or "\u202a" <= c <= "\u202e"]
    metadata = text.removesuffix(card.text)
    assert not {"<", ">"} & set(metadata)
    assert safe_load(metadata.strip("-\n"))["library_name"] == "peft"
    assert len(max(card.text.splitlines(), key=len)) < max(2000, 12 * len(hostile))


def test_markdown_is_escaped_where_it_would_mark_something_and_only_there():
    plain = 'a dog_house, 3.5 (of 7): it\'s 50 % - "so" + x = y; f(x) / 2 @ http:8080. 1.5'
    assert markdown(plain) == plain
    assert markdown(12345) == "12,345"
    assert [markdown(each) for each in ("- a", "1. a", "12) a", "===")] == [r"\- a", r"1\. a", r"12\) a", r"\==="]
    assert markdown("_a_ http://b www.c") == r"\_a\_ http\://b www\.c"
    assert markdown(markdown("*")) == r"\*"
    assert [code(each) for each in ("a", "a`b", "``", "")] == ["`a`", "``a`b``", "``` `` ```", "`  `"]


def test_data_and_revisions_are_named_when_the_run_knows_them(folder):
    assert "at revision" not in (text := write_model_card(folder).read_text())
    assert "- revision of" not in text
    data = {"train": {"rows": 29000, "pictures": 29000, "content_hash": "c0ffee"}}
    write_summary(folder, data=data, dataset_revision="main", vision_revision="abc")
    text = write_model_card(folder).read_text()
    assert "- `nlphuji/flickr30k` at revision `main`" in text
    assert "- split train: 29,000 rows, 29,000 pictures, content hash `c0ffee`" in text
    assert "- revision of the encoder: `abc`" in text


def test_a_mixture_names_each_data_set(folder):
    write_summary(folder, dataset=["nlphuji/flickr30k", "mine/rows.parquet"], dataset_revision=["abc", None])
    write_scores(folder, "test", {"CIDEr": 1.0}, dataset="mine/rows.parquet")
    text = write_model_card(folder).read_text()
    assert "on `nlphuji/flickr30k`, `mine/rows.parquet`." in text
    assert "- `nlphuji/flickr30k` at revision `abc`\n- `mine/rows.parquet`\n" in text
    assert front(text)["model-index"][0]["results"][0]["dataset"]["name"] == "rows.parquet"


def test_licences_are_those_that_cards_state(folder):
    for name, licence in (("clip", "license: mit\n"), ("qwen3", "license: mit\n"), ("rows", "")):
        (folder / name).mkdir()
        (folder / name / "README.md").write_text(f"---\n{licence}tags: [a]\n---\n# Card\n")
    clip, qwen3, rows = (str(folder / name) for name in ("clip", "qwen3", "rows"))
    write_summary(folder, vision_model=clip, text_model=qwen3, dataset=rows)
    text = write_model_card(folder).read_text()
    assert front(text)["license"] == "mit"
    assert f"- encoder `{clip}`: mit\n- decoder `{qwen3}`: mit\n- data `{rows}`: not stated by its card" in text
    (folder / "clip" / "README.md").unlink()
    text = write_model_card(folder).read_text()
    assert "license" not in front(text)
    assert f"- encoder `{clip}`: not known: its card was not at hand" in text


def test_licences_of_a_card(tmp_path):
    def stated(front: str) -> str | None:
        (tmp_path / "README.md").write_text(front)
        return stated_licence(str(tmp_path))

    assert stated("---\nlicense: other\nlicense_name: my-own\n---\n") == "other (my-own)"
    assert stated("---\nlicense: [mit, cc0-1.0]\n---\n") == "mit, cc0-1.0"
    assert stated("no metadata") == ""
    assert stated("---\n- a list\n---\n") == ""
    assert stated_licence("nobody/knows-this") is None
    assert licence_line("data", "a/b", "mit") == "- data `a/b`: mit"
    assert common_licence(["mit", "mit"]) == "mit"
    assert common_licence(["mit", "apache-2.0"]) is None
    assert common_licence(["mit", None]) is None
    assert common_licence(["other", "other"]) is None


def test_without_scores_there_is_no_table(folder):
    text = write_model_card(folder).read_text()
    assert "## Scores" not in text
    assert "## What it says" not in text


def test_without_a_run_there_is_no_card(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_model_card(tmp_path)
    (tmp_path / "run_summary.json").write_text(json.dumps({key: SUMMARY[key] for key in SUMMARY if key != "date"}))
    with pytest.raises(ValueError, match=r"run_summary.json: date missing, which the card shows"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
