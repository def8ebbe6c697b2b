"""Pre-train the demo's small CLIP: image-text and region-text contrast on canvases of several vendors' emoji.

    python recipes/demo/pretrain_clip.py --art DIR --output recipes/demo/clip

The region-text loss (as in RegionCLIP, arXiv 2112.09106) asks every patch that shows an object for that object's name,
so that a patch token says what it is part of; the image-text loss is CLIP's own, on the names of a canvas's objects.
Both would let a patch forget where it is: they ask for the same at every place. So linear heads, which are thrown away
afterwards, must find each patch's row and column, the four edges of the object that it shows, and the digit of a number
that is written there, in its last state. Uses a GPU where there is one (`--workers` processes make the canvases).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from canvases import (
    COLOURS,
    DEMO_SHARE,
    DIGITS_SHARE,
    GRID,
    IGNORED,
    PAGE_SHARE,
    PATCH,
    SIDE,
    TEXT_SHARE,
    CanvasBatches,
    CanvasMaker,
    Entry,
    load_entries,
    written_digits,
)
from devices import choose_device, device_name
from emoji_art import BACKGROUNDS, CONCEPTS, DEFAULT_ART, HeldOutFilter, load_held_out_pairs
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

VENDORS = [
    "twemoji", "fluent-emoji-flat", "fluent-emoji", "emojione", "fxemoji", "streamline-emojis",
    "fluent-emoji-high-contrast", "icon-park", "streamline-color", "streamline-cyber-color", "streamline-plump-color",
]  # fmt: skip
EDGE_BINS = 28
WEIGHTS = {"region": 1.0, "image_text": 0.2, "place": 0.3, "edges": 0.6, "written": 0.2}
CONTEXT = 32
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
END = "<|im_end|>"


def build_model(tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """A CLIP with a vision tower of 2.8 million parameters and a small text tower on the demo's tokenizer."""
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=SIDE,
        patch_size=PATCH, hidden_act="gelu",
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, hidden_act="gelu", bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=192))


class TextTower:
    """Texts -> token ids -> unit embeddings (n, 192), with the ids of short texts kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._end = tokenizer, tokenizer.convert_tokens_to_ids(END)
        self._ids: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text in self._ids:
            return self._ids[text]
        ids = [*self._tokenizer.encode(text)[: CONTEXT - 1], self._end]
        if ";" not in text:
            self._ids[text] = ids
        return ids

    def ids(self, texts: list[str]) -> torch.Tensor:
        """Token ids (n, T), padded on the right."""
        rows = [self._encode(t) for t in texts]
        width = max(map(len, rows))
        # Causal attention: what follows the end token cannot reach it, so no mask is needed.
        return torch.tensor([r + [self._tokenizer.pad_token_id] * (width - len(r)) for r in rows])

    def __call__(self, model: CLIPModel, texts: list[str] | torch.Tensor) -> torch.Tensor:
        """Embed texts, or their ids, with the model's text tower."""
        ids = self.ids(texts) if isinstance(texts, list) else texts
        pooled = model.text_model(input_ids=ids.to(model.device)).pooler_output
        return normalize(model.text_projection(pooled).float(), dim=-1)


