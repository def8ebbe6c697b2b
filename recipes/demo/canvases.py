"""Endless labelled canvases for the encoder's pre-training: 1 to 5 augmented emoji on one background, pages, digits.

A canvas knows which concept each 14x14 patch shows and where that object ends; no canvas holds a held-out pair of the
demo's concepts.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from emoji_art import BACKGROUNDS, CONCEPTS, HeldOutFilter, Vendor, cldr_entries, fit, jittered_background
from pages import FONT_PACKAGES, HANDWRITING_PACKAGES, ITEMS, TITLES, draw_page, fetch_fonts, load_font
from PIL import Image, ImageDraw, ImageFilter

SIDE, PATCH = 112, 14
GRID = SIDE // PATCH
RENDER_SIZE = 72
IGNORED = -1
COUNTS, COUNT_SHARES = (1, 2, 3, 4, 5), (0.15, 0.45, 0.22, 0.12, 0.06)
SIZES = {1: (24, 60), 2: (22, 56), 3: (20, 40), 4: (20, 34), 5: (20, 30)}
DEMO_SHARE = 0.7
# Of canvases: pages with a table, and rows of digits; of a scene's objects: words and numbers.
PAGE_SHARE, DIGITS_SHARE, TEXT_SHARE = 0.1, 0.12, 0.08
NUMBERS = 100
COLOURS = tuple(BACKGROUNDS)
# Rotation of the hue about the gray axis: RGB -> luma and two chroma axes -> RGB.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass
class Entry:
    """One concept: its texts (names, names with keywords), the demo nouns in its names, and its sprites.

    A word or a number has no sprites: it is set anew each time.
    """

    label: str
    texts: list[str]
    nouns: frozenset[str]
    sprites: list[Image.Image]
    mirror: bool
    demo: bool


def load_entries(art: Path, vendors: list[str], held_out: HeldOutFilter) -> list[Entry]:
    """The demo's concepts first, then every other emoji that a vendor draws (no flags, sequences, clock faces)."""
    cldr, demo = cldr_entries(art), {c.code: c for c in CONCEPTS}
    others = [
        code for code, e in cldr.items()
        if e.get("group") in (0, 1, 3, 4, 5, 6, 7, 8) and "200D" not in code and code not in demo
        and "o'clock" not in e["label"] and "thirty" not in e["label"]
    ]  # fmt: skip
    codes = [*demo, *others]
    packs = [Vendor(art, v, codes) for v in vendors]
    entries = []
    for code in codes:
        label, concept = cldr[code]["label"], demo.get(code)
        texts = [concept.phrase, concept.bare, concept.noun, label] if concept else [label, label]
        for tag in cldr[code].get("tags", []):
            if not held_out(f"{label} {tag}"):
                texts.append(f"{label}, {tag}")
        sprites = [s for pack in packs for s in pack.sprites(code, RENDER_SIZE)]
        if sprites:
            nouns = held_out.nouns(" ".join(texts[:4]) if concept else label)
            mirror = cldr[code]["group"] != 8
            entries.append(Entry(label, texts, frozenset(nouns), sprites, mirror, concept is not None))
    for word in (*TITLES, *ITEMS):
        entries.append(Entry(word, [word, f"the word {word}"], frozenset(), [], False, False))
    for number in range(NUMBERS):
        entries.append(Entry(str(number), [str(number), f"the number {number}"], frozenset(), [], False, False))
    return entries


def is_plain(sprite: Image.Image) -> bool:
    """Whether a sprite is drawn in one colour, as icons are, so that any other would do as well."""
    pixels = np.asarray(sprite).reshape(-1, 4)
    return bool(pixels[pixels[:, 3] > 200, :3].std(0).max(initial=0.0) < 12)


