"""Compose the demo's data set: scenes of vendors' emoji art, with exact captions, questions, conversations and boxes.

    python recipes/demo/build_scenes.py --art DIR --output recipes/demo/scenes

Every split is one parquet file with the picture's bytes embedded. ``test_pairs`` holds pairs of objects which occur
together in no other split, ``test_style`` holds art of vendors whose pictures occur in no other split.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from emoji_art import BACKGROUNDS, CONCEPTS, DEFAULT_ART, Concept, Vendor, fit, jittered_background
from PIL import Image
from scene_questions import (
    CLEARLY_LARGER_AREA,
    CLEARLY_LONGER,
    TYPES,
    Balance,
    absent_concepts,
    conversation,
    question_table,
    questions,
)

if TYPE_CHECKING:
    import datasets

SIDE = 112
MARGIN = 2
RENDER_SIZE = 128
SIZES = {1: (34, 56), 2: (28, 54), 3: (26, 35)}
COUNT_SHARES = {1: 0.13, 2: 0.67, 3: 0.20}
MIN_CONTRAST, MIN_CONTRAST_SHARE = 75.0, 0.6


@dataclass
class Scene:
    """Objects in order (left to right, or top to bottom), their boxes in pixels, and the background's colour."""

    concepts: list[Concept]
    boxes: list[list[int]]
    horizontal: bool
    background: str


def captions(scene: Scene) -> list[str]:
    """Five captions, each a function of the scene: whoever sees everything can write any of them word for word."""
    names, ground = [c.phrase for c in scene.concepts], f"{article(scene.background)} {scene.background} background"
    plain, across = f"the background is {scene.background}", scene.horizontal
    if len(names) == 1:
        name = names[0]
        bare = scene.concepts[0].bare
        return [
            f"{name} on {ground}",
            f"there is {name} on {ground}",
            f"a picture of {name} on {ground}",
            f"a single {bare} on {ground}",
            f"{plain} and the only object is {name}",
        ]
    if len(names) == 2:
        first, second = names
        if across:
            return [
                f"{first} to the left of {second} on {ground}",
                f"{second} to the right of {first} on {ground}",
                f"there is {first} on the left and {second} on the right of {ground}",
                f"a picture of {first} next to {second} on {ground}",
                f"{plain} and {first} is to the left of {second}",
            ]
        return [
            f"{first} above {second} on {ground}",
            f"{second} below {first} on {ground}",
            f"there is {first} at the top and {second} at the bottom of {ground}",
            f"a picture of {first} over {second} on {ground}",
            f"{plain} and {first} is above {second}",
        ]
    first, middle, last = names
    start, end = ("on the left", "on the right") if across else ("at the top", "at the bottom")
    line, order = ("row", "from left to right") if across else ("column", "from top to bottom")
    return [
        f"{first}, {middle} and {last} in a {line} on {ground}",
        f"{first}, {middle} and {last} {order} on {ground}",
        f"there is {first} {start}, {middle} in the middle and {last} {end} of {ground}",
        f"a picture of {middle} between {first} and {last} on {ground}",
        f"{plain} and {middle} is between {first} and {last}",
    ]


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


def pass_over(scene: Scene, held_out: set[frozenset[str]], rng: np.random.Generator) -> None:
    """Draw what the first edition's questions drew between two pictures, so that every picture stays what it was."""
    number = len(scene.concepts)
    if rng.random() < 0.5:
        rng.integers(number)
    else:
        rng.integers(len(absent_concepts([c.noun for c in scene.concepts], held_out)))
    if number > 1:
        rng.integers(number - 1)
        if number == 2:
            rng.random()
        rng.choice(3, p=[0.4, 0.4, 0.2])


