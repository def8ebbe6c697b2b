"""Teach the demo's small Qwen3 to read soft grids of words and to answer questions about them: text only, no pictures.

    python recipes/demo/pretrain_reading.py --art DIR --model recipes/demo/qwen3

A decoder that has only read a dictionary cannot look something up in its context, and does not learn it from a few
thousand captions. What it reads here is made by `reading_texts.py`. Matching a word that was asked for with one that is
there is a circuit that appears suddenly: it appears on many easy cases (short lines, small grids, nothing confused) and
carries over to the 8 x 8 cells of a picture.

The rows of the ten digits of a decoder that has read no numbers are almost parallel (mean cosine 0.99), so that no
hidden state could tell them apart; they are drawn anew first, unless this has been done before.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_art import DEFAULT_ART, HeldOutFilter, fetch_wordnet, load_held_out_pairs
from pretrain_lm import build_texts, save
from reading_texts import DEMO_SHARE, Cells, Document, ReadingTexts, english_tokens, split_words
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, embedding_bag, linear, normalize
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

LENGTH, ROWS = 256, 12
PERIODS = (0.5, 1.0, 2.0, 4.0)
EDGE_SHARE, PLACE_SHARE = 0.35, 0.6
SHORTEST_ENGLISH = 12
EASY, MEDIUM, HALF = 0.18, 0.32, 0.6
LOOKING = 0.4
MEASURED_BATCHES, MEASURE_EVERY = 25, 300
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
    """Rows of packed documents; see `pack`."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    branches: torch.Tensor
    cells: torch.Tensor
    names: torch.Tensor
    shares: torch.Tensor
    codes: torch.Tensor
    words: Looks
    answers: Looks
    kinds: list[str]


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
        side = pages or rng.choice((4, 6, 8))
        return texts.pages(side, rng.randint(1, {4: 4, 6: 3, 8: 2}[side]))
    return texts.picture(rng.choice(sides), rng.randint(4, 8), clean, easy)


