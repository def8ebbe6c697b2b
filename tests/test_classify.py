"""Task classify: names of classes are branches of one prompt, as probable as each alone; its data, scores and runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HOSTILE
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import get_peft_model
from PIL import Image
from trl import SFTConfig

from vlm_peft.__main__ import main
from vlm_peft.adapters.loading import load_model
from vlm_peft.adapters.lora import lora_config
from vlm_peft.commands.doctor import main as doctor
from vlm_peft.commands.evaluate import main as evaluate
from vlm_peft.commands.web_demo import PictureAnswers
from vlm_peft.data.arguments import DataArguments
from vlm_peft.data.splits import load_split, settle
from vlm_peft.evaluation import choices
from vlm_peft.evaluation.choices import choice_log_probs, picture_class_probabilities
from vlm_peft.evaluation.evaluate import _swapped, generate_rows
from vlm_peft.evaluation.task_scores import score_rows
from vlm_peft.metrics.calibration import calibration_error, fit_temperature
from vlm_peft.report.charts import confusion_chart
from vlm_peft.tasks import TASKS, TaskSettings, make_task
from vlm_peft.tasks.example import picture_turn
from vlm_peft.training import sft
from vlm_peft.training.data import encode_split, hold_back

COLOURS = {"dark_red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}
NAMES = ["cat", "caterpillar", "polar bear", "a", "zebra (plains)", "Ünïcode", "cat food"]


@pytest.fixture
def adapted(model):
    """LoRA and projector drawn at random."""
    found = get_peft_model(model, lora_config(model, r=4, init_lora_weights=False)).eval()
    for name, parameter in found.named_parameters():
        if "multi_modal_projector" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return found


PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def fetch(ids):
    return {"pixel_values": PIXELS[ids]}


@torch.inference_mode()
def alone(model, processor, prompt, images, name) -> float:
    """Nats of one name and the end of its turn, in a sequence of its own, token by token."""
    prefix = processor.encode_prompt(prompt)
    answer = [*processor.tokenizer(name)["input_ids"], processor.end_of_turn_token_id]
    logits = model(input_ids=torch.tensor([prefix + answer]), pixel_values=PIXELS[images]).logits[0]
    nats = logits.double().log_softmax(-1)
    return sum(nats[len(prefix) + place - 1, token].item() for place, token in enumerate(answer))


SOLVED = [*picture_turn("What is it?"), {"role": "assistant", "content": "cat"}]


@pytest.mark.parametrize("branches", [1024, 20], ids=["one pass", "several passes"])
def test_branches_are_as_probable_as_each_name_alone(adapted, processor, monkeypatch, branches):
    monkeypatch.setattr(choices, "_BRANCHES", branches)
    prompts = [picture_turn("What is it?"), [*SOLVED, *picture_turn("What is it?")], picture_turn("Name it.")]
    images = [[0], [0, 1], [2]]
    found = choice_log_probs(adapted, processor, prompts, images, fetch, NAMES)
    expected = [
        [alone(adapted, processor, prompt, shown, name) for name in NAMES]
        for prompt, shown in zip(prompts, images, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    # The pictures matter, or nothing was compared.
    other = choice_log_probs(adapted, processor, prompts[:1], [[1]], fetch, NAMES)
    assert (found[0] - other[0]).abs().max() > 1e-3


def test_batches_and_decoders_that_share_nothing_change_nothing(adapted, processor, monkeypatch):
    arguments = (adapted, processor, [picture_turn("?")] * 3, [[0], [1], [2]], fetch, NAMES)
    found = choice_log_probs(*arguments)
    torch.testing.assert_close(choice_log_probs(*arguments, batch_size=1), found, atol=1e-5, rtol=1e-5)
    unshared = choices.probe(adapted)
    monkeypatch.setattr(choices, "probe", lambda model: type(unshared)(False, False, 0.0, 0.0, 0.0))
    torch.testing.assert_close(choice_log_probs(*arguments), found, atol=1e-5, rtol=1e-5)


def test_a_hundred_classes_read_the_picture_once(adapted, processor, monkeypatch):
    names = [f"class {number}" for number in range(100)]
    tokens = []
    choices.probe(adapted)
    trunk = adapted.get_base_model().model
    forward = trunk.forward
    monkeypatch.setattr(trunk, "forward", lambda **batch: tokens.append(batch["input_ids"]) or forward(**batch))
    choice_log_probs(adapted, processor, [picture_turn("?")], [[0]], fetch, names)
    assert len(tokens) == 1
    assert sum((ids == 259).sum() for ids in tokens) == len(tokens) * processor.num_image_tokens


def test_pictures_get_probabilities(adapted, processor):
    pictures = [Image.new("RGB", (9, 9), colour) for colour in COLOURS.values()]
    found = picture_class_probabilities(adapted, processor, pictures, NAMES, "What is it?")
    assert found.shape == (3, len(NAMES))
    torch.testing.assert_close(found.sum(-1), torch.ones(3))
    flat = picture_class_probabilities(adapted, processor, pictures, NAMES, "What is it?", temperature=1e6)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / len(NAMES)), atol=1e-3, rtol=0)


def test_a_prompt_that_the_decoder_has_no_place_for_is_refused(adapted, processor):
    with pytest.raises(ValueError, match="more than the 512 that the decoder takes"):
        choice_log_probs(adapted, processor, [picture_turn("x" * 600)], [[0]], fetch, NAMES)


# Rows


def save_folder(folder: Path, count: int = 4, splits=("train", "test")) -> Path:
    """A folder a class and nothing else, as `datasets` reads it."""
    for number, split in enumerate(splits):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                picture = Image.new("RGB", (10, 8), tuple(min(255, each + 9 * index + 4 * number) for each in colour))
                picture.save(folder / split / name / f"{index}.png")
    return folder


def load(folder, processor, split="test", **options):
    data = DataArguments(dataset_name=str(folder), task="classify", **options)
    for name, value in settle(data, split).items():
        setattr(data, name, value)
    return load_split(data, split, processor)


def references(split):
    return [question.references[0] for question in split.questions()]


def test_a_folder_a_class_is_read_class_by_turns(tmp_path, processor):
    split = load(save_folder(tmp_path), processor)
    assert split.task.choices == ("blue", "dark red", "green")
    said = references(split)
    assert [sorted(said[start : start + 3]) for start in range(0, 12, 3)] == [["blue", "dark red", "green"]] * 4
    for question in split.questions():
        pixel = split.pictures.open(question.image_ids[0]).getpixel((0, 0))
        nearest = min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True)))
        assert nearest.replace("_", " ") == question.references[0]
    limited = load_split(split.data, "test", processor, limit=3)
    assert sorted(references(limited)) == ["blue", "dark red", "green"]
    # The blind control shows pictures of other classes, too.
    others = [said[other[0]] for other in _swapped([[place] for place in range(12)])]
    assert 0 < sum(a == b for a, b in zip(said, others, strict=True)) < 12


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_class_that_is_a_link_is_neither_left_out_nor_learnt_twice(tmp_path, processor, is_elsewhere):
    folder = save_folder(tmp_path / "data")
    if is_elsewhere:
        (folder / "train/green").rename(tmp_path / "green")
    target = tmp_path / "green" if is_elsewhere else folder / "train/green"
    link = folder / "train" / ("green" if is_elsewhere else "lime")
    link.symlink_to(target)
    with pytest.raises(ValueError, match=f"{link} is a link to the folder {target.resolve()}"):
        load(folder, processor, "train")
    # Not a class: hidden, or a picture that lies elsewhere.
    link.rename(link.with_name(".kept"))
    (folder / "train/blue/more.png").symlink_to(next(target.iterdir()))
    assert len(load(folder, processor, "train").texts) == (9 if is_elsewhere else 13)


def test_held_back_rows_are_not_trained_on(tmp_path, processor):
    split = load(save_folder(tmp_path), processor, "train", calibration_rows=5)
    rows = encode_split(split, processor, SFTConfig("", max_length=None, use_cpu=True, bf16=False)).dataset
    kept, back = hold_back(split, rows)
    asked = {question.image_ids[0] for question in back.questions()}
    assert len(asked) == 5
    assert asked | {ids[0] for ids in kept["image_ids"]} == set(range(12))
    assert len(kept) == 7
    assert not split.left_out
    split.task = replace(split.task, held_back=12)
    with pytest.raises(ValueError, match="12 rows of train are to be held back, which has 12"):
        hold_back(split, rows)


def test_the_temperature_is_that_of_the_task(tmp_path, adapted, processor):
    split = load(save_folder(tmp_path), processor)
    questions = list(split.questions())

    def shares(temperature):
        task = replace(split.task, temperature=temperature)
        rows = generate_rows(adapted, processor, questions, split.fetch_images, task=task)
        return torch.tensor([list(row["probabilities"].values()) for row in rows], dtype=torch.float64)

    plain, warm = shares(1.0), shares(4.0)
    torch.testing.assert_close((plain.log() / 4).softmax(-1), warm, atol=1e-6, rtol=1e-6)
    assert (plain - warm).abs().max() > 1e-3


@pytest.mark.parametrize("is_class_label", [True, False])
def test_a_column_of_labels(tmp_path, processor, is_class_label):
    feature = ClassLabel(names=["no", "yes"]) if is_class_label else Value("string")
    rows = {
        "image": [{"bytes": (save_folder(tmp_path / "f") / "test/blue/0.png").read_bytes(), "path": None}] * 4,
        "kind": [0, 1, 1, 0] if is_class_label else ["no", "yes", "yes", "no"],
    }
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "kind": feature})).to_parquet(
        tmp_path / "test.parquet"
    )
    split = load(tmp_path / "test.parquet", processor, text_column="kind")
    assert split.task.choices == ("no", "yes")
    assert sorted(references(split)) == ["no", "no", "yes", "yes"]


def test_named_errors(tmp_path, processor):
    columns = ["image", "label"]
    for names, said in (
        (["a", " "], "the name of a class"),
        (["a_b", "a b"], "'a b' is there twice: 'a_b' and 'a b'"),
        (["a"], "two or more classes to choose from, got a"),
    ):
        with pytest.raises(ValueError, match=said):
            make_task("classify", columns, class_names=names)
    with pytest.raises(ValueError, match=r"one of the 2 classes .a, b., got the label 'c'"):
        make_task("classify", columns, class_names=["a", "b"]).example({"label": "c"})
    with pytest.raises(ValueError, match="calibration_rows of at least 0"):
        make_task("classify", columns, calibration_rows=-1)
    with pytest.raises(ValueError, match=r"no column 'label or labels.*all pictures lie straight in their class's"):
        make_task("classify", ["image"])
    with pytest.raises(ValueError, match="class_names is no UTF-8 text: byte 0xe9 after 3 characters"):
        make_task("classify", columns, class_names=["a", "caf\udce9"])
    folder = save_folder(tmp_path)
    for place in list((folder / "train" / "blue").iterdir())[1:]:
        place.unlink()
    data = DataArguments(dataset_name=str(folder), task="classify")
    with pytest.raises(ValueError, match="1 of 3 classes have one picture, for example 'blue'"):
        settle(data, "train", is_trained=True)
    assert settle(data, "test", is_trained=True)["class_names"] == ["blue", "dark red", "green"]


def test_task_json_keeps_classes(tmp_path):
    settings = TaskSettings(task="classify", class_names=["a", *HOSTILE[:3]], class_temperature=1.5)
    (tmp_path / "task.json").write_text(settings.to_json())
    assert TaskSettings.read(tmp_path) == settings
    (tmp_path / "task.json").write_text('{"class_names": ["a", 3]}')
    with pytest.raises(ValueError, match=r"class_names is .'a', 3., expected a list of texts"):
        TaskSettings.read(tmp_path)
    (tmp_path / "task.json").write_text('{"class_names": ["a", "\\ud83d"]}')
    with pytest.raises(ValueError, match=r"task.json: class_names is no UTF-8 text: half a character, U.D83D"):
        TaskSettings.read(tmp_path)


# Scores


def rows_of(table, labels, names):
    return [
        {
            "id": str(index),
            "prediction": names[max(range(len(names)), key=values.__getitem__)],
            "references": [names[label]],
            "probabilities": dict(zip(names, values, strict=True)),
        }
        for index, (values, label) in enumerate(zip(table, labels, strict=True))
    ]


def test_scores_are_those_computed_by_hand():
    names = list("abcdef")
    table = [
        [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.3, 0.4, 0.1, 0.1, 0.06, 0.04],
        [0.9, 0.02, 0.02, 0.02, 0.02, 0.02],
        [0.4, 0.3, 0.2, 0.05, 0.04, 0.01],
    ]
    scores = score_rows("classify", rows_of(table, [0, 0, 1, 5], names))
    # a: one of two, b: none of one, f: none of one and last of six.
    assert scores.metrics["acc1"] == 0.25
    assert scores.metrics["acc5"] == 0.75
    assert scores.metrics["mean_per_class_recall"] == pytest.approx(0.5 / 3)
    assert scores.breakdowns == {"acc1": {"class": {"a": 0.5, "b": 0.0, "f": 0.0}}}
    # Bins of confidence: 0.5 (right), 0.4 twice (wrong), 0.9 (wrong).
    assert scores.metrics["ECE"] == pytest.approx((0.5 + 2 * 0.4 + 0.9) / 4)
    texts = score_rows("classify", [{"prediction": "a", "references": ["a"]}])
    assert texts.metrics == {"acc1": 1.0, "mean_per_class_recall": 1.0}
    assert set(texts.skipped) == {"acc5", "ECE"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"probabilities": {"a": 1.0}}, "row '1': expected a probability for each of 2 classes as probabilities"),
        ({"probabilities": {"a": 2.0, "b": 0.1}}, "from 0 to 1 as probabilities"),
        ({"references": ["c"]}, "row '1': expected one of its 2 classes as references"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(change, said):
    rows = rows_of([[0.9, 0.1]] * 2, [0, 1], ["a", "b"])
    rows[1] |= change
    with pytest.raises(ValueError, match=said):
        score_rows("classify", rows)


def test_the_temperature_makes_confidence_honest():
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(4000, 4)) * 2
    true = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    labels = [draw.choice(4, p=row) for row in true]
    # Scores three times too large: sure of too much.
    found = fit_temperature(3 * scores, labels)
    assert found == pytest.approx(3, rel=0.05)
    sharp = np.exp(3 * scores - (3 * scores).max(axis=1, keepdims=True))
    sharp /= sharp.sum(axis=1, keepdims=True)
    assert calibration_error(true, labels) < 0.03 < 0.15 < calibration_error(sharp, labels)
    rows = rows_of(sharp.tolist(), labels, list("abcd"))
    assert TASKS["classify"].calibrate(rows)["class_temperature"] == pytest.approx(found, rel=1e-4)


def test_rows_that_are_all_right_show_no_more_than_so_many_rows_can():
    """Without a wrong one, scores that are multiplied are likelier: the temperature fell to its bound."""
    scores, labels = np.log(np.array([[0.6, 0.3, 0.1]] * 10 + [[0.2, 0.7, 0.1]] * 10)), [0] * 10 + [1] * 10
    temperature = fit_temperature(scores, labels)
    shares = np.exp(scores / temperature)
    shares /= shares.sum(axis=1, keepdims=True)
    assert shares.max(axis=1).mean() == pytest.approx(21 / 22, abs=1e-4)
    # Sure enough already, or nothing to tell classes apart by.
    assert fit_temperature(40 * scores, labels) == 1.0
    assert fit_temperature(0 * scores, labels) == 1.0
    # Wrong rows decide again, by the likelihood alone.
    assert 1.2 * temperature < fit_temperature(scores, [1, 1, 1, *labels[3:]]) < 1


# Runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, bases):
    """A run with everything: scores before, in training, after and blind, and rows that calibrate."""
    folder = tmp_path_factory.mktemp("run")
    arguments = {
        "dataset_name": save_folder(folder / "data", 6),
        "task": "classify",
        "blind_splits": "test",
        "score_before": True,
        "calibration_rows": 4,
        "vision_model": bases[0],
        "model_name_or_path": bases[1],
        "vision_feature_layer": -1,
        "output_dir": folder / "out",
        "use_peft": True,
        "lora_r": 2,
        "use_cpu": True,
        "max_steps": 4,
        "learning_rate": 0.02,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_samples": 6,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "feature_cache_dir": folder / "features",
    }
    options = [str(part) for key, value in arguments.items() for part in (f"--{key}", value)]
    assert sft.main(options) == 0
    return folder, options


def test_a_run_leaves_classes_probabilities_and_a_temperature(trained):
    folder, _ = trained
    settings = TaskSettings.read(folder / "out")
    assert settings.class_names == ["blue", "dark red", "green"]
    assert settings.class_temperature != 1
    for condition in ("test", "test-before", "test-blind"):
        scores = json.loads((folder / "out" / "eval" / condition / "scores.json").read_text())
        assert set(scores["metrics"]) == {"acc1", "mean_per_class_recall", "ECE"}
        assert set(scores["breakdowns"]["acc1"]["class"]) == set(settings.class_names)
        rows = [json.loads(line) for line in (folder / "out" / "eval" / condition / "predictions.jsonl").open()]
        assert len(rows) == 18
        for row in rows:
            assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
            assert sum(row["probabilities"].values()) == pytest.approx(1)
    history = json.loads((folder / "out" / "log_history.json").read_text())
    assert any("eval_acc1" in entry for entry in history)


def test_eval_asks_as_trained_and_gives_the_same_scores(trained, tmp_path):
    folder, _ = trained
    options = ["--model", folder / "out", "--dataset", folder / "data", "--split", "test", "--output_dir", tmp_path]
    assert evaluate([str(each) for each in [*options, "--no-meteor", "--feature_cache_dir", folder / "features"]]) == 0
    again = json.loads((tmp_path / "scores.json").read_text())
    there = json.loads((folder / "out" / "eval" / "test" / "scores.json").read_text())
    assert again["metrics"] == there["metrics"]


def test_captions_and_the_web_page_name_classes(trained, capsys):
    folder, _ = trained
    picture = folder / "data" / "test" / "blue" / "0.png"
    there = [json.loads(line) for line in (folder / "out" / "eval" / "test" / "predictions.jsonl").open()]
    assert main(["caption", str(folder / "out"), str(picture)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    record = json.loads(line)
    # The run's feature cache holds half precision.
    nearest = min(abs(record["probabilities"]["blue"] - row["probabilities"]["blue"]) for row in there)
    assert nearest < 1e-3
    assert record["caption"] == max(record["probabilities"], key=record["probabilities"].get)
    model, processor = load_model(folder / "out")
    answers = PictureAnswers(model, processor, TaskSettings.read(folder / "out"))
    after, before = list(answers(picture, ""))[-1]
    first = f"{record['caption']} ({record['probabilities'][record['caption']]:.0%})"
    assert after.splitlines()[0] == first
    assert len(after.splitlines()) == len(before.splitlines()) == 3
    assert main(["caption", str(folder / "out"), str(picture), "--question", "What?"]) == 0
    assert "probabilities" not in capsys.readouterr().out


def test_the_report_shows_confusions_and_the_card_the_scores(trained):
    folder, _ = trained
    page = (folder / "out" / "report.html").read_text()
    rows = [json.loads(line) for line in (folder / "out" / "eval" / "test" / "predictions.jsonl").open()]
    said = sum(row["references"] == ["blue"] and row["prediction"] == "blue" for row in rows)
    assert f"<title>blue: {said} of 6 taken for blue</title>" in page
    assert "acc1 on test by class" in page
    assert "Higher is better, unless said otherwise." in page
    assert "mean_per_class_recall" in (folder / "out" / "README.md").read_text()


def test_a_confusion_chart_escapes_names_and_keeps_the_most_confused():
    counts = {(f"class {number}", f"class {number}"): 5 for number in range(40)}
    counts |= {(name, "class 1"): 2 for name in HOSTILE[:4]}
    drawn = str(confusion_chart("Confusion", counts))
    assert "<img" not in drawn
    assert "<script" not in drawn
    assert f"{2} of 2 taken for class 1" in drawn
    assert drawn.count('class="cell after"') == 20
    assert "200 of 208 rows on the diagonal" in drawn


def test_a_stream_needs_the_classes(trained):
    _, options = trained
    streamed = [*options, "--streaming", "true", "--calibration_rows", "0", "--output_dir", options[3] + "-stream"]
    with pytest.raises(ValueError, match="give --class_names"):
        sft.main(streamed)


def test_the_doctor_tries_it_without_the_rows_that_are_held_back(trained, tmp_path, capsys):
    _, options = trained
    config = dict(zip(options[::2], options[1::2], strict=True)) | {"--output_dir": str(tmp_path / "new")}
    config |= {"--max_steps": "-1", "--num_train_epochs": "1", "--per_device_train_batch_size": "1"}
    assert doctor([text for pair in config.items() for text in pair]) == 0
    said = capsys.readouterr().out
    assert "4 of them are held back, to calibrate the answers: 14 are trained on" in said
    assert "(1 epochs of 14 rows, 1 a step)" in said
    # 18 of test, before, after and blind; and those held back.
    assert "(58 texts)" in said


def test_a_finished_run_goes_on_from_its_checkpoint(trained):
    _, options = trained
    assert sft.main([*options, "--resume_from_checkpoint", "true", "--max_steps", "6"]) == 0
