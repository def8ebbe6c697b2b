"""What the demo's small models are trained on: questions have their true answers, and looks go to what they name."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer

DEMO = ROOT / "recipes/demo"


@pytest.fixture(scope="module")
def scripts():
    """The scripts beside each other, as when one of them is run."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        import canvases
        import pretrain_reading
        import reading_texts

        yield canvases, pretrain_reading, reading_texts
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == DEMO:
            del sys.modules[name]


@pytest.fixture(scope="module")
def texts(scripts):
    _, reading, words = scripts
    held_out = reading.HeldOutFilter(reading.load_held_out_pairs(DEMO / "scenes/held_out_pairs.json"))
    tokenizer = Tokenizer.from_file(str(DEMO / "qwen3/tokenizer.json"))
    return words.ReadingTexts(tokenizer, ["stone", "river"], held_out, lambda number: [5] * number, 0, 0.9, True)


def test_yes_and_no_are_even_for_each_kind_of_question(texts):
    said = {"number": Counter(), "larger?": Counter(), "relation": Counter(), "present": Counter()}
    for _ in range(1500):
        scene = texts.scene(8)
        for kind, answers in said.items():
            _, _, answer = texts.ask(scene, kind)
            answers[{"right": "yes", "wrong": "no"}.get(answer, answer)] += 1
    for kind, answers in said.items():
        assert 0.44 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.56, (kind, answers)


def test_five_pages_of_the_demos_words_are_found_without_a_held_out_pair(scripts, texts):
    _, _, words = scripts
    held_out = texts._held_out
    only = words.ReadingTexts(texts._tokenizer, ["stone"], held_out, texts._english, 1, 1.0, True)
    for _ in range(20):
        assert not held_out(" ; ".join(only.pages(8, 5).words))


def test_numbers_are_compared_rightly(texts):
    values = {
        word: number for number, word in enumerate(("none", "one", "two", "three", "four", "five", "six", "seven"))
    }
    seen = set()
    for _ in range(600):
        scene = texts.scene(8)
        kind, question, answer = texts.ask(scene, "number")
        if not kind:
            continue
        tokens = question.rstrip("?").split()
        said = next(token for token in tokens if token.isdigit() or token in values)
        number, count = int(said) if said.isdigit() else values[said], len(scene.things)
        way = next(
            (name for name, words in {
                "least": ("least", "or more"), "most": ("most", "or less"), "over": ("over", "more than", "Above"),
                "under": ("under", "fewer", "Less"),
            }.items() if any(word in question for word in words)),
            "just",
        )  # fmt: skip
        holds = {
            "least": count >= number, "most": count <= number, "over": count > number, "under": count < number,
            "just": count == number,
        }[way]  # fmt: skip
        assert answer == ("yes" if holds else "no"), (question, count)
        seen.add((way, answer))
    assert len(seen) == 10


def test_words_look_at_the_cells_that_show_them_and_know_their_box(scripts, texts):
    _, reading, _ = scripts
    batch = reading.pack(texts, reading.Codes(192, 0), 1.0, 6, reading.LENGTH)
    cells = {int(place): names[shares > 0.2].tolist() for place, names, shares in
             zip(batch.cells, batch.names, batch.shares, strict=True)}  # fmt: skip
    looked = 0
    for place, columns, there in zip(batch.words.places, batch.words.targets, batch.there, strict=True):
        row, token = int(place) // reading.LENGTH, int(batch.ids.flatten()[place])
        shown = [row * reading.LENGTH + int(column) for column in columns.nonzero()[:, 0]]
        assert shown
        assert all(each <= place for each in shown)
        if there and all(each in cells for each in shown):
            # Some of a thing's cells are mostly ground, and names can be doubtful: not all of them.
            assert sum(token in cells[each] for each in shown) > 0.5 * len(shown)
            looked += 1
    assert looked > 50
    known = ~batch.boxes[:, 0].isnan()
    assert known.sum() > 20
    assert batch.there[known].all()
    assert (batch.boxes[known][:, 2:] > batch.boxes[known][:, :2]).all()
    # What comes before an answer looks at words of its own question, which lie before it.
    for looks in batch.asked:
        assert (looks.targets.sum(-1) == 1).all()
        assert (looks.targets.float().argmax(-1) <= looks.places % reading.LENGTH).all()