def layout(sizes: list[tuple[int, int]], horizontal: bool, rng: np.random.Generator) -> list[list[int]] | None:
    """Boxes [x, y, width, height] for these (width, height), in order along one axis; None if they do not fit.

    Along the axis the boxes are apart; across it the centres differ by at most half of what they differ along it.
    """
    along, across = (0, 1) if horizontal else (1, 0)
    free = SIDE - 2 * MARGIN - sum(s[along] for s in sizes) - 3 * (len(sizes) - 1)
    if free < 0:
        return None
    gaps = np.sort(rng.integers(0, free + 1, len(sizes)))
    boxes, cursor = [], MARGIN
    for size, gap in zip(sizes, gaps, strict=True):
        box = [0, 0, *size]
        box[along] = cursor + int(gap)
        box[across] = int(rng.integers(MARGIN, SIDE - MARGIN - size[across] + 1))
        cursor += size[along] + 3
        boxes.append(box)
    centres = np.array([[b[0] + b[2] / 2, b[1] + b[3] / 2] for b in boxes])
    steps = np.abs(np.diff(centres, axis=0))
    return boxes if (steps[:, across] <= 0.5 * steps[:, along]).all() else None


def stands_out(sprite: Image.Image, colour: np.ndarray) -> bool:
    """Whether enough of the sprite's opaque pixels differ from the background colour."""
    pixels = np.asarray(fit(sprite, 32)).reshape(-1, 4).astype(float)
    distance = np.linalg.norm(pixels[pixels[:, 3] > 128, :3] - colour, axis=1)
    return float((distance > MIN_CONTRAST).mean()) >= MIN_CONTRAST_SHARE


def compose(
    concepts: list[Concept], art: dict[str, list[Image.Image]], background: str, rng: np.random.Generator
) -> tuple[Image.Image, Scene] | None:
    """A 112x112 RGB picture of the concepts in order; None if an object would not stand out from its background."""
    colour = jittered_background(background, rng)
    sprites = [art[c.code][rng.integers(len(art[c.code]))] for c in concepts]
    if not all(stands_out(s, colour) for s in sprites):
        return None
    low, high = SIZES[len(concepts)]
    horizontal = bool(rng.random() < 0.5)
    while True:
        pictures = [fit(s, int(rng.integers(low, high + 1))) for s in sprites]
        boxes = layout([p.size for p in pictures], horizontal, rng)
        if boxes:
            break
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(int(c) for c in colour))
    for picture, box in zip(pictures, boxes, strict=True):
        canvas.paste(picture, (box[0], box[1]), picture)
    return canvas, Scene(concepts, boxes, horizontal, background)


def choose_held_out(share: float, rng: np.random.Generator) -> set[frozenset[str]]:
    """About ``share`` of all pairs of nouns, spread evenly: no noun is in many more of them than another."""
    pairs = list(itertools.combinations([c.noun for c in CONCEPTS], 2))
    wanted, most = round(share * len(pairs)), int(np.ceil(share * (len(CONCEPTS) - 1)))
    degree: Counter[str] = Counter()
    chosen: set[frozenset[str]] = set()
    for i in rng.permutation(len(pairs)):
        pair = pairs[i]
        if len(chosen) < wanted and max(degree[n] for n in pair) < most:
            chosen.add(frozenset(pair))
            degree.update(pair)
    return chosen


def concept_lists(
    number: int,
    pairs: Sequence[tuple[Concept, ...]],
    held_out: set[frozenset[str]],
    only_held_out: bool,
    rng: np.random.Generator,
) -> list[list[Concept]]:
    """What each of ``number`` pictures shows: singles, the given pairs in turn, and triples built on a given pair."""
    shares = {k: v for k, v in COUNT_SHARES.items() if k > 1 or not only_held_out}
    counts = rng.choice(list(shares), number, p=np.array(list(shares.values())) / sum(shares.values()))
    turn = itertools.cycle([pairs[i] for i in rng.permutation(len(pairs))])
    singles = itertools.cycle([CONCEPTS[i] for i in rng.permutation(len(CONCEPTS))])
    seen_pairs = {frozenset(c.noun for c in p) for p in pairs}
    lists = []
    for count in counts:
        chosen = [next(singles)] if count == 1 else list(next(turn))
        if count == 3:
            known = [c.noun for c in chosen]
            fitting = [
                c for c in CONCEPTS
                if c.noun not in known
                and (only_held_out or all(frozenset((c.noun, k)) in seen_pairs for k in known))
                and not (only_held_out and any(frozenset((c.noun, k)) in held_out for k in known))
            ]  # fmt: skip
            # Few training pictures show few pairs: a pair that no third object completes stays one.
            if fitting:
                chosen.append(fitting[rng.integers(len(fitting))])
        lists.append([chosen[i] for i in rng.permutation(len(chosen))])
    return lists


