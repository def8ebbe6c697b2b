"""Compose the data set of the task `digits`: pictures with rows of handwritten digits, to be read in order.

    python recipes/demo/build_digits.py --output recipes/demo/digits

The digits are scikit-learn's `load_digits` (8 x 8 pixels each; in the extra `art`, needed for nothing else), so nothing
is fetched. A digit that is shown in `test` is never shown in `train`.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import datasets

SIDE, GRID, SCALE = 112, 4, 3
CELL, DIGIT = SIDE // GRID, 8 * SCALE
FEWEST, MOST = 4, 8


def compose(scans: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of scans (N, 8, 8), levels 0..16, dark on light, each somewhere in its cell of the grid."""
    levels = np.zeros((SIDE, SIDE))
    for cell, scan in enumerate(scans):
        row, column = divmod(cell, GRID)
        top, left = (place * CELL + int(rng.integers(0, CELL - DIGIT + 1)) for place in (row, column))
        levels[top : top + DIGIT, left : left + DIGIT] = np.kron(scan, np.ones((SCALE, SCALE)))
    paper, ink = rng.integers(200, 256, 3), rng.integers(0, 100, 3)
    pixels = paper + (ink - paper) * levels[..., None] / 16
    return Image.fromarray(pixels.round().astype(np.uint8))


def encode(picture: Image.Image) -> bytes:
    """The picture's bytes as lossless WebP: blocks of one colour take a tenth of what a smooth enlargement takes."""
    buffer = BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()


def build_split(name: str, number: int, scans: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> list[dict]:
    """Rows of one split; every scan is drawn once before any is drawn again."""
    waiting = np.empty(0, dtype=np.int64)
    rows = []
    for index in range(number):
        count = int(rng.integers(FEWEST, MOST + 1))
        if len(waiting) < count:
            waiting = np.concatenate([waiting, rng.permutation(len(scans))])
        shown, waiting = waiting[:count], waiting[count:]
        rows.append({
            "id": f"{name}-{index:05d}",
            "image": {"bytes": encode(compose(scans[shown], rng)), "path": None},
            "digits": "".join(map(str, labels[shown])),
        })  # fmt: skip
    return rows


def features() -> datasets.Features:
    """The columns of both splits."""
    from datasets import Features, Image, Value

    return Features({"id": Value("string"), "image": Image(), "digits": Value("string")})


def dataset_card(pictures: dict[str, int], sources: dict[str, int], digits: dict[str, int], seed: int) -> str:
    """The data set's README.md, with counted figures only."""
    files = "\n".join(f"      - split: {n}\n        path: data/{n}-*.parquet" for n in pictures)
    table = "\n".join(f"| `{n}` | {pictures[n]} | {digits[n]} | {sources[n]} |" for n in pictures)
    return f"""---
license: cc-by-4.0
task_categories: [image-to-text]
pretty_name: Rows of digits
configs:
  - config_name: default
    data_files:
{files}
---
# Rows of digits

Pictures of {SIDE}x{SIDE} pixels with {FEWEST} to {MOST} handwritten digits, dark on light, in rows of {GRID}, each
moved by up to {CELL - DIGIT} pixels in its cell of {CELL}x{CELL}. Built by
`recipes/demo/build_digits.py` (seed {seed}).

| split | pictures | digits shown | different digits |
|---|---|---|---|
{table}

No digit of one split is in the other.

Columns: `id`; `image` (lossless WebP); `digits`, what stands there from left to right and top to bottom, as `417`: with
Qwen's tokenizer, and with the demo's, one token a digit.

Source: scikit-learn's `load_digits`, the test part of Optical Recognition of Handwritten Digits (E. Alpaydin and
C. Kaynak; archive.ics.uci.edu/dataset/80), CC BY 4.0. Changed: enlarged, coloured, composed. The same
13 people wrote the digits of both splits.
"""


def main() -> None:
    """Build both splits and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "digits")
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--test", type=int, default=250)
    parser.add_argument("--test_share", type=float, default=0.2, help="share of the source's digits kept for test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from datasets import Dataset
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(args.seed)
    source = load_digits()
    order = rng.permutation(len(source.images))
    kept = round(args.test_share * len(order))
    chosen = {"train": order[kept:], "test": order[:kept]}
    (args.output / "data").mkdir(parents=True, exist_ok=True)
    digits = {}
    for name, number in (("train", args.train), ("test", args.test)):
        rows = build_split(name, number, source.images[chosen[name]], source.target[chosen[name]], rng)
        file = args.output / "data" / f"{name}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features()).to_parquet(file)
        digits[name] = sum(len(row["digits"]) for row in rows)
        print(name, len(rows), f"{file.stat().st_size / 1e6:.2f} MB", flush=True)
    pictures = {"train": args.train, "test": args.test}
    sources = {name: len(each) for name, each in chosen.items()}
    (args.output / "README.md").write_text(dataset_card(pictures, sources, digits, args.seed))


if __name__ == "__main__":
    main()
