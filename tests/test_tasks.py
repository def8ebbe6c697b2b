"""Tasks: rows of published schemas become prompts and completions; rows without text are refused."""

import pytest

from vlm_peft.tasks import make_task
from vlm_peft.tasks.caption import caption_example
from vlm_peft.tasks.vqa import vqa_example

PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("  a dog ", ["a dog"]),
        (["a dog", " two dogs"], ["a dog", "two dogs"]),
        ([{"raw": "a dog", "sentid": 1}], ["a dog"]),
    ],
)
def test_captions_of_every_published_shape(cell, texts):
    example = caption_example(cell, "Describe.")
    assert example.completions == texts
    assert example.references == [texts]
    assert example.questions == [[]]
    assert example.prompt == [{"role": "user", "content": [PICTURE, {"type": "text", "text": "Describe."}]}]


@pytest.mark.parametrize("cell", [None, [], "", " \n", ["a dog", ""], ["a dog", None], [{"sentid": 1}], [3]])
def test_rows_without_a_caption_are_refused(cell):
    with pytest.raises(ValueError, match="Expected one or more captions with text, got"):
        caption_example(cell, "Describe.")


def test_questions_are_branches_with_their_own_unlabelled_text():
    example = vqa_example([{"question": "How many? ", "answer": " two"}, {"question": "Red?", "answer": "no"}])
    assert example.prompt == [{"role": "user", "content": [PICTURE]}]
    assert example.completions[0] == [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "two"},
    ]
    assert example.questions == [completion[:1] for completion in example.completions]
    assert example.references == [["two"], ["no"]]


@pytest.mark.parametrize(
    "cell",
    [None, [], [{"question": "a", "answer": None}], [{"question": " ", "answer": "b"}], [{"question": "a"}], ["a"]],
)
def test_rows_without_a_question_and_an_answer_are_refused(cell):
    with pytest.raises(
        ValueError, match=r"Expected (one or more questions with answers|an answer with text to .*), got"
    ):
        vqa_example(cell)


def test_the_usual_caption_columns_are_found_and_others_can_be_named():
    row = {"captions": ["x"], "caption": ["y"], "alt": "z"}
    assert make_task("caption", ["image", "caption", "captions"]).example(row).completions == ["x"]
    assert make_task("caption", ["image", "caption", "alt"]).example(row).completions == ["y"]
    task = make_task("caption", ["photo", "caption", "alt"], image_column="photo", text_column="alt")
    assert task.example(row).completions == ["z"]
    assert task.image_columns == ["photo"]


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("caption", ["photo", "caption"], "no column 'image'; it has caption, photo"),
        ("caption", ["image", "alt"], "no column 'captions or caption or sentences or text'; it has alt, image"),
        ("vqa", ["image", "caption"], "no column 'questions'; it has caption, image"),
        ("sing", ["image"], "Expected one of the tasks .*, got 'sing'"),
    ],
)
def test_missing_columns_are_listed_beside_those_there_are(name, columns, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, columns)
