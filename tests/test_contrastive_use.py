"""Using a CLIP: retrieval and classification metrics, few-shot heads, the index, commands as a user runs them."""

import json
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_clips import COLORS, SIDE, save_tiny

from vlm_peft import VisionQwen
from vlm_peft.__main__ import main
from vlm_peft.adapters.loading import load_model
from vlm_peft.commands import classify
from vlm_peft.commands.evaluate_clip import main as evaluate_clip
from vlm_peft.contrastive import features, search
from vlm_peft.contrastive.adapt import Tuning, adapt
from vlm_peft.contrastive.arguments import parse_arguments
from vlm_peft.contrastive.card import NEEDED, write_clip_card
from vlm_peft.contrastive.features import PictureVectors
from vlm_peft.contrastive.few_shot import (
    choose_strength,
    draw_shots,
    few_shot_table,
    linear_probe,
    read_zhou_split,
    tip_adapter,
)
from vlm_peft.contrastive.folder import load_clip, save_clip
from vlm_peft.contrastive.search import PictureIndex, index_pictures
from vlm_peft.data.pictures import open_picture
from vlm_peft.evaluation.choices import picture_class_probabilities
from vlm_peft.metrics.classification import classification_scores
from vlm_peft.metrics.retrieval import retrieval_ranks, retrieval_scores
from vlm_peft.tasks import TaskSettings


def unit(*shape, seed=0):
    found = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


# --- metrics


def recall_at_k(scores, positive_pairs, k):
    """As CLIP_benchmark publishes it: true positives among the first k, by the number of positives."""
    rows, columns = scores.shape
    topk = torch.topk(scores, k, dim=1)[1]
    positives = positive_pairs.sum(dim=1)
    chosen = torch.nn.functional.one_hot(topk, num_classes=columns)
    return (positive_pairs.view(rows, 1, columns) * chosen).sum(dim=(1, 2)) / positives


def test_retrieval_is_that_of_clip_benchmark():
    images, texts = unit(30, 8), unit(140, 8, seed=1)
    owners = np.concatenate([np.arange(30), np.random.default_rng(2).integers(0, 30, 110)])
    texts = texts + 1.5 * images[owners]
    found, per_picture = retrieval_scores(*retrieval_ranks(images, texts, owners), owners)
    scores = torch.from_numpy(texts @ images.T)
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(len(scores)), torch.from_numpy(owners)] = True
    for k in (1, 5, 10):
        theirs = {
            f"image_retrieval_recall@{k}": (recall_at_k(scores, positive, k) > 0).float().mean(),
            f"text_retrieval_recall@{k}": (recall_at_k(scores.T, positive.T, k) > 0).float().mean(),
        }
        for name, value in theirs.items():
            assert found[name] == pytest.approx(float(value), abs=1e-6)
            assert np.mean(per_picture[name]) == pytest.approx(float(value), abs=1e-6)
    assert 0 < found["image_retrieval_recall@1"] < 1


def test_ranks_by_hand():
    images = np.eye(3, dtype=np.float32)
    # Picture 2's text points to picture 0 and ties with picture 1; of equal scores the earlier comes first.
    texts = np.array([[1, 0, 0], [0, 1, 0], [0.8, 0.6, 0.6], [0, 0, 1]], dtype=np.float32)
    of_text, of_image = retrieval_ranks(images, texts, [0, 1, 2, 2])
    assert of_text.tolist() == [1, 1, 3, 1]
    assert of_image.tolist() == [1, 1, 1]
    found, _ = retrieval_scores(of_text, of_image, [0, 1, 2, 2])
    assert found["image_retrieval_recall@1"] == 0.75
    assert found["image_retrieval_median_rank"] == 1
    with pytest.raises(ValueError, match="picture 1 has none"):
        retrieval_ranks(images, texts, [0, 0, 2, 2])


def test_classification_by_hand():
    scores = np.array([[3, 2, 1], [3, 2, 1], [3, 2, 1], [1, 1, 0]])
    found, per_picture = classification_scores(scores, [0, 0, 1, 0])
    assert found == {"acc1": 0.75, "mean_per_class_recall": 0.5}
    assert per_picture == {"acc1": [1, 1, 0, 1]}
    many = classification_scores(np.arange(12.0).reshape(2, 6), [1, 0])[0]
    assert many["acc1"] == 0
    assert many["acc5"] == 0.5
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        classification_scores(scores, [0, 0, 3, 0])