def encode(picture: Image.Image) -> bytes:
    """The picture's bytes as lossless WebP, which is smaller than PNG here."""
    buffer = BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()


def build_split(
    name: str,
    lists: list[list[Concept]],
    art: dict[str, list[Image.Image]],
    held_out: set[frozenset[str]],
    seen: set[bytes],
    rng: np.random.Generator,
) -> list[dict]:
    """The rows of one split; ``seen`` collects the pixels of all splits, so that no picture occurs twice."""
    colours = itertools.cycle(BACKGROUNDS)
    asked, told = Balance(), Balance()
    rows = []
    for number, concepts in enumerate(lists):
        made = None
        tries = 0
        while made is None or made[0].tobytes() in seen:
            # The next colour in turn; after a few tries any colour, for objects that few colours suit.
            colour = next(colours) if tries == 0 else str(rng.choice(list(BACKGROUNDS)))
            made, tries = compose(concepts, art, colour, rng), tries + 1
        picture, scene = made
        seen.add(picture.tobytes())
        pass_over(scene, held_out, rng)
        row_id = f"{name}-{number:05d}"
        own = np.random.default_rng(list(row_id.encode()))
        about, missing = questions(scene, held_out, asked, own)
        rows.append({
            "id": row_id,
            "image": {"bytes": encode(picture), "path": None},
            "captions": captions(scene),
            "questions": about,
            "messages": conversation(scene, held_out, missing, told, own),
            "objects": [{"name": c.noun, "box": b} for c, b in zip(scene.concepts, scene.boxes, strict=True)],
            "background": scene.background,
        })  # fmt: skip
    return rows


def render(art: Path, vendors: list[str]) -> dict[str, list[Image.Image]]:
    """Sprites of every concept by code point, one of each vendor that draws it."""
    codes = [c.code for c in CONCEPTS]
    packs = [Vendor(art, v, codes) for v in vendors]
    sprites = {code: [s for pack in packs for s in pack.sprites(code, RENDER_SIZE)] for code in codes}
    for concept in CONCEPTS:
        if not sprites[concept.code]:
            raise SystemExit(f"none of {', '.join(vendors)} has art of {concept.noun} ({concept.code})")
    return sprites


def cider(predictions: list[str], references: list[list[str]]) -> float:
    """CIDEr of pycocoevalcap on lower-case words without full stops and commas."""
    from pycocoevalcap.cider.cider import Cider

    def clean(text: str) -> str:
        return " ".join(text.lower().replace(",", "").rstrip(".").split())

    truth = {i: [clean(r) for r in refs] for i, refs in enumerate(references)}
    return float(Cider().compute_score(truth, {i: [clean(p)] for i, p in enumerate(predictions)})[0])