def pack(texts: ReadingTexts, codes: Codes, progress: float, rows: int, length: int, full: bool = False) -> Batch:
    """Rows (B, T) of documents.

    A branch sees its document's prefix and itself, and counts its positions on from the prefix. What a row's documents
    leave is filled with general English.
    """
    ids, owners = np.zeros((rows, length), np.int64), np.full((rows, length), -1, np.int64)
    branches, positions = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.int64)
    targets, weights = np.full((rows, length), -100, np.int64), np.zeros((rows, length), np.float32)
    places, names, shares, added, kinds, words, answers = [], [], [], [], [], [], []
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
            owners[row, at:length] = owner
            for size, part in zip(sizes, document.prefix, strict=False):
                if isinstance(part, Cells):
                    code, scale = codes(part, hardness)
                    places.append(row * length + at + np.arange(size))
                    names.append(part.ids)
                    shares.append(part.weights * scale)
                    added.append(code)
                else:
                    ids[row, at : at + size] = part
                at += size
            for index, branch in kept:
                kinds.append(document.kinds[index])
                here = begin
                for part, weight in branch:
                    size = len(part)
                    ids[row, at : at + size] = part
                    branches[row, at : at + size] = len(kinds)
                    flat = row * length + at
                    for name, last in spot_words(part, shown):
                        words.append((flat + last, shown[name] or [start]))
                        if weight and shown[name] and last >= len(name):
                            answers.append((flat + last - len(name), shown[name]))
                    for word in document.words if weight and begin else ():
                        spelled, cells = texts.bare_name(word), shown[tuple(texts.name(word))]
                        if cells and part[: len(spelled)] == spelled:
                            answers.append((flat - 1, cells))
                    positions[row, at : at + size] = here + np.arange(size)
                    if weight and begin + here:
                        targets[row, at - 1 : at + size - 1], weights[row, at - 1 : at + size - 1] = part, weight
                    elif weight:
                        targets[row, at : at + size - 1], weights[row, at : at + size - 1] = part[1:], weight
                    at, here = at + size, here + size
            owner += 1
        owners[row, at:] = owner
    branch, owned = torch.from_numpy(branches), torch.from_numpy(owners)
    seen = (owned[:, :, None] == owned[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    seen &= (branch[:, None] == 0) | (branch[:, :, None] == branch[:, None])
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -1e4)[:, None]
    return Batch(
        torch.from_numpy(ids), mask, torch.from_numpy(positions), torch.from_numpy(targets), torch.from_numpy(weights),
        branch, torch.from_numpy(np.concatenate(places)), torch.from_numpy(np.concatenate(names)),
        torch.from_numpy(np.concatenate(shares)), torch.from_numpy(np.concatenate(added)).float(),
        Looks.of(words, length), Looks.of(answers, length), kinds,
    )  # fmt: skip


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


def looking_loss(model, batch: Batch, rotary, kept: list[torch.Tensor]) -> torch.Tensor:
    """Mean of -log of the attention that a word pays, in the first head of some layers, to the cells that show it.

    A word that is not there is to look at the document's first token. In later layers what comes before a word of the
    answer looks at the cells that show that word.
    """
    losses = []
    for index, looks in ((1, batch.words), (2, batch.words), (3, batch.answers), (4, batch.answers)):
        rows, columns = looks.places // batch.ids.shape[1], looks.places % batch.ids.shape[1]
        hidden_from = batch.mask[rows, 0, columns]
        layer = model.model.layers[index]
        attention, normed = layer.self_attn, layer.input_layernorm(kept[index])
        size = attention.head_dim
        query = attention.q_norm(linear(normed, attention.q_proj.weight[:size])[:, None])
        key = attention.k_norm(linear(normed, attention.k_proj.weight[:size])[:, None])
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        scores = torch.einsum("qd,qtd->qt", query[rows, 0, columns].float(), key[rows, 0].float()) * attention.scaling
        shares = (scores + hidden_from).log_softmax(-1)
        losses.append(-shares.masked_fill(~looks.targets, -1e4).logsumexp(-1).mean())
    return torch.stack(losses)


def learnt(model, body, batch: Batch, looking: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (M, V) where something is to be learnt, and the loss of looking."""
    table = model.get_input_embeddings().weight
    cells = embedding_bag(batch.names, table, mode="sum", per_sample_weights=batch.shares) + batch.codes
    width = table.shape[1]
    embedded = table[batch.ids].flatten(0, 1).index_copy(0, batch.cells, cells).view(*batch.ids.shape, width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, rotary, kept = body(embedded, batch.mask, batch.positions)
        logits = model.lm_head(hidden[batch.targets >= 0]).float()
        return logits, looking_loss(model, batch, rotary, kept)


def measure(model, body, batches: list[Batch]) -> dict[str, tuple[float, int]]:
    """Share of answers that are right to the last token (teacher forcing), and their number, by kind.

    For English it is the mean cross-entropy in nats per token.
    """
    right: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad():
        for batch in batches:
            (logits, _), where = learnt(model, body, batch), batch.targets >= 0
            targets, branches = batch.targets[where], batch.branches[where]
            hits = (logits.argmax(-1) == targets).numpy()
            losses = cross_entropy(logits, targets, reduction="none").numpy()
            for index, kind in enumerate(batch.kinds, 1):
                mine = (branches == index).numpy()
                if mine.any():
                    right[kind].append(float(losses[mine].mean() if kind == "English" else hits[mine].all()))
    return {kind: (float(np.mean(values)), len(values)) for kind, values in sorted(right.items())}


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


def train(
    model, texts: ReadingTexts, held: dict[str, list[Batch]], codes: Codes, options: argparse.Namespace
) -> dict[str, Any]:
    """Train for `options.steps` with a cosine schedule; returns what was measured."""
    body = make_body(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    running: dict[str, float] = {}
    start = time.monotonic()
    for step in range(options.steps):
        share = step / options.steps
        rate = options.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = pack(texts, codes, share, ROWS, LENGTH)
        logits, looking = learnt(model, body, batch)
        targets, weights = batch.targets[batch.targets >= 0], batch.weights[batch.targets >= 0]
        loss = (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        (loss + LOOKING * looking.mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in (
            ("loss", loss.item()),
            ("norm", float(norm)),
            *zip(("words", "answers"), looking.view(2, 2).mean(1).tolist(), strict=True),
        ):
            running[name] = value if step == 0 else 0.98 * running[name] + 0.02 * value
        if step % 50 == 0:
            said = " ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"step {step} {said} {time.monotonic() - start:.0f} s", flush=True)
        if (step + 1) % MEASURE_EVERY == 0 or step + 1 == options.steps:
            found = {name: measure(model, body, batches) for name, batches in held.items()}
            for name, shares in found.items():
                print(f"step {step + 1} {name}", *(f"{k}={v:.2f}" for k, (v, _) in shares.items()), flush=True)
    return {"steps": options.steps, "minutes": (time.monotonic() - start) / 60, "found": found}


FIRST_PASS = """## Reading

Then trained by `recipes/demo/pretrain_reading.py` to read soft grids of words that stand for pictures, and to answer
questions about them; text only, no pictures. Questions and answers are worded differently from the demo's, and no text
names both nouns of a held-out pair. The tables have the share of answers that are right to the last token (teacher
forcing), and the number of questions, on grids of 8 x 8 cells. The last digits of a place cannot be known from noisy
cells, so that places and edges are hardly ever right as a whole."""
SECOND_PASS = """### Second pass

With more questions that need a second look after the first: relations, neighbours, order, counts."""


def card(before: str, figures: dict[str, Any], words: dict[str, int], second: bool) -> str:
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

{figures["steps"]:,} steps of {ROWS * LENGTH:,} tokens, {figures["minutes"]:.0f} minutes on one CPU core.
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
    parser.add_argument("--steps", type=int, default=2700)
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
    english, kept = english_tokens(line[len(line) // 50 :], seed), english_tokens(line[: len(line) // 50], 1)
    texts = ReadingTexts(backend, ones * 2 + twos, held_out, english, seed, two_looks=options.two_looks)
    unseen = ReadingTexts(backend, held_ones * 2 + held_twos, held_out, kept, seed + 1000, 0.0, True)
    demo = ReadingTexts(backend, ones, held_out, kept, seed + 2000, 1.0, True)
    codes = Codes(model.config.hidden_size, seed)
    held = {
        name: [pack(each, codes, 1.0, ROWS, LENGTH, full=True) for _ in range(MEASURED_BATCHES)]
        for name, each in (("unseen", unseen), ("demo", demo))
    }
    figures = train(model, texts, held, codes, options)
    print(json.dumps(figures))
    before = (options.model / "README.md").read_text(encoding="utf-8")
    numbers = {"trained": len(ones) + len(twos), "held out": len(held_ones) + len(held_twos)}
    save(model, tokenizer, card(before, figures, numbers, options.two_looks), output)


if __name__ == "__main__":
    main()
