"""Pre-train the demo's small CLIP: image-text and region-text contrast on canvases of several vendors' emoji.

    python recipes/demo/pretrain_clip.py --art DIR --output recipes/demo/clip --minutes 80

The region-text loss (as in RegionCLIP, arXiv 2112.09106) asks every patch that shows an object for that object's name,
so that a patch token says what it is part of; the image-text loss is CLIP's own, on the names of a canvas's objects.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from canvases import COLOURS, DEMO_SHARE, GRID, IGNORED, PATCH, SIDE, CanvasBatches, CanvasMaker, Entry, load_entries
from emoji_art import BACKGROUNDS, CONCEPTS, DEFAULT_ART, HeldOutFilter, load_held_out_pairs
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

VENDORS = ["twemoji", "fluent-emoji-flat", "fluent-emoji", "emojione", "fxemoji", "streamline-emojis"]
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
    """Texts -> unit embeddings (n, 192), with the token ids of each text kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._end = tokenizer, tokenizer.convert_tokens_to_ids(END)
        self._ids: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = [*self._tokenizer.encode(text)[: CONTEXT - 1], self._end]
        return self._ids[text]

    def __call__(self, model: CLIPModel, texts: list[str]) -> torch.Tensor:
        """Embed the texts with the model's text tower."""
        rows = [self._encode(t) for t in texts]
        width = max(map(len, rows))
        # Causal attention: what follows the end token cannot reach it, so no mask is needed.
        ids = torch.tensor([r + [self._tokenizer.pad_token_id] * (width - len(r)) for r in rows])
        pooled = model.text_model(input_ids=ids).pooler_output
        return normalize(model.text_projection(pooled).float(), dim=-1)


