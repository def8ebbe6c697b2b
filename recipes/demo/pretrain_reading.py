"""Teach the demo's small Qwen3 to read soft grids of words and to answer questions about them: text only, no pictures.

    python recipes/demo/pretrain_reading.py --art DIR --model recipes/demo/qwen3

A decoder that has only read a dictionary cannot look something up in its context, and does not learn it from a few
thousand captions. What it reads here is made by `reading_texts.py`. Matching a word that was asked for with one that is
there is a circuit that appears suddenly: it appears on many easy cases (short lines, small grids, nothing confused) and
carries over to the 8 x 8 cells of a picture. Questions that need two things found and compared stayed at chance until
some heads were shown where to look (`looking_loss`) and hidden states were asked for what was found there (`BoxHead`).

The rows of the ten digits of a decoder that has read no numbers are almost parallel (mean cosine 0.99), so that no
hidden state could tell them apart; they are drawn anew first, unless this has been done before. Uses a GPU where there
is one (`--workers` processes make the texts).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from devices import choose_device, device_name
from emoji_art import DEFAULT_ART, HeldOutFilter, fetch_wordnet, load_held_out_pairs
from pretrain_clip import overlaps
from pretrain_lm import build_texts, save
from reading_texts import DEMO_SHARE, Cells, Document, ReadingTexts, english_tokens, split_words
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, embedding_bag, linear, normalize
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

LENGTH = 512
PERIODS = (0.5, 1.0, 2.0, 4.0)
EDGE_SHARE, PLACE_SHARE = 0.35, 0.6
SHORTEST_ENGLISH = 12
EASY, MEDIUM, HALF = 0.18, 0.32, 0.6
LOOKING = 0.4
READING = 0.3
EDGE_BINS, PLACE_BINS, SIZE_BINS = 32, 16, 16
NOWHERE = (float("nan"),) * 4
MEASURED_ROWS = 144
WORDS_SEED = CODES_SEED = 0
# What words' embeddings have on average after `pretrain_lm.py`.
WORD_NORM = 0.816


@dataclass
class Looks:
    """Who is to look where: places in the flattened rows (Q), and which places of the same row to look at (Q, T)."""

    places: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, looks: list[tuple[int, list[int]]], length: int) -> Looks:
        """From pairs of a place and the columns to look at."""
        targets = torch.zeros(len(looks), length, dtype=torch.bool)
        for line, (_, columns) in zip(targets, looks, strict=True):
            line[columns] = True
        return cls(torch.tensor([place for place, _ in looks], dtype=torch.long), targets)


@dataclass
class Batch:
    """Rows of packed documents; see `pack`.

    Args:
        ids, positions, targets, weights, owners, branches: (B, T).
        cells: Places of soft cells in the flattened rows (C), with names and shares (C, K) and codes (C, D_t).
        middles: Whether a cell holds the middle of a thing (C).
        words, answers, asked: Who is to look where; see `looking_loss`.
        there: Whether what `words` name is anywhere (Q).
        boxes: Its box (Q, 4), NaN where it is nowhere or there are several.
        digits: Places before the numbers of a box (P), and that box (P, 4).
        kinds: A name for each branch.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor
    branches: torch.Tensor
    cells: torch.Tensor
    names: torch.Tensor
    shares: torch.Tensor
    codes: torch.Tensor
    middles: torch.Tensor
    words: Looks
    there: torch.Tensor
    boxes: torch.Tensor
    answers: Looks
    asked: tuple[Looks, Looks]
    digits: tuple[torch.Tensor, torch.Tensor]
    kinds: list[str]

    def to(self, device: torch.device) -> Batch:
        """All tensors on a device."""

        def move(value: Any) -> Any:
            if isinstance(value, Looks):
                return Looks(move(value.places), move(value.targets))
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return Batch(*(move(getattr(self, each.name)) for each in fields(self)))

    def mask(self) -> torch.Tensor:
        """What is added to the scores of attention (B, 1, T, T): a branch sees its document's prefix and itself."""
        length = self.ids.shape[1]
        seen = (self.owners[:, :, None] == self.owners[:, None]) & torch.ones(
            length, length, dtype=torch.bool, device=self.ids.device
        ).tril()
        seen &= (self.branches[:, None] == 0) | (self.branches[:, :, None] == self.branches[:, None])
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -1e4)[:, None]


