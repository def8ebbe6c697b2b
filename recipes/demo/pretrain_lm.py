"""Pre-train the demo's small language model: a tokenizer of 4,096 entries and a Qwen3 of about 3 million parameters.

    python recipes/demo/pretrain_lm.py --art DIR --output recipes/demo/qwen3

The text is WordNet's glosses and examples, CLDR's names and keywords of emoji, and plain sentences about everyday
things. It holds none of the demo's captions, none of their sentence forms, and no held-out pair in one sentence.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from devices import choose_device, device_name
from emoji_art import (
    BACKGROUNDS,
    CONCEPTS,
    DEFAULT_ART,
    HeldOutFilter,
    cldr_entries,
    fetch_wordnet,
    load_held_out_pairs,
)
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 4096
LENGTH = 128
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
PLAIN_TOKENS = ["<think>", "</think>"]
_NUMBERS = ("one", "two", "three", "four", "five")
_PLACES = ("the kitchen", "the garden", "the park", "the street", "the shop", "our school", "the beach", "the market")
_TIMES = ("This morning", "Yesterday", "At noon", "On Sunday", "In the evening", "Last week", "Every day")
# {a}, {b}, {c}: things with an article; {A}, {B}: the same with "the"; {u}, {v}: colours.
_ONE_THING = (
    "{time} I saw {a} in {place}.",
    "My brother drew {a} with a {u} pencil.",
    "Nobody in {place} had ever owned {a}.",
    "{A} is small, but you can see it from far away.",
    "Do you like the color {u}? My {bare} is {u}.",
    "We painted the wall behind {A} {u}, so now it has {u_article} {u} background.",
    "In the photograph {A} stands alone, and nothing else is near it.",
    "She took a picture of the {u} wall, then one more of {A}.",
    "There were {n} things on the shelf, and the only new one was {a}.",
    "If the paper is {u}, choose another color for {A}.",
    "{A} fell over and rolled to the {side} side of the table.",
    "Look {side}: somebody has left {a} in {place}.",
    "{time} the children made {a} out of {u} paper.",
    "An object such as {a} can be found in {place}.",
)
_TWO_THINGS = (
    "{time} she bought {a} and {b}.",
    "I like {a} better than {b}.",
    "Put {A} to one side and leave {B} where it is.",
    "{A} stands beside {B}.",
    "Turn left for {a}; turn right for {b}.",
    "The top shelf holds {a}, and the bottom shelf holds {b}.",
    "Above us we saw {a}; below us lay {b}.",
    "He moved {A} from the left hand to the right hand and picked up {b}.",
    "Next to {A} you will find {b} in {place}.",
    "Over there is {a}, and there is also {b}.",
    "{A} is {u} and {B} is {v}.",
    "Neither {a} nor {b} was in {place}.",
)
_THREE_THINGS = (
    "{time} we counted {a}, {b} and {c} in {place}.",
    "Between {A} and {C} somebody put {b}.",
    "The boxes were in a row: first {a}, then {b}, then {c}.",
    "From bottom to top the column of drawers holds {a}, {b} and {c}.",
    "The middle drawer holds {b}, the others {a} and {c}.",
    "A list of three objects: {a}, {b}, {c}.",
)


def wordnet_texts(folder: Path, rng: random.Random) -> Iterator[str]:
    """Dictionary entries: "word: gloss" as plain text or as a question with its answer, and the usage examples."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text().splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            head, gloss = line.split("|", 1)
            word = re.sub(r"\(.*\)", "", head.split()[4]).replace("_", " ")
            examples = re.findall(r'"([^"]{8,})"', gloss)
            meaning = gloss.split('"')[0].strip().rstrip(";").strip()
            if not meaning:
                continue
            if rng.random() < 0.3:
                question = rng.choice((f"What is {word}?", f"What does {word} mean?", f"Explain the word {word}."))
                yield f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{meaning}<|im_end|>"
            else:
                yield f"{word}: {meaning}"
            for example in examples:
                yield example[0].upper() + example[1:] + "." * (example[-1] not in ".!?")


