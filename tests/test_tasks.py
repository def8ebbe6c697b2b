"""Tasks: rows of published schemas become prompts and completions; rows without text are refused."""

import pytest
from separate_samples import RELATIVE, compare

from vlm_peft.tasks import make_task
from vlm_peft.tasks.caption import caption_example
from vlm_peft.tasks.chat import chat_example
from vlm_peft.tasks.vqa import vqa_example

PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("  a dog ", ["a dog"]),
        (["a dog", " two dogs"], ["a dog", "two dogs"]),
        ([{"raw": "a dog", "sentid": 1}], ["a dog"]),
        ({"raw": ["a dog", "two dogs"], "sentid": [1, 2]}, ["a dog", "two dogs"]),
        ([["a dog", "two dogs"], ["b"]], ["a dog", "two dogs", "b"]),
    ],
)
def test_captions_of_every_published_shape(cell, texts):
    example = caption_example(cell, "Describe.")
    assert example.completions == texts
    assert example.references == [texts]
    assert example.questions == [[]]
    assert example.prompt == [{"role": "user", "content": [PICTURE, {"type": "text", "text": "Describe."}]}]


@pytest.mark.parametrize("cell", [None, [], "", " \n", ["a dog", ""], ["a dog", None], [{"sentid": 1}], {}, [3], 3])
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
    [
        None,
        [],
        ["a"],
        [{"question": "a"}],
        [{"question": " ", "answer": "b"}],
        [{"question": 3, "answer": "b"}],
        [{"question": "a", "answer": None}],
        [{"question": "a", "answer": True}],
        [{"question": "a", "answer": float("nan")}],
        [{"question": "a", "answer": "b", "answers": [{"answer_id": 1}]}],
    ],
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
        ("caption", ["sentences", "url"], r"'image'; it has sentences, url\..* not downloaded from addresses \(url\)"),
        ("vqa", ["image", "caption"], "no column 'questions'; it has caption, image"),
        (
            "vqa",
            ["image", "question"],
            "no column 'answers or multiple_choice_answer or answer'; it has image, question",
        ),
        (
            "slides",
            ["image", "question", "answer"],
            "no column 'page_1', 'evidence_pages'; it has answer, image, quest",
        ),
        ("chat", ["image", "text"], "no column 'messages or conversations'; it has image, text"),
        ("sing", ["image"], "Expected one of the tasks .*, got 'sing'"),
    ],
)
def test_missing_columns_are_listed_beside_those_there_are(name, columns, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, columns)


# --- vqa ---


@pytest.mark.parametrize(
    ("item", "learnt", "accepted"),
    [
        ({"answer": 2}, "2", ["2"]),
        ({"answer": 2.0}, "2", ["2"]),
        ({"multiple_choice_answer": 0, "answers": [1, 1, 0]}, "0", ["1", "1", "0"]),
        ({"answer": 0.5}, "0.5", ["0.5"]),
        ({"answer": ["a", "b", "b"]}, "b", ["a", "b", "b"]),
        ({"answers": ["a", "", "a "], "multiple_choice_answer": "a"}, "a", ["a", "", "a"]),
        ({"answers": [{"answer": "b", "answer_id": 1}, {"answer": "a", "answer_id": 2}] * 5}, "b", ["b", "a"] * 5),
        ({"answers": {"answer": ["a", "a", "b"], "answer_id": [1, 2, 3]}}, "a", ["a", "a", "b"]),
    ],
)
def test_answers_of_every_published_shape(item, learnt, accepted):
    example = vqa_example([{"question": "What?", **item}])
    assert example.completions[0][-1] == {"role": "assistant", "content": learnt}
    assert example.references == [accepted]


def test_rows_are_grouped_by_their_picture_and_named_by_their_question():
    columns = ["image", "question", "answers", "multiple_choice_answer", "question_id", "image_id"]
    task = make_task("vqa", columns, instruction="Be brief.")
    assert task.id_column == "question_id"
    assert task.group_key({"image_id": 3}) == task.group_key({"image_id": 3}) != task.group_key({"image_id": 4})
    assert task.group_key({"image_id": None}) != task.group_key({"image_id": None})
    cells = {"question": ["A?", "B?"], "answers": [["a"], ["b"]], "multiple_choice_answer": ["a", "b"]}
    example = task.example(cells | {"id": [30, 31], "image_id": [3, 3]})
    assert [question[0]["content"] for question in example.questions] == ["A? Be brief.", "B? Be brief."]
    assert make_task("vqa", columns[:-1], text_column="question").group_key is None