def embed_pictures(model: CLIPModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From uint8 pixels (B, 3, 112, 112): unit embeddings of pictures (B, 192) and of their patches (B, 64, 192), and
    the patches' last states (B, 64, 192)."""
    values = (pixels.float() / 255 - MEAN[0]) / STD[0]
    out = model.vision_model(pixel_values=values)
    states = out.last_hidden_state[:, 1:]
    whole = model.visual_projection(out.pooler_output)
    parts = model.visual_projection(model.vision_model.post_layernorm(states))
    return normalize(whole.float(), dim=-1), normalize(parts.float(), dim=-1), states


class PlaceHead(torch.nn.Module):
    """Reads from patches' last states (B, 64, 192) where they are, where the object ends that they show, and which
    digit of a number is written there.

    Linear, as the projector of a captioner may be: what it finds, that finds, too.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.places = torch.nn.Linear(width, 2 * GRID)
        self.edges = torch.nn.Linear(width, 4 * EDGE_BINS)
        self.digits = torch.nn.Linear(width, 10)
        rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        self.register_buffer("truth", torch.stack((rows.flatten(), columns.flatten())), persistent=False)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of rows and columns (B, 64, 2, 8), of the four edges' bins (B, 64, 4, EDGE_BINS), and of digits
        (B, 64, 10)."""
        states = self.norm(states)
        edges = self.edges(states).unflatten(-1, (4, EDGE_BINS))
        return self.places(states).unflatten(-1, (2, GRID)), edges, self.digits(states)

    def losses(
        self, states: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor, digits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cross-entropies in nats of all patches' places, of the edges of objects, and of digits: boxes (B, 64, 4) in
        pixels, digits (B, 64) 0..9 or IGNORED.

        An edge's target is a bell over the bins, one bin wide, so that near misses cost little.
        """
        places, edges, said = self(states)
        truth = self.truth.T.expand(len(states), -1, -1)
        place = cross_entropy(places.float().flatten(0, 2), truth.flatten())
        shown = labels >= 0
        middles = (torch.arange(EDGE_BINS, device=boxes.device) + 0.5) * SIDE / EDGE_BINS
        bell = torch.softmax(-0.5 * ((boxes[shown][..., None] - middles) * EDGE_BINS / SIDE) ** 2, -1)
        edge = -(bell * edges[shown].float().log_softmax(-1)).sum(-1).mean()
        written = digits != IGNORED
        return place, edge, cross_entropy(said[written].float(), digits[written])

    @torch.no_grad()
    def read_boxes(self, states: torch.Tensor) -> torch.Tensor:
        """Boxes (B, 64, 4) in pixels: the means over the bins."""
        middles = (torch.arange(EDGE_BINS, device=states.device) + 0.5) * SIDE / EDGE_BINS
        return self(states)[1].float().softmax(-1) @ middles


def region_loss(patches: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of labelled patches over the batch's texts: patches (B, 64, 192), labels (B, 64), texts (n, 192).

    Every object weighs about the same however many patches it fills, and all of a picture's background weighs as one.
    """
    picture, place = torch.nonzero(labels != IGNORED, as_tuple=True)
    wanted = labels[picture, place]
    key = picture * len(texts) + wanted
    _, inverse, counts = torch.unique(key, return_inverse=True, return_counts=True)
    weight = counts[inverse].float().pow(-0.7)
    losses = cross_entropy(scale * patches[picture, place] @ texts.T, wanted, reduction="none")
    return (losses * weight).sum() / weight.sum()


class Batcher:
    """Turns labels of entries into labels of the batch's texts, one random text for each concept in the batch."""

    def __init__(self, entries: list[Entry], towers: TextTower, seed: int) -> None:
        self._entries, self._towers, self._random = entries, towers, random.Random(seed)

    def __call__(self, labels: torch.Tensor, grounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Labels (B, 64) into the n texts, the texts' token ids, and those of one text for each picture."""
        present = sorted(set(labels.unique().tolist()) - {IGNORED})
        number: dict[int, int] = {}
        places: dict[str, int] = {}
        for label in present:
            if label < 0:
                text = self._ground(IGNORED - 1 - label)
            else:
                names = self._entries[label].texts
                text = self._random.choice(names[:4] if self._random.random() < 0.7 else names)
            # The word "horse" and a horse may have one text, and are no negatives of each other then.
            number[label] = places.setdefault(text, len(places))
        texts = list(places)
        table = torch.full((len(self._entries) + len(COLOURS) + 1,), IGNORED)
        for label, i in number.items():
            table[label] = i
        table[IGNORED] = IGNORED
        whole = []
        for row, ground in zip(labels.tolist(), grounds.tolist(), strict=True):
            names = [texts[number[label]].split(",")[0] for label in sorted(set(row)) if label >= 0]
            self._random.shuffle(names)
            whole.append("; ".join(([f"{COLOURS[ground]}"] if ground != IGNORED else []) + names))
        return table[labels], self._towers.ids(texts), self._towers.ids(whole)

    def _ground(self, colour: int) -> str:
        return self._random.choice((f"{COLOURS[colour]} background", COLOURS[colour]))


class NamedCanvases(torch.utils.data.IterableDataset):
    """Batches of canvases with their texts: pixels, labels and boxes as `CanvasBatches` gives them, the digits that are
    written in the patches, and what `Batcher` makes of the labels.

    Each process of a loader draws from a seed of its own.
    """

    def __init__(
        self, make: Callable[[int], CanvasMaker], entries: list[Entry], towers: TextTower, batch: int, seed: int
    ) -> None:
        self._make, self._entries, self._towers = make, entries, towers
        self._batch, self._seed = batch, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Endless batches."""
        process = torch.utils.data.get_worker_info()
        number = 0 if process is None else process.id
        batcher = Batcher(self._entries, self._towers, self._seed + number)
        numbers = {i: entry.label for i, entry in enumerate(self._entries) if entry.label.isdigit()}
        for pixels, labels, boxes, grounds in CanvasBatches(self._make(number), self._batch):
            yield pixels, labels, boxes, written_digits(labels, boxes, numbers), *batcher(labels, grounds)


def overlaps(boxes: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (n, 4), x1, y1, x2, y2."""
    low, high = torch.maximum(boxes[:, :2], truth[:, :2]), torch.minimum(boxes[:, 2:], truth[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(each[:, 2:] - each[:, :2]).clamp(min=0).prod(-1) for each in (boxes, truth)]
    return shared / (areas[0] + areas[1] - shared)


@torch.no_grad()
def accuracies(
    model: CLIPModel, head: PlaceHead, towers: TextTower, batches: list, entries: list[Entry]
) -> dict[str, float]:
    """Of plain canvases: shares of patches whose nearest text is right, among the demo's names and among all names, of
    those whose row and column are found, and of objects' patches whose box overlaps the true one by half."""
    demo = [i for i, e in enumerate(entries) if e.demo]
    every = torch.cat([towers(model, [e.texts[0] for e in entries[i : i + 128]]) for i in range(0, len(entries), 128)])
    colours = towers(model, [f"{c} background" for c in COLOURS])
    right: dict[str, list[torch.Tensor]] = {
        each: [] for each in ("patch_64", "patch_all", "background", "place", "box_50")
    }
    for pixels, labels, boxes in ([each.to(model.device) for each in batch[:3]] for batch in batches):
        _, patches, states = embed_pictures(model, pixels)
        shown = labels >= 0
        places = head(states)[0].argmax(-1) == head.truth.T
        right["place"].append(places.all(-1).flatten())
        right["box_50"].append(overlaps(head.read_boxes(states)[shown], boxes[shown]) >= 0.5)
        near = (patches[shown] @ every.T).argmax(-1) == labels[shown]
        right["patch_all"].append(near)
        known = shown & (labels < len(demo))
        right["patch_64"].append((patches[known] @ every[demo].T).argmax(-1) == labels[known])
        ground = labels < IGNORED
        right["background"].append((patches[ground] @ colours.T).argmax(-1) == IGNORED - 1 - labels[ground])
    return {k: torch.cat(v).float().mean().item() for k, v in right.items()}


@torch.no_grad()
def scene_accuracy(model: CLIPModel, towers: TextTower, scenes: Path, split: str) -> float:
    """Share of a split's objects whose patches, averaged over the box, are nearest to their name among 64."""
    from datasets import load_dataset

    rows = load_dataset(str(scenes), split=split)
    number = {c.noun: i for i, c in enumerate(CONCEPTS)}
    names = towers(model, [c.phrase for c in CONCEPTS])
    pixels = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in rows["image"]])).permute(0, 3, 1, 2)
    patches = embed_pictures(model, pixels.to(model.device))[1].view(-1, GRID, GRID, names.shape[1])
    right = []
    for grid, objects in zip(patches, rows["objects"], strict=True):
        for thing in objects:
            x, y, width, height = thing["box"]
            rows_, columns = [slice(round(a / PATCH), max(round(b / PATCH), round(a / PATCH) + 1)) for a, b in
                              ((y, y + height), (x, x + width))]  # fmt: skip
            scores = grid[rows_, columns].flatten(0, 1).mean(0) @ names.T
            right.append(scores.argmax().item() == number[thing["name"]])
    return float(np.mean(right))


def load_checkpoint(path: Path | None, parts: dict[str, torch.nn.Module | torch.optim.Optimizer]) -> tuple[int, float]:
    """Put back what an interrupted run saved; its number of steps and minutes, or zeros without a checkpoint."""
    if path is None or not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["minutes"]


def train(
    model: CLIPModel, towers: TextTower, entries: list[Entry], pairs: set[frozenset[str]], options: argparse.Namespace,
    export: Callable[[CLIPModel, dict], None],
) -> None:  # fmt: skip
    """Train for ``options.steps`` with a cosine schedule; ``export`` an average of the weights."""
    maker = CanvasMaker(entries, pairs, options.seed + 99, options.art, augment=False)
    plain = iter(CanvasBatches(maker, 64))
    threads = torch.get_num_threads()
    checks = [next(plain) for _ in range(8)]
    torch.set_num_threads(threads)
    device = model.device
    head = PlaceHead(model.config.vision_config.hidden_size).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    average, average_head = (copy.deepcopy(each).requires_grad_(False) for each in (model, head))
    averaged = [*average.parameters(), *average_head.parameters()]
    parts: dict = {
        "model": model, "head": head, "average": average, "average_head": average_head, "optimizer": optimizer
    }  # fmt: skip
    first, before = load_checkpoint(options.checkpoint, parts)

    def make(process: int) -> CanvasMaker:
        # A continued run draws other canvases than those it has seen.
        return CanvasMaker(entries, pairs, 1000 * (options.seed + 1) + first + 10**7 * process, options.art)

    canvases = NamedCanvases(make, entries, towers, options.batch, options.seed)
    loader = torch.utils.data.DataLoader(
        canvases, batch_size=None, num_workers=options.workers, prefetch_factor=8, pin_memory=device.type == "cuda"
    )
    start = time.monotonic()
    running: dict[str, torch.Tensor] = {}
    step = first

    def measure_and_export(finished: bool) -> None:
        average.eval()
        minutes = before + (time.monotonic() - start) / 60
        figures = {"pictures": step * options.batch, "steps": step, "finished": finished, "minutes": minutes}
        figures |= accuracies(average, average_head, towers, checks, entries)
        for split in ("train[:300]", *(("test", "test_pairs") if finished else ())):
            figures[f"objects_{split}"] = scene_accuracy(average, towers, options.scenes, split)
        print(json.dumps({k: round(v, 3) for k, v in figures.items()}), flush=True)
        export(average, figures)
        if options.checkpoint:
            state = {k: v.state_dict() for k, v in parts.items()} | {"step": step, "minutes": minutes}
            torch.save(state, options.checkpoint)

    for batch in loader:
        elapsed = before + (time.monotonic() - start) / 60
        share = elapsed / options.minutes if options.minutes else step / options.steps
        if share >= 1.0:
            break
        rate = options.rate * min(1.0, (step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, labels, boxes, digits, wanted, texts, whole_texts = (
            each.to(device, non_blocking=True) for each in batch
        )
        with torch.autocast(device.type, dtype=torch.bfloat16):
            whole, patches, states = embed_pictures(model, pixels)
            names, sentences = towers(model, texts), towers(model, whole_texts)
            place, edges, written = head.losses(states, labels, boxes, digits)
        scale = model.logit_scale.exp()
        losses = {
            "region": region_loss(patches, wanted, names, scale),
            "place": place,
            "edges": edges,
            "written": written,
        }
        logits, target = scale * whole @ sentences.T, torch.arange(len(whole), device=device)
        losses["image_text"] = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(60)))
            # Early averages must forget the random start.
            keep = min(0.998, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, parameters, 1 - keep)
        for key, value in losses.items():
            running[key] = value.detach() if key not in running else running[key].lerp(value.detach(), 0.02)
        step += 1
        if step % 100 == 0:
            shown = " ".join(f"{k} {v.item():.3f}" for k, v in running.items())
            speed = options.batch * (step - first) / (time.monotonic() - start)
            print(f"step {step} {shown} lr {rate:.1e} {speed:.0f}/s", flush=True)
        if step % options.export_steps == 0:
            measure_and_export(finished=False)
    measure_and_export(finished=True)


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, card: str, output: Path) -> None:
    """Write the folder next to ``output`` and swap it in, so that readers never see half of it."""
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.deepcopy(model).half().save_pretrained(fresh)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    )
    processor.save_pretrained(fresh)
    settings = json.loads((fresh / "preprocessor_config.json").read_text())
    # The name without a backend: transformers takes torchvision's where there is one, and Pillow's otherwise.
    settings["image_processor_type"] = "CLIPImageProcessor"
    (fresh / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save_pretrained(fresh)
    (fresh / "README.md").write_text(card)
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)