def bend(picture: Image.Image, py: random.Random, strength: float = 2.5) -> Image.Image:
    """A picture whose quarters are stretched at random, by about ``strength`` pixels, as a hand would."""
    width, height = picture.size
    xs, ys = (0, width // 2, width), (0, height // 2, height)
    moved = {(x, y): (x + py.gauss(0, strength), y + py.gauss(0, strength)) for x in xs for y in ys}
    mesh = []
    for x, right in itertools.pairwise(xs):
        for y, low in itertools.pairwise(ys):
            corners = (*moved[x, y], *moved[x, low], *moved[right, low], *moved[right, y])
            mesh.append(((x, y, right, low), corners))
    return picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def scanned_digit(digit: int, font: Path, py: random.Random) -> np.ndarray:
    """A digit as a coarse scan: ink (24, 24) from 0 to 1 in 8x8 blocks of 3x3 pixels."""
    picture = Image.new("L", (48, 48))
    width = py.choice((0, 0, 1, 1, 2))
    drawn = load_font(font, py.randint(28, 36))
    ImageDraw.Draw(picture).text((24, 24), str(digit), fill=255, font=drawn, anchor="mm", stroke_width=width)
    slant, squeeze = py.gauss(0, 0.18), py.uniform(-0.1, 0.1)
    matrix = (1, slant, -24 * slant, squeeze, 1, -24 * squeeze)
    picture = picture.transform((48, 48), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    picture = picture.rotate(py.gauss(0, 6), Image.Resampling.BILINEAR)
    picture = bend(picture, py)
    picture = picture.crop(picture.getbbox())
    wide = max(3, min(8, round(8 * picture.width / picture.height * py.uniform(0.9, 1.3))))
    scan = np.zeros((8, 8), np.float32)
    left = (8 - wide) // 2
    scan[:, left : left + wide] = np.asarray(picture.resize((wide, 8), Image.Resampling.BOX)) / 255
    return np.kron(np.clip(scan * py.uniform(1.0, 1.5), 0, 1), np.ones((3, 3), np.float32))


class CanvasMaker:
    """Composes canvases from the entries; every draw comes from ``rng``."""

    def __init__(
        self, entries: list[Entry], pairs: set[frozenset[str]], seed: int, art: Path, augment: bool = True
    ) -> None:
        self.entries, self._augment, self._art = entries, augment, art
        self.rng, self._py = np.random.default_rng(seed), random.Random(seed)
        self._demo = [i for i, e in enumerate(entries) if e.demo]
        self._drawn = [i for i, e in enumerate(entries) if e.sprites]
        self._texts = {e.label: i for i, e in enumerate(entries) if not e.sprites}
        self._plain = {id(sprite) for e in entries for sprite in e.sprites if is_plain(sprite)}
        self._fonts = fetch_fonts(art, FONT_PACKAGES)
        self._hands = [*self._fonts, *3 * fetch_fonts(art, HANDWRITING_PACKAGES)]
        self._forbidden = {tuple(p) for p in pairs} | {tuple(p)[::-1] for p in pairs}

    def _pick(self, count: int) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < count:
            if self._augment and self._py.random() < TEXT_SHARE:
                new = self._py.choice(list(self._texts.values()))
            else:
                new = self._py.choice(self._demo if self._py.random() < DEMO_SHARE else self._drawn)
            nouns = self.entries[new].nouns
            clash = any((a, b) in self._forbidden for c in chosen for a in self.entries[c].nouns for b in nouns)
            if new not in chosen and not clash:
                chosen.append(new)
        return chosen

    def _background(self) -> tuple[np.ndarray, int]:
        """A float canvas (SIDE, SIDE, 3) and the index of its colour's name, or IGNORED where it has no single one."""
        kind = self._py.random()
        canvas = np.empty((SIDE, SIDE, 3), np.float32)
        if kind < 0.7:
            name = self._py.randrange(len(COLOURS))
            canvas[:] = jittered_background(COLOURS[name], self.rng)
            return canvas, name
        one, two = self.rng.uniform(0, 255, (2, 3))
        if kind < 0.85:
            canvas[:] = one
            return canvas, IGNORED
        ramp = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None]
        ramp = ramp[:, None] if self._py.random() < 0.5 else ramp[None]
        canvas[:] = one * (1 - ramp) + two * ramp
        return canvas, IGNORED

    def _sprite(self, entry: Entry, size: int) -> np.ndarray:
        """One sprite as float RGBA (h, w, 4), resized and, in training, restyled."""
        if not entry.sprites:
            return self._set_text(entry.label, size)
        py, sprite = self._py, self._py.choice(entry.sprites)
        plain = id(sprite) in self._plain
        if not self._augment:
            return np.asarray(fit(sprite, size), np.float32)
        if entry.mirror and py.random() < 0.4:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if py.random() < 0.4:
            sprite = sprite.rotate(py.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
        if py.random() < 0.35:
            sprite = bend(sprite, py, 0.05 * max(sprite.size))
        stretch = py.uniform(0.88, 1.14) if py.random() < 0.4 else 1.0
        scale = size / max(sprite.size)
        shape = (
            max(4, round(sprite.width * scale * min(1.0, stretch))),
            max(4, round(sprite.height * scale / max(1.0, stretch))),
        )
        sprite = sprite.resize(shape, Image.Resampling.BOX if py.random() < 0.8 else Image.Resampling.NEAREST)
        if py.random() < 0.08:
            # Flat colours out of gradients: another vendor's habit.
            alpha = sprite.getchannel("A")
            sprite = sprite.convert("RGB").quantize(py.randint(3, 7)).convert("RGBA")
            sprite.putalpha(alpha)
        if py.random() < 0.12:
            wide = sprite.getchannel("A").filter(ImageFilter.MaxFilter(3))
            line = Image.new("RGBA", sprite.size, (*(py.choice((20, 20, 60, 255)),) * 3, 255))
            line.putalpha(wide)
            sprite = Image.alpha_composite(line, sprite)
        if py.random() < 0.15:
            sprite = sprite.filter(ImageFilter.GaussianBlur(py.uniform(0.3, 1.0)))
        pixels = np.array(sprite, np.float32)
        if plain and py.random() < 0.8:
            pixels[..., :3] = [py.uniform(0, 255) for _ in range(3)]
        angle = py.gauss(0, 0.16) if py.random() < 0.7 else 0.0
        saturation = py.uniform(0.6, 1.35) if py.random() < 0.95 else 0.0
        cos, sin = saturation * np.cos(angle), saturation * np.sin(angle)
        turn = _FROM_YIQ @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _TO_YIQ
        colour = pixels[..., :3] @ turn.T.astype(np.float32)
        contrast, shift = py.uniform(0.75, 1.25), py.uniform(-24, 24)
        colour = (colour - 128) * contrast + 128 + shift
        if py.random() < 0.3:
            # Light from one side: flat art becomes shaded.
            height, width = colour.shape[:2]
            slope = np.linspace(-1, 1, height)[:, None] * py.uniform(-40, 40) + np.linspace(-1, 1, width) * py.uniform(
                -30, 30
            )
            colour += slope[..., None].astype(np.float32)
        pixels[..., :3] = np.clip(colour, 0, 255)
        return pixels

    def _set_text(self, text: str, size: int) -> np.ndarray:
        """A word or a number as float RGBA (h, w, 4), numbers about ``size`` pixels high and words as wide."""
        font = load_font(self._py.choice(self._fonts), round(size * (0.5 if text.isalpha() else 0.9)))
        left, top, right, bottom = font.getbbox(text, anchor="ls")
        picture = Image.new("L", (round(right - left) + 2, round(bottom - top) + 2))
        ImageDraw.Draw(picture).text((1 - left, 1 - top), text, fill=255, font=font, anchor="ls")
        pixels = np.empty((picture.height, picture.width, 4), np.float32)
        pixels[..., :3], pixels[..., 3] = [self._py.uniform(0, 255) for _ in range(3)], np.asarray(picture)
        return pixels[:SIDE, :SIDE]

    def _page(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """A page, as `__call__` gives canvases; its paper has no name."""
        rows = [(word, int(self.rng.integers(NUMBERS))) for word in self._py.sample(ITEMS, self._py.randint(1, 3))]
        picture, found = draw_page(self._py.choice(TITLES), rows, self.rng, self._art)
        labels, boxes = np.full((GRID, GRID), IGNORED, np.int64), np.zeros((GRID, GRID, 4), np.float32)
        for each in found:
            x1, y1, x2, y2 = each["box"]
            # A patch shows a text when a third of its width is covered, in the rows that hold most of its height.
            columns = slice(round(x1 / PATCH - 0.17), max(round(x2 / PATCH + 0.17), round(x1 / PATCH - 0.17) + 1))
            top = int((y1 + y2) / 2 / PATCH - 0.5)
            labels[top : top + 2, columns] = self._texts[each["text"]]
            boxes[top : top + 2, columns] = each["box"]
        return np.asarray(picture), labels.ravel(), boxes.reshape(-1, 4), IGNORED

    def _digits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Four to eight digits in rows of four, each in a cell of two by two patches, as `__call__` gives canvases."""
        ink = np.zeros((SIDE, SIDE, 1), np.float32)
        labels, boxes = np.full((GRID, GRID), IGNORED, np.int64), np.zeros((GRID, GRID, 4), np.float32)
        font = self._py.choice(self._hands) if self._py.random() < 0.3 else None
        for cell in range(self._py.randint(4, 8)):
            digit = self._py.randrange(10)
            row, column = divmod(cell, 4)
            y, x = 2 * PATCH * row + self._py.randint(0, 4), 2 * PATCH * column + self._py.randint(0, 4)
            ink[y : y + 24, x : x + 24, 0] = scanned_digit(digit, font or self._py.choice(self._hands), self._py)
            place = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
            labels[place], boxes[place] = self._texts[str(digit)], (x, y, x + 24, y + 24)
        light, dark = self.rng.integers(190, 256, 3), self.rng.integers(0, 110, 3)
        canvas = light + (dark - light) * ink
        return canvas.round().astype(np.uint8), labels.ravel(), boxes.reshape(-1, 4), IGNORED

    def __call__(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """A canvas (SIDE, SIDE, 3) uint8, its patches' entries (GRID * GRID,) with IGNORED, the boxes of what they show
        (GRID * GRID, 4) in pixels, and its colour's index.

        Patches of plain background are IGNORED - 1 - colour where the colour has a name.
        """
        kind = self._py.random() if self._augment else 1.0
        if kind < PAGE_SHARE:
            return self._page()
        if kind < PAGE_SHARE + DIGITS_SHARE:
            return self._digits()
        count = self._py.choices(COUNTS, COUNT_SHARES)[0]
        canvas, ground = self._background()
        labels, best = np.full(GRID * GRID, IGNORED, np.int64), np.zeros(GRID * GRID, np.float32)
        boxes = np.zeros((GRID * GRID, 4), np.float32)
        total = np.zeros(GRID * GRID, np.float32)
        taken: list[tuple[int, int, int, int]] = []
        for index in self._pick(count):
            low, high = SIZES[count]
            pixels = np.empty((0, 0, 4), np.float32)
            for attempt in range(12):
                # Later tries are smaller, so that almost every object finds a place.
                size = self._py.randint(low, max(low, high - 3 * attempt))
                if attempt % 4 == 0:
                    pixels = self._sprite(self.entries[index], size)
                height, width = pixels.shape[:2]
                x, y = self._py.randint(0, max(0, SIDE - width)), self._py.randint(0, max(0, SIDE - height))
                if all(x >= x2 or x + width <= x1 or y >= y2 or y + height <= y1 for x1, y1, x2, y2 in taken):
                    break
            else:
                continue
            pixels = pixels[: SIDE - y, : SIDE - x]
            height, width = pixels.shape[:2]
            taken.append((x, y, x + width, y + height))
            alpha = pixels[..., 3:] / 255
            region = canvas[y : y + height, x : x + width]
            region += alpha * (pixels[..., :3] - region)
            mask = np.zeros((SIDE, SIDE), np.float32)
            mask[y : y + height, x : x + width] = alpha[..., 0]
            cover = mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel()
            total += cover
            # A thin object fills no patch: its best one counts all the same.
            shown = (cover > best) & ((cover >= 0.3) | ((cover >= 0.1) & (cover == cover.max())))
            labels[shown], best[shown], boxes[shown] = index, cover[shown], (x, y, x + width, y + height)
        if ground != IGNORED:
            labels[total < 0.03] = IGNORED - 1 - ground
        if self._augment and self._py.random() < 0.15:
            canvas += self.rng.normal(0, self._py.uniform(2, 8), canvas.shape)
        return np.clip(canvas, 0, 255).astype(np.uint8), labels, boxes, ground


def written_digits(labels: torch.Tensor, boxes: torch.Tensor, numbers: dict[int, str]) -> torch.Tensor:
    """The digit that is written in each patch (B, 64), or IGNORED: of a number of two digits, that of the patch's half.

    Args:
        labels, boxes: As `CanvasBatches` gives them.
        numbers: Labels that are numbers, with their digits.
    """
    first, last = torch.full((2, max(numbers) + 1), IGNORED)
    for label, number in numbers.items():
        first[label], last[label] = int(number[0]), int(number[-1])
    places = labels.clamp(min=0, max=max(numbers))
    middles = (torch.arange(GRID * GRID) % GRID + 0.5) * PATCH
    digits = torch.where(middles < (boxes[..., 0] + boxes[..., 2]) / 2, first[places], last[places])
    return torch.where((labels >= 0) & (labels <= max(numbers)), digits, IGNORED)


class CanvasBatches(torch.utils.data.IterableDataset):
    """Batches of canvases: pixels (B, 3, SIDE, SIDE) uint8, labels (B, GRID * GRID) int64, boxes (B, GRID * GRID, 4)
    float32 and colours (B,) int64."""

    def __init__(self, maker: CanvasMaker, batch: int) -> None:
        self._maker, self._batch = maker, batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Endless batches, made by one thread."""
        torch.set_num_threads(1)
        while True:
            pixels, labels, boxes, grounds = zip(*(self._maker() for _ in range(self._batch)), strict=True)
            images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
            yield images, torch.from_numpy(np.stack(labels)), torch.from_numpy(np.stack(boxes)), torch.tensor(grounds)