# --- slides ---

DECK = ["page_1", "page_2", "page_3", "page_10", "question", "answer", "evidence_pages", "deck_name", "qa_id"]
QUESTIONS = {"question": ["A?", " B? "], "answer": ["42", 3], "evidence_pages": [[10, 1], [1, 10]]}


def texts_of(example) -> list[str]:
    return [completion[-1]["content"] for completion in example.completions]


def test_evidence_pages_are_shown_in_order_each_after_its_number():
    task = make_task("slides", DECK)
    assert task.image_columns == ["page_1", "page_2", "page_3", "page_10"]
    row = QUESTIONS | {"picture_places": [0, 1, 2, 3]}
    assert task.pages(row) == [0, 3]
    example = task.example(row)
    content = [{"type": "text", "text": "Page 1:"}, PICTURE, {"type": "text", "text": "Page 10:"}, PICTURE]
    assert example.prompt == [{"role": "user", "content": content}]
    assert [question[0]["content"] for question in example.questions] == ["A?", "B?"]
    assert texts_of(example) == ["42", "3"]
    assert example.details[1] == {"question": "B?", "evidence_pages": [1, 10]}


def test_the_whole_deck_is_what_it_has():
    task = make_task("slides", DECK, slide_pages="all")
    row = QUESTIONS | {"picture_places": [0, 2, 3]}
    assert task.pages(row) == [0, 2, 3]
    names = [part["text"] for part in task.example(row).prompt[0]["content"] if part["type"] == "text"]
    assert names == ["Page 1:", "Page 3:", "Page 10:"]


def test_learnt_answers_name_their_pages_and_references_do_not():
    task = make_task("slides", DECK, name_pages=True, slide_pages="all")
    row = QUESTIONS | {"evidence_pages": [[10, 1], [3]], "picture_places": [0, 1, 2, 3]}
    example = task.example(row)
    assert texts_of(example) == ["42 (pages 1, 10)", "3 (page 3)"]
    assert example.references == [["42"], ["3"]]


def test_questions_share_a_deck_or_its_evidence():
    first = {"deck_name": "a", "evidence_pages": [3, 1]}
    for pages, groups in (("evidence", [1, 1, 2, 3]), ("all", [1, 1, 1, 3])):
        key = make_task("slides", DECK, slide_pages=pages).group_key
        rows = [first, first | {"evidence_pages": [1, 3]}, first | {"evidence_pages": [1]}, first | {"deck_name": "b"}]
        keys = [key(row) for row in rows]
        assert [[keys[other] == name for other in range(4)] for name in keys] == [
            [groups[other] == group for other in range(4)] for group in groups
        ]
    assert key({"deck_name": None}) != key({"deck_name": None})


@pytest.mark.parametrize("evidence", [[], None, [0], [4], ["one"], [1, True], 1])
def test_evidence_outside_the_deck_is_refused(evidence):
    task = make_task("slides", DECK)
    row = {"question": ["A?"], "answer": ["42"], "evidence_pages": [evidence], "picture_places": [0, 1, 2]}
    task.pages(row)
    with pytest.raises(ValueError, match="Expected evidence_pages of 'A\\?' among the deck's pages 1, 2, 3, got"):
        task.example(row)


@pytest.mark.parametrize(("column", "cell"), [("question", " "), ("question", None), ("answer", ""), ("answer", None)])
def test_decks_without_question_or_answer_are_refused(column, cell):
    row = {"question": ["A?"], "answer": ["42"], "evidence_pages": [[1]], "picture_places": [0]} | {column: [cell]}
    with pytest.raises(ValueError, match=r"Expected (a question about the deck|an answer .* to 'A\?'), got"):
        make_task("slides", DECK).example(row)


# --- chat ---


def said(text: str) -> dict:
    return {"type": "text", "text": text}


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [PICTURE, said("What?")]},
    {"role": "assistant", "content": "A <image> dog."},
    {"role": "user", "content": [said("Sure?"), PICTURE]},
    {"role": "assistant", "content": [said("Yes."), said("Two.")]},
    {"role": "user", "content": "Thanks."},
]
CONVERSATIONS = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "A <image> dog.\n"},
    {"from": "human", "value": "Sure?<image>"},
    {"from": "gpt", "value": "Yes.\nTwo."},
]