class Codes:
    """Smooth codes of edges and places: Fourier features times a random matrix that stays the same.

    Args:
        width: Of the embeddings.
        seed: Of all noise.
    """

    def __init__(self, width: int, seed: int) -> None:
        fixed = np.random.default_rng(CODES_SEED)
        self._matrix = fixed.normal(0, 1, (6, 2 * len(PERIODS), width)) / np.sqrt(width * len(PERIODS))
        self._numpy, self._random = np.random.default_rng(seed + 1), random.Random(seed)

    def _fourier(self, values: np.ndarray) -> np.ndarray:
        angles = 2 * np.pi * values[..., None] * np.array(PERIODS)
        return np.concatenate([np.sin(angles), np.cos(angles)], -1)

    def of_edges(self, edges: np.ndarray) -> np.ndarray:
        """Codes (n, width) of boxes (n, 4), each side 0..1."""
        return np.einsum("nef,efd->nd", self._fourier(edges), self._matrix[:4])

    def of_places(self, places: np.ndarray) -> np.ndarray:
        """Codes (n, width) of columns and rows (n, 2), 0..1."""
        return np.einsum("nef,efd->nd", self._fourier(places), self._matrix[4:])

    def __call__(self, cells: Cells, hardness: float) -> tuple[np.ndarray, float]:
        """What is added to the cells (n, width), and the scale of the whole; `hardness` 0..1 is the amount of noise."""
        draw, number, width = self._random, len(cells.place), self._matrix.shape[-1]
        total = np.zeros((number, width))
        known = ~np.isnan(cells.edges[:, 0])
        if known.any() and draw.random() < 0.85:
            edges = cells.edges[known] + self._numpy.normal(0, 0.012 * hardness, (known.sum(), 4))
            share = EDGE_SHARE * draw.uniform(0.7, 1.5)
            total[known] += share * self.of_edges(edges)
        if draw.random() < 0.95:
            place = cells.place + self._numpy.normal(0, 0.015 * hardness, cells.place.shape)
            share = PLACE_SHARE * draw.uniform(0.6, 1.4)
            total += share * self.of_places(place)
        noise = hardness * draw.uniform(0, 0.8)
        total += noise / np.sqrt(width) * self._numpy.normal(0, 1, total.shape)
        total += 0.5 * noise / np.sqrt(width) * self._numpy.normal(0, 1, width)
        scale = draw.uniform(1 - 0.3 * hardness, 1 + 0.5 * hardness)
        return WORD_NORM * scale * total, scale


def draw_document(texts: ReadingTexts, progress: float, full: bool = False) -> Document:
    """A document of a difficulty that grows with `progress` (0..1); `full` is the last stage's at once."""
    rng = texts.rng
    if full or texts.two_looks:
        progress = 1.0
    easy = progress < EASY
    if rng.random() < (0.05 if easy else 0.13):
        return texts.plain(rng.randint(64, 128))
    if easy:
        kind = rng.choices(("words", "picture", "repeat"), (0.25, 0.68, 0.07))[0]
        sides, pages, clean = (2, 3, 4), 4, True
    elif progress < MEDIUM:
        kind = rng.choices(("words", "picture", "digits", "pages", "repeat"), (0.15, 0.65, 0.08, 0.06, 0.06))[0]
        sides, pages, clean = (2, 3, 4, 4), 4, rng.random() < 0.5
    else:
        kind = rng.choices(("words", "picture", "digits", "pages", "repeat"), (0.05, 0.74, 0.09, 0.09, 0.03))[0]
        sides, pages, clean = ((3, 4, 6, 8, 8, 8, 8, 8) if progress < HALF else (4, 8, 8, 8, 8, 8, 8)), None, False
        if texts.two_looks and not full:
            sides, clean = (2, 3, 4, 6, 8, 8, 8, 8), rng.random() < 0.3
    if rng.random() < (0.15 if easy else 0.07):
        return texts.spelling()
    if kind == "words":
        return texts.words_only()
    if kind == "repeat":
        return texts.repeat()
    if kind == "digits":
        return texts.digits()
    if kind == "pages":
        side = pages or rng.choice((4, 6, 8, 8))
        return texts.pages(side, rng.randint(1, {4: 4, 6: 4, 8: 5}[side]))
    return texts.picture(rng.choice(sides), rng.randint(4, 8), clean, easy)