def model_card(model: CLIPModel, entries: list[Entry], figures: dict[str, Any], vendors: list[str]) -> str:
    """The model card, with measured figures only."""
    vision = sum(p.numel() for p in model.vision_model.parameters())
    every = sum(p.numel() for p in model.parameters())
    emoji = sum(bool(each.sprites) for each in entries)
    note = "" if figures["finished"] else " (an export before the end)"
    shares = "\n".join(
        f"| objects of `{split}` (mean over the box), nearest name among {len(CONCEPTS)} | {value:.3f} |"
        for split in ("test", "test_pairs")
        if (value := figures.get(f"objects_{split}")) is not None
    )
    return f"""---
license: other
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# The demo's small CLIP

A `CLIPModel` of {every:,} parameters, {vision:,} of them in the vision tower (6 layers, hidden 192, {SIDE}x{SIDE}
pixels, {GRID * GRID} patches of {PATCH}x{PATCH}). It exists so that the demo of `vlm_peft` runs without a network.

Made by `recipes/demo/pretrain_clip.py` from random weights: {figures["pictures"]:,} canvases,
{figures["steps"]:,} steps of {figures["batch"]}{note}, {figures["minutes"]:.0f} minutes on {figures["device"]}.
A canvas shows 1 to 5 of {emoji:,} emoji concepts, {DEMO_SHARE:.0%} of them from the demo's {len(CONCEPTS)}, on
backgrounds of {len(BACKGROUNDS)} named and of other colours, or words and numbers ({TEXT_SHARE:.0%});
{PAGE_SHARE:.0%} of the canvases are pages (a title and rows "word number"), {DIGITS_SHARE:.0%} rows of digits, set in
fonts. The art is drawn by
{", ".join(vendors)}
and restyled at random (colour, light, outline, blur, rotation, size). Two contrastive losses: image-text (the names of
a canvas) and region-text (each covered patch of the last hidden state, after `post_layernorm` and `visual_projection`,
against the CLDR name or keywords of what it shows; plain patches against the name of their colour). Three more, of
linear heads that are not kept: each patch's row and column, the four edges of the object that it shows, and the digit
of a number that is written there.
Held out: all art of the vendor of `test_style`; no canvas holds a pair of objects of `scenes/held_out_pairs.json`; the
digits of `digits/` are other people's handwriting.

| measured on pictures not trained on | |
|---|---|
| patches of fresh canvases (same vendors), nearest name among the demo's {len(CONCEPTS)} | {figures["patch_64"]:.3f} |
| likewise among all {len(entries):,} names | {figures["patch_all"]:.3f} |
| background patches, nearest name among {len(BACKGROUNDS)} colours | {figures["background"]:.3f} |
| row and column of a patch, read by a linear head | {figures["place"]:.3f} |
| patches of objects whose box, read by a linear head, overlaps the true one by half | {figures["box_50"]:.3f} |
{shares}

Texts end with `{END}`, which is what the text tower pools; at most {CONTEXT} tokens.
Sources and licences of the art: see `../NOTICE.md`.
"""