@pytest.mark.parametrize("conversation", [MESSAGES, CONVERSATIONS])
def test_both_shapes_of_conversations(conversation):
    example = chat_example(conversation)
    assert example.prompt == [
        {"role": "system", "content": [said("Be brief.")]},
        {"role": "user", "content": [PICTURE, said("What?")]},
        {"role": "assistant", "content": [said("A <image> dog.")]},
        {"role": "user", "content": [said("Sure?"), PICTURE]},
    ]
    assert example.completions == ["Yes.\nTwo."]
    assert example.references == [["Yes.\nTwo."]]
    assert example.details == [{"question": "Sure?"}]


def test_the_assistant_s_turns_are_learnt_and_nothing_else(processor):
    example = chat_example(CONVERSATIONS)
    row = processor.encode_row(example.prompt, example.completions)
    labels = [label for label in row.shift_labels if label != -100]
    assert processor.tokenizer.decode(labels) == "A <image> dog.<|im_end|>Yes.\nTwo.<|im_end|>"
    assert row.input_ids.count(processor.image_token_id) == 2 * processor.num_image_tokens
    # The evaluation asks with what training has before the last answer.
    prompt = processor.encode_prompt(example.prompt)
    assert row.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("text", ["<|im_end|>", "<|image_pad|>", "<|im_start|>assistant"])
def test_control_tokens_in_a_conversation_stay_text(processor, text):
    turns = [{"from": "human", "value": f"<image>{text}"}, {"from": "gpt", "value": f"{text}!"}]
    example = chat_example(turns)
    row = processor.encode_row(example.prompt, example.completions)
    assert row.input_ids.count(processor.image_token_id) == processor.num_image_tokens
    assert sum(label == processor.end_of_turn_token_id for label in row.shift_labels) == 1


def test_text_alone_and_pictures_in_order():
    example = chat_example([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    assert example.prompt == [{"role": "user", "content": [said("Hi")]}]
    pictures = [{"type": "image", "index": index, "text": None} for index in (0, 1)]
    turns = [{"role": "user", "content": pictures}, {"role": "assistant", "content": "Hello"}]
    assert chat_example(turns).prompt == [{"role": "user", "content": [PICTURE, PICTURE]}]
    turns[0] = {"role": "user", "content": pictures[::-1]}
    with pytest.raises(ValueError, match="in the order of the pictures"):
        chat_example(turns)


ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "conversation",
    [
        None,
        [],
        "Hi",
        ["Hi"],
        [ANSWER],
        [ANSWER, {"role": "user", "content": "Hi"}, ANSWER],
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}],
        [{"role": "user", "content": None}, ANSWER],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER],
        [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Hi"}, ANSWER],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [PICTURE]}],
        [{"role": "tool", "content": "Hi"}, ANSWER],
        [{"from": "human", "text": "Hi"}, ANSWER],
    ],
)
def test_conversations_that_teach_nothing_are_refused(conversation):
    with pytest.raises(ValueError, match=r"Expected (a|turns|parts|pictures) "):
        chat_example(conversation)


def test_columns_of_conversations():
    assert make_task("chat", ["id", "conversations", "image"]).image_columns == ["image"]
    assert make_task("chat", ["messages", "images"]).image_columns == ["images"]
    assert make_task("chat", ["messages"]).image_columns == []
    with pytest.raises(ValueError, match="no column 'photo'"):
        make_task("chat", ["messages", "images"], image_column="photo")
    with pytest.raises(ValueError, match="chat has its instructions in the data"):
        make_task("chat", ["messages", "images"], instruction="Be brief.")


# --- shared prefixes ---


def vqa_row():
    cells = {"question": ["How many?", "Is it red?"], "answer": [2, "no"], "image_id": [7, 7]}
    return make_task("vqa", ["image", *cells], instruction="Be brief.").example(cells)


def deck_row():
    cells = {"question": ["Which color?", "How many?"], "answer": ["red", "3"], "evidence_pages": [[1, 3], [3]]}
    task = make_task("slides", DECK, slide_pages="all", name_pages=True)
    return task.example(cells | {"picture_places": [0, 2]})


def chat_row():
    return chat_example(CONVERSATIONS)


@pytest.mark.parametrize("rows", [[vqa_row], [deck_row], [vqa_row, deck_row, chat_row]])
def test_grouped_rows_learn_what_separate_samples_would(rows):
    examples = [make() for make in rows]
    loss, gradient = compare([(example.prompt, example.completions) for example in examples])
    assert loss < RELATIVE
    assert gradient < RELATIVE
