"""Compose the data set of the task `slides`: decks of pages with words and numbers, and questions about them.

    python recipes/demo/build_documents.py --output recipes/demo/documents

Columns are SlideVQA's. Things stand on several pages of a deck with different numbers, so that a number is an answer
only together with its page; the fonts are fetched once (`pages.py`).
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from emoji_art import DEFAULT_ART
from pages import ITEMS, SIDE, TITLES, draw_page
from PIL import Image

if TYPE_CHECKING:
    import datasets

FEWEST, MOST = 2, 5
COLOURS = 32
KINDS = {
    "number": "Which number is next to bread on the market page?",
    "page": "Which page lists honey?",
    "title": "What is the title of page 2?",
    "more": "Which is more on the market page, bread or honey?",
}


@dataclass
class Page:
    """A title, and what the rows below it say."""

    title: str
    rows: list[tuple[str, int]]


def make_deck(rng: np.random.Generator) -> list[Page]:
    """Pages of different titles: two of the deck's three things, and mostly one that is on no other page."""
    number = int(rng.integers(FEWEST, MOST + 1))
    titles = rng.choice(TITLES, number, replace=False).tolist()
    things = rng.choice(ITEMS, 3 + number, replace=False).tolist()
    # No number twice in a deck: what another page says of a thing is never right by chance.
    numbers = iter(rng.permutation(100).tolist())
    pages = []
    for place, title in enumerate(titles):
        listed = rng.choice(things[:3], 2, replace=False).tolist()
        if place == 0 or rng.random() < 0.8:
            listed.append(things[3 + place])
        pages.append(Page(title, [(listed[i], next(numbers)) for i in rng.permutation(len(listed))]))
    return [pages[i] for i in rng.permutation(number)]


def questions(deck: list[Page], rng: np.random.Generator) -> list[tuple[str, str, str, int]]:
    """Three or four of kind, question, answer and the number of the page that has it."""
    where: dict[str, list[int]] = defaultdict(list)
    for number, page in enumerate(deck):
        for thing, _ in page.rows:
            where[thing].append(number)
    repeated = [
        (number, thing, value)
        for number, page in enumerate(deck)
        for thing, value in page.rows
        if len(where[thing]) > 1
    ]
    found = []
    for i in rng.permutation(len(repeated))[:2]:
        number, thing, value = repeated[i]
        asked = (
            f"Which number is next to {thing} on the {deck[number].title} page?",
            f"On the {deck[number].title} page, which number does {thing} have?",
        )
        found.append(("number", asked[rng.integers(2)], str(value), number))
    alone = [thing for thing, places in where.items() if len(places) == 1]
    thing = alone[rng.integers(len(alone))]
    number = where[thing][0]
    asked = (f"Which page lists {thing}?", f"On which page is {thing}?")
    found.append(("page", asked[rng.integers(2)], deck[number].title, number))
    number = int(rng.integers(len(deck)))
    kind = ("title", "more", "none")[rng.integers(3)]
    if kind == "title":
        found.append((kind, f"What is the title of page {number + 1}?", deck[number].title, number))
    elif kind == "more":
        (one, few), (other, many) = (deck[number].rows[i] for i in rng.permutation(len(deck[number].rows))[:2])
        more = one if few > many else other
        found.append((kind, f"Which is more on the {deck[number].title} page, {one} or {other}?", more, number))
    return found


def encode(picture: Image.Image) -> bytes:
    """The picture's bytes as lossless WebP; in fewer shades at the letters' edges it takes half."""
    buffer = BytesIO()
    shades = picture.quantize(COLOURS, dither=Image.Dither.NONE).convert("RGB")
    shades.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()


def build_split(
    name: str, number: int, art: Path, seen: set[bytes], rng: np.random.Generator
) -> tuple[list[dict], list[tuple[str, str, str]]]:
    """Rows of one split, a question each, and of each its kind, question and answer; ``seen`` collects all pages."""
    rows, asked = [], []
    for deck_number in range(number):
        deck = make_deck(rng)
        pages = [encode(draw_page(page.title, page.rows, rng, art)[0]) for page in deck]
        if not seen.isdisjoint(pages):
            raise SystemExit(f"{name}: a page was drawn twice; expected different ones, choose another --seed")
        seen.update(pages)
        cells = dict.fromkeys(f"page_{place}" for place in range(1, MOST + 1))
        cells |= {f"page_{place}": {"bytes": page, "path": None} for place, page in enumerate(pages, 1)}
        for kind, question, answer, place in questions(deck, rng):
            rows.append({
                "deck_name": f"{name}-{deck_number:04d}", **cells, "qa_id": len(rows),
                "question": question, "answer": answer, "evidence_pages": [place + 1],
            })  # fmt: skip
            asked.append((kind, question, answer))
    return rows, asked