def pack(texts: ReadingTexts, codes: Codes, progress: float, rows: int, length: int, full: bool = False) -> Batch:
    """Rows (B, T) of documents.

    A branch sees its document's prefix and itself, and counts its positions on from the prefix. What a row's documents
    leave is filled with general English.
    """
    ids, owners = np.zeros((rows, length), np.int64), np.full((rows, length), -1, np.int64)
    branches, positions = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.int64)
    targets, weights = np.full((rows, length), -100, np.int64), np.zeros((rows, length), np.float32)
    places, names, shares, added, middles, kinds = [], [], [], [], [], []
    words, there, boxes, answers, digits, corners = [], [], [], [], [], []
    asked: tuple[list, list] = ([], [])
    hardness = 1.0 if full or texts.two_looks else min(1.0, max(0.0, (progress - 0.15) / 0.3))
    for row in range(rows):
        at, owner = 0, 0
        while length - at >= SHORTEST_ENGLISH:
            document = draw_document(texts, progress, full) if at < length - 60 else texts.plain(length - at)
            if document.kinds == ["English"] and len(document.branches[0][0][0]) > length - at:
                document = texts.plain(length - at)
            sizes = [len(part.place) if isinstance(part, Cells) else len(part) for part in document.prefix]
            begin = sum(sizes)
            spans = [[sum(len(ids) for ids, _ in branch), branch] for branch in document.branches]
            room, kept = length - at - begin, []
            for index, (size, branch) in enumerate(spans):
                if size <= room:
                    kept.append((index, branch))
                    room -= size
            if not kept:
                document = texts.plain(length - at)
                sizes, begin, kept = [], 0, [(0, document.branches[0])]
            positions[row, at : at + begin] = np.arange(begin)
            start, shown = at, find_words(texts, document, at) if begin else {}
            known = {
                tuple(texts.name(word)): box
                for part in document.prefix
                if isinstance(part, Cells)
                for word, box in part.boxes.items()
            }
            owners[row, at:length] = owner
            for size, part in zip(sizes, document.prefix, strict=False):
                if isinstance(part, Cells):
                    code, scale = codes(part, hardness)
                    places.append(row * length + at + np.arange(size))
                    names.append(part.ids)
                    shares.append(part.weights * scale)
                    added.append(code)
                    middles.append(hold_middles(part))
                else:
                    ids[row, at : at + size] = part
                at += size
            for index, branch in kept:
                kinds.append(document.kinds[index])
                here, question = begin, []
                for part, weight in branch:
                    size = len(part)
                    ids[row, at : at + size] = part
                    branches[row, at : at + size] = len(kinds)
                    flat = row * length + at
                    found = sorted(spot_words(part, shown), key=lambda each: each[1])
                    for name, last in found:
                        words.append((flat + last, shown[name] or [start]))
                        there.append(bool(shown[name]))
                        boxes.append(known.get(name, NOWHERE))
                        if weight and shown[name] and last >= len(name):
                            answers.append((flat + last - len(name), shown[name]))
                    for word in document.words if weight and begin else ():
                        spelled, cells = texts.bare_name(word), shown[tuple(texts.name(word))]
                        if cells and part[: len(spelled)] == spelled:
                            answers.append((flat - 1, cells))
                            found.insert(0, (tuple(texts.name(word)), len(spelled) - 1))
                    if not weight:
                        question = [(name, at + last) for name, last in found]
                    elif begin and question:
                        for looks, (_, column) in zip(asked, (question[0], question[-1]), strict=True):
                            looks.append((flat - 1, [column]))
                    if weight and document.kinds[index] in ("place", "edge") and begin:
                        for name, first, end in number_spans(found, question, len(part)):
                            for place in range(first, end) if name in known else ():
                                answers.append((flat + place - 1, shown[name]))
                                digits.append(flat + place - 1)
                                corners.append(known[name])
                    positions[row, at : at + size] = here + np.arange(size)
                    if weight and begin + here:
                        targets[row, at - 1 : at + size - 1], weights[row, at - 1 : at + size - 1] = part, weight
                    elif weight:
                        targets[row, at : at + size - 1], weights[row, at : at + size - 1] = part[1:], weight
                    at, here = at + size, here + size
            owner += 1
        owners[row, at:] = owner
    tensor = torch.from_numpy
    return Batch(
        tensor(ids), tensor(positions), tensor(targets), tensor(weights), tensor(owners), tensor(branches),
        tensor(np.concatenate(places)), tensor(np.concatenate(names)), tensor(np.concatenate(shares)),
        tensor(np.concatenate(added)).float(), tensor(np.concatenate(middles)), Looks.of(words, length),
        torch.tensor(there, dtype=torch.bool), torch.tensor(boxes).view(-1, 4), Looks.of(answers, length),
        (Looks.of(asked[0], length), Looks.of(asked[1], length)),
        (torch.tensor(digits, dtype=torch.long), torch.tensor(corners).view(-1, 4)), kinds,
    )  # fmt: skip