# --- few-shot heads


def test_the_linear_probe_is_at_the_minimum_of_its_loss():
    features, labels = unit(40, 6).astype(np.float64) * 5, np.arange(40) % 4
    probe = torch.from_numpy(linear_probe(features, labels, 4, 0.5)).requires_grad_()
    logits = torch.from_numpy(features) @ probe[:, :-1].T + probe[:, -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    (loss + 0.25 * probe[:, :-1].square().sum()).backward()
    assert probe.grad.abs().max() < 1e-3
    # The stronger it is held, the nearer a zero-shot-initialised probe stays to the names.
    start = unit(4, 6, seed=3).astype(np.float64)
    apart = [np.abs(linear_probe(features, labels, 4, s, start)[:, :-1] - start).max() for s in (1e-1, 1e1, 1e4)]
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 1e-2


def test_strength_is_chosen_without_the_test_split():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 4)
    clean = np.eye(3)[labels] * 10
    assert choose_strength(clean, labels, 3) < choose_strength(rng.normal(size=(12, 3)) * 10, labels, 3)
    assert choose_strength(clean[::4], labels[::4], 3) == 1


def test_tip_adapter_by_hand():
    shots, classes = np.array([[1.0, 0]]), np.array([[0.0, 1], [1, 0]])
    found = tip_adapter(shots, np.array([0]), classes, np.array([[1.0, 0]]))
    np.testing.assert_allclose(found, [[1.0, 100.0]])


def test_shots_and_the_table():
    labels = [0] * 9 + [1] * 3
    assert len(draw_shots(labels, 4, 0)) == 7
    assert set(draw_shots(labels, 4, 0)) != set(draw_shots(labels, 4, 1))
    classes = unit(3, 8)
    truth = np.arange(30) % 3
    features = classes[truth] + 0.8 * unit(30, 8, seed=4)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rows = few_shot_table((features, truth), {"test": (features, truth)}, classes, shots=(1, 8), seeds=(0, 1))["test"]
    heads = ("linear_probe", "zero_shot_probe", "tip_adapter")
    assert {(row["head"], row["shots"]) for row in rows} == {
        ("zero_shot", 0),
        *((head, shots) for shots in (1, 8) for head in heads),
    }
    by_shots = {row["shots"]: row for row in rows if row["head"] == "linear_probe"}
    assert by_shots[8]["acc1"] > by_shots[1]["acc1"]
    assert by_shots[8]["pictures"] == 24


def test_published_split_files_are_read(tmp_path):
    file = tmp_path / "split_zhou_Pets.json"
    file.write_text(json.dumps({"train": [["a/1.jpg", 0, "cat"]], "val": [], "test": [["b/1.jpg", 1, "dog"]]}))
    assert read_zhou_split(file)["test"] == [("b/1.jpg", 1, "dog")]
    file.write_text(json.dumps({"train": [["a/1.jpg", 0, "cat"]], "val": [], "test": [["b/1.jpg", 0, "dog"]]}))
    with pytest.raises(ValueError, match="one class has several names: cat, dog"):
        read_zhou_split(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="expected a split file"):
        read_zhou_split(file)


def test_a_published_split_is_scored_with_its_few_shots(clip, album, tmp_path, capsys):
    (album / "more").mkdir()
    for color in ("red", "blue"):
        for shade in range(3):
            Image.new("RGB", (SIDE, SIDE), color).point(lambda v, s=shade: max(v - s, 0)).save(
                album / "more" / f"{color}_{shade}.png"
            )
    rows = {color: [f"more/{color}_{shade}.png" for shade in range(3)] for color in ("red", "blue")}
    numbers = {"red": 0, "blue": 1}
    parts = {"train": rows, "val": {}, "test": {color: [f"{color}.png"] for color in rows}}
    split = {
        part: [[path, numbers[color], f"the_{color}"] for color, paths in found.items() for path in paths]
        for part, found in parts.items()
    }
    (tmp_path / "split_zhou_Walls.json").write_text(json.dumps(split))
    arguments = [
        "--clip_model",
        str(clip),
        "--split_file",
        str(tmp_path / "split_zhou_Walls.json"),
        "--dataset_name",
        "-",
    ]
    arguments += ["--image_folder", str(album), "--few_shot", "true", "--output_dir", str(tmp_path / "scores")]
    arguments += ["--vectors_dir", str(tmp_path / "vectors"), "--use_cpu", "true", "--report_to", "none"]
    assert evaluate_clip(arguments) == 0
    assert "linear_probe" in capsys.readouterr().out
    table = json.loads((tmp_path / "scores" / "few_shot.json").read_text())["test"]
    assert {row["pictures"] for row in table if row["shots"] == 16} == {6}
    lines = (tmp_path / "scores" / "eval" / "zero_shot-test" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["references"][0] for line in lines} == {"the red", "the blue"}


