"""Rewards: what a text earns in each task, and what no trick earns."""

import re
import sys

import pytest
from PIL import Image
from tiny_clips import save_tiny

from vlm_peft.metrics.captions import Cider
from vlm_peft.metrics.clip_score import clip_scores
from vlm_peft.tasks import TASKS
from vlm_peft.training import rewards
from vlm_peft.training.rewards import load_function, make_rewards, parse_reward

END = 258
CAPTIONS = [
    ["a dog runs on the grass", "the dog is running outside"],
    ["two cats sleep on a sofa", "cats asleep on the couch"],
    ["a red car in a street", "the car is parked"],
    ["a boat on a lake", "the boat is small"],
]
DOG = {"label": "dog", "box": [0, 0, 99, 99]}
ROWS = [
    *({"id": str(index), "references": texts} for index, texts in enumerate(CAPTIONS)),
    {"id": "vqa", "references": ["2"] * 10},
    {"id": "slides", "references": ["42"]},
    {"id": "digits", "references": ["0417"]},
    {"id": "grounding", "references": ["dog [0, 0, 99, 99]"], "boxes": [DOG]},
    {"id": "classify", "references": ["polar bear"]},
]
KINDS = [TASKS[name] for name in ["caption"] * 4 + ["vqa", "slides", "digits", "grounding", "classify"]]
ANSWERS = ["a dog runs on the grass", "two cats sleep on a sofa", "the car is parked", "a boat on a lake"]
ANSWERS += ["2", "42", "0417", "dog [0, 0, 99, 99]", "polar bear"]
PROMPT = "Describe the picture."


def build(*names, **options):
    asked = {"clip_model": None, "format_pattern": None, "device": "cpu"} | options
    pictures = [Image.new("RGB", (8, 8), (40 * number, 90, 200)) for number in range(4)]
    return make_rewards(
        names, ROWS, KINDS, END, training=range(len(ROWS)), open_picture=pictures.__getitem__, options=asked
    )


def pay(reward, texts, rows, ended=True):
    ids = [[1, 2, END] if ended else [1, 2, 3] for _ in texts]
    return reward(prompts=[PROMPT] * len(texts), completions=texts, completion_ids=ids, row=rows, trainer_state=None)


def test_each_question_is_paid_by_its_own_task():
    (reward,) = build("task")
    cider = Cider(CAPTIONS)
    expected = [*(cider(text, CAPTIONS[row]) for row, text in enumerate(ANSWERS[:4])), 1, 1, 1, 1, 1]
    assert pay(reward, ANSWERS, range(len(ROWS))) == pytest.approx(expected, rel=1e-12)
    assert pay(reward, ["3", "41", "0418", "cat [0, 0, 99, 99]", "bear"], range(4, 9)) == [0] * 5
    assert pay(reward, [" 0417 \n"], [6]) == [1]


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[kind.name for kind in KINDS])
def test_no_trick_is_paid(row):
    (reward,) = build("task")
    right, (honest,) = ANSWERS[row], pay(reward, [ANSWERS[row]], [row])
    assert honest > 0.5
    assert pay(reward, [right], [row], ended=False) == [0], "the end of the turn counts"
    assert pay(reward, ["", " \n"], [row, row]) == [0, 0]
    assert pay(reward, [" ".join([right] * 100)], [row]) == [0]
    repeated, prompt = pay(reward, [" ".join([right] * 3), PROMPT], [row, row])
    assert repeated < 0.7 * honest
    assert prompt < 0.1 * honest


def test_a_repeated_part_of_a_caption_earns_less_than_the_part():
    (reward,) = build("task")
    for count in (2, 4, 8):
        once, again = pay(reward, ["a dog runs", " ".join(["a dog runs"] * count)], [0, 0])
        assert again < once


def test_documents_are_counted_over_what_is_trained_on():
    rows = [*ROWS[:4], {"id": "held out", "references": ["a dog runs on the grass"] * 2}]
    of_all, of_some = (
        make_rewards(["task"], rows, [TASKS["caption"]] * 5, END, training=chosen, open_picture=None, options={})[0]
        for chosen in (range(5), range(4))
    )
    text, own = "a dog runs outside", Cider(CAPTIONS)
    assert pay(of_some, [text], [0]) == [pytest.approx(own(text, CAPTIONS[0]))]
    assert pay(of_all, [text], [0])[0] < pay(of_some, [text], [0])[0]


def test_length_is_paid_between_the_shortest_and_the_longest_reference():
    (reward,) = build("length")
    texts = ["a b c d e", "a b c d e f", "a b c", "a b c d e f g h i", " ".join("a" * 12), ""]
    assert pay(reward, texts, [0] * 6) == pytest.approx([1, 1, 3 / 5, 0.5, 0, 0])
    assert pay(reward, texts[:1], [0], ended=False) == [0]


def test_a_format_is_an_expression_that_matches_the_whole_text():
    (reward,) = build("format", format_pattern=r"([a-z ]+\.)?")
    assert pay(reward, ["a dog.", "a dog", "A dog.", "a dog. no", ""], [0] * 5) == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"--format_pattern '\[' is no regular expression"):
        build("format", format_pattern="[")


def test_clip_score_is_the_metric(tmp_path):
    clip = save_tiny(tmp_path)
    (reward,) = build("clip_score", clip_model=str(clip))
    texts, rows = ["a dog", "two cats", "a dog"], [0, 2, 0]
    pictures = [Image.new("RGB", (8, 8), (40 * number, 90, 200)) for number in rows]
    expected = clip_scores(clip, pictures, texts).per_picture["CLIPScore"]
    for _ in range(2):
        assert pay(reward, texts, rows) == pytest.approx(expected, abs=1e-6)
    assert pay(reward, texts, rows, ended=False) == [0, 0, 0]


def test_a_function_of_the_users_is_found_and_called_as_trl_calls_it(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions, completion_ids, **columns):\n"
        "    return [-len(text) for text in completions]\n"
        "x = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task, mine = build("task", "my_rewards:short")
    assert (task.__name__, mine.__name__) == ("task", "short")
    assert pay(mine, ["abc", ""], [0, 1]) == [-3, 0]
    sys.modules.pop("my_rewards")
    for name, said in {
        "my_rewards:long": "has no attribute 'long'. Expected module:function",
        "no_such_module:f": "No module named 'no_such_module'. Expected module:function",
        "my_rewards:x": "is a int, expected a function",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            load_function(name)


@pytest.mark.parametrize("name", ["cider", "my rewards:f", "module:", ":f", "a:b:c", "module.function"])
def test_an_unknown_reward_is_refused_at_once(name):
    with pytest.raises(ValueError, match="rewards: expected task, clip_score, length, format or module:function, got"):
        parse_reward(name)


def test_known_rewards_are_taken():
    for name in (*rewards.REWARDS, "a.b:c"):
        assert parse_reward(name) == name
