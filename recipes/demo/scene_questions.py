"""Questions and conversations about the demo's scenes, exact because they come from the scene.

A question of yes and no must not be answered by its wording: where most of a training set's "Is there ...?" are yes, a
model learns to say yes and never looks. So yes and no take turns, for each text and for what texts have in common.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from emoji_art import CONCEPTS, Concept

if TYPE_CHECKING:
    from build_scenes import Scene

NUMBERS = ("", "one", "two", "three")
# Larger is what has both more area and a longer side, by so much that nobody disputes it.
CLEARLY_LARGER_AREA, CLEARLY_LONGER = 1.5, 1.2
# Two of three scenes have two objects; so many of them are asked for their number, so that "2" is no good guess.
COUNT_SHARES = {1: 1.0, 2: 0.3, 3: 1.0}
COLOR_SHARE = 0.5
TYPES = ("color", "count", "position", "presence", "relation", "comparison", "last turn")


@dataclass
class Asked:
    """A question with its answer; ``shared``: what it has in common with others, for which answers are balanced."""

    question: str
    answer: str
    type: str
    shared: tuple[str, ...] = ()

    @property
    def row(self) -> dict[str, str]:
        """What the data set holds of it."""
        return {"question": self.question, "answer": self.answer, "type": self.type}


@dataclass
class Balance:
    """Which answers were given how often, over one split."""

    excess: Counter[str] = field(default_factory=Counter)

    def choose(self, candidates: Sequence[Asked], rng: np.random.Generator) -> Asked | None:
        """The one of ``candidates`` that brings yes and no closest; none if each would part those of its own text."""

        def excess(asked: Asked, key: str) -> int:
            return self.excess[key] * (1 if asked.answer == "yes" else -1)

        fair = [candidates[i] for i in rng.permutation(len(candidates))]
        fair = [each for each in fair if excess(each, each.question) <= 0]
        if not fair:
            return None
        chosen = min(fair, key=lambda each: sum(excess(each, key) for key in (each.question, *each.shared)))
        self.excess.update(dict.fromkeys((chosen.question, *chosen.shared), 1 if chosen.answer == "yes" else -1))
        return chosen


def absent_concepts(nouns: Iterable[str], held_out: set[frozenset[str]]) -> list[Concept]:
    """What may be asked for beside ``nouns`` and is none of them: a question shows no held-out pair, either."""
    nouns = list(nouns)
    return [
        c for c in CONCEPTS
        if c.noun not in nouns and not any(frozenset((c.noun, noun)) in held_out for noun in nouns)
    ]  # fmt: skip


def yes_no(holds: bool) -> str:
    """The answer."""
    return "yes" if holds else "no"


def directions(scene: Scene) -> tuple[str, str]:
    """Where the first of two neighbours is from the second, and the second from the first."""
    return ("to the left of", "to the right of") if scene.horizontal else ("above", "below")


def larger(scene: Scene, first: int, second: int) -> bool | None:
    """Whether an object is larger than another; None where their sizes are too near each other to say."""
    one, other = (
        (width * height, max(width, height)) for _, _, width, height in (scene.boxes[first], scene.boxes[second])
    )
    for big, small, answer in ((one, other, True), (other, one, False)):
        if big[0] >= CLEARLY_LARGER_AREA * small[0] and big[1] >= CLEARLY_LONGER * small[1]:
            return answer
    return None


def position_question(scene: Scene, rng: np.random.Generator) -> Asked:
    """About one of two neighbours; with three objects always beside the middle one, whose neighbours are unique."""
    at = int(rng.integers(len(scene.concepts) - 1))
    ask_for_first = at == 0 if len(scene.concepts) == 3 else rng.random() < 0.5
    first, second = scene.concepts[at], scene.concepts[at + 1]
    wanted, known = (first, second) if ask_for_first else (second, first)
    where = directions(scene)[0 if ask_for_first else 1]
    return Asked(f"What is {where} the {known.bare}?", wanted.noun, "position")


def presence_candidates(scene: Scene, others: Sequence[Concept]) -> list[Asked]:
    """ "Is there ...?" for what is there and for ``others``."""
    there = [(concept, True) for concept in scene.concepts] + [(concept, False) for concept in others]
    return [Asked(f"Is there {c.phrase}?", yes_no(holds), "presence", ("presence",)) for c, holds in there]


def pair_candidates(scene: Scene, held_out: set[frozenset[str]]) -> tuple[list[Asked], list[Asked]]:
    """What can be asked of two objects: where one is from the other, and which is larger.

    Of a scene with a held-out pair, these ask for that pair.
    """
    places = list(itertools.permutations(range(len(scene.concepts)), 2))
    names = [c.noun for c in scene.concepts]
    places = [p for p in places if frozenset(names[i] for i in p) in held_out] or places
    relations, sizes = [], []
    for one, other in places:
        first, second = scene.concepts[one], scene.concepts[other]
        is_larger = larger(scene, one, other)
        statements = [(relations, "relation", where, (one < other) == (where == directions(scene)[0]))
                      for where in directions(scene)]  # fmt: skip
        if is_larger is not None:
            statements += [
                (sizes, "comparison", how, is_larger == (how == "larger than"))
                for how in ("larger than", "smaller than")
            ]
        for found, kind, words, holds in statements:
            shared = (words, f"{words} {second.noun}", f"{first.noun} {words}", kind)
            found.append(Asked(f"Is the {first.bare} {words} the {second.bare}?", yes_no(holds), kind, shared))
    return relations, sizes


def number_candidates(number: int) -> list[Asked]:
    """What can be asked of the number of objects and answered by yes or no."""
    statements = {
        "Is there only one object?": number == 1,
        "Is there more than one object?": number > 1,
        "Are there exactly two objects?": number == 2,
        "Are there more than two objects?": number > 2,
        "Are there fewer than three objects?": number < 3,
    }
    return [Asked(text, yes_no(holds), "comparison", ("number",)) for text, holds in statements.items()]


def questions(
    scene: Scene, held_out: set[frozenset[str]], balance: Balance, rng: np.random.Generator
) -> tuple[list[dict[str, str]], list[Concept]]:
    """Four to seven questions with short answers, and what they ask for that is not there.

    Types are color, count, position, presence, relation (one object from another) and comparison (sizes, numbers).
    """
    number = len(scene.concepts)
    found: list[Asked | None] = []
    if rng.random() < COLOR_SHARE:
        found.append(Asked("What color is the background?", scene.background, "color"))
    if rng.random() < COUNT_SHARES[number]:
        found.append(Asked("How many objects are there?", str(number), "count"))
    if number > 1:
        found.append(position_question(scene, rng))
        relations, sizes = pair_candidates(scene, held_out)
        found += [balance.choose(relations, rng), balance.choose(sizes, rng)]
    found.append(balance.choose(number_candidates(number), rng))
    missing: list[Concept] = []
    for _ in range(2):
        others = absent_concepts([c.noun for c in [*scene.concepts, *missing]], held_out)
        known = {each.question for each in found if each}
        candidates = [each for each in presence_candidates(scene, others) if each.question not in known]
        asked = balance.choose(candidates, rng)
        found.append(asked)
        missing += [c for c in others if asked and asked.question == f"Is there {c.phrase}?"]
    return [each.row for each in found if each], missing


def conversation(
    scene: Scene,
    held_out: set[frozenset[str]],
    missing: Sequence[Concept],
    balance: Balance,
    rng: np.random.Generator,
) -> list[dict[str, str]]:
    """Two to four questions with their answers, of which later ones build on earlier ones.

    What the last one asks for, an object or the background's colour, is in no earlier turn and follows from none.

    Args:
        scene: What the picture shows.
        held_out: Pairs that no conversation names together, unless the picture shows them.
        missing: What the picture's questions ask for that is not there.
        balance: Of yes and no over the split.
        rng: Draws what is asked, and in which words.
    """

    def draw(options: Sequence[str]) -> str:
        return options[rng.integers(len(options))]

    names, number = [c.phrase for c in scene.concepts], len(scene.concepts)
    first_side, second_side = ("on the left", "on the right") if scene.horizontal else ("at the top", "at the bottom")
    before, after = directions(scene)
    turns: list[tuple[str, str]] = []

    def say_number() -> None:
        objects = "one object" if number == 1 else f"{NUMBERS[number]} objects"
        turns.append(
            (draw(["How many objects are there?", "How many things do you see?", "Count the objects."]), objects)
        )

    def ask_for(phrase: str) -> str:
        # After another such question, its answer and nothing else says what is asked.
        if turns and turns[-1][0].startswith(("Is there", "Do you see")) and rng.random() < 0.5:
            return f"And {phrase}?"
        return draw([f"Is there {phrase}?", f"Do you see {phrase}?"])

    def confirm(at: int) -> None:
        balance.excess.update({names[at]: 1, "presence": 1})
        turns.append((ask_for(names[at]), f"yes, there is {names[at]}"))

    def deny(again: bool = False) -> None:
        others = absent_concepts([c.noun for c in [*scene.concepts, *missing]], held_out)
        denied = [Asked(c.phrase, "no", "presence", ("presence",)) for c in others]
        fair = balance.choose(denied, rng)
        phrase = fair.question if fair else draw([c.phrase for c in others])
        bare = phrase.split(" ", 1)[1]
        turns.append((ask_for(phrase), f"no, there is no {bare}"))
        if again:
            turns.append((f"Are you sure that there is no {bare}?", "yes, I am sure"))

    def ask_neighbours(known: int) -> None:
        sides = [(known - 1, before), (known + 1, after)]
        sides = [sides[i] for i in rng.permutation(2) if 0 <= sides[i][0] < number]
        at, where = sides[0]
        asked = draw([f"What is {where} it?", f"And what is {where} it?", f"What do you see {where} it?"])
        turns.append((asked, names[at]))
        if len(sides) == 2 and rng.random() < 0.5:
            turns.append((draw(["And on the other side?", "What is on its other side?"]), names[sides[1][0]]))

    def ask_color(of_one: bool) -> None:
        behind = ["And what color is behind it?", "What is the color behind it?"]
        ground = ["What color is the background then?", "And what color is the background?", "And the background?"]
        turns.append((draw(behind if of_one and rng.random() < 0.5 else ground), scene.background))

    sizes = {i: larger(scene, i, 1 - i) for i in range(2)} if number == 2 else {}
    ways = ["color", "color then"]
    if number == 1:
        ways += ["single", "single then"]
    else:
        # An object is asked for several times as often as the colour, whose ten names are easier to guess.
        ways += 3 * ["neighbour", "order"] + 2 * ["side"]
        ways += 2 * ["size"] if sizes.get(0) is not None else []
    way = draw(ways)
    if way == "color":
        at = int(rng.integers(number))
        confirm(at)
        both = rng.random() < 0.5
        if both:
            deny()
        ask_color(of_one=not both)
    elif way == "color then":
        deny(again=rng.random() < 0.5)
        if rng.random() < 0.5:
            say_number()
        ask_color(of_one=False)
    elif way == "single":
        say_number()
        turns.append((draw(["Which one is it?", "And what is it?", "What is it then?"]), names[0]))
    elif way == "single then":
        deny(again=rng.random() < 0.5)
        turns.append((draw(["What is there then?", "What do you see then?"]), names[0]))
    elif way == "neighbour":
        # Of three objects, only the middle one has neighbours that "to the left of it" names without doubt.
        at, before_it = 1 if number == 3 else int(rng.integers(2)), rng.random()
        if before_it < 0.2:
            say_number()
        elif before_it < 0.8:
            deny()
        confirm(at)
        ask_neighbours(at)
    elif way == "side":
        at = 1 if number == 3 else int(rng.integers(2))
        side = "in the middle" if number == 3 else (first_side, second_side)[at]
        turns.append((draw([f"What is {side}?", f"Which object is {side}?"]), names[at]))
        ask_neighbours(at)
    elif way == "order":
        line = "in a row" if scene.horizontal else "in a column"
        say_number()
        turns.append((draw(["Are they in a row or in a column?", "In a row or in a column?"]), line))
        order = list(range(number)) if rng.random() < 0.5 else list(range(number))[::-1]
        sides = {0: first_side, number - 1: second_side} | ({1: "in the middle"} if number == 3 else {})
        order = order[: int(rng.integers(1, 3))]
        for place, at in enumerate(order):
            turns.append((f"{'And what' if place else 'What'} is {sides[at]}?", names[at]))
    else:
        say_number()
        how = draw(["larger", "smaller"])
        at = 0 if sizes[0] == (how == "larger") else 1
        turns.append((draw([f"Which of them is {how}?", f"Which one is the {how} one?"]), names[at]))
    messages = []
    for place, (asked, answer) in enumerate(turns):
        content = f"<image>{asked}" if place == 0 else asked
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def asked_texts(rows: Sequence[dict]) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers of each type, and as ``last turn`` those that conversations end with."""
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in TYPES}
    for row in rows:
        for each in row["questions"]:
            found[each["type"]].append((each["question"], each["answer"]))
        found["last turn"].append((row["messages"][-2]["content"], row["messages"][-1]["content"]))
    return found


def question_table(train: Sequence[dict], rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """For each type: how many questions, the share of "yes", and what the best guess from the text alone scores.

    The guess is the answer that the exact question has most often in ``train``, or else the type; scored are equal
    answers, and of the last turns, which may have several words, those that both have (F1).
    """
    from vlm_peft.metrics.answers import token_f1

    known, table = asked_texts(train), {}
    for kind, asked in asked_texts(rows).items():
        counted: dict[str, Counter[str]] = defaultdict(Counter)
        for question, answer in known[kind]:
            counted[question][answer] += 1
            counted[kind][answer] += 1
        guesses = [(counted.get(question) or counted[kind]).most_common(1)[0][0] for question, _ in asked]
        table[kind] = {
            "questions": len(asked),
            "yes": float(np.mean([answer == "yes" for _, answer in asked])),
            "prior": float(np.mean([token_f1(guess, [true]) for guess, (_, true) in zip(guesses, asked, strict=True)])),
        }
    return table