def hold_middles(cells: Cells) -> np.ndarray:
    """Which cells (n) hold the middle of a thing."""
    middle, half = (cells.edges[:, :2] + cells.edges[:, 2:]) / 2, 0.5 / np.sqrt(len(cells.place))
    return (np.abs(middle - cells.place) <= half).all(-1)


def number_spans(
    named: list[tuple[tuple[int, ...], int]], question: list[tuple[tuple[int, ...], int]], length: int
) -> list[tuple[tuple[int, ...], int, int]]:
    """A word, and where the numbers after it begin and end in an answer; without a word there, the question's last."""
    if not named:
        return [(question[-1][0], 0, length)] if question else []
    begins = [last + 1 for _, last in named]
    ends = [last - len(name) + 1 for name, last in named[1:]] + [length]
    return [(name, begin, end) for (name, _), begin, end in zip(named, begins, ends, strict=True)]


def find_words(texts: ReadingTexts, document: Document, start: int) -> dict[tuple[int, ...], list[int]]:
    """Places in a row of the words of a document that begins at `start`; none for those that are not there."""
    found: dict[tuple[int, ...], list[int]] = {tuple(texts.name(word)): [] for word in document.words}
    for part in document.prefix:
        if isinstance(part, Cells):
            for word, cells in part.where.items():
                found.setdefault(tuple(texts.name(word)), []).extend((start + cells).tolist())
            start += len(part.place)
        else:
            for name, last in spot_words(part, found):
                found[name].append(start + last)
            start += len(part)
    return found


def spot_words(ids: list[int], words: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], int]]:
    """The words that are in `ids`, with the place of their last token."""
    return [
        (name, place)
        for name in words
        for place in range(len(name) - 1, len(ids))
        if ids[place] == name[-1] and tuple(ids[place - len(name) + 1 : place + 1]) == name
    ]


def make_body(model):
    """The decoder from embeddings to its last hidden state; also the states before each layer."""
    decoder = model.model

    def body(embedded, mask, positions):
        rotary, hidden, kept = decoder.rotary_emb(embedded, positions), embedded, []
        for layer in decoder.layers:
            kept.append(hidden)
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return decoder.norm(hidden), rotary, kept

    return torch.compile(body, dynamic=False)