def embed_pictures(
    model: CLIPModel, pixels: torch.Tensor, tower: Callable | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of pictures (B, 192) and of their patches (B, 64, 192) from uint8 pixels (B, 3, 112, 112).

    ``tower`` stands in for the model's vision tower, for instance its compiled twin.
    """
    values = (pixels.float() / 255 - MEAN[0]) / STD[0]
    out = (tower or model.vision_model)(pixel_values=values)
    patches = model.vision_model.post_layernorm(out.last_hidden_state[:, 1:])
    whole, parts = model.visual_projection(out.pooler_output), model.visual_projection(patches)
    return normalize(whole.float(), dim=-1), normalize(parts.float(), dim=-1)


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

    def __init__(self, entries: list[Entry], seed: int) -> None:
        self._entries, self._random = entries, random.Random(seed)

    def __call__(self, labels: torch.Tensor, grounds: torch.Tensor) -> tuple[torch.Tensor, list[str], list[str]]:
        """Labels (B, 64) into the n texts, the texts, and one text for each picture."""
        present = sorted(set(labels.unique().tolist()) - {IGNORED})
        number = {label: i for i, label in enumerate(present)}
        texts = []
        for label in present:
            if label < 0:
                texts.append(self._ground(IGNORED - 1 - label))
            else:
                names = self._entries[label].texts
                texts.append(self._random.choice(names[:4] if self._random.random() < 0.7 else names))
        table = torch.full((len(self._entries) + len(COLOURS) + 1,), IGNORED)
        for label, i in number.items():
            table[label] = i
        table[IGNORED] = IGNORED
        whole = []
        for row, ground in zip(labels.tolist(), grounds.tolist(), strict=True):
            names = [texts[number[label]].split(",")[0] for label in sorted(set(row)) if label >= 0]
            self._random.shuffle(names)
            whole.append("; ".join(([f"{COLOURS[ground]}"] if ground != IGNORED else []) + names))
        return table[labels], texts, whole

    def _ground(self, colour: int) -> str:
        return self._random.choice((f"{COLOURS[colour]} background", COLOURS[colour]))


@torch.no_grad()
def accuracies(model: CLIPModel, towers: TextTower, batches: list, entries: list[Entry]) -> dict[str, float]:
    """Of plain canvases: shares of patches whose nearest text is right, among the demo's names and among all names."""
    demo = [i for i, e in enumerate(entries) if e.demo]
    every = torch.cat([towers(model, [e.texts[0] for e in entries[i : i + 128]]) for i in range(0, len(entries), 128)])
    colours = towers(model, [f"{c} background" for c in COLOURS])
    right: dict[str, list[torch.Tensor]] = {"patch_64": [], "patch_all": [], "background": []}
    for pixels, labels, _ in batches:
        patches = embed_pictures(model, pixels)[1]
        shown = labels >= 0
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
    patches = embed_pictures(model, pixels)[1].view(-1, GRID, GRID, names.shape[1])
    right = []
    for grid, objects in zip(patches, rows["objects"], strict=True):
        for thing in objects:
            x, y, width, height = thing["box"]
            rows_, columns = [slice(round(a / PATCH), max(round(b / PATCH), round(a / PATCH) + 1)) for a, b in
                              ((y, y + height), (x, x + width))]  # fmt: skip
            scores = grid[rows_, columns].flatten(0, 1).mean(0) @ names.T
            right.append(scores.argmax().item() == number[thing["name"]])
    return float(np.mean(right))


def load_checkpoint(
    path: Path | None, model: CLIPModel, average: CLIPModel, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Put back what an interrupted run saved; its number of steps and minutes, or zeros without a checkpoint."""
    if path is None or not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["minutes"]


def average_gradients(model: CLIPModel, share: float) -> float:
    """Average all processes' gradients in place; returns the first one's ``share`` of the time, so all stop at once."""
    if not dist.is_initialized():
        return share
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([share if dist.get_rank() == 0 else 0.0])])
    dist.all_reduce(flat)
    size = dist.get_world_size()
    for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient) / size)
    return float(flat[-1])


def train(
    model: CLIPModel, towers: TextTower, entries: list[Entry], pairs: set[frozenset[str]], options: argparse.Namespace,
    export: Callable[[CLIPModel, dict], None],
) -> None:  # fmt: skip
    """Train for ``options.minutes``, a cosine schedule over the elapsed time; ``export`` an average of the weights."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    plain = iter(CanvasBatches(CanvasMaker(entries, pairs, options.seed + 99, augment=False), 64))
    threads = torch.get_num_threads()
    checks = [next(plain) for _ in range(8)]
    torch.set_num_threads(threads)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    average, batcher = copy.deepcopy(model).requires_grad_(False), Batcher(entries, options.seed + rank)
    tower = torch.compile(model.vision_model, dynamic=False) if options.compile else None
    first, before = load_checkpoint(options.checkpoint, model, average, optimizer)
    # Each process draws its own canvases, and a continued run others than those it has seen.
    seed = 1000 * (options.seed + 1) + first * size + options.pictures_before + rank
    loader = torch.utils.data.DataLoader(
        CanvasBatches(CanvasMaker(entries, pairs, seed), options.batch), batch_size=None, num_workers=1,
        prefetch_factor=8,
    )  # fmt: skip
    start, share, next_export = time.monotonic(), before / options.minutes, before + options.export_minutes
    running: dict[str, float] = {}
    for step, (pixels, labels, grounds) in enumerate(loader, start=first):
        warm = min(1.0, (step + 1) / 300)
        rate = options.rate * warm * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        wanted, texts, whole_texts = batcher(labels, grounds)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            whole, patches = embed_pictures(model, pixels, tower)
            names, sentences = towers(model, texts), towers(model, whole_texts)
        scale = model.logit_scale.exp()
        region = region_loss(patches, wanted, names, scale)
        logits, target = scale * whole @ sentences.T, torch.arange(len(whole))
        image_text = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        (region + 0.2 * image_text).backward()
        share = average_gradients(model, (before + (time.monotonic() - start) / 60) / options.minutes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(60)))
            # Early averages must forget the random start.
            keep = min(0.998, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        pictures = (step + 1) * options.batch * size
        elapsed = before + (time.monotonic() - start) / 60
        for key, value in (("region", region.item()), ("image_text", image_text.item())):
            running[key] = value if key not in running else 0.98 * running[key] + 0.02 * value
        if step % 100 == 99 and rank == 0:
            losses = " ".join(f"{k} {v:.3f}" for k, v in running.items())
            speed = f"{pictures / elapsed / 60:.0f}/s"
            print(f"step {step + 1} {losses} lr {rate:.1e} {speed} {share:.0%}", flush=True)
        if (share >= 1.0 or elapsed >= next_export) and rank == 0:
            next_export = elapsed + options.export_minutes
            average.eval()
            figures = {"pictures": pictures, "minutes": elapsed, "planned_minutes": options.minutes}
            figures |= accuracies(average, towers, checks, entries)
            for split in ("test", "test_pairs"):
                figures[f"objects_{split}"] = scene_accuracy(average, towers, options.scenes, split)
            print(json.dumps({k: round(v, 3) for k, v in figures.items()}), flush=True)
            export(average, figures)
            if options.checkpoint:
                parts = {"model": model, "average": average, "optimizer": optimizer}
                state = {k: v.state_dict() for k, v in parts.items()} | {"step": step + 1, "minutes": elapsed}
                torch.save(state, options.checkpoint)
        if share >= 1.0:
            return


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


def model_card(model: CLIPModel, entries: list[Entry], figures: dict[str, float], vendors: list[str]) -> str:
    """The model card, with measured figures only."""
    vision = sum(p.numel() for p in model.vision_model.parameters())
    every = sum(p.numel() for p in model.parameters())
    unfinished = figures["minutes"] < figures["planned_minutes"]
    note = f" (an export before the end of the planned {figures['planned_minutes']:.0f} minutes)" if unfinished else ""
    ran_before = figures["pictures_before"]
    earlier = (
        f", {ran_before:,} of the canvases in an earlier run of {figures['minutes_before']:.0f} minutes"
        if ran_before
        else ""
    )
    return f"""---
license: other
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# The demo's small CLIP

A `CLIPModel` of {every:,} parameters, {vision:,} of them in the vision tower (6 layers, hidden 192, {SIDE}x{SIDE}
pixels, {GRID * GRID} patches of {PATCH}x{PATCH}). It exists so that the demo of `vlm_peft` runs without a network.

Made by `recipes/demo/pretrain_clip.py` from random weights: {figures["pictures"]:,} canvases in
{figures["minutes"]:.0f} minutes on two CPU cores{note}{earlier}.
A canvas shows 1 to 5 of {len(entries):,} emoji concepts, {DEMO_SHARE:.0%} of them from the demo's {len(CONCEPTS)}, on
backgrounds of {len(BACKGROUNDS)} named and of other colours. The art is drawn by
{", ".join(vendors)}
and restyled at random (colour, light, outline, blur, rotation, size). Two contrastive losses: image-text (the names of
a canvas) and region-text (each covered patch of the last hidden state, after `post_layernorm` and `visual_projection`,
against the CLDR name or keywords of what it shows; plain patches against the name of their colour).
Held out: all art of the vendor of `test_style`; no canvas holds a pair of objects of `scenes/held_out_pairs.json`.

| measured on pictures not trained on | |
|---|---|
| patches of fresh canvases (same vendors), nearest name among the demo's {len(CONCEPTS)} | {figures["patch_64"]:.3f} |
| likewise among all {len(entries):,} names | {figures["patch_all"]:.3f} |
| background patches, nearest name among {len(BACKGROUNDS)} colours | {figures["background"]:.3f} |
| objects of `test` (mean over the box), nearest name among {len(CONCEPTS)} | {figures["objects_test"]:.3f} |
| objects of `test_pairs`, likewise | {figures["objects_test_pairs"]:.3f} |

Texts end with `{END}`, which is what the text tower pools; at most {CONTEXT} tokens.
Sources and licences of the art: see `../NOTICE.md`.
"""


def run(rank: int, options: argparse.Namespace) -> None:
    """Train in one of the processes; the first one writes the folder, at intervals and at the end."""
    if options.processes > 1:
        # On few cores, one thread in each of several processes loses less than several threads in one.
        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{options.port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=options.processes)
    torch.manual_seed(options.seed)
    pairs = load_held_out_pairs(options.scenes / "held_out_pairs.json")
    entries = load_entries(options.art, options.vendors, HeldOutFilter(pairs))
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    model = build_model(tokenizer)
    if options.start_from is not None:
        model.load_state_dict(CLIPModel.from_pretrained(options.start_from, dtype=torch.float32).state_dict())
    print(f"{len(entries)} concepts, {sum(len(e.sprites) for e in entries)} sprites", flush=True)

    def export(average: CLIPModel, figures: dict[str, float]) -> None:
        figures |= {"pictures": figures["pictures"] + options.pictures_before}
        figures |= {"minutes": figures["minutes"] + options.minutes_before}
        figures |= {"planned_minutes": figures["planned_minutes"] + options.minutes_before}
        figures |= {"pictures_before": options.pictures_before, "minutes_before": options.minutes_before}
        save(average, tokenizer, model_card(average, entries, figures, options.vendors), options.output)

    train(model, TextTower(tokenizer), entries, pairs, options, export)


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--art", type=Path, default=DEFAULT_ART, help="folder of unpacked npm packs; filled")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "clip")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent / "qwen3")
    parser.add_argument(
        "--scenes", type=Path, default=Path(__file__).parent / "scenes", help="held-out pairs and checks"
    )
    parser.add_argument("--vendors", nargs="+", default=VENDORS, help="@iconify-json packs")
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--export_minutes", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--compile", action="store_true", help="compile the vision tower (needs a C++ compiler)")
    parser.add_argument("--checkpoint", type=Path, help="file to continue from, written at every export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="each takes one core and its own canvases")
    parser.add_argument("--port", type=int, default=29511, help="on this machine, for the processes to meet")
    parser.add_argument("--start_from", type=Path, help="folder of an earlier export to go on from")
    parser.add_argument("--pictures_before", type=int, default=0, help="canvases seen up to that export")
    parser.add_argument("--minutes_before", type=float, default=0.0, help="minutes up to that export")
    options = parser.parse_args()
    if options.processes == 1:
        run(0, options)
    else:
        torch.multiprocessing.spawn(run, args=(options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
