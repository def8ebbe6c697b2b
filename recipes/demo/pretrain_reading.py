"""Teach the demo's small Qwen3 to read a grid of words and to say what stands where: text only, no pictures.

    python recipes/demo/pretrain_reading.py --model recipes/demo/qwen3 --minutes 8

A picture reaches the decoder as a grid of tokens, row by row. A decoder that has only read a dictionary cannot yet
look something up in its context, and learning that from captions is slow: after 20,000 captions the names of most
objects were still at chance. Here a grid of 4 x 4 words stands for the picture: one to three words on a ground of
colour words. The answers are worded differently from the demo's captions and boxes, and no grid holds a held-out pair.

A dictionary has hardly any numbers: the rows of the ten digits were almost parallel (mean cosine 0.99), so that no
hidden state could tell them apart, and boxes were not learnt. They are drawn anew before the training, and half of the
texts ask for places as numbers, or for numbers to be repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from emoji_art import BACKGROUNDS, HeldOutFilter, load_held_out_pairs
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SIDE = 4
IGNORED = -100
QUESTIONS = (
    "Read this.",
    "What do you read?",
    "Which words are there?",
    "Tell me what is where.",
    "Describe the grid.",
)
ONE = (
    "I read {a} and nothing else; the rest says {u}.",
    "Only {a}, and {u} all around it.",
    "The word is {a}, the ground {u}.",
)
BESIDE = (
    "I read {a} first and {b} after it; the rest says {u}.",
    "Leftmost stands {a}, rightmost {b}, and {u} fills what remains.",
    "Here {b} follows {a} in the same line. The ground says {u}.",
    "Starting from the right side: {b}, then {a}. Everywhere else {u}.",
)
STACKED = (
    "I read {a} in the upper part and {b} in the lower part; the rest says {u}.",
    "Here {b} lies lower than {a}, and {u} fills what remains.",
    "Upper word: {a}. Lower word: {b}. Ground: {u}.",
    "Starting from the bottom: {b}, then {a}. Everywhere else {u}.",
)
THREE_BESIDE = (
    "The line says {a}, {b}, {c}; the rest says {u}.",
    "Leftmost {a}, then {b}, rightmost {c}, and {u} elsewhere.",
    "Here {b} has {a} before it and {c} after it. The ground says {u}.",
)
THREE_STACKED = (
    "From the upper edge: {a}, {b}, {c}; the rest says {u}.",
    "Here {b} has {a} over it and {c} under it, and {u} elsewhere.",
)
FIND_ONE = ("Where does it say {a}?", "Give the place of {a}.", "From where to where is {a}?")
FIND_TWO = ("Where does it say {a}, and where {b}?", "Give the places of {a} and {b}.")
DIGITS = "0123456789"


class Grids:
    """Makes grids with answers as token ids.

    Args:
        tokenizer: The demo's; only words that are one token are used.
        held_out: Refuses texts that name both objects of a held-out pair.
        seed: Of all draws.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, held_out: HeldOutFilter, seed: int) -> None:
        self._tokenizer, self._held_out, self._random = tokenizer, held_out, random.Random(seed)
        vocabulary = tokenizer.get_vocab()
        words = [token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isalpha() and len(token) > 3]
        self._words = sorted(set(words) - set(BACKGROUNDS))

    def _cells(self, count: int, across: bool) -> list[list[tuple[int, int]]]:
        """Cells of each word: blocks of 1 or 2 cells a side, in order along one axis without overlap."""
        blocks, start = [], 0
        for index in range(count):
            left = count - index - 1
            size = self._random.randint(1, 2 if SIDE - start - left >= 2 and count < 3 else 1)
            first = self._random.randint(start, SIDE - left - size) if count < 3 else start
            start = first + size
            wide = self._random.randint(1, 2)
            offset = self._random.randint(0, SIDE - wide)
            along, aside = range(first, first + size), range(offset, offset + wide)
            blocks.append([(y, x) if across else (x, y) for x in along for y in aside])
        return blocks

    def _numbers(self) -> tuple[str, str]:
        """Numbers to be repeated."""
        numbers = " ".join(str(self._random.randint(0, 999)) for _ in range(self._random.randint(2, 8)))
        return f"\n{numbers}\nSay it again.", numbers

    def _places(self, words: list[str], blocks: list[list[tuple[int, int]]]) -> tuple[str, str]:
        """Where words stand, in thousandths of the grid's sides; a word that is not there is left out."""
        found = dict(zip(words, blocks, strict=True))
        absent = self._random.choice([word for word in self._words if word not in found])
        asked = self._random.sample([*words, *([absent] if self._random.random() < 0.3 else [])], 1)
        if len(words) > 1 and self._random.random() < 0.6:
            asked = self._random.sample([*words, absent] if self._random.random() < 0.3 else words, 2)
        form = self._random.choice(FIND_ONE if len(asked) == 1 else FIND_TWO)
        said = []
        for word in asked:
            if word in found:
                rows, columns = zip(*found[word], strict=True)
                x1, y1 = (1000 * min(each) // SIDE for each in (columns, rows))
                x2, y2 = (1000 * (max(each) + 1) // SIDE - 1 for each in (columns, rows))
                said.append(f"{word} from {x1}, {y1} to {x2}, {y2}")
        return form.format(**dict(zip("ab", asked, strict=False))), "; ".join(said) or "nowhere"

    def __call__(self) -> tuple[list[int], int]:
        """Token ids of one text, and where the answer begins."""
        while True:
            count = self._random.choices((1, 2, 3), (0.25, 0.55, 0.2))[0]
            words = self._random.sample(self._words, count)
            if not self._held_out(" ".join(words)):
                break
        kind = self._random.choices(("say", "place", "repeat"), (0.5, 0.38, 0.12))[0]
        if kind == "repeat":
            return self._encode(*self._numbers())
        across, ground = self._random.random() < 0.5, self._random.choice(list(BACKGROUNDS))
        grid = [[ground] * SIDE for _ in range(SIDE)]
        blocks = self._cells(count, across)
        for word, cells in zip(words, blocks, strict=True):
            for row, column in cells:
                grid[row][column] = word
        forms = {1: (ONE, ONE), 2: (STACKED, BESIDE), 3: (THREE_STACKED, THREE_BESIDE)}[count][across]
        named = dict(zip("abc", words, strict=False)) | {"u": ground}
        answer = self._random.choice(forms).format(**named)
        read = "".join(f" {word}" for row in grid for word in row)
        question = self._random.choice(QUESTIONS)
        if kind == "place":
            question, answer = self._places(words, blocks)
        return self._encode(f"\n{read}{question}", answer)

    def _encode(self, question: str, answer: str) -> tuple[list[int], int]:
        prompt = f"<|im_start|>user{question}<|im_end|>\n<|im_start|>assistant\n"
        begin = self._tokenizer.encode(prompt)
        return begin + self._tokenizer.encode(f"{answer}<|im_end|>"), len(begin)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T) and targets (B, T), -100 outside the answers."""
        texts = [self() for _ in range(size)]
        width = max(len(ids) for ids, _ in texts)
        ids = torch.full((size, width), self._tokenizer.pad_token_id)
        targets = torch.full((size, width), IGNORED)
        for row, (text, begin) in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            targets[row, begin - 1 : len(text) - 1] = torch.tensor(text[begin:])
        return ids, targets


def separate_digits(model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Draws the embeddings of the ten digits anew, as long as the others are on average; input and head share them."""
    weight = model.get_input_embeddings().weight
    rows = tokenizer.convert_tokens_to_ids(list(DIGITS))
    with torch.no_grad():
        fresh = torch.randn(len(rows), weight.shape[1])
        weight[rows] = fresh / fresh.norm(dim=1, keepdim=True) * weight.norm(dim=1).mean()


def train(model, grids: Grids, minutes: float, rate: float, batch: int) -> dict[str, float]:
    """Train for `minutes` with a cosine schedule over the elapsed time; returns what was measured."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    start, step, share, running, texts = time.monotonic(), 0, 0.0, None, 0
    while share < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * share)))
        ids, targets = grids.batch(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[targets != IGNORED])
        loss = cross_entropy(logits.float(), targets[targets != IGNORED])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, texts, share = step + 1, texts + batch, (time.monotonic() - start) / 60 / minutes
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step} texts {texts} loss {running:.3f} {share:.0%}", flush=True)
    return {"texts": texts, "minutes": minutes, "loss": running}


def main() -> None:
    """Train and write the folder anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "qwen3")
    parser.add_argument("--output", type=Path, help="by default the model's own folder")
    parser.add_argument("--scenes", type=Path, default=Path(__file__).parent / "scenes")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    output = options.output or options.model
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    held_out = HeldOutFilter(load_held_out_pairs(options.scenes / "held_out_pairs.json"))
    separate_digits(model, tokenizer)
    figures = train(model, Grids(tokenizer, held_out, options.seed), options.minutes, options.rate, options.batch)
    card = (options.model / "README.md").read_text(encoding="utf-8").split("\n## Reading\n")[0].rstrip()
    card += (
        "\n\n## Reading\n\nThen trained by `recipes/demo/pretrain_reading.py` to read grids of 4 x 4 words and to say "
        f"what stands where, also as numbers, in text only: {figures['texts']:,} texts in {figures['minutes']:.0f} "
        "minutes on top of an earlier stage without numbers (9 minutes), last loss "
        f"on answers {figures['loss']:.3f} nats per token (running mean). The answers are worded differently from the "
        "demo's captions; no grid holds a held-out pair.\n"
    )
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.half().save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
