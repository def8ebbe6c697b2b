"""Endless labelled canvases for the encoder's pre-training: 1 to 5 augmented emoji on one background.

A canvas knows which concept each 14x14 patch shows; no canvas holds a held-out pair of the demo's concepts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from emoji_art import BACKGROUNDS, CONCEPTS, HeldOutFilter, Vendor, cldr_entries, fit, jittered_background
from PIL import Image, ImageFilter

SIDE, PATCH = 112, 14
GRID = SIDE // PATCH
RENDER_SIZE = 72
IGNORED = -1
COUNTS, COUNT_SHARES = (1, 2, 3, 4, 5), (0.15, 0.45, 0.22, 0.12, 0.06)
SIZES = {1: (24, 60), 2: (22, 56), 3: (20, 40), 4: (20, 34), 5: (20, 30)}
DEMO_SHARE = 0.7
COLOURS = tuple(BACKGROUNDS)
# Rotation of the hue about the gray axis: RGB -> luma and two chroma axes -> RGB.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass
class Entry:
    """One concept: its texts (names, names with keywords), the demo nouns in its names, and its sprites."""

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
    return entries


class CanvasMaker:
    """Composes canvases from the entries; every draw comes from ``rng``."""

    def __init__(self, entries: list[Entry], pairs: set[frozenset[str]], seed: int, augment: bool = True) -> None:
        self.entries, self._augment = entries, augment
        self.rng, self._py = np.random.default_rng(seed), random.Random(seed)
        self._demo = [i for i, e in enumerate(entries) if e.demo]
        self._forbidden = {tuple(p) for p in pairs} | {tuple(p)[::-1] for p in pairs}

    def _pick(self, count: int) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < count:
            demo = self._py.random() < DEMO_SHARE
            new = self._py.choice(self._demo) if demo else self._py.randrange(len(self.entries))
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
        py, sprite = self._py, self._py.choice(entry.sprites)
        if not self._augment:
            return np.asarray(fit(sprite, size), np.float32)
        if entry.mirror and py.random() < 0.4:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if py.random() < 0.4:
            sprite = sprite.rotate(py.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
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

    def __call__(self) -> tuple[np.ndarray, np.ndarray, int]:
        """A canvas (SIDE, SIDE, 3) uint8, its patches' entries (GRID * GRID,) with IGNORED, and its colour's index.

        Patches of plain background are IGNORED - 1 - colour where the colour has a name.
        """
        count = self._py.choices(COUNTS, COUNT_SHARES)[0]
        canvas, ground = self._background()
        labels, best = np.full(GRID * GRID, IGNORED, np.int64), np.zeros(GRID * GRID, np.float32)
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
            labels[shown], best[shown] = index, cover[shown]
        if ground != IGNORED:
            labels[total < 0.03] = IGNORED - 1 - ground
        if self._augment and self._py.random() < 0.15:
            canvas += self.rng.normal(0, self._py.uniform(2, 8), canvas.shape)
        return np.clip(canvas, 0, 255).astype(np.uint8), labels, ground


class CanvasBatches(torch.utils.data.IterableDataset):
    """Batches of canvases: pixels (B, 3, SIDE, SIDE) uint8, labels (B, GRID * GRID) int64, colours (B,) int64."""

    def __init__(self, maker: CanvasMaker, batch: int) -> None:
        self._maker, self._batch = maker, batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Endless batches, made by one thread."""
        torch.set_num_threads(1)
        while True:
            pixels, labels, grounds = zip(*(self._maker() for _ in range(self._batch)), strict=True)
            images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
            yield images, torch.from_numpy(np.stack(labels)), torch.tensor(grounds)