# --- the index


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    for color in COLORS:
        Image.new("RGB", (SIDE, SIDE), color).save(folder / f"{color}.png")
    return folder


def test_an_index_encodes_what_is_new_and_nothing_twice(clip, album, tmp_path):
    encoder = load_clip(clip)

    def build():
        paths = sorted(map(str, album.glob("*.png")))
        index, problems, encoded = index_pictures(encoder, album, paths, directory=tmp_path / "index")
        return index, problems, encoded

    index, problems, encoded = build()
    assert (len(index), problems, encoded) == (8, {}, 8)
    assert build()[2] == 0
    # A copy under another name is the same picture; a changed file is another; a damaged one is named.
    (album / "copy.png").write_bytes((album / "red.png").read_bytes())
    Image.new("RGB", (SIDE, SIDE), "navy").save(album / "blue.png")
    (album / "broken.png").write_bytes(b"no picture")
    index, problems, encoded = build()
    assert (len(index), encoded) == (9, 1)
    assert list(problems) == [str(album / "broken.png")]
    expected = encoder.embed_pictures([Image.open(path) for path in index.paths])
    np.testing.assert_allclose(index.vectors().astype(np.float32), expected, atol=1e-3)
    (album / "red.png").unlink()
    assert len(build()[0]) == 8


@pytest.fixture
def opened(monkeypatch):
    """Pictures that were opened; no two are open at a time but the last one and the one that comes."""
    found = []

    def opens(value):
        assert sum(each() is not None for each in found) <= 1
        picture = open_picture(value)
        found.append(weakref.ref(picture))
        return picture

    for module in (features, classify):
        monkeypatch.setattr(module, "open_picture", opens)
    return found


def test_an_index_opens_one_picture_at_a_time(clip, album, tmp_path, opened):
    (album / "broken.png").write_bytes(b"no picture")
    paths = sorted(map(str, album.glob("*.png")))
    index, problems, _ = index_pictures(load_clip(clip), album, paths, directory=tmp_path / "index", batch_size=4)
    assert (len(index), list(problems), len(opened)) == (8, [str(album / "broken.png")], 8)


@pytest.mark.parametrize("is_clip", [True, False])
def test_labels_are_found_for_one_open_picture_at_a_time(clip, album, adapter, opened, is_clip):
    labels = ["cat", "dog"]
    if is_clip:
        classifier = classify.by_clip(load_clip(clip), labels)
    else:
        classifier = classify.by_captioner(*load_model(adapter), TaskSettings(), labels)
    (album / "broken.png").write_bytes(b"no picture")
    paths = sorted(map(str, album.glob("*.png")))
    found = list(classify.classify_pictures(classifier, [*paths, paths[0], str(album / "broken.png")], labels, 6))
    assert [each["image"] for each in found if "error" in each] == [str(album / "broken.png")] * 2
    assert len(opened) == 9
    for record in found:
        if "error" not in record:
            shares = classifier([open_picture(Path(record["image"]))])[0].tolist()
            assert list(record["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
    # A batch of which nothing can be read.
    assert "error" in next(classify.classify_pictures(classifier, [str(album / "broken.png")], labels, 1))


def test_pictures_of_a_batch_are_scaled_as_one_list_is(clip):
    encoder = load_clip(clip)
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)) for size in ((9, 30), (40, 8), (9, 30))]
    together = encoder.processor.image_processor(pictures, return_tensors="pt")
    assert torch.equal(encoder.pixels(pictures)["pixel_values"], together["pixel_values"])


