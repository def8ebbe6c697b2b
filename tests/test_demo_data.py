"""The committed data sets of the demo: what they ask can be answered, and not from the words alone."""

import importlib.util
import re
import sys
from collections import Counter, defaultdict
from itertools import combinations, pairwise

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from vlm_peft.data.rows import bind_rows, load_rows
from vlm_peft.tasks import make_task

DEMO = ROOT / "recipes/demo"
SCENES, DOCUMENTS, DIGITS = DEMO / "scenes", DEMO / "documents", DEMO / "digits"
SPLITS = ("train", "test", "test_pairs", "test_style")
PAGES = [f"page_{place}" for place in range(1, 6)]
YES_NO = ("presence", "relation", "comparison")


def read(folder, split: str, columns: list[str] | None = None) -> list[dict]:
    return pq.read_table(folder / "data" / f"{split}-00000-of-00001.parquet", columns=columns).to_pylist()


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[dict]]:
    return {split: read(SCENES, split, ["questions", "messages", "objects", "background"]) for split in SPLITS}


@pytest.fixture(scope="module")
def documents() -> dict[str, list[dict]]:
    return {split: read(DOCUMENTS, split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def names():
    """Finds the demo's objects in texts, as the pre-training of the demo's decoder does."""
    spec = importlib.util.spec_from_file_location("emoji_art", DEMO / "emoji_art.py")
    art = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules["emoji_art"] = art
    spec.loader.exec_module(art)
    pairs = art.load_held_out_pairs(SCENES / "held_out_pairs.json")
    return {c.bare: c.noun for c in art.CONCEPTS}, pairs, art.HeldOutFilter(pairs)


def asked(rows: list[dict]) -> list[dict]:
    return [each for row in rows for each in row["questions"]]


@pytest.mark.parametrize("split", SPLITS)
def test_yes_and_no_are_even_for_each_type_and_each_wording(scenes, split):
    shares, texts = defaultdict(Counter), defaultdict(Counter)
    for each in asked(scenes[split]):
        if each["type"] in YES_NO:
            wording = re.sub(r"the .* (larger|smaller|to the left|to the right|above|below)", r"\1", each["question"])
            shares[each["type"]][each["answer"]] += 1
            shares[re.sub(r" (the|a|an) (?!left|right).*", "", wording)][each["answer"]] += 1
            texts[each["question"]][each["answer"]] += 1
    for kind in YES_NO:
        assert shares[kind].keys() == {"yes", "no"}
    for kind, counted in shares.items():
        assert abs(counted["yes"] - counted["no"]) <= max(1, 0.02 * counted.total()), (kind, counted)
    for text, counted in texts.items():
        assert abs(counted["yes"] - counted["no"]) <= 1, (text, counted)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_majority_in_training_answers_no_yes_no_question(scenes, split):
    counted, met = defaultdict(Counter), defaultdict(list)
    for each in asked(scenes["train"]):
        counted[each["question"]][each["answer"]] += 1
    for each in asked(scenes[split]):
        guess = counted[each["question"]].most_common(1)
        met[each["type"]].append(guess[0][0] == each["answer"] if guess else 0.5)
    shares = {kind: sum(values) / len(values) for kind, values in met.items()}
    assert all(shares[kind] < 0.56 for kind in YES_NO), shares
    assert shares["count"] < 0.5
    assert shares["position"] < 0.05
    assert shares["color"] < 0.2


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_what_the_scene_holds(scenes, names, split):
    noun = names[0]
    for row in scenes[split]:
        boxes = {each["name"]: each["box"] for each in row["objects"]}
        middle = {name: (x + width / 2, y + height / 2) for name, (x, y, width, height) in boxes.items()}
        area = {name: width * height for name, (_, _, width, height) in boxes.items()}
        assert len(boxes) == len(row["objects"])
        for each in row["questions"]:
            question, answer = each["question"], each["answer"]
            if each["type"] == "presence":
                found = re.fullmatch(r"Is there an? (.*)\?", question)
                assert answer == ("yes" if noun[found[1]] in boxes else "no")
            elif found := re.fullmatch(
                r"Is the (.*) (to the left of|to the right of|above|below) the (.*)\?", question
            ):
                axis, sign = {
                    "to the left of": (0, 1),
                    "to the right of": (0, -1),
                    "above": (1, 1),
                    "below": (1, -1),
                }[found[2]]
                steps = [middle[noun[found[3]]][i] - middle[noun[found[1]]][i] for i in range(2)]
                assert abs(steps[axis]) >= 2 * abs(steps[1 - axis])
                assert answer == ("yes" if sign * steps[axis] > 0 else "no")
            elif found := re.fullmatch(r"Is the (.*) (larger|smaller) than the (.*)\?", question):
                ratio = area[noun[found[1]]] / area[noun[found[3]]]
                assert max(ratio, 1 / ratio) >= 1.5
                assert answer == ("yes" if (ratio > 1) == (found[2] == "larger") else "no")
            elif found := re.fullmatch(r"What is (to the left of|to the right of|above|below) the (.*)\?", question):
                order = list(boxes)
                step = -1 if found[1] in ("to the left of", "above") else 1
                assert answer == order[order.index(noun[found[2]]) + step]
            elif each["type"] == "count":
                assert answer == str(len(boxes))
            elif each["type"] == "color":
                assert answer == row["background"]
            else:
                holds = {
                    "Is there only one object?": len(boxes) == 1,
                    "Is there more than one object?": len(boxes) > 1,
                    "Are there exactly two objects?": len(boxes) == 2,
                    "Are there more than two objects?": len(boxes) > 2,
                    "Are there fewer than three objects?": len(boxes) < 3,
                }[question]
                assert answer == ("yes" if holds else "no")
        texts = [each["question"] for each in row["questions"]]
        assert 3 <= len(texts) == len(set(texts)) <= 8


@pytest.mark.parametrize("split", SPLITS)
def test_conversations_end_with_what_no_earlier_turn_says(scenes, names, split):
    noun, _, mentions = names
    guesses = Counter()
    for row in scenes[split]:
        turns = row["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert 4 <= len(turns) <= 8
        assert [turn["content"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
        there, said = {each["name"] for each in row["objects"]}, turns[-1]["content"]
        earlier = " ".join(turn["content"] for turn in turns[:-1])
        if said != row["background"]:
            assert noun[said.split(" ", 1)[1]] in there
            assert not mentions.nouns(said) & mentions.nouns(earlier)
        else:
            assert said not in earlier.split()
        guesses[said] += 1
        for question, answer in pairwise(turn["content"] for turn in turns):
            if found := re.match(r"(yes, there is|no, there is no) (?:an? )?(.*)", answer):
                assert (noun[found[2]] in there) == found[1].startswith("yes")
                assert found[2] in question
    assert max(guesses.values()) < 0.06 * len(scenes[split])


@pytest.mark.parametrize("split", ["train", "test", "test_style"])
def test_no_text_of_a_row_holds_a_held_out_pair(scenes, names, split):
    _, pairs, is_held_out = names
    for row in scenes[split]:
        nouns = [each["name"] for each in row["objects"]]
        assert not any(frozenset(pair) in pairs for pair in combinations(nouns, 2))
        everything = [each["question"] for each in row["questions"]] + [turn["content"] for turn in row["messages"]]
        assert not is_held_out(" ".join([*nouns, *everything]))


def test_held_out_pairs_are_asked_for_where_they_are_shown(scenes, names):
    is_held_out = names[2]
    relations = [each["question"] for each in asked(scenes["test_pairs"]) if each["type"] == "relation"]
    assert len(relations) == len(scenes["test_pairs"])
    assert all(map(is_held_out, relations))


def test_no_picture_is_in_two_splits(documents):
    digest = {split: [row["image"]["bytes"] for row in read(SCENES, split, ["image"])] for split in SPLITS}
    everything = [picture for pictures in digest.values() for picture in pictures]
    assert len(set(everything)) == len(everything) == 3750
    pages = {
        split: {row[page]["bytes"] for row in rows for page in PAGES if row[page]} for split, rows in documents.items()
    }
    assert pages["train"].isdisjoint(pages["test"])
    assert len(pages["test"]) > 180


@pytest.mark.parametrize("split", ["train", "test"])
def test_decks_have_two_to_five_pages_and_three_or_four_questions(documents, split):
    decks = defaultdict(list)
    for row in documents[split]:
        decks[row["deck_name"]].append(row)
    for rows in decks.values():
        shown = [[row[page] is not None for page in PAGES] for row in rows]
        count = sum(shown[0])
        assert 2 <= count <= 5
        assert all(each == [True] * count + [False] * (5 - count) for each in shown)
        assert all(row[page] == rows[0][page] for row in rows for page in PAGES)
        assert len({row["question"] for row in rows}) == len(rows)
        assert all(len(row["evidence_pages"]) == 1 and 1 <= row["evidence_pages"][0] <= count for row in rows)
        assert 3 <= len(rows) <= 4
    assert len(decks) == {"train": 500, "test": 60}[split]
    assert [row["qa_id"] for row in documents[split]] == list(range(len(documents[split])))
    answers = Counter(row["answer"] for row in documents[split])
    assert max(answers.values()) < 0.05 * len(documents[split])


@pytest.mark.parametrize(
    ("folder", "task"),
    [
        *((SCENES, task) for task in ("caption", "vqa", "grounding", "chat")),
        (DOCUMENTS, "slides"),
        (DIGITS, "digits"),
    ],
)
def test_each_task_reads_its_data_without_options(folder, task):
    rows = load_rows(str(folder), "test", limit=6)
    bound = make_task(task, rows.column_names)
    texts, pictures = bind_rows(rows, bound)
    assert len(texts) == len(pictures) > 1
    example = bound.example(texts[0])
    assert sum(part["type"] == "image" for part in example.prompt[0]["content"]) == 1
    assert len(example.references) == len(example.questions or [()])
    if task == "chat":
        last = read(SCENES, "test", ["messages"])[0]["messages"][-2:]
        assert example.details[0]["question"] == last[0]["content"]
        assert example.references == [[last[1]["content"]]]


def test_committed_data_stays_small():
    data = [path.stat().st_size for folder in (SCENES, DOCUMENTS, DIGITS) for path in folder.rglob("*.*")]
    assert sum(data) <= 14e6
    assert sum(path.stat().st_size for path in (DOCUMENTS / "data").iterdir()) <= 3e6
    weights = [path.stat().st_size for folder in ("clip", "qwen3") for path in (DEMO / folder).iterdir()]
    code = [path.stat().st_size for path in ROOT.glob("[!.]*") if path.is_file()]
    folders = ("vlm_peft", "tests", "eval", "recipes/configs")
    code += [path.stat().st_size for name in folders for path in (ROOT / name).rglob("*.*") if path.suffix != ".pyc"]
    assert sum(data) + sum(weights) + sum(code) <= 36e6