def looking_loss(model, batch: Batch, mask: torch.Tensor, rotary, kept: list[torch.Tensor]) -> torch.Tensor:
    """Mean of -log of the attention that is paid to where something is to be looked up, by one head of some layers.

    In layers 1 and 2 a word looks at the cells that show it; one that is not there, at the document's first token. In
    layers 3 and 4 what comes before a word of the answer, or before a number of its box, looks at that word's cells.
    In layer 4 what comes before an answer looks, with two more heads, at the first and the last word of the question.
    """
    losses = []
    first, last = batch.asked
    for index, head, looks in (
        (1, 0, batch.words), (2, 0, batch.words), (3, 0, batch.answers), (4, 0, batch.answers), (4, 2, first),
        (4, 4, last),
    ):  # fmt: skip
        rows, columns = looks.places // batch.ids.shape[1], looks.places % batch.ids.shape[1]
        hidden_from = mask[rows, 0, columns]
        layer = model.model.layers[index]
        attention, normed = layer.self_attn, layer.input_layernorm(kept[index])
        size = attention.head_dim
        shared = head // attention.num_key_value_groups
        query = attention.q_norm(linear(normed, attention.q_proj.weight[head * size : (head + 1) * size])[:, None])
        key = attention.k_norm(linear(normed, attention.k_proj.weight[shared * size : (shared + 1) * size])[:, None])
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        scores = torch.einsum("qd,qtd->qt", query[rows, 0, columns].float(), key[rows, 0].float()) * attention.scaling
        shares = (scores + hidden_from).log_softmax(-1)
        losses.append(-shares.masked_fill(~looks.targets, -1e4).logsumexp(-1).mean())
    return torch.stack(losses)


class BoxHead(torch.nn.Module):
    """Reads from states what the decoder should know there: it is thrown away afterwards.

    A word in a question or an answer should know where its thing is and how large, once it has looked there, and what
    comes before a number of a box, that box; a cell, whether the middle of its thing is in it, which makes things
    countable.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(width) for _ in range(3))
        self.words = torch.nn.Linear(width, 4 * EDGE_BINS + 2 * PLACE_BINS + 2 * SIZE_BINS + 1)
        self.digits = torch.nn.Linear(width, 4 * EDGE_BINS)
        self.middles = torch.nn.Linear(width, 1)

    @staticmethod
    def _bins(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of logits (n, k, bins) with bells one bin wide around values (n, k) in 0..1."""
        bins = logits.shape[-1]
        middles = (torch.arange(bins, device=logits.device) + 0.5) / bins
        bell = torch.softmax(-0.5 * ((values[..., None] - middles) * bins) ** 2, -1)
        return -(bell * logits.log_softmax(-1)).sum(-1).mean()

    def forward(self, batch: Batch, kept: list[torch.Tensor]) -> torch.Tensor:
        """Losses in nats: of words' boxes, places and sizes, whether they are there, numbers' boxes, and middles."""
        word, digit, cell = (
            norm(kept[layer].flatten(0, 1)[places].float())
            for norm, layer, places in zip(
                self.norms, (3, 5, 2), (batch.words.places, batch.digits[0], batch.cells), strict=True
            )
        )
        read = self.words(word)
        edges, places, sizes, there = read.split((4 * EDGE_BINS, 2 * PLACE_BINS, 2 * SIZE_BINS, 1), -1)
        known = ~batch.boxes[:, 0].isnan()
        box = batch.boxes[known]
        size = box[:, 2:] - box[:, :2]
        # In halvings: what is larger is so by a factor.
        size = 1 + torch.stack((size.prod(-1).sqrt(), size.amax(-1)), -1).clamp(min=1 / 8).log2() / 3
        with_logits = torch.nn.functional.binary_cross_entropy_with_logits
        return torch.stack((
            self._bins(edges[known].unflatten(-1, (4, -1)), box),
            self._bins(places[known].unflatten(-1, (2, -1)), (box[:, :2] + box[:, 2:]) / 2),
            self._bins(sizes[known].unflatten(-1, (2, -1)), size),
            with_logits(there[:, 0], batch.there.float()),
            self._bins(self.digits(digit).unflatten(-1, (4, -1)), batch.digits[1]) if len(digit) else read.sum() * 0,
            with_logits(self.middles(cell)[:, 0], batch.middles.float()),
        ))  # fmt: skip