def main() -> None:
    """Train and write the folder, at intervals and at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--art", type=Path, default=DEFAULT_ART, help="folder of unpacked npm packs and fonts; filled")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "clip")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent / "qwen3")
    parser.add_argument(
        "--scenes", type=Path, default=Path(__file__).parent / "scenes", help="held-out pairs and checks"
    )
    parser.add_argument("--vendors", nargs="+", default=VENDORS, help="@iconify-json packs")
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument("--minutes", type=float, help="train so long, instead of --steps")
    parser.add_argument("--export_steps", type=int, default=1_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--workers", type=int, default=1, help="processes that make canvases")
    parser.add_argument("--checkpoint", type=Path, help="file to continue from, written at every export")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    pairs = load_held_out_pairs(options.scenes / "held_out_pairs.json")
    entries = load_entries(options.art, options.vendors, HeldOutFilter(pairs))
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    model = build_model(tokenizer).to(choose_device())
    print(f"{len(entries)} concepts, {sum(len(e.sprites) for e in entries)} sprites", flush=True)

    def export(average: CLIPModel, figures: dict[str, float]) -> None:
        figures = figures | {"batch": options.batch, "device": device_name(model.device)}
        save(average, tokenizer, model_card(average, entries, figures, options.vendors), options.output)

    train(model, TextTower(tokenizer), entries, pairs, options, export)


if __name__ == "__main__":
    main()
