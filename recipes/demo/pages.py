"""Words and numbers as pictures: the demo's pages (a title and rows of a table), and the fonts that they are set in.

The fonts are Debian's packages; a folder that has them is used as it is, what is missing is fetched with ``apt-get``.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
from emoji_art import DEFAULT_ART
from PIL import Image, ImageDraw, ImageFont

SIDE = 112
# Each is one token of the demo's tokenizer, and none is another's plural.
TITLES = (
    "market school garden kitchen park street shop beach station hotel office factory castle city town farm forest "
    "island bank club port stadium church desert"
).split()
ITEMS = (
    "bread milk wine corn garlic onion potato tomato beans honey sugar salt oil butter candy peach pear olive coconut "
    "shrimp duck horse goat book paper pencil soap chair table plate spoon coat dress gloves jeans hat coin stone wood "
    "iron"
).split()
ROWS = 3
FONT_PACKAGES = {
    "fonts-dejavu-core": ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf"),
    "fonts-liberation": (
        "LiberationSans-Bold.ttf", "LiberationSerif-Bold.ttf", "LiberationSans-Regular.ttf", "LiberationMono-Bold.ttf",
    ),
}  # fmt: skip
HANDWRITING_PACKAGES = {
    "fonts-breip": ("Breip.ttf",),
    "fonts-bwht": (
        "BecauseWeBuild-Regular.otf", "BecauseWeConnect-Regular.otf", "BecauseWeCreate-Regular.otf",
        "BecauseWeLearn-Regular.otf", "BecauseWeMentor-Regular.otf", "BecauseWeOrganize-Regular.otf",
    ),
    "fonts-comic-neue": ("ComicNeue-Bold.otf", "ComicNeue-Regular.otf"),
    "fonts-dkg-handwriting": ("dkg.ttf", "dkgBI.ttf", "dkgBd.ttf", "dkgIt.ttf"),
    "fonts-humor-sans": ("Humor-Sans.ttf",),
    "fonts-kristi": ("Kristi.ttf",),
    "fonts-rufscript": ("Rufscript010.ttf",),
    "fonts-sjfonts": ("Delphine.ttf", "SteveHand.ttf"),
}  # fmt: skip


def fetch_fonts(art: Path, packages: dict[str, tuple[str, ...]]) -> list[Path]:
    """The font files of Debian ``packages`` under ``art``; fetched with ``apt-get download`` when not there."""
    paths = []
    for package, files in packages.items():
        folder = art / "fonts" / package
        if not folder.is_dir():
            for client in ("apt-get", "dpkg"):
                if shutil.which(client) is None:
                    raise SystemExit(f"{package} is not under {art / 'fonts'}, and {client} is not installed")
            folder.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", "--quiet", package], cwd=folder.parent, check=True)
            subprocess.run(["dpkg", "-x", str(next(folder.parent.glob(f"{package}_*.deb"))), str(folder)], check=True)
        found = {path.name: path for path in folder.rglob("*") if path.suffix in (".ttf", ".otf")}
        paths += [found[name] for name in files]
    return paths


@lru_cache(maxsize=512)
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font of ``size`` pixels."""
    return ImageFont.truetype(str(path), size)


def fitted_font(path: Path, text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """The font at ``size`` pixels, or smaller where ``text`` would be wider than ``width`` pixels."""
    while size > 6 and load_font(path, size).getlength(text) > width:
        size -= 1
    return load_font(path, size)


def draw_page(
    title: str, rows: list[tuple[str, int]], rng: np.random.Generator, art: Path = DEFAULT_ART
) -> tuple[Image.Image, list[dict]]:
    """A page of 112x112 pixels: the title at the top, below it up to three rows "word   number".

    Args:
        title: One word.
        rows: Words with numbers of one or two digits.
        rng: Draws font, colours and small shifts.
        art: Folder with the fonts.

    Returns:
        The RGB picture, and what stands where in the order of reading: ``text``, ``box`` = x1, y1, x2, y2 in pixels.
    """
    fonts = fetch_fonts(art, FONT_PACKAGES)
    path = fonts[rng.integers(len(fonts))]
    paper = rng.integers(225, 256, 3)
    ink, accent = rng.integers(0, 70, 3), rng.integers(0, 120, 3)
    picture = Image.new("RGB", (SIDE, SIDE), tuple(int(c) for c in paper))
    pen = ImageDraw.Draw(picture)
    found = []

    def write(
        text: str, font: ImageFont.FreeTypeFont, x: float, middle: float, colour: np.ndarray, anchor: str
    ) -> None:
        place = (x + int(rng.integers(-1, 2)), middle + int(rng.integers(-1, 2)))
        pen.text(place, text, fill=tuple(int(c) for c in colour), font=font, anchor=anchor)
        found.append(
            {"text": text, "box": [round(each) for each in pen.textbbox(place, text, font=font, anchor=anchor)]}
        )

    write(title, fitted_font(path, title, 20, SIDE - 8), 4, SIDE / 8, accent, "lm")
    for number, (word, value) in enumerate(rows[:ROWS]):
        middle = SIDE * (3 + 2 * number) / 8
        write(word, fitted_font(path, word, 18, 68), 4, middle, ink, "lm")
        write(str(value), fitted_font(path, str(value), 25, 36), SIDE - 4, middle, ink, "rm")
    return picture, found