def learnt(model, body, head: BoxHead, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (M, V) where something is to be learnt, the losses of looking, and those of what is read there."""
    table, mask = model.get_input_embeddings().weight, batch.mask()
    cells = embedding_bag(batch.names, table, mode="sum", per_sample_weights=batch.shares) + batch.codes
    width = table.shape[1]
    embedded = table[batch.ids].flatten(0, 1).index_copy(0, batch.cells, cells).view(*batch.ids.shape, width)
    with torch.autocast(table.device.type, dtype=torch.bfloat16):
        hidden, rotary, kept = body(embedded, mask, batch.positions)
        logits = model.lm_head(hidden[batch.targets >= 0]).float()
        looking = looking_loss(model, batch, mask, rotary, kept)
    return logits, looking, head(batch, kept)


def measure(model, body, head: BoxHead, batches: list[Batch], tokenizer) -> dict[str, tuple[float, int]]:
    """Share of answers that are right to the last token (teacher forcing), and their number, by kind.

    For English it is the mean cross-entropy in nats per token; a place is right when all its boxes overlap the true
    ones by half.
    """
    right: dict[str, list[float]] = defaultdict(list)
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        for batch in (each.to(device) for each in batches):
            (logits, _, _), where = learnt(model, body, head, batch), batch.targets >= 0
            targets, branches = batch.targets[where].cpu(), batch.branches[where].cpu().numpy()
            guesses, losses = logits.argmax(-1).cpu(), cross_entropy(logits.cpu(), targets, reduction="none").numpy()
            for index, kind in enumerate(batch.kinds, 1):
                mine = branches == index
                if not mine.any():
                    continue
                guessed, true = guesses[mine].tolist(), targets[mine].tolist()
                if kind == "English":
                    right[kind].append(float(losses[mine].mean()))
                elif kind == "place":
                    right[kind].append(
                        float(boxes_overlap(*(tokenizer.convert_ids_to_tokens(x) for x in (guessed, true))))
                    )
                else:
                    right[kind].append(float(guessed == true))
    return {kind: (float(np.mean(values)), len(values)) for kind, values in sorted(right.items())}


def boxes_overlap(guessed: list[str], true: list[str]) -> bool:
    """Whether all boxes of an answer overlap the true ones by half, and all that is no number is right."""
    if any(a != b and not (a.isdigit() and b.isdigit()) for a, b in zip(guessed, true, strict=True)):
        return False
    numbers: tuple[list[str], list[str]] = ([], [])
    for before, (a, b) in zip(["", *true], zip(guessed, true, strict=True), strict=False):
        for found, token in zip(numbers, (a, b), strict=True):
            if token.isdigit() and before.isdigit():
                found[-1] += token
            elif token.isdigit():
                found.append(token)
    boxes = [torch.tensor([float(each) for each in found]).view(-1, 4) for found in numbers]
    return bool((overlaps(*boxes) >= 0.5).all())


def separate_digits(model, tokenizer) -> None:
    """Draws the embeddings of the ten digits anew where they are parallel; input and head share them."""
    weight = model.get_input_embeddings().weight
    rows = tokenizer.convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        unit = normalize(weight[rows], dim=1)
        if (unit @ unit.T).mean() > 0.9:
            fresh = torch.randn(len(rows), weight.shape[1])
            weight[rows] = fresh / fresh.norm(dim=1, keepdim=True) * weight.norm(dim=1).mean()


def nouns_of_two_tokens(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """WordNet's nouns that are two tokens in running text."""
    words = []
    for line in (folder / "data.noun").read_text().splitlines():
        if not line.startswith("  "):
            words.append(line.split()[4].replace("_", " "))
    words = sorted(
        {
            word
            for word in words
            if word.isascii() and word.replace(" ", "").isalpha() and word.islower() and 3 < len(word) < 16
        }
    )
    encoded = tokenizer.encode_batch_fast([f" {word}" for word in words], add_special_tokens=False)
    return [word for word, each in zip(words, encoded, strict=True) if len(each.ids) == 2]


class Packs(torch.utils.data.IterableDataset):
    """Endless batches. Each process of a loader draws from a seed of its own; `progress` (0..1) is read as it grows."""

    def __init__(self, make: Callable[[int], tuple[ReadingTexts, Codes]], progress: Any, rows: int) -> None:
        self._make, self._progress, self._rows = make, progress, rows

    def __iter__(self) -> Iterator[Batch]:
        """Batches of `rows` rows."""
        torch.set_num_threads(1)
        process = torch.utils.data.get_worker_info()
        texts, codes = self._make(0 if process is None else process.id)
        while True:
            yield pack(texts, codes, self._progress.value, self._rows, LENGTH)


def train(
    model, make: Callable[[int], tuple[ReadingTexts, Codes]], held: dict[str, list[Batch]], tokenizer,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Train for `options.steps`, or minutes, with a cosine schedule; returns what was measured."""
    body, device = make_body(model), model.device
    head = BoxHead(model.config.hidden_size).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    progress = multiprocessing.get_context("fork").Value("d", 0.0)
    loader = torch.utils.data.DataLoader(
        Packs(make, progress, options.rows), batch_size=None, num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
    )  # fmt: skip
    running: dict[str, torch.Tensor] = {}
    start, step, found = time.monotonic(), 0, {}

    def look() -> None:
        for name, batches in held.items():
            found[name] = measure(model, body, head, batches, tokenizer)
            print(f"step {step} {name}", *(f"{k}={v:.2f}" for k, (v, _) in found[name].items()), flush=True)

    for batch in loader:
        share = (time.monotonic() - start) / 60 / options.minutes if options.minutes else step / options.steps
        if share >= 1.0:
            break
        progress.value = share
        rate = options.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits, looking, reading = learnt(model, body, head, batch := batch.to(device))
        targets, weights = batch.targets[batch.targets >= 0], batch.weights[batch.targets >= 0]
        loss = (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        (loss + LOOKING * looking.mean() + READING * reading.mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        looked = ("words", "answers", "asked"), looking.detach().view(3, 2).mean(1)
        read = ("edges", "places", "sizes", "there", "digits", "middles"), reading.detach()
        for name, value in (("loss", loss.detach()), *zip(*looked, strict=True), *zip(*read, strict=True)):
            running[name] = value if name not in running else running[name].lerp(value, 0.02)
        step += 1
        if step % 50 == 0:
            said = " ".join(f"{name} {value.item():.3f}" for name, value in running.items())
            print(f"step {step} {said} {time.monotonic() - start:.0f} s", flush=True)
        if step % options.measure_every == 0:
            look()
    minutes = (time.monotonic() - start) / 60
    look()
    return {"steps": step, "minutes": minutes, "found": found, "tokens": options.rows * LENGTH}


FIRST_PASS = """## Reading

Then trained by `recipes/demo/pretrain_reading.py` to read soft grids of words that stand for pictures, and to answer
questions about them; text only, no pictures. Questions and answers are worded differently from the demo's, and no text
names both nouns of a held-out pair. The tables have the share of answers that are right to the last token (teacher
forcing), and the number of questions, on grids of 8 x 8 cells. A place is right when its boxes overlap the true ones by
half; the last digits of an edge cannot be known from noisy cells, so that edges are hardly ever right as a whole."""
SECOND_PASS = """### Second pass

With more questions that need a second look after the first: relations, neighbours, order, counts."""


def card(before: str, figures: dict[str, Any], words: dict[str, int], second: bool, device: torch.device) -> str:
    """The model's card with a section about this pass, with measured figures only."""
    demo, unseen = figures["found"]["demo"], figures["found"]["unseen"]
    title = SECOND_PASS if second else FIRST_PASS
    kinds = sorted({*demo, *unseen} - {"English", "say"})
    rows = "\n".join(
        f"| {kind} | "
        + " | ".join(f"{each[kind][0]:.2f} ({each[kind][1]})" if kind in each else "" for each in (demo, unseen))
        + " |"
        for kind in kinds
    )
    return f"""{before.split(title.splitlines()[0])[0].rstrip()}

{title}

{figures["steps"]:,} steps of {figures["tokens"]:,} tokens, {figures["minutes"]:.0f} minutes on {device_name(device)}.
Things are the demo's nouns ({DEMO_SHARE:.0%}) or one of {words["trained"]:,} other words of one or two tokens;
{words["held out"]} more were kept out. English: {demo["English"][0]:.2f} nats per token on pieces that were kept out.

| question | demo's nouns | words kept out |
|---|---|---|
{rows}
"""


def read_english(art: Path, held_out: HeldOutFilter, tokenizer, seed: int) -> np.ndarray:
    """Token ids of `pretrain_lm.py`'s texts in one line, each text ended by <|endoftext|>."""
    texts, _ = build_texts(art, held_out, seed)
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([*each.ids, tokenizer.pad_token_id], np.int32) for each in encoded])