def test_half_written_vectors_are_overwritten(tmp_path):
    store = PictureVectors(tmp_path, 4)
    names = [f"{number:032x}" for number in range(3)]
    store.add(names[:2], unit(2, 4))
    with (tmp_path / "vectors.f16").open("ab") as file:
        file.write(b"12345678901")
    store.add([names[1], names[2]], unit(2, 4, seed=1))
    assert store.rows() == {name: row for row, name in enumerate(names)}
    np.testing.assert_array_equal(store.array()[2], unit(2, 4, seed=1)[1].astype(np.float16))


def test_search_is_exact(tmp_path):
    store, vectors = PictureVectors(tmp_path, 32), unit(10_000, 32)
    store.add([f"{number:032x}" for number in range(10_000)], vectors)
    index = PictureIndex(store, list(map(str, range(10_000))), np.arange(10_000))
    query = unit(32, seed=9)
    found = index.search(query, 5)
    expected = np.argsort(-(vectors.astype(np.float16).astype(np.float32) @ query), kind="stable")[:5]
    assert [each.path for each in found] == list(map(str, expected))
    assert found[0].score == pytest.approx(float(vectors[expected[0]] @ query), abs=1e-3)


# --- commands


def test_search_as_a_user_runs_it(clip, album, tmp_path, capsys):
    arguments = ["search", str(album), "red", "--model", str(clip), "--index", str(tmp_path / "index"), "--count", "3"]
    page, exported = tmp_path / "found.html", tmp_path / "all.parquet"
    assert main([*arguments, "--json", "--html", str(page), "--export", str(exported)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert lines[0]["score"] >= lines[1]["score"] >= lines[2]["score"]
    shown = page.read_text()
    assert shown.count("<img") == 3
    assert not re.search(r'src="(?!data:)', shown)
    stored = pq.read_table(exported)
    assert stored.column_names == ["id", "vector"]
    assert len(stored) == 8
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(lines[0]["image"])
    for text, said in (("", "an empty one"), ("word " * 30, "longer than the 24 tokens")):
        assert main(["search", str(album), text, "--model", str(clip), "--index", str(tmp_path / "index")]) == 2
        assert said in capsys.readouterr().err


def test_classify_as_a_user_runs_it(clip, album, capsys):
    assert main(["classify", str(clip), str(album), "--labels", "cat", "dog", "--templates", "a {}"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8
    assert all(sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5) for line in lines)
    (album / "broken.png").write_bytes(b"no picture")
    assert main(["classify", str(clip), str(album / "broken.png"), "--labels", "cat", "dog"]) == 1
    assert "error" in json.loads(capsys.readouterr().out)
    assert main(["classify", str(clip), str(album), "--labels", "cat", "cat"]) == 2
    assert "every label once, got 'cat'" in capsys.readouterr().err
    assert main(["classify", str(ROOT / "recipes/demo/qwen3"), str(album), "--labels", "cat", "dog"]) == 2
    assert "expected a CLIP or SigLIP" in capsys.readouterr().err


def test_a_captioner_classifies_with_the_same_output(adapter, clip, album, tmp_path, capsys):
    model, processor = load_model(adapter)
    asked = ["--labels", "red", "blue", "--instruction", "Which?", "--batch_size", "3"]
    (album / "broken.png").write_bytes(b"no picture")
    assert main(["classify", str(adapter), str(album), *asked]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == sorted(path.name for path in album.iterdir())
    good = [line for line in lines if "error" not in line]
    assert len(good) == len(lines) - 1
    pictures = [open_picture(line["image"]) for line in good]
    expected = picture_class_probabilities(model, processor, pictures, ["red", "blue"], "Which?").tolist()
    for line, row in zip(good, expected, strict=True):
        assert list(line["probabilities"].values()) == pytest.approx(row, abs=2e-6)
        assert line["probability"] == line["probabilities"][line["label"]] == max(line["probabilities"].values())
    # A full save answers as its adapter does.
    VisionQwen.from_adapter(adapter, merge=True).save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    assert main(["classify", str(tmp_path / "full"), good[0]["image"], *asked]) == 0
    assert json.loads(capsys.readouterr().out)["probabilities"] == pytest.approx(good[0]["probabilities"], abs=1e-4)
    for arguments, told in (
        ([str(adapter), str(album), "--labels", "a", "b", "--templates", "a {}"], "--templates are for a CLIP"),
        ([str(clip), str(album), *asked], "--instruction is for a VisionQwen"),
        ([str(adapter), str(album), "--labels", "a", "a"], "every label once, got 'a'"),
        ([str(adapter), str(album), "--labels", "a", " "], "labels of at least a letter"),
    ):
        assert main(["classify", *arguments]) == 2
        assert told in capsys.readouterr().err


def test_odd_file_names_are_paths_and_shown_on_one_line(clip, tmp_path, capsys, monkeypatch):
    """What looks like base64 text, an option, markup or a second line; and bytes that are no text."""
    monkeypatch.chdir(tmp_path)
    names = ["iVBORw0KGgo.png", "data:x.png", "--labels.png", "<b>.png", "a\nb.png", "\x1b[31m.png", "g\udcff.png"]
    for number, name in enumerate(names):
        Image.new("RGB", (SIDE, SIDE), (number, 9, 9)).save(tmp_path / name)
    arguments = [
        "search",
        ".",
        "red",
        "--model",
        str(clip),
        "--index",
        str(tmp_path / "index"),
        "--export",
        "x.parquet",
    ]
    assert main([*arguments, "--html", "found.html"]) == 0
    told = capsys.readouterr()
    assert told.err == f"Encoded {len(names)} of {len(names)} pictures.\n"
    lines = told.out.splitlines()
    assert len(lines) == len(names)
    assert all(line.isprintable() for line in lines)
    assert any(line.endswith(' "a\\nb.png"') for line in lines)
    assert (tmp_path / "found.html").read_text().count("<img") == len(names)
    assert "&lt;b&gt;.png" in (tmp_path / "found.html").read_text()
    assert len(pq.read_table("x.parquet")) == len(names)
    assert main([*arguments, "--json"]) == 0
    found = {json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()}
    assert found == set(names)
    assert main(["classify", str(clip), ".", "--labels", "cat", "dog"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["image"] for line in lines} == set(names)


def test_a_picture_that_changes_while_it_is_read_gets_no_vector(clip, album, tmp_path, monkeypatch):
    encoder, changed = load_clip(clip), album / "red.png"
    real = search.encode_missing

    def late(*arguments, **options):
        Image.new("RGB", (SIDE, SIDE), "black").save(changed)
        return real(*arguments, **options)

    monkeypatch.setattr(search, "encode_missing", late)
    paths = sorted(map(str, album.glob("*.png")))
    index, problems, encoded = index_pictures(encoder, album, paths, directory=tmp_path / "index")
    assert (len(index), encoded) == (7, 7)
    assert problems == {str(changed): "It changed while it was read: search again."}
    monkeypatch.undo()
    # Gone since it was listed; damaged memory of earlier looks costs one more look.
    changed.unlink()
    for file in (tmp_path / "index").rglob("files-*.json"):
        file.write_text("{")
    index, problems, encoded = index_pictures(encoder, album, paths, directory=tmp_path / "index")
    assert (len(index), encoded) == (7, 0)
    assert "No such file" in problems[str(changed)]


def test_an_index_that_was_killed_goes_on(clip, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (SIDE, SIDE), (number, 99, 99)).save(folder / f"{number:02}.png")
    build = f"""
import os, signal, sys
from vlm_peft.contrastive import features
from vlm_peft.__main__ import main
features._BATCH = 16
add = features.PictureVectors.add
def half(store, hashes, vectors):
    if store.rows():
        # The vectors are written, and of the hashes a part.
        with (store.folder / "vectors.f16").open("ab") as file:
            file.write(vectors.astype("float16").tobytes())
        with (store.folder / "hashes.txt").open("ab") as file:
            file.write(hashes[0].encode() + b"\\n" + hashes[1].encode()[:7])
        os.kill(os.getpid(), signal.SIGKILL)
    add(store, hashes, vectors)
features.PictureVectors.add = half
main(["search", {str(folder)!r}, "red", "--model", {str(clip)!r}, "--index", {str(tmp_path / "index")!r}])
"""
    assert subprocess.run([sys.executable, "-c", build], capture_output=True).returncode == -9
    encoder, paths = load_clip(clip), sorted(map(str, folder.iterdir()))
    index, problems, encoded = index_pictures(encoder, folder, paths, directory=tmp_path / "index")
    # 16 were kept, and the one whose line was whole.
    assert (len(index), problems, encoded) == (40, {}, 23)
    expected = encoder.embed_pictures([Image.open(path) for path in paths])
    np.testing.assert_allclose(index.vectors().astype(np.float32), expected, atol=1e-3)


def test_a_label_that_would_be_cut_is_named(clip):
    encoder = load_clip(clip)
    with pytest.raises(ValueError, match=r"The label 'red red.*longer than the 24 tokens"):
        encoder.embed_classes(["cat", "red " * 30], ["{}"])


def test_the_recipe_and_the_evaluation(clip, album, tmp_path, monkeypatch, capsys):
    from vlm_peft.contrastive.fine_tune import main as fine_tune

    lines = [
        {"file_name": f"{color}.png", "captions": [f"it is {color}", f"{color} it is"], "label": color}
        for color in COLORS
    ]
    (album / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ["--dataset_name", str(album), "--train_split", "train[:6]", "--eval_splits", "train[6:]"]
    data += ["--clip_model", str(clip), "--label_column", "label", "--templates", "names", "--use_cpu", "true"]
    data += ["--report_to", "none", "--disable_tqdm", "true", "--vectors_dir", str(tmp_path / "vectors")]
    output = tmp_path / "run"
    more = ["--max_steps", "2", "--save_steps", "1", "--output_dir", str(output), "--merge", "true"]
    more += ["--blind_splits", "train[6:]", "--vision_tuning", "locked", "--text_tuning", "full"]
    assert fine_tune([*data, *more]) == 0
    said = capsys.readouterr().out
    assert "its embeddings are equal." in said
    folders = {path.parent.name for path in output.glob("eval/*/scores.json")}
    name = "train_6"
    assert folders == {
        *(f"{task}-{name}{suffix}" for task in ("retrieval", "zero_shot") for suffix in ("", "-before")),
        f"retrieval-{name}-blind",
    }
    scores = json.loads((output / "eval" / f"retrieval-{name}" / "scores.json").read_text())
    assert scores["intervals"].keys() == {n for n in scores["metrics"] if "recall@" in n}
    for file in ("README.md", "report.html", "run_summary.json", "adapter_model.safetensors", "merged/config.json"):
        assert (output / file).is_file(), file
    assert "load_clip" in (output / "report.html").read_text()
    # It goes on from its checkpoint, with what it was trained with and nothing else.
    resume = ["--resume_from_checkpoint", "true", *data, *more]
    assert fine_tune(resume) == 0
    with pytest.raises(ValueError, match=r"\(r: 8 there, 4 here\)"):
        fine_tune([*resume, "--lora_r", "4"])
    capsys.readouterr()
    arguments = [*data, "--clip_model", str(output), "--output_dir", str(tmp_path / "scores"), "--wise_ft", "0", "1"]
    assert evaluate_clip([*arguments, "--few_shot", "true"]) == 0
    said = capsys.readouterr().out
    assert "WiSE-FT, retrieval train[6:]" in said
    assert "tip_adapter" in said
    table = json.loads((tmp_path / "scores" / "wise_ft.json").read_text())["retrieval train[6:]"]
    before = json.loads((output / "eval" / f"retrieval-{name}-before" / "scores.json").read_text())
    assert table["0"] == pytest.approx(before["metrics"])
    assert table["1"] == pytest.approx(scores["metrics"])
    heads = json.loads((tmp_path / "scores" / "few_shot.json").read_text())["train[6:]"]
    alone = {row["head"]: row["acc1"] for row in heads if row["shots"] == 0}
    assert alone.keys() == {"zero_shot", "wise_ft 0", "wise_ft 1"}
    assert alone["wise_ft 1"] == alone["zero_shot"]


def test_names_are_no_markup_on_a_clips_card(tmp_path):
    hostile = "a|b <img src=x> [c](http://d)"
    summary = {name: hostile for name in NEEDED} | {"parameters": 10, "trainable_parameters": 1}
    summary |= {"seconds": {"train": 1.0}, "versions": {hostile: "1"}}
    (tmp_path / "run_summary.json").write_text(json.dumps(summary))
    shown = write_clip_card(tmp_path).read_text().partition("---\n\n")[2]
    # In code spans a name is as it is; elsewhere every mark is escaped.
    outside = re.sub(r"`[^`]*`", "", shown)
    assert outside.startswith(r"# a\|b \<img src=x\> \[c\](http\://d)")
    assert not re.search(r"(?<!\\)[<\[]", outside.replace("# (1, D)", ""))
    with pytest.raises(FileNotFoundError):
        write_clip_card(tmp_path / "nowhere")


def test_a_clip_that_others_could_not_load_is_refused_before_training(clip, album, tmp_path, monkeypatch):
    from vlm_peft.contrastive.fine_tune import main as fine_tune

    monkeypatch.setattr("vlm_peft.hub.access.get_token", lambda: None)
    data = ["--dataset_name", str(album), "--clip_model", str(clip), "--use_cpu", "true", "--report_to", "none"]
    data += ["--output_dir", str(tmp_path / "run"), "--push_to_hub", "true", "--hub_model_id", "me/run"]
    with pytest.raises(ValueError, match=r"encoder is the local folder .*clip0, .* its id \(vision="):
        fine_tune(data)
    # A merged one needs no base.
    with pytest.raises(OSError, match="Nothing is pushed to the repository me/run without an access token"):
        fine_tune([*data, "--merge", "true"])
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_trained_on_a_plain_checkpoint_only(clip, album, tmp_path):
    from vlm_peft.contrastive.fine_tune import main as fine_tune

    encoder = load_clip(clip)
    encoder.clip = adapt(encoder.clip, Tuning())
    save_clip(encoder, tmp_path / "adapter")
    data = ["--dataset_name", str(album), "--use_cpu", "true", "--report_to", "none", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"is an adapter, .* `vlm-peft export .* FOLDER --to merged`"):
        fine_tune([*data, "--clip_model", str(tmp_path / "adapter")])
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--to", "merged"]) == 0
    plain = load_clip(tmp_path / "plain")
    torch.testing.assert_close(plain.embed_texts(["red"]), encoder.eval().embed_texts(["red"]))
    for arguments in (["--to", "llava"], ["--to", "merged", "--scale", "0.5"]):
        assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "other"), *arguments]) == 2
    # What is there already is not replaced.
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--to", "merged"]) == 2


def test_options_that_are_none_are_named():
    for arguments, said in (
        (["--clip_modell", "x"], "did you mean 'clip_model'"),
        (["--clip_model", "x"], "--dataset_name is missing"),
        (["--clip_model", "x", "--dataset_name", "y", "--loss", "huber"], "invalid choice|expected one of"),
        (["--clip_model", "x", "--dataset_name", "y", "--train_on", "labels"], "--label_column"),
        (["--clip_model", "x", "--dataset_name", "y", "--chunk_size", "0"], "chunk_size is 0, expected at least 1"),
    ):
        with pytest.raises(SystemExit) as raised:
            parse_arguments([*arguments, "--use_cpu", "true", "--report_to", "none"])
        assert raised.value.code == 2 or re.search(said, str(raised.value.code)), raised.value.code


@pytest.mark.parametrize(("label", "image"), [("label", "img"), ("label", "image")])
def test_hub_schemas_of_classes_are_read(tmp_path, label, image):
    """CIFAR-10 and EuroSAT keep pictures with the number of a class, whose names are in the schema."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    from vlm_peft.contrastive.pairs import load_pairs
    from vlm_peft.data.arguments import DataArguments

    features = Features({image: ImageFeature(), label: ClassLabel(names=["Annual Crop", "Forest"])})
    pictures = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "green")]
    Dataset.from_dict({image: pictures, label: [1, 0]}, features).to_parquet(tmp_path / "train.parquet")
    data = DataArguments(dataset_name=str(tmp_path / "train.parquet"), image_column=image)
    assert load_pairs(data, "train", label_column=label, with_texts=False).labels == ["Forest", "Annual Crop"]


def test_a_search_answers_at_once(tmp_path):
    store = PictureVectors(tmp_path, 512)
    store.add([f"{number:032x}" for number in range(2_000)], unit(2_000, 512))
    index = PictureIndex(store, list(map(str, range(2_000))), np.arange(2_000))
    start = time.monotonic()
    index.search(unit(512), 10)
    # Twenty times what it takes: a scan that decodes pictures or builds an index again would be seen.
    assert time.monotonic() - start < 0.5
