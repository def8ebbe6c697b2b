"""Solved examples before a question: drawn with a seed, for every task, never the question's own picture."""

import json

import pytest
from conftest import flickr_rows, save_flickr
from datasets import Dataset, Image

from vlm_peft.commands import evaluate as command
from vlm_peft.data.arguments import DataArguments
from vlm_peft.data.splits import Split, load_split
from vlm_peft.evaluation import few_shot
from vlm_peft.evaluation.few_shot import check_room, load_examples, with_examples
from vlm_peft.tasks import TASKS

DATA = {"stored_split": "test", "split_column": "split"}


@pytest.fixture
def drawn(flickr, processor):
    """The split `test` behind examples of the split `train`."""

    def draw(shots, seed=0, task="caption", dataset=flickr, **options):
        data = DataArguments(dataset_name=str(dataset), task=task, **DATA, **options)
        split = load_split(data, "test", processor)
        source = load_examples(data, "train", processor, count=100, seed=seed)
        return with_examples(split, source, shots, seed)

    return draw


def test_examples_stand_before_the_question_with_their_own_answers(drawn):
    split = drawn(2)
    plain = list(Split.questions(split))
    for question, alone in zip(split.questions(), plain, strict=True):
        assert [message["role"] for message in question.prompt] == ["user", "assistant", "user", "assistant", "user"]
        assert question.prompt[-1:] == alone.prompt
        assert (question.id, question.references) == (alone.id, alone.references)
        assert question.image_ids[-1:] == alone.image_ids
        assert question.solved == 2
        for place, image in enumerate(question.image_ids[:2]):
            row = split.source.texts[image - len(split.pictures)]
            assert question.prompt[2 * place + 1]["content"] in row["caption"]
    features = split.fetch_images([question.image_ids[0], question.image_ids[-1]])["pixel_values"]
    own = split.source.fetch_images([question.image_ids[0] - len(split.pictures)])["pixel_values"]
    assert (features[:1] == own).all()


def test_the_seed_decides_and_each_question_has_its_own(drawn):
    prompts = [str([question.prompt for question in drawn(3, seed).questions()]) for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    pictures = {tuple(question.image_ids[:3]) for question in drawn(3).questions()}
    assert len(pictures) == 4
    assert [question.prompt for question in drawn(0).questions()] == [
        question.prompt for question in Split.questions(drawn(3))
    ]


def test_a_question_never_sees_its_own_picture_solved(drawn, tmp_path):
    rows = flickr_rows()
    test = [index for index, name in enumerate(rows["split"]) if name == "test"]
    train = [index for index, name in enumerate(rows["split"]) if name == "train"]
    for copy, original in zip(train[2:], [each for each in test for _ in range(5)], strict=False):
        rows["image"][copy] = rows["image"][original]
    split = drawn(6, dataset=save_flickr(tmp_path, rows))
    for question in split.questions():
        own = split.pictures.hashes[question.image_ids[-1]]
        shown = [split.source.pictures.hashes[image - len(split.pictures)] for image in question.image_ids[:-1]]
        assert own not in shown
    with pytest.raises(ValueError, match="Expected 30 solved examples with other pictures"):
        list(drawn(30, dataset=tmp_path).questions())


def test_every_task_has_examples(drawn, tmp_path):
    rows, folder = flickr_rows(), tmp_path
    count = len(rows["image"])
    rows |= {"question": ["what?"] * count, "answer": ["wall"] * count, "label": ["red", "blue"] * (count // 2)}
    rows["digits"] = [str(index) for index in range(count)]
    rows["objects"] = [[{"name": "wall", "box": [0, 0, 5, 5]}]] * count
    messages = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "This."}]
    rows["messages"] = [messages] * count
    rows |= {"page_1": rows["image"], "evidence_pages": [[1]] * count}
    Dataset.from_dict(rows).cast_column("image", Image()).cast_column("page_1", Image()).to_parquet(
        folder / "test-00000-of-00001.parquet"
    )
    for task in TASKS:
        for question in drawn(2, task=task, dataset=folder).questions():
            roles = [message["role"] for message in question.prompt]
            assert roles.count("assistant") == 2
            assert roles[-1] == "user"
            places = sum(
                part["type"] == "image"
                for message in question.prompt
                for part in message["content"]
                if not isinstance(message["content"], str)
            )
            assert places == len(question.image_ids) == 3


def test_more_pictures_than_the_decoder_holds_are_refused_before_any_is_encoded(
    drawn, model, processor, adapter, flickr, tmp_path, monkeypatch
):
    check_room(model, processor, drawn(4), 6)
    with pytest.raises(
        ValueError, match=r"12 solved examples are too many.*13 pictures of 16 tokens.*room for about \d"
    ) as refused:
        check_room(model, processor, drawn(12), 6)
    room = int(str(refused.value).split("about ")[1][0])
    check_room(model, processor, drawn(room), 6)

    from vlm_peft.data import splits

    monkeypatch.setattr(splits, "build_feature_cache", None)
    with pytest.raises(ValueError, match="solved examples are too many"):
        run(adapter, flickr, tmp_path, "--shots", "12")


def run(adapter, flickr, output, *options):
    given = ["--model", adapter, "--dataset", flickr, "--stored_split", "test", "--split_column", "split"]
    given += ["--split", "test", "--output_dir", output, "--feature_cache_dir", output / "features", "--no-meteor"]
    assert command.main([str(each) for each in [*given, "--tokenizer", "treebank-python", *options]]) == 0
    rows = [json.loads(line) for line in (output / "predictions.jsonl").open()]
    return [row["prediction"] for row in rows], json.loads((output / "scores.json").read_text())


def test_the_command(adapter, flickr, tmp_path, monkeypatch, capsys):
    plain, scores = run(adapter, flickr, tmp_path)
    assert "shots" not in scores["decoding"]
    assert run(adapter, flickr, tmp_path, "--shots", "0")[0] == plain
    shown, scores = run(adapter, flickr, tmp_path, "--shots", "2", "--seed", "1")
    assert shown != plain
    assert {"shots": 2, "shot_split": "train", "seed": 1}.items() <= scores["decoding"].items()
    assert run(adapter, flickr, tmp_path, "--shots", "2", "--seed", "1", "--no-feature_cache")[0] == shown
    asked = []
    generate = few_shot.FewShotSplit.questions
    monkeypatch.setattr(
        few_shot.FewShotSplit, "questions", lambda self: asked.append(list(generate(self))) or asked[-1]
    )
    blind, _ = run(adapter, flickr, tmp_path, "--shots", "2", "--seed", "1", "--blind")
    assert blind != shown
    with pytest.raises(SystemExit):
        run(adapter, flickr, tmp_path, "--shots", "2", "--shot_split", "test")
    assert "is what is scored" in capsys.readouterr().err


def test_the_blind_control_swaps_the_question_s_picture_only(drawn, monkeypatch):
    from vlm_peft.evaluation import evaluate

    split, seen = drawn(2), []

    def generate(model, processor, prompts, image_ids, *_, **__):
        seen.append(image_ids)
        return ["x"] * len(prompts)

    monkeypatch.setattr(evaluate, "generate_texts", generate)
    questions = list(split.questions())
    for blind in (False, True):
        evaluate.generate_rows(None, None, questions, split.fetch_images, task=split.task, blind=blind)
    own, blind = seen
    assert [ids[:2] for ids in own] == [ids[:2] for ids in blind]
    assert [ids[2] for ids in blind] == [own[(place + 2) % 4][2] for place in range(4)]