def statistics(rows: list[dict], rng: np.random.Generator) -> dict[str, float]:
    """CIDEr of known predictors: a perfect one, a left-out reference, a constant, another picture's caption."""
    references = [r["captions"] for r in rows]
    first = [r[0] for r in references]
    shuffled = [first[i] for i in rng.permutation(len(rows))]
    # Words that any caption of this kind has, around the commonest objects of the split.
    names = Counter(o["name"] for r in rows for o in r["objects"]).most_common(2)
    phrase = {c.noun: c.phrase for c in CONCEPTS}
    constants = {f"{phrase[names[0][0]]} to the left of {phrase[names[1][0]]} on a red background", *first}
    sampled = sorted(constants)[:: max(1, len(constants) // 40)]
    return {
        "oracle": cider(first, references),
        "leave_one_out": cider(first, [r[1:] for r in references]),
        "constant": max(cider([c] * len(rows), references) for c in sampled),
        "shuffled": cider(shuffled, references),
    }


def features() -> datasets.Features:
    """The columns of every split."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    return Features({
        "id": text,
        "image": Image(),
        "captions": List(text),
        "questions": List({"question": text, "answer": text, "type": text}),
        "messages": List({"role": text, "content": text}),
        "objects": List({"name": text, "box": List(Value("int32"))}),
        "background": text,
    })  # fmt: skip


def asked_cell(figures: dict[str, float]) -> str:
    """What the card says of one type of questions in one split."""
    yes = f", yes {figures['yes']:.3f}" if figures["yes"] else ""
    return f"{figures['questions']}{yes}, guess {figures['prior']:.3f}"


def dataset_card(
    reports: dict[str, dict[str, float]],
    asked: dict[str, dict[str, dict[str, float]]],
    held_out: int,
    every: int,
    args: argparse.Namespace,
) -> str:
    """The data set's README.md, with measured figures only."""
    files = "\n".join(f"      - split: {n}\n        path: data/{n}-*.parquet" for n in reports)
    columns = ("pictures", "objects", "oracle", "leave_one_out", "constant", "shuffled")
    table = "\n".join(f"| `{n}` | " + " | ".join(str(r.get(c, "")) for c in columns) + " |" for n, r in reports.items())
    colours = ", ".join(BACKGROUNDS)
    kinds = "\n".join(
        f"| {kind} | " + " | ".join(asked_cell(by[kind]) for by in asked.values()) + " |" for kind in TYPES
    )
    return f"""---
license: other
license_name: cc-by-4.0-and-others
license_link: ../NOTICE.md
language: en
task_categories: [image-to-text, visual-question-answering]
pretty_name: Emoji scenes
configs:
  - config_name: default
    data_files:
{files}
---
# Emoji scenes

Pictures of {SIDE}x{SIDE} pixels, composed from vendors' emoji art: one to three of {len(CONCEPTS)} everyday objects on
a plain background, with five captions, four to seven questions, a conversation and the objects' boxes. All of it is
exact, because it comes from the scene. Built by `recipes/demo/build_scenes.py` (seed {args.seed}); licences and authors
of the art: `../NOTICE.md`.

| split | pictures | objects | CIDEr: perfect | a reference left out | a constant caption | shuffled |
|---|---|---|---|---|---|---|
{table}

- `train`, `test`: art of {" and ".join(args.vendors)}; every pair of objects in `test` also occurs in `train`.
- `test_pairs`: the same art; every picture holds one of {held_out} pairs of objects (of {every}) that occur together in
  no other split (`held_out_pairs.json`).
- `test_style`: art of {" and ".join(args.style_vendors)} only, which no other split shows; pairs that occur in `train`.

Columns: `id`; `image` (lossless WebP); `captions` (five, no two alike); `questions` (`question`, `answer`, `type`);
`messages` (`role`, `content`: two to four questions with their answers, later ones about earlier ones); `objects`
(`name` and `box` = x, y, width, height in pixels, in order from left to right or top to bottom); `background`
({colours}).

Questions of each type, the share of "yes", and what the best guess from the text alone scores, the answer that the
exact question has most often in `train`:

| type | {" | ".join(f"`{name}`" for name in asked)} |
|---|{"---|" * len(asked)}
{kinds}

Yes and no take turns for each text, so that no wording has a majority worth learning. `relation`: "Is the dog to the
left of the cat?", in `test_pairs` of the held-out pair. `comparison`: which of two is larger, where one has
{CLEARLY_LARGER_AREA} times the area and a {CLEARLY_LONGER} times longer side, and how many objects there are. A
conversation ends with a question (`last turn`, by F1) for an object or a colour that no earlier turn says. No question
and no conversation of `train` holds a held-out pair.

The CIDEr columns say what a score means: of the first caption against all five, against the other four, of the best of
some constant captions, and of captions of another picture (pycocoevalcap, lower-case words without commas and full
stops).

```python
from datasets import load_dataset

scenes = load_dataset("recipes/demo/scenes", split="test_pairs")
```
"""


def main() -> None:
    """Build every split and print what a reader of its scores needs to know."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--art", type=Path, default=DEFAULT_ART, help="folder of unpacked npm packs; what is missing is fetched"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "scenes")
    parser.add_argument("--vendors", nargs="+", default=["twemoji", "fluent-emoji-flat"], help="@iconify-json packs")
    parser.add_argument("--style_vendors", nargs="+", default=["noto"], help="packs of test_style alone")
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--test", type=int, default=250, help="pictures of each of the three held-out splits")
    parser.add_argument(
        "--held_out_share", type=float, default=0.09, help="share of all pairs of objects kept for test_pairs"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from datasets import Dataset

    if both := set(args.vendors) & set(args.style_vendors):
        raise SystemExit(f"{', '.join(sorted(both))}: a vendor of test_style must not be in the other splits")
    rng = np.random.default_rng(args.seed)
    held_out = choose_held_out(args.held_out_share, rng)
    every = list(itertools.combinations(CONCEPTS, 2))
    closed = [p for p in every if frozenset(c.noun for c in p) in held_out]
    allowed = [p for p in every if p not in closed]
    main_art, style_art = render(args.art, args.vendors), render(args.art, args.style_vendors)

    (args.output / "data").mkdir(parents=True, exist_ok=True)
    pairs = {
        "about": "pairs of objects that occur together in test_pairs only",
        "pairs": sorted(sorted(p) for p in held_out),
    }
    (args.output / "held_out_pairs.json").write_text(json.dumps(pairs, indent=0) + "\n")
    seen: set[bytes] = set()
    shown, reports, asked = allowed, {}, {}
    for name in ("train", "test", "test_pairs", "test_style"):
        lists = concept_lists(
            args.train if name == "train" else args.test,
            closed if name == "test_pairs" else shown, held_out, name == "test_pairs", rng,
        )  # fmt: skip
        rows = build_split(name, lists, style_art if name == "test_style" else main_art, held_out, seen, rng)
        if name == "train":
            train = rows
            # "Seen pairs" means seen: the held-out splits use only pairs that training really showed.
            met = {frozenset(p) for r in rows for p in itertools.combinations([o["name"] for o in r["objects"]], 2)}
            shown = [p for p in allowed if frozenset(c.noun for c in p) in met]
            if not shown:
                raise SystemExit(f"--train {args.train}: no picture shows two objects; expected at least about 20")
        file = args.output / "data" / f"{name}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features()).to_parquet(file)
        often = Counter(o["name"] for r in rows for o in r["objects"])
        report = {"pictures": len(rows), "MB": round(file.stat().st_size / 1e6, 2), "objects": often.total()}
        report |= {
            "pictures_of_rarest": min(often.values()),
            "words": round(float(np.mean([len(c.split()) for r in rows for c in r["captions"]])), 2),
        }
        if name != "train":
            report |= {k: round(v, 3) for k, v in statistics(rows, rng).items()}
        reports[name] = report
        asked[name] = question_table(train, rows)
        print(name, json.dumps(report), flush=True)
        for kind, figures in asked[name].items():
            print(f"  {kind:<11}", " ".join(f"{column} {value:.4g}" for column, value in figures.items()))
    (args.output / "README.md").write_text(dataset_card(reports, asked, len(closed), len(every), args))


if __name__ == "__main__":
    main()