def main() -> None:
    """Train and write the folder anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--art", type=Path, default=DEFAULT_ART, help="folder with WordNet and CLDR; filled")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "qwen3")
    parser.add_argument("--output", type=Path, help="by default the model's own folder")
    parser.add_argument("--scenes", type=Path, default=Path(__file__).parent / "scenes")
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--minutes", type=float, help="train so long, instead of --steps")
    parser.add_argument("--rows", type=int, default=24, help=f"of {LENGTH} tokens, in a step")
    parser.add_argument("--workers", type=int, default=0, help="processes that make texts")
    parser.add_argument("--measure_every", type=int, default=300, help="steps")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument(
        "--two_looks", action="store_true", help="second stage: more questions about relations and order"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    output, seed = options.output or options.model, options.seed
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    backend = tokenizer.backend_tokenizer
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager")
    separate_digits(model, tokenizer)
    held_out = HeldOutFilter(load_held_out_pairs(options.scenes / "held_out_pairs.json"))
    line = read_english(options.art, held_out, tokenizer, seed)
    words = [token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha() and len(token) > 3]
    two = random.Random(WORDS_SEED).sample(nouns_of_two_tokens(fetch_wordnet(options.art), backend), 2 * len(words))
    (ones, held_ones), (twos, held_twos) = split_words(words, WORDS_SEED), split_words(two, WORDS_SEED)
    kept = english_tokens(line[: len(line) // 50], 1)

    def make(process: int) -> tuple[ReadingTexts, Codes]:
        own = seed + 10_000 * process
        pieces = english_tokens(line[len(line) // 50 :], own)
        texts = ReadingTexts(backend, ones * 2 + twos, held_out, pieces, own, two_looks=options.two_looks)
        return texts, Codes(model.config.hidden_size, own)

    unseen = ReadingTexts(backend, held_ones * 2 + held_twos, held_out, kept, seed + 1000, 0.0, True)
    demo = ReadingTexts(backend, ones, held_out, kept, seed + 2000, 1.0, True)
    codes = Codes(model.config.hidden_size, seed)
    held = {
        name: [pack(each, codes, 1.0, options.rows, LENGTH, full=True) for _ in range(MEASURED_ROWS // options.rows)]
        for name, each in (("unseen", unseen), ("demo", demo))
    }
    model.to(choose_device())
    figures = train(model, make, held, tokenizer, options)
    print(json.dumps(figures))
    before = (options.model / "README.md").read_text(encoding="utf-8")
    numbers = {"trained": len(ones) + len(twos), "held out": len(held_ones) + len(held_twos)}
    save(model, tokenizer, card(before, figures, numbers, options.two_looks, model.device), output)


if __name__ == "__main__":
    main()