def test_places_before_numbers_know_the_box_that_the_numbers_say(scripts, texts):
    _, reading, words = scripts
    document = None
    for _ in range(60):
        scene = texts.scene(8)
        kind, question, answer = texts.ask(scene, "place")
        if kind and answer.count(";") == 1 and "(" in answer:
            document = words.Document([texts._user, texts.cells(scene, 8)], [texts._turn(question, answer)], ["place"])
            document.words = scene.words()
            break
    assert document is not None
    texts_picture, texts.picture = texts.picture, lambda *_, **__: document
    draw, reading.draw_document = reading.draw_document, lambda *_: document
    try:
        batch = reading.pack(texts, reading.Codes(192, 0), 1.0, 1, reading.LENGTH)
    finally:
        texts.picture, reading.draw_document = texts_picture, draw
    ids, (places, boxes) = batch.ids.flatten().tolist(), batch.digits
    number = ""
    for place, box in zip(places.tolist(), boxes, strict=True):
        token = texts._tokenizer.id_to_token(ids[place + 1])
        number = number + token if token.isdigit() else ""
        if len(number) == 3:
            assert min(abs(int(number) - 1000 * edge) for edge in box.tolist()) <= 1.5, (number, box)
    assert len(places) > 20


@pytest.mark.parametrize(
    ("guessed", "true", "right"),
    [
        ("a ( 1 0 0 , 1 0 0 , 5 0 0 , 5 0 0 )", "a ( 1 0 0 , 1 0 0 , 5 0 0 , 5 0 0 )", True),
        ("a ( 1 9 9 , 1 0 0 , 5 0 0 , 5 0 0 )", "a ( 1 0 0 , 1 0 0 , 5 0 0 , 5 0 0 )", True),
        ("a ( 4 0 0 , 1 0 0 , 5 0 0 , 5 0 0 )", "a ( 1 0 0 , 1 0 0 , 5 0 0 , 5 0 0 )", False),
        ("b ( 1 0 0 , 1 0 0 , 5 0 0 , 5 0 0 )", "a ( 1 0 0 , 1 0 0 , 5 0 0 , 5 0 0 )", False),
        ("a ( 1 ) 0 , 1 0 0 , 5 0 0 , 5 0 0 )", "a ( 1 0 0 , 1 0 0 , 5 0 0 , 5 0 0 )", False),
        ("none", "none", True),
        ("dog", "none", False),
    ],
)
def test_a_place_is_right_when_its_boxes_overlap_by_half(scripts, guessed, true, right):
    assert scripts[1].boxes_overlap(guessed.split(), true.split()) is right


def test_a_patch_has_the_digit_of_its_half_of_a_number(scripts):
    canvases, _, _ = scripts
    labels, boxes = torch.full((1, 64), canvases.IGNORED), torch.zeros(1, 64, 4)
    labels[0, 4:8], boxes[0, 4:8] = 1, torch.tensor([58.0, 0.0, 110.0, 14.0])
    labels[0, 8:10], boxes[0, 8:10] = 2, torch.tensor([0.0, 14.0, 28.0, 28.0])
    labels[0, 16], labels[0, 17] = 0, canvases.IGNORED - 1
    digits = canvases.written_digits(labels, boxes, {1: "37", 2: "5"})[0]
    assert digits[4:8].tolist() == [3, 3, 7, 7]
    assert digits[8:10].tolist() == [5, 5]
    assert set(np.delete(digits.numpy(), [*range(4, 10)]).tolist()) == {canvases.IGNORED}