def features() -> datasets.Features:
    """The columns of both splits: those of SlideVQA that the task reads."""
    from datasets import Features, Image, List, Value

    pages = {f"page_{place}": Image() for place in range(1, MOST + 1)}
    text, whole = Value("string"), Value("int32")
    return Features({
        "deck_name": text, **pages, "qa_id": whole, "question": text, "answer": text, "evidence_pages": List(whole),
    })  # fmt: skip


def guessed(train: list[tuple[str, str, str]], asked: list[tuple[str, str, str]]) -> dict[str, tuple[int, float]]:
    """Of each kind, and of all, how many questions, and the share that the best guess from the text alone answers.

    The guess is the answer that the exact question has most often in ``train``, or else the kind.
    """
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, question, answer in train:
        counted[question][answer] += 1
        counted[kind][answer] += 1
    met: dict[str, list[bool]] = {kind: [] for kind in (*KINDS, "all")}
    for kind, question, answer in asked:
        right = (counted.get(question) or counted[kind]).most_common(1)[0][0] == answer
        met[kind].append(right)
        met["all"].append(right)
    return {kind: (len(each), float(np.mean(each))) for kind, each in met.items()}


def dataset_card(figures: dict[str, dict[str, tuple[int, float]]], decks: dict[str, Counter[int]], seed: int) -> str:
    """The data set's README.md, with counted figures only."""
    files = "\n".join(f"      - split: {n}\n        path: data/{n}-*.parquet" for n in figures)
    sizes = "\n".join(
        f"| `{name}` | {by.total()} | {sum(size * count for size, count in by.items())} | "
        + ", ".join(f"{by[size]} of {size}" for size in sorted(by))
        + " |"
        for name, by in decks.items()
    )
    kinds = "\n".join(
        f"| {kind} | {KINDS.get(kind, '')} | "
        + " | ".join(f"{by[kind][0]}, guess {by[kind][1]:.3f}" for by in figures.values())
        + " |"
        for kind in (*KINDS, "all")
    )
    return f"""---
license: apache-2.0
language: en
task_categories: [visual-question-answering]
pretty_name: Decks of pages
configs:
  - config_name: default
    data_files:
{files}
---
# Decks of pages

Decks of {FEWEST} to {MOST} pages of {SIDE}x{SIDE} pixels: a title, and below it two or three rows "thing, number".
Built by `recipes/demo/build_documents.py` (seed {seed}) from {len(TITLES)} titles and {len(ITEMS)} things. Licences of
the fonts: `../NOTICE.md`.

| split | decks | pages | decks by pages |
|---|---|---|---|
{sizes}

Questions of each kind, and what the best guess from the text alone scores, the answer that the exact question has most
often in `train`:

| kind | for example | {" | ".join(f"`{name}`" for name in figures)} |
|---|---|{"---|" * len(figures)}
{kinds}

Two of three things that a deck has are on each page, with different numbers, and mostly one that is on no other page.

Columns, named as in SlideVQA (arXiv 2301.04883), a row a question: `deck_name`; `page_1` to `page_{MOST}` (lossless
WebP in {COLOURS} shades, empty after a deck's end); `qa_id`; `question`; `answer`; `evidence_pages`.

```python
from datasets import load_dataset

documents = load_dataset("recipes/demo/documents", split="test")
```
"""


def main() -> None:
    """Build both splits and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--art", type=Path, default=DEFAULT_ART, help="folder with the fonts; missing ones are fetched")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "documents")
    parser.add_argument("--train", type=int, default=500, help="decks")
    parser.add_argument("--test", type=int, default=60, help="decks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(args.seed)
    (args.output / "data").mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    known: list[tuple[str, str, str]] = []
    figures, decks = {}, {}
    for name, number in (("train", args.train), ("test", args.test)):
        rows, asked = build_split(name, number, args.art, seen, rng)
        known = known or asked
        file = args.output / "data" / f"{name}-00000-of-00001.parquet"
        # Pages are repeated with each question of their deck: pyarrow's dictionary, which `to_parquet` leaves out for
        # pictures, stores them once.
        pq.write_table(pa.Table.from_pylist(rows, schema=features().arrow_schema), file)
        figures[name] = guessed(known, asked)
        sizes = {
            row["deck_name"]: sum(row[f"page_{place}"] is not None for place in range(1, MOST + 1)) for row in rows
        }
        decks[name] = Counter(sizes.values())
        print(
            name,
            f"{number} decks, {len(rows)} questions, {file.stat().st_size / 1e6:.2f} MB",
            figures[name],
            flush=True,
        )
    (args.output / "README.md").write_text(dataset_card(figures, decks, args.seed))


if __name__ == "__main__":
    main()