def emoji_texts(entries: dict[str, dict], rng: random.Random) -> Iterator[str]:
    """CLDR names and keywords made into sentences."""
    for entry in entries.values():
        label, tags = entry["label"], [t for t in entry.get("tags", []) if t != entry["label"]]
        rng.shuffle(tags)
        yield f"{label}: {', '.join(tags)}" if tags else label
        if tags:
            yield f"The emoji called {label} makes people think of {tags[0]}."


def everyday_texts(number: int, names: list[str], held_out: HeldOutFilter, rng: random.Random) -> Iterator[str]:
    """Generated sentences with objects, colours, numbers and places; half of the objects are the demo's."""
    phrases = [c.phrase for c in CONCEPTS]
    others = [f"{'an' if n[0] in 'aeiou' else 'a'} {n}" for n in names]

    def sentence() -> str:
        a, b, c = (rng.choice(phrases if rng.random() < 0.6 else others) for _ in range(3))
        u, v = rng.sample(list(BACKGROUNDS), 2)
        the = {k.upper(): "the " + x.split(" ", 1)[1] for k, x in (("a", a), ("b", b), ("c", c))}
        text = rng.choice(rng.choice((_ONE_THING, _TWO_THINGS, _THREE_THINGS))).format(
            a=a, b=b, c=c, u=u, v=v, **the, bare=a.split(" ", 1)[1], u_article="an" if u[0] in "aeiou" else "a",
            n=rng.choice(_NUMBERS), place=rng.choice(_PLACES), time=rng.choice(_TIMES),
            side=rng.choice(("left", "right")),
        )  # fmt: skip
        return text[0].upper() + text[1:]

    for _ in range(number):
        # The rule is about one text, so a second sentence must not complete a pair either.
        for _ in range(100):
            text = " ".join(sentence() for _ in range(rng.choice((1, 1, 2))))
            if not held_out(text):
                yield text
                break


def build_texts(art: Path, held_out: HeldOutFilter, seed: int) -> tuple[list[str], dict[str, int]]:
    """All texts in random order without any that names a held-out pair, and how many there are of each kind."""
    rng = random.Random(seed)
    entries = cldr_entries(art)
    names = [
        e["label"] for e in entries.values()
        if e.get("group") in (3, 4, 5, 7) and e["label"].isascii() and e["label"].isalpha()
    ]  # fmt: skip
    kinds = {
        "WordNet": wordnet_texts(fetch_wordnet(art), rng),
        "CLDR": emoji_texts(entries, rng),
        "everyday sentences": everyday_texts(60_000, names, held_out, rng),
    }
    texts, counts, dropped = [], {}, 0
    for kind, source in kinds.items():
        every = list(source)
        kept = [t for t in every if not held_out(t)]
        counts[kind] = len(kept)
        dropped += len(every) - len(kept)
        texts += kept * (3 if kind == "CLDR" else 1)
    rng.shuffle(texts)
    return texts, counts | {"dropped (held-out pair)": dropped}


def train_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen3's special tokens at the end of its 4,096 entries."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = Qwen2Tokenizer().backend_tokenizer.normalizer
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    added = SPECIAL_TOKENS + PLAIN_TOKENS
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    plain = (re.sub(r"<\|im_\w+\|>", "", t) for t in texts)
    trained.train_from_iterator(plain, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in PLAIN_TOKENS])
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token = "<|im_end|>", "<|endoftext|>", None
    tokenizer.model_max_length = 2048
    return tokenizer


