"""Texts from which the demo's decoder learns to read: soft grids of words that stand for pictures, questions, answers.

A picture reaches the decoder as 64 vectors, row by row. Here such a grid is made from the decoder's own input
embeddings: a cell that a thing covers by c is c * e(name) + (1 - c) * e(ground's colour), plus smooth codes of the
thing's four edges and of the cell's own row and column, plus noise; names are confused now and then, as an encoder
confuses them. The codes exist in this stage only: a projector has to find a linear map into this space.

No text names both nouns of a held-out pair, and questions and answers are worded differently from the demo's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from emoji_art import BACKGROUNDS, CONCEPTS, HeldOutFilter
from tokenizers import Tokenizer

COLOURS = tuple(BACKGROUNDS)
DEMO_SHARE = 0.4
HELD_OUT_WORDS = 0.1
NAMES_A_CELL = 4
GRID = 1000
FULL_SIDE = 8
NOWHERE = ("nowhere", "not there", "none")
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven")
_PHRASES = {c.noun: c.phrase for c in CONCEPTS}


@dataclass
class Thing:
    """A word and its box, corners in 0..1; `rival` is what an encoder takes it for by a share of `doubt`."""

    word: str
    box: tuple[float, float, float, float]
    rival: str = ""
    doubt: float = 0.0

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box: across, down."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> float:
        """Share of the grid that the box takes."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    @property
    def corners(self) -> list[int]:
        """x1, y1, x2, y2 in thousandths, both corners inside."""
        first, last = self.box[:2], self.box[2:]
        return [round(GRID * each) for each in first] + [min(round(GRID * each), GRID) - 1 for each in last]


@dataclass
class Scene:
    """Things on a ground; `axis` is 0 for a row, 1 for a column, and None where they stand freely."""

    things: list[Thing]
    ground: str
    axis: int | None
    absent: list[str]

    def words(self) -> list[str]:
        """The different words that are there."""
        return list(dict.fromkeys(each.word for each in self.things))

    def count(self, word: str) -> int:
        """How many things have this word."""
        return sum(each.word == word for each in self.things)

    def single(self) -> list[Thing]:
        """Things whose word no other has."""
        return [each for each in self.things if self.count(each.word) == 1]


@dataclass
class Cells:
    """Cells (n): token ids (n, K) with weights (n, K), edges (n, 4) or NaN, and place (n, 2), all of the latter 0..1.

    `where` has the cells that show a word, `boxes` the box of a word that one thing has and no other.
    """

    ids: np.ndarray
    weights: np.ndarray
    edges: np.ndarray
    place: np.ndarray
    where: dict[str, np.ndarray]
    boxes: dict[str, tuple[float, float, float, float]]


Part = "list[int] | Cells"
Span = tuple[list[int], float]
"""Token ids and the weight of the loss on them; 0 for what is only read."""


@dataclass
class Document:
    """What all of `branches` begin with, and branches that do not see each other; a kind's name for each branch.

    `words` are those that can be looked up in the prefix, whether they are there or not.
    """

    prefix: list
    branches: list[list[Span]]
    kinds: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


def _overlap(a: tuple[float, ...], b: tuple[float, ...], gap: float) -> bool:
    """Whether two boxes are less than `gap` apart."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def listed(words: list[str], last: str = "and") -> str:
    """ "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