def pack(texts: list[str], tokenizer: Qwen2Tokenizer) -> np.ndarray:
    """Token ids of all texts, each ended by <|endoftext|>, cut into rows: (rows, LENGTH + 1)."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids += encoding.ids
        ids.append(tokenizer.pad_token_id)
    rows = len(ids) // (LENGTH + 1)
    return np.array(ids[: rows * (LENGTH + 1)], dtype=np.int32).reshape(rows, LENGTH + 1)


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3 of about 3 million parameters with tied embeddings."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def loss_of(model: Qwen3ForCausalLM, rows: np.ndarray) -> torch.Tensor:
    """Mean next-token cross-entropy in nats of token rows (B, LENGTH + 1)."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(model: Qwen3ForCausalLM, rows: np.ndarray, steps: int, batch: int) -> dict[str, float]:
    """Train for ``steps`` with a cosine schedule; returns what was measured."""
    held, rows = rows[:200], rows[200:]
    decay = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    start, running = time.monotonic(), None
    for step in range(steps):
        rate = 3e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked = np.arange(step * batch, (step + 1) * batch) % len(rows)
        loss = loss_of(model, rows[picked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            speed = (step + 1) * batch * LENGTH / (time.monotonic() - start)
            print(f"step {step + 1} loss {running:.3f} lr {rate:.2e} {speed:.0f} tokens/s", flush=True)
    with torch.no_grad():
        held_loss = float(np.mean([loss_of(model.eval(), held[i : i + 50]).item() for i in range(0, len(held), 50)]))
    seconds = time.monotonic() - start
    return {"steps": steps, "tokens": steps * batch * LENGTH, "minutes": seconds / 60, "loss": held_loss}


def save(model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, card: str, output: Path) -> None:
    """Write the folder next to ``output`` and swap it in, so that readers never see half of it."""
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.half().save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "README.md").write_text(card)
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)


def model_card(parameters: int, figures: dict[str, Any], counts: dict[str, int]) -> str:
    """The model card, with measured figures only."""
    kinds = "\n".join(f"| {k} | {v:,} |" for k, v in counts.items())
    return f"""---
license: other
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The demo's small Qwen3

A `Qwen3ForCausalLM` of {parameters:,} parameters (6 layers, hidden 192, tied embeddings) with its own byte-level BPE
tokenizer of {VOCABULARY:,} entries, among them Qwen3's special tokens. It exists so that the demo of `vlm_peft` runs
without a network; it knows a dictionary's English and nothing of pictures.

Made by `recipes/demo/pretrain_lm.py`: next-token prediction from random weights, {figures["steps"]:,} steps,
{figures["tokens"]:,} tokens of text in {figures["minutes"]:.1f} minutes on {figures["device"]}.
Cross-entropy on 200 rows of {LENGTH} tokens kept out of training: {figures["loss"]:.3f} nats per token.

| text | number |
|---|---|
{kinds}

No caption of the demo and none of the captions' sentence forms is in that text, and no text names both objects of a
pair in `scenes/held_out_pairs.json`.

Sources: WordNet 3.0 (Princeton University, WordNet licence), CLDR names and keywords by way of emojibase (MIT;
Unicode-3.0). See `../NOTICE.md`.
"""


def main() -> None:
    """Train tokenizer and model and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--art", type=Path, default=DEFAULT_ART, help="folder of unpacked npm packs and WordNet; filled"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "qwen3")
    parser.add_argument("--scenes", type=Path, default=Path(__file__).parent / "scenes", help="for its held-out pairs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64, help=f"rows of {LENGTH} tokens in a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    held_out = HeldOutFilter(load_held_out_pairs(args.scenes / "held_out_pairs.json"))
    texts, counts = build_texts(args.art, held_out, args.seed)
    tokenizer = train_tokenizer(texts)
    rows = pack(texts, tokenizer)
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{counts} -> {rows.size:,} tokens, {len(tokenizer)} entries, {parameters:,} parameters", flush=True)
    model.to(choose_device())
    figures = train(model, rows, args.steps, args.batch) | {"device": device_name(model.device)}
    save(model, tokenizer, model_card(parameters, figures, counts), args.output)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