class ReadingTexts:
    """Makes documents.

    Args:
        tokenizer: The demo's.
        words: Words beside the demo's nouns that things can have.
        held_out: Refuses texts that name both objects of a held-out pair.
        english: Token ids of general English, endless.
        seed: Of all draws.
        demo_share: Share of the things that are the demo's nouns.
        two_looks: Whether questions that need a second look after the first (relations, neighbours, order) are more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        words: list[str],
        held_out: HeldOutFilter,
        english: Callable[[int], list[int]],
        seed: int,
        demo_share: float = DEMO_SHARE,
        two_looks: bool = False,
    ) -> None:
        self._tokenizer, self._words, self._held_out, self._english = tokenizer, words, held_out, english
        self.rng, self._numpy, self._demo_share = random.Random(seed), np.random.default_rng(seed), demo_share
        self.two_looks = two_looks
        self._demo = [c.noun for c in CONCEPTS]
        self._easy = {
            "present": 3.0, "check": 3.0, "list": 1.5, "say": 2.0, "which of": 1.0, "beside": 2.0, "colour": 0.8,
        }  # fmt: skip
        self._cache: dict[str, list[int]] = {}
        self._user = self._encode("<|im_start|>user\n")
        self._reply = self._encode("<|im_end|>\n<|im_start|>assistant\n")
        self._end, self._again = self._encode("<|im_end|>"), self._encode("\n<|im_start|>user\n")
        self.questions: dict[str, tuple[Callable, float]] = {
            "say": (self._say, 2.0),
            "list": (self._list, 0.7),
            "present": (self._present, 4.0),
            "check": (self._check, 1.5),
            "missing": (self._missing, 0.7),
            "both": (self._both, 0.8),
            "which of": (self._which_of, 0.7),
            "count": (self._count, 1.0),
            "number": (self._number, 1.0),
            "count of": (self._count_of, 0.8),
            "more": (self._more, 0.6),
            "beside": (self._beside, 2.0),
            "relation": (self._relation, 2.0),
            "first": (self._first, 0.7),
            "larger": (self._larger, 1.0),
            "larger?": (self._is_larger, 1.2),
            "colour": (self._colour, 0.8),
            "colour?": (self._is_colour, 0.5),
            "place": (self._place, 2.2),
            "edge": (self._edge, 0.6),
            "at": (self._at, 0.5),
            "half": (self._half, 0.0),
            "sorted": (self._sorted, 0.0),
        }
        self._two_looks = {
            "say": 1.5, "list": 0.7, "present": 2.0, "check": 0.7, "missing": 0.5, "both": 0.6, "which of": 0.6,
            "count": 2.5, "number": 4.0, "count of": 0.6, "more": 0.6, "beside": 4.0, "relation": 3.5, "first": 1.8,
            "larger": 2.5, "larger?": 4.0, "colour": 0.5, "colour?": 1.2, "place": 7.0, "edge": 2.5, "at": 1.0,
            "half": 2.0, "sorted": 2.0,
        }  # fmt: skip

    # Words and token ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def name(self, word: str) -> list[int]:
        """Token ids of a word in running text; those of digits have no blank."""
        if word not in self._cache:
            self._cache[word] = self._encode(word if word.isdigit() else f" {word}")
        return self._cache[word]

    def _draw(self, count: int, taken: list[str] | None = None) -> list[str]:
        """Different words, no two of which (nor one with those taken) are a held-out pair."""
        words = list(taken or [])
        while len(words) < count + len(taken or []):
            word = self.rng.choice(self._demo if self.rng.random() < self._demo_share else self._words)
            # Word by word: twenty of the demo's nouns at once hardly ever hold no pair.
            if word not in words and not self._held_out(" ; ".join([*words, word])):
                words.append(word)
        return words[len(taken or []) :]

    def bare_name(self, word: str) -> list[int]:
        """Token ids of a word at the beginning of an answer."""
        if f"^{word}" not in self._cache:
            self._cache[f"^{word}"] = self._encode(word)
        return self._cache[f"^{word}"]

    def _phrase(self, word: str, chance: float = 0.5) -> str:
        """The word, or the word with its article."""
        if self.rng.random() > chance:
            return word
        return _PHRASES.get(word, f"{'an' if word[0] in 'aeiou' else 'a'} {word}")

    def _the(self, word: str) -> str:
        """ "the dog", or the bare word."""
        bare = _PHRASES.get(word, f"a {word}").split(" ", 1)[1]
        return self.rng.choice((word, f"the {bare}", f"the {word}"))

    # Scenes

    def _boxes(self, count: int, side: int, axis: int | None) -> list[tuple[float, float, float, float]] | None:
        """Boxes that do not overlap, in order along the axis; on small grids they end at cells' borders."""
        rng, step = self.rng, 1 / side
        low, high = {1: (0.3, 0.52), 2: (0.24, 0.5), 3: (0.2, 0.32), 4: (0.16, 0.25), 5: (0.13, 0.2)}[count]
        sizes = []
        for _ in range(count):
            large, aspect = rng.uniform(low, high), rng.uniform(0.55, 1.0)
            wide, tall = (large, large * aspect) if rng.random() < 0.5 else (large * aspect, large)
            if side <= 4:
                most = side if count == 1 else max(1, side // count)
                wide, tall = (min(most, max(1, round(each * side))) * step for each in (wide, tall))
            sizes.append((wide, tall))
        boxes: list[tuple[float, float, float, float]] = []
        if axis is None:
            for wide, tall in sizes:
                for _ in range(20):
                    x, y = self._start(1 - wide, side), self._start(1 - tall, side)
                    gap = 0 if side <= 4 else 0.02
                    box = (x, y, x + wide, y + tall)
                    if not any(_overlap(box, other, gap) for other in boxes):
                        boxes.append(box)
                        break
                else:
                    return None
            return boxes
        free = 1 - sum(size[axis] for size in sizes) - 0.02 * (count - 1) * (side > 4)
        if free < -1e-9:
            return None
        gaps, cursor = sorted(self._start(max(0.0, free), side) for _ in sizes), 0.0
        for size, gap in zip(sizes, gaps, strict=True):
            start = [0.0, 0.0]
            start[axis] = cursor + gap
            start[1 - axis] = self._start(1 - size[1 - axis], side)
            cursor += size[axis] + 0.02 * (side > 4)
            boxes.append((start[0], start[1], start[0] + size[0], start[1] + size[1]))
        for before, after in pairwise(boxes):
            along = (after[axis] + after[axis + 2] - before[axis] - before[axis + 2]) / 2
            across = (after[1 - axis] + after[3 - axis] - before[1 - axis] - before[3 - axis]) / 2
            if abs(across) > 0.6 * along:
                return None
        return boxes

    def _start(self, free: float, side: int) -> float:
        """A place in 0..free, at a cell's border on small grids."""
        if side > 4:
            return self.rng.uniform(0, max(0.0, free))
        return self.rng.randint(0, round(max(0.0, free) * side)) / side

    def scene(self, side: int) -> Scene:
        """One to five things in a row, in a column, or anywhere."""
        rng = self.rng
        while True:
            count = rng.choices((1, 2, 3, 4, 5), (0.16, 0.46, 0.24, 0.09, 0.05))[0]
            count = min(count, side if side < 4 else 5)
            axis = rng.choice((0, 1)) if rng.random() < 0.7 and count > 1 else None
            boxes = self._boxes(count, side, axis)
            if boxes:
                break
        drawn = self._draw(count + 3)
        words = drawn[:count]
        if count > 1 and rng.random() < 0.2:
            # Several of one name.
            for index in range(1, count):
                if rng.random() < 0.6:
                    words[index] = words[0]
            rng.shuffle(words)
        things = [Thing(word, box) for word, box in zip(words, boxes, strict=True)]
        rng.shuffle(drawn[count:])
        return Scene(things, rng.choice(COLOURS), axis, drawn[count:])

    def cells(self, scene: Scene, side: int, doubtful: float = 0.12) -> Cells:
        """The scene as side * side cells, row by row."""
        rng, step = self.rng, 1 / side
        number, low = side * side, np.arange(side) * step
        covers = np.zeros((len(scene.things), side, side))
        for index, thing in enumerate(scene.things):
            x1, y1, x2, y2 = thing.box
            across = np.clip(np.minimum(low + step, x2) - np.maximum(low, x1), 0, None) * side
            down = np.clip(np.minimum(low + step, y2) - np.maximum(low, y1), 0, None) * side
            full = 1.0 if side <= 4 else rng.uniform(0.75, 1.0)
            covers[index] = down[:, None] * across[None] * full
        if side > 4:
            covers *= self._numpy.uniform(0.7, 1.0, covers.shape)
        covers = covers.reshape(len(scene.things), number)
        ids, weights = np.zeros((number, NAMES_A_CELL * 2), np.int64), np.zeros((number, NAMES_A_CELL * 2), np.float32)
        edges = np.full((number, 4), np.nan, np.float32)
        used, where = np.zeros(number, np.int64), {}

        def put(at: np.ndarray, word: str, share: np.ndarray) -> None:
            tokens = self.name(word)
            for token in tokens:
                fits = at[used[at] < ids.shape[1]]
                ids[fits, used[fits]] = token
                weights[fits, used[fits]] = share[fits] / len(tokens)
                used[fits] += 1

        put(np.arange(number), scene.ground, 1 - covers.sum(0))
        for thing, cover in zip(scene.things, covers, strict=True):
            at = np.flatnonzero(cover > 0.04)
            put(at, thing.word, cover * (1 - thing.doubt))
            if thing.doubt:
                put(at, thing.rival, cover * thing.doubt)
            best = at[cover[at] >= covers[:, at].max(0) - 1e-9]
            edges[best] = thing.box
            shown = at[cover[at] >= min(0.4, cover.max())]
            where[thing.word] = np.concatenate([where.get(thing.word, shown[:0]), shown])
        where[scene.ground] = np.flatnonzero(covers.sum(0) < 0.5)
        rows, columns = np.divmod(np.arange(number), side)
        place = np.stack([(columns + 0.5) * step, (rows + 0.5) * step], 1).astype(np.float32)
        return Cells(ids, weights, edges, place, where, {each.word: each.box for each in scene.single()})

    def doubt(self, scene: Scene) -> None:
        """Gives some things a rival that no question of this scene names."""
        for thing in scene.things:
            if self.rng.random() < 0.3:
                thing.rival = self._draw(1, [*scene.words(), *scene.absent])[0]
                thing.doubt = self.rng.uniform(0.08, 0.45)

    def _bare(self, word: str) -> str:
        """The word alone or in a short sentence, where it is the same tokens as in the grid."""
        return word if self.rng.random() < 0.65 else self._pick(f"It is {word}.", f"That is {word}.", f"I see {word}.")

    # Questions: each returns question and answer, or None where the scene has no such question

    def _pick(self, *forms: str) -> str:
        return self.rng.choice(forms)

    def _say(self, scene: Scene) -> tuple[str, str] | None:
        question = self._pick(
            "Read this.", "What do you read?", "Which words are there?", "Tell me what is where.", "Say what you see.",
            "Put the grid into words.", "Sum this up in a sentence.",
        )  # fmt: skip
        chance = float(self.rng.random() < 0.5)
        names, u = [self._phrase(each.word, chance) for each in scene.things], scene.ground
        if len(names) == 1:
            return question, self._pick(
                "I read {a} and nothing else; the rest says {u}.",
                "Only {a}, and {u} all around it.",
                "The word is {a}, the ground {u}.",
                "It is {u} with {a} in it.",
            ).format(a=names[0], u=u)
        if scene.axis is None:
            self.rng.shuffle(names)
            return question, f"Here and there: {listed(names)}. The ground says {u}."
        if len(names) == 2 and scene.axis == 0:
            form = self._pick(
                "I read {a} first and {b} after it; the rest says {u}.",
                "Leftmost stands {a}, rightmost {b}, and {u} fills what remains.",
                "Here {b} follows {a} in the same line. The ground says {u}.",
                "Starting from the right side: {b}, then {a}. Everywhere else {u}.",
                "On {u} the left one is {a}, the right one {b}.",
            )
        elif len(names) == 2:
            form = self._pick(
                "I read {a} in the upper part and {b} in the lower part; the rest says {u}.",
                "Here {b} lies lower than {a}, and {u} fills what remains.",
                "Upper word: {a}. Lower word: {b}. Ground: {u}.",
                "Starting from the bottom: {b}, then {a}. Everywhere else {u}.",
                "On {u} the upper one is {a}, the lower one {b}.",
            )
        elif len(names) == 3 and self.rng.random() < 0.5:
            form = self._pick(
                "Here {b} has {a} before it and {c} after it. The ground says {u}.",
                "The middle holds {b}, {a} comes before it, {c} after it; {u} elsewhere.",
            )
        else:
            start = self._pick("The line says", "Leftmost first:") if scene.axis == 0 else self._pick(
                "From the upper edge:", "Going down:")  # fmt: skip
            return question, f"{start} {', '.join(names)}; the rest says {u}."
        return question, form.format(**dict(zip("abc", names, strict=False)), u=u)

    def _list(self, scene: Scene) -> tuple[str, str] | None:
        if scene.axis is None and len(scene.things) > 1:
            return None
        order = "from left to right" if scene.axis == 0 else "from the top down"
        if len(scene.things) == 1:
            order = "in order"
        question = self._pick("Name everything", "List the things", "Read out the words") + f" {order}."
        return question, ", ".join(each.word for each in scene.things)

    def _asked(self, scene: Scene) -> tuple[str, bool]:
        """A word that is there or, as often, one that is not."""
        here = self.rng.random() < 0.5
        return self.rng.choice(scene.words() if here else scene.absent), here

    def _present(self, scene: Scene) -> tuple[str, str] | None:
        word, here = self._asked(scene)
        a = self._phrase(word)
        return self._pick(
            f"Do you see {a}?", f"Does the grid show {a}?", f"Can {a} be found here?", f"Is {a} one of the things?",
            f"Is {a} here?", f"Does it say {word} somewhere?", f"Has it got {a}?", f"Is there {a} in it?",
            f"{word}: yes or no?", f"Is {a} to be seen?",
        ), "yes" if here else "no"  # fmt: skip

    def _check(self, scene: Scene) -> tuple[str, str] | None:
        """Each of some words is said once more with what holds for it: the plainest way to learn looking it up."""
        words = self.rng.sample(scene.words(), self.rng.randint(1, min(3, len(scene.words()))))
        asked = words + scene.absent[: self.rng.randint(1, 3)]
        self.rng.shuffle(asked)
        if self.rng.random() < 0.7:
            question = self._pick(
                f"Check {listed(asked)}.", f"One by one: {', '.join(asked)}.", f"Yes or no for each: {listed(asked)}."
            )
            return question, "Result: " + ", ".join(f"{word} {'yes' if word in words else 'no'}" for word in asked)
        question = self._pick(f"Count {listed(asked)}.", f"How many of each: {', '.join(asked)}?")
        return question, "Result: " + ", ".join(f"{word} {scene.count(word)}" for word in asked)

    def _missing(self, scene: Scene) -> tuple[str, str] | None:
        word, here = self._asked(scene)
        a = self._phrase(word)
        return self._pick(
            f"Is {a} missing?", f"Is there no {word}?", f"Is it without {a}?", f"Is {a} nowhere to be seen?",
            f"Does it lack {a}?",
        ), "no" if here else "yes"  # fmt: skip

    def _both(self, scene: Scene) -> tuple[str, str] | None:
        here, absent = scene.words(), scene.absent
        if len(here) < 2:
            return None
        kind = self.rng.choice(("both", "either"))
        if kind == "both":
            pair = self.rng.sample(here, 2) if self.rng.random() < 0.5 else [self.rng.choice(here), absent[0]]
            yes = absent[0] not in pair
        else:
            pair = [self.rng.choice(here), absent[0]] if self.rng.random() < 0.5 else absent[:2]
            yes = pair[0] in here
        self.rng.shuffle(pair)
        a, b = (self._phrase(word) for word in pair)
        form = (
            self._pick(f"Do you see both {a} and {b}?", f"Are {a} and {b} both here?")
            if kind == "both"
            else self._pick(f"Do you see {a} or {b}?", f"Is at least one of {a} and {b} here?")
        )
        return form, "yes" if yes else "no"

    def _which_of(self, scene: Scene) -> tuple[str, str] | None:
        here = scene.words()[: self.rng.randint(0, 2)]
        asked = here + scene.absent[: self.rng.randint(1, 3 - len(here))]
        self.rng.shuffle(asked)
        question = self._pick(f"Which of {listed(asked)} do you see?", f"Pick out what is here: {', '.join(asked)}.")
        return question, ", ".join(word for word in asked if word in here) or "none of them"

    def _count(self, scene: Scene) -> tuple[str, str] | None:
        question = self._pick(
            "Count the things.", "How many words besides the ground?", "What is the number of things?",
            "Say how many there are.", "How many are here?",
        )  # fmt: skip
        return question, str(len(scene.things))

    def _number(self, scene: Scene) -> tuple[str, str] | None:
        """Whether the number of things is more, less, or just so many."""
        count, wanted = len(scene.things), self.rng.random() < 0.5
        holds = {
            "over": lambda number: count > number, "under": lambda number: count < number,
            "least": lambda number: count >= number, "most": lambda number: count <= number,
            "just": lambda number: count == number,
        }  # fmt: skip
        way = self.rng.choice(list(holds))
        near = [number for number in range(max(1, count - 2), count + 3) if holds[way](number) == wanted]
        if not near:
            return None
        number = self.rng.choice(near)
        said = self.rng.choice((str(number), _NUMBERS[number]))
        things = "thing" if number == 1 else "things"
        question = self._pick(*{
            "over": (f"Do you see over {said} {things}?", f"Is the count more than {said}?", f"Above {said} {things}?"),
            "under": (f"Do you see under {said} {things}?", f"Is the count fewer than {said}?", f"Less than {said}?"),
            "least": (f"Do you see at least {said} {things}?", f"Is the count {said} or more?"),
            "most": (f"Do you see at most {said} {things}?", f"Is the count {said} or less?"),
            "just": (f"Is the count {said}?", f"Do you see just {said} {things}?", f"Only {said} {things} here?",
                     f"Is the count exactly {said}?"),
        }[way])  # fmt: skip
        return question, "yes" if wanted else "no"

    def _count_of(self, scene: Scene) -> tuple[str, str] | None:
        word = scene.absent[0] if self.rng.random() < 0.2 else self.rng.choice(scene.words())
        several = [each for each in scene.words() if scene.count(each) > 1]
        if several and self.rng.random() < 0.6:
            word = self.rng.choice(several)
        question = self._pick(f"How often do you see {word}?", f"How many are {word}?", f"Count {word}.")
        return question, str(scene.count(word))

    def _more(self, scene: Scene) -> tuple[str, str] | None:
        here = scene.words()
        if len(here) < 2:
            return None
        a, b = self.rng.sample(here, 2)
        first, second = scene.count(a), scene.count(b)
        if first == second and self.rng.random() < 0.6:
            return None
        if self.rng.random() < 0.4:
            answer = "the same" if first == second else a if first > second else b
            return self._pick(f"What is there more of, {a} or {b}?", f"More {a} or more {b}?"), answer
        if self.rng.random() < 0.5:
            return self._pick(
                f"As many {a} as {b}?", f"Same number of {a} and {b}?"
            ), "yes" if first == second else "no"
        return f"More {a} than {b}?", "yes" if first > second else "no"

    def _pair(self, scene: Scene) -> tuple[Thing, Thing, int] | None:
        """Two things of different single words that differ clearly along an axis."""
        single = scene.single()
        if len(single) < 2:
            return None
        a, b = self.rng.sample(single, 2)
        apart = [abs(a.centre[axis] - b.centre[axis]) for axis in (0, 1)]
        axis = int(apart[1] > apart[0])
        return (a, b, axis) if apart[axis] > 0.08 else None

    def _side(self, axis: int, before: bool) -> str:
        forms = (
            (("left of", "to the left of", "further left than"), ("right of", "to the right of", "further right than")),
            (("above", "over", "higher than"), ("below", "under", "lower than")),
        )
        return self.rng.choice(forms[axis][0 if before else 1])

    def _relation(self, scene: Scene) -> tuple[str, str] | None:
        pair = self._pair(scene)
        if pair is None:
            return None
        a, b, axis = pair
        before = self.rng.random() < 0.5
        where, true = self._side(axis, before), (a.centre[axis] < b.centre[axis]) == before
        x, y = self._the(a.word), self._the(b.word)
        question = self._pick(
            f"Is {x} {where} {y}?", f"Does {x} stand {where} {y}?", f"{x} {where} {y}: right or wrong?"
        )
        if question.endswith("wrong?"):
            return question, "right" if true else "wrong"
        return question, "yes" if true else "no"

    def _half(self, scene: Scene) -> tuple[str, str] | None:
        """On which side of the middle a thing stands."""
        thing, axis = self.rng.choice(scene.things), self.rng.choice((0, 1))
        if scene.count(thing.word) > 1 or abs(thing.centre[axis] - 0.5) < 0.1:
            return None
        names, x = (("left", "right"), ("top", "bottom"))[axis], self._the(thing.word)
        answer = names[thing.centre[axis] > 0.5]
        if self.rng.random() < 0.4:
            return f"Which half holds {x}, {names[0]} or {names[1]}?", answer
        name = self.rng.choice(names)
        return self._pick(
            f"Is {x} in the {name} half?", f"Has the {name} half got {x}?"
        ), "yes" if name == answer else "no"

    def _sorted(self, scene: Scene) -> tuple[str, str] | None:
        """Things in order along one axis, where they clearly differ."""
        single, axis = scene.single(), scene.axis if scene.axis is not None else self.rng.choice((0, 1))
        if len(single) < 2:
            return None
        asked = self.rng.sample(single, min(len(single), self.rng.choice((2, 2, 3))))
        order = sorted(asked, key=lambda thing: thing.centre[axis])
        if any(b.centre[axis] - a.centre[axis] < 0.08 for a, b in pairwise(order)):
            return None
        back = self.rng.random() < 0.4
        begin = (("left", "right"), ("top", "bottom"))[axis][back]
        names = [thing.word for thing in asked]
        question = self._pick(f"Sort {listed(names)} from the {begin}.", f"Order from the {begin}: {', '.join(names)}")
        return question, ", ".join(thing.word for thing in (reversed(order) if back else order))

    def _first(self, scene: Scene) -> tuple[str, str] | None:
        pair = self._pair(scene)
        if pair is None:
            return None
        a, b, axis = pair
        before = self.rng.random() < 0.5
        chosen = a if (a.centre[axis] < b.centre[axis]) == before else b
        more = (("left", "right"), ("up", "down"))[axis][0 if before else 1]
        form = self._pick("Which is further {more}, {a} or {b}?", "Further {more}: {a} or {b}?")
        return form.format(more=more, a=a.word, b=b.word), chosen.word

    def _beside(self, scene: Scene) -> tuple[str, str] | None:
        """What is next to a thing on one side; in a row or a column only, where that is clear."""
        things, axis = scene.things, scene.axis
        if axis is None or len(things) < 2:
            return None
        at = self.rng.randrange(len(things))
        before = self.rng.random() < 0.5
        if not 0 <= at + (-1 if before else 1) < len(things) and self.rng.random() < 0.75:
            before = not before
        if scene.count(things[at].word) > 1:
            return None
        known, other = self._the(things[at].word), at + (-1 if before else 1)
        if self.rng.random() < 0.75:
            where = self._side(axis, before)
        else:
            close = ("next", "just")[self.rng.random() < 0.5]
            where = (("next to the left of", "next to the right of"), ("just above", "just below"))[axis][not before]
            where = where if close == "next" else where.replace("next to", "just to")
        question = self._pick(
            f"Which thing stands {where} {known}?", f"What do you see {where} {known}?", f"Who is {where} {known}?",
            f"What is found {where} {known}?", f"{where[0].upper()}{where[1:]} {known}, what is there?",
        )  # fmt: skip
        return question, self._bare(things[other].word) if 0 <= other < len(things) else "nothing"

    def _larger(self, scene: Scene) -> tuple[str, str] | None:
        single = scene.single()
        if len(single) < 2:
            return None
        a, b = self.rng.sample(single, 2)
        if max(a.area, b.area) < 1.35 * min(a.area, b.area):
            return None
        large = self.rng.random() < 0.5
        chosen = a if (a.area > b.area) == large else b
        word = self._pick("larger", "bigger") if large else "smaller"
        form = self._pick(
            "Which is {word}, {a} or {b}?", f"What takes {'more' if large else 'less'} room, {{a}} or {{b}}?"
        )
        return form.format(word=word, a=a.word, b=b.word), chosen.word

    def _is_larger(self, scene: Scene) -> tuple[str, str] | None:
        made = self._larger(scene)
        if made is None or "," not in made[0] or not made[0].startswith("Which is "):
            return None
        word, pair = made[0][len("Which is ") : -1].split(", ")
        a, b = pair.split(" or ")
        return f"Is {self._the(a)} {word} than {self._the(b)}?", "yes" if made[1] == a else "no"

    def _colour(self, scene: Scene) -> tuple[str, str] | None:
        return self._pick(
            "Which colour fills the rest?", "What does the ground say?", "Name the ground's color.",
            "Which color is behind it all?", "What is the colour around the things?",
        ), scene.ground  # fmt: skip

    def _is_colour(self, scene: Scene) -> tuple[str, str] | None:
        here = self.rng.random() < 0.5
        other = self.rng.choice([each for each in COLOURS if each != scene.ground])
        colour = scene.ground if here else other
        return self._pick(f"Is the ground {colour}?", f"Is it {colour} behind the things?"), "yes" if here else "no"

    def _place(self, scene: Scene) -> tuple[str, str] | None:
        """Where things are, in thousandths; what is not there is left out."""
        here = scene.words()
        asked = self.rng.sample(here, min(len(here), self.rng.choice((1, 1, 1, 2, 3))))
        if self.rng.random() < 0.3:
            asked = (asked if self.rng.random() < 0.5 else []) + [scene.absent[0]]
            self.rng.shuffle(asked)
        found = [each for word in asked for each in scene.things if each.word == word]
        if len(found) > 3:
            return None
        form, none = self.rng.choice((
            (f"Where is {listed(asked)}?", "nowhere"),
            (f"Give the place of {listed(asked)}.", "nowhere"),
            (f"find {', '.join(asked)}", "nothing"),
            (f"Corners of {', '.join(asked)}:", "not there"),
            (f"Measure: {'; '.join(asked)}", "nothing"),
        ))  # fmt: skip
        made = "; ".join(f"{each.word} {', '.join(map(str, each.corners))}" for each in found)
        if self.rng.random() < 0.5:
            made = "; ".join(f"{each.word} ({', '.join(map(str, each.corners))})" for each in found)
            form += " In brackets."
        return form, made or none

    def _edge(self, scene: Scene) -> tuple[str, str] | None:
        single = scene.single()
        if not single:
            return None
        thing = self.rng.choice(single)
        edge = self.rng.randrange(4)
        name = ("left", "upper", "right", "lower")[edge]
        question = self._pick(f"The {name} edge of {thing.word}?", f"Where is {thing.word}'s {name} end?")
        return question, str(thing.corners[edge])

    def _at(self, scene: Scene) -> tuple[str, str] | None:
        if self.rng.random() < 0.75:
            thing = self.rng.choice(scene.things)
            (x, y), answer = thing.centre, thing.word
        else:
            x, y = self.rng.random(), self.rng.random()
            if any(_overlap((x, y, x, y), thing.box, 0.06) for thing in scene.things):
                return None
            answer = scene.ground
        x, y = (min(GRID - 1, int(GRID * each)) for each in (x, y))
        return self._pick(f"What is at {x}, {y}?", f"Which word stands at {x}, {y}?"), answer

    # Documents

    def _weight(self, answer: str) -> float:
        # The last digits of a place are hardly to be known: they would be most of the loss.
        if answer.count(",") > 2 and answer[-2:].strip(")").isdigit():
            return 1.0 if self.two_looks else 0.5
        return 3.0 if answer in ("yes", "no", "right", "wrong") else 1.0

    def _turn(self, question: str, answer: str, first: bool = True) -> list[Span]:
        """A question with its answer; further ones begin the user's turn anew."""
        begin = ([] if first else self._again) + self._encode(question) + self._reply
        return [(begin, 0.0), (self._encode(answer) + self._end, self._weight(answer))]

    def ask(self, scene: Scene, kind: str | None = None, easy: bool = False) -> tuple[str, str, str]:
        """A kind, a question, and its answer."""
        shares = {name: weight for name, (_, weight) in self.questions.items()}
        if easy or self.two_looks:
            shares = self._easy if easy else self._two_looks
        while True:
            chosen = kind or self.rng.choices(list(shares), list(shares.values()))[0]
            made = self.questions[chosen][0](scene)
            if made is not None:
                return chosen, *made
            if kind is not None:
                return "", "", ""

    def _dialogue(self, scene: Scene) -> tuple[list[Span], str]:
        """Two to four questions one after the other; some follow-ups say only the word."""
        spans: list[Span] = []
        last = ""
        for turn in range(self.rng.randint(2, 4)):
            kind, question, answer = self.ask(scene)
            follow = turn > 0 and last in ("present", "missing", "count of") and self.rng.random() < 0.6
            if follow:
                word, here = self._asked(scene)
                question = self._pick(f"And {self._phrase(word)}?", f"What about {self._phrase(word)}?")
                answer = str(scene.count(word))
                if last != "count of":
                    answer = "yes" if here == (last == "present") else "no"
                kind = last
            spans += self._turn(question, answer, first=turn == 0)
            last = kind
        return spans, "dialogue"

    def picture(self, side: int, branches: int, clean: bool = False, easy: bool = False) -> Document:
        """A grid with questions about it that do not see each other; `easy` ones need one look each."""
        scene = self.scene(side)
        if not clean:
            self.doubt(scene)
        words = [*scene.words(), *scene.absent, *COLOURS]
        document = Document([self._user, self.cells(scene, side)], [], words=words)
        for _ in range(branches):
            if not easy and self.rng.random() < 0.08:
                spans, kind = self._dialogue(scene)
            else:
                kind, question, answer = self.ask(scene, easy=easy)
                spans = self._turn(question, answer)
            document.branches.append(spans)
            document.kinds.append(kind)
        return document

    def digits(self) -> Document:
        """Four to eight digits, 2 x 2 cells each, in one or two rows."""
        count = self.rng.randint(4, 8)
        shown = [str(self.rng.randint(0, 9)) for _ in range(count)]
        things = []
        for index, digit in enumerate(shown):
            row, column = divmod(index, 4)
            x, y = column / 4 + self.rng.uniform(0, 0.03), row / 4 + self.rng.uniform(0, 0.03)
            things.append(Thing(digit, (x, y, x + 0.21, y + 0.21)))
            if self.rng.random() < 0.15:
                things[-1].rival, things[-1].doubt = str(self.rng.randint(0, 9)), self.rng.uniform(0.1, 0.4)
        scene = Scene(things, self.rng.choice(COLOURS), None, [])
        question = self._pick(
            "Which number is it?", "Say the digits one by one.", "What number stands here?", "Copy the figures."
        )
        spans = self._turn(question, "".join(shown))
        at = self.rng.randrange(count)
        place = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")[at]
        other = self._turn(self._pick(f"What is the {place} digit?", f"Which digit is {place}?"), shown[at])
        counted = self._turn("How many digits are there?", str(count))
        kinds = ["digits", "digit", "digits counted"]
        return Document([self._user, self.cells(scene, FULL_SIDE)], [spans, other, counted], kinds)

    def pages(self, side: int, number: int) -> Document:
        """Pages of grids, each with a title word above rows of a word and a number."""
        rng = self.rng
        tall = 1 if side < 6 else 2
        rows = [rng.randint(1, min(3, side // tall - 1)) for _ in range(number)]
        words = self._draw(number + sum(rows) + 1)
        titles, left = words[:number], words[number:]
        pages: list[list[tuple[str, int]]] = []
        grids: list[Cells] = []
        for title, count in zip(titles, rows, strict=True):
            entries = [(left.pop(), rng.choice((rng.randint(0, 9), rng.randint(10, 99)))) for _ in range(count)]
            pages.append(entries)
            step, things, loose = 1 / side, [], 0.0 if side < 6 else rng.uniform(0.05, 0.3)
            low = (tall - loose) * step
            wide = rng.randint(1, side // 2)
            things.append(Thing(title, (0, loose * step, max(wide, side // 2) * step, low)))
            for row, (word, figure) in enumerate(entries, 1):
                top = row * tall * step
                start = rng.randint(0, 1) * step
                things.append(Thing(word, (start, top + loose * step, start + wide * step, top + low)))
                # On large grids numbers end at the right, and their digits need not fit the cells.
                size = 1.0 if side < 6 else rng.uniform(0.8, 1.15)
                first = side - 2 if side < 6 else side - rng.uniform(0.1, 0.5) - size * len(str(figure))
                for place, digit in enumerate(str(figure)):
                    x = (first + place * size) * step
                    things.append(Thing(digit, (x, top + loose * step, x + size * step, top + low)))
            grids.append(self.cells(Scene(things, rng.choice(("white", "gray", "yellow")), None, []), side))
        document = Document([self._user, *grids], [], words=words)
        absent = left.pop()

        def add(kind: str, question: str, answer: str) -> None:
            document.branches.append(self._turn(question, answer))
            document.kinds.append(kind)

        for _ in range(3):
            page = rng.randrange(number)
            word, figure = rng.choice(pages[page])
            choice = rng.random()
            if choice < 0.45:
                add("table", self._pick(
                    f"How many {word} are on the page {titles[page]}?", f"What number stands by {word}?",
                    f"How many {word} does {titles[page]} have?", f"{titles[page]}: how many {word}?",
                ), str(figure))  # fmt: skip
            elif choice < 0.65:
                add("which page", self._pick(
                    f"Which page has {word}?", f"Where do you read {word}? Page", f"On what page is {word}?"
                ), str(page + 1))  # fmt: skip
            elif choice < 0.8:
                question = self._pick(f"What is page {page + 1} called?", f"The title of page {page + 1}?")
                add("title", question, titles[page])
            elif choice < 0.9:
                here = rng.random() < 0.5
                word = word if here else absent
                question = self._pick(f"Does any page have {word}?", f"Is {word} in the pages?")
                add("on pages", question, "yes" if here else "no")
            else:
                add("pages", self._pick("How many pages are there?", "Count the pages."), str(number))
        return document

    def repeat(self) -> Document:
        """Numbers or words to be said again."""
        if self.rng.random() < 0.5:
            said = " ".join(str(self.rng.randint(0, 999)) for _ in range(self.rng.randint(2, 6)))
        else:
            said = ", ".join(self._draw(self.rng.randint(2, 6)))
        question = self._pick(
            f"Say it again: {said}", f"Repeat after me: {said}", f"{said}\nThe same once more, please."
        )
        return Document([self._user], [self._turn(question, said)], ["repeat"])

    def spelling(self) -> Document:
        """Words to be said alone: at the beginning of an answer a word has no blank, and with it other tokens."""
        document = Document([self._user], [])
        for word in self._draw(10):
            question = self._pick(f"Say {word}.", f" {word}", f"The word is {word}. Which word?", f"Only one: {word}")
            document.branches.append(self._turn(question, word))
            document.kinds.append("spelling")
        return document

    def words_only(self) -> Document:
        """A line of words, and whether one is among them: the plainest form of looking something up."""
        rng = self.rng
        drawn = self._draw(rng.randint(2, 9) + 2)
        here, absent = drawn[:-2], drawn[-2:]
        document = Document([self._user + self._encode(f" {', '.join(here)}.")], [], words=drawn)
        for _ in range(4):
            yes, kind = rng.random() < 0.5, rng.random()
            word = rng.choice(here if yes else absent)
            at = rng.randrange(len(here) - 1)
            if kind < 0.35:
                question = self._pick(f" Is {word} among them?", f" Does it say {word}?", f" Do you see {word}?")
                name, answer = "word?", "yes" if yes else "no"
            elif kind < 0.55:
                asked = rng.sample(drawn, min(len(drawn), rng.randint(2, 6)))
                question = self._pick(f" Check {listed(asked)}.", f" One by one: {', '.join(asked)}.")
                answer = "Result: " + ", ".join(f"{each} {'yes' if each in here else 'no'}" for each in asked)
                name = "words checked"
            elif kind < 0.75:
                question = self._pick(f" What comes after {here[at]}?", f" Which is next to {here[at]}?")
                name, answer = "next word", self._bare(here[at + 1])
            elif kind < 0.9:
                question, name = self._pick(" Say it again.", " Once more, please.", " Copy the words."), "words again"
                answer = self._pick("", "I read ") + ", ".join(here)
            else:
                question, name, answer = self._pick(" How many words?", " Count them."), "words counted", str(len(here))
            document.branches.append(self._turn(question, answer))
            document.kinds.append(name)
        return document

    def plain(self, length: int) -> Document:
        """General English."""
        return Document([], [[(self._english(length), 0.5)]], ["English"])


def english_tokens(ids: np.ndarray, seed: int) -> Callable[[int], list[int]]:
    """Pieces of a long line of token ids, from places drawn at random."""
    rng = random.Random(seed)

    def piece(length: int) -> list[int]:
        start = rng.randrange(len(ids) - length)
        return ids[start : start + length].tolist()

    return piece


def split_words(words: Iterator[str] | list[str], seed: int) -> tuple[list[str], list[str]]:
    """Words to train on, and those held out for measuring."""
    every = sorted(set(words) - set(COLOURS) - {c.noun for c in CONCEPTS})
    random.Random(seed).shuffle(every)
    kept = round(len(every) * HELD_OUT_WORDS)
    return every[kept:], every[:kept]
